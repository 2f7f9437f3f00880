"""How Triton kernels round float32 to bf16: to nearest, ties to even, by integer arithmetic.

A GPU's own conversion gives the same bits; Triton's interpreter truncates instead. Import only where Triton is.
"""

import triton
import triton.language as tl


@triton.jit
def round_to_bf16(x):
    """float32 -> bf16. NaN stays NaN, infinity stays infinity."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = tl.where(is_nan, bits | 0x400000, rounded) & -65536
    return rounded.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 -> `dtype`, which is float32 or bf16."""
    if dtype == tl.bfloat16:
        result = round_to_bf16(x)
    else:
        result = x.to(dtype)
    return result
