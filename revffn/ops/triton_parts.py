"""Small Triton functions that several kernels share. Imported by kernels only.

Triton's interpreter truncates float32 to bf16 where a GPU rounds, so kernels round with integers; and the order of
`tl.sum` is the compiler's, so sums whose bits count are made as a tree of adjacent pairs, which PyTorch can repeat.
"""

import triton
import triton.language as tl


@triton.jit
def bf16_bits(x):
    """float32 -> the bits of bf16 in the upper half of int32, to nearest even, and anything in the lower half. NaN
    stays NaN, infinity stays infinity."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x400000, rounded)


@triton.jit
def round_to_bf16(x):
    """float32 -> bf16, as `bf16_bits` says."""
    return (bf16_bits(x) & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def split_24(x):
    """float32 -> its first 16 bits as int16 and the next 8 as uint8, rounded to nearest even. NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = bits + 0x7F + ((bits >> 8) & 1)
    rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x400000, rounded)
    return (rounded >> 16).to(tl.int16), ((rounded >> 8) & 0xFF).to(tl.uint8)


@triton.jit
def join_24(high, low):
    """What `split_24` has split."""
    return ((high.to(tl.int32) << 16) | (low.to(tl.int32) << 8)).to(tl.float32, bitcast=True)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 -> `dtype`, which is float32 or bf16."""
    if dtype == tl.bfloat16:
        result = round_to_bf16(x)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def to_int(x):
    """Round half to even, to int32."""
    floor = tl.floor(x)
    rest = x - floor
    low = floor.to(tl.int32)
    up = (rest > 0.5) | ((rest == 0.5) & ((low & 1) == 1))
    return low + up.to(tl.int32)


@triton.jit
def not_finite(x):
    return ((x.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000).to(tl.int32)


@triton.jit
def pair_sums(x, ROWS: tl.constexpr, LANES: tl.constexpr):
    """(ROWS, LANES) -> (ROWS,): neighbours are added, then neighbouring sums, and so on; LANES is a power of two.

    A sum of two has one order. `tl.split` would do, but where it follows some loads Triton 3.6 lets every thread hold
    a whole row.
    """
    for i in tl.static_range(16):
        if (LANES >> i) > 1:
            x = tl.sum(tl.reshape(x, (ROWS, LANES >> (i + 1), 2)), 2)
    return tl.reshape(x, (ROWS,))


@triton.jit
def row_sum(x, LANES: tl.constexpr):
    """`pair_sums` of one row (LANES,): a scalar."""
    return tl.sum(pair_sums(tl.reshape(x, (1, LANES)), 1, LANES), 0)
