"""Small Triton functions that several kernels share. Imported by kernels only.

Triton's interpreter truncates float32 to bf16 where a GPU rounds, so kernels round with integers; and the order of
`tl.sum` is the compiler's, so sums whose bits count are made as a tree of adjacent pairs, which PyTorch can repeat.
"""

import triton
import triton.language as tl


@triton.jit
def round_to_bf16(x):
    """float32 -> float32 that bf16 holds, to nearest even; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    rounded = tl.where(x == x, rounded, 0x7FC00000)
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def round_to(x, KIND: tl.constexpr):
    """float32 rounded to what `KIND`, tl.bfloat16 or tl.float32, holds, as float32."""
    if KIND == tl.bfloat16:
        return round_to_bf16(x)
    else:
        return x


@triton.jit
def tree_sum(x, LOG: tl.constexpr):
    """Sum of 2**LOG elements (N,): neighbours are added, then neighbouring sums, and so on."""
    for _ in tl.static_range(LOG):
        x = tl.reshape(x, (x.shape[0] // 2, 2))
        even, odd = tl.split(x)
        x = even + odd
    return tl.sum(x, 0)
