"""Kernels of the dense parts against their reference; run by test_dense.py in the interpreter, by hand on a GPU.

python tests/ops/dense_kernels.py            rotary embedding and norms bit for bit, SwiGLU but for the last bit
python tests/ops/dense_kernels.py --break    one kernel turns the wrong way: must fail
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from interpreter import assert_same

from revffn.ops.dense import kernels, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def compare_rope(B: int, H: int, T: int, D: int, dtype: torch.dtype) -> None:
    x = numbers(B, T, H, D, dtype=dtype).transpose(1, 2)
    for batch, back in ((1, False), (B, True)):
        cos, sin = numbers(batch, T, D, dtype=dtype), numbers(batch, T, D, dtype=dtype)
        found, expected = (module.rope(x, cos, sin, back) for module in (kernels, reference))
        assert found.stride() == expected.stride()
        assert_same(found, expected, f"rope {(B, H, T, D)} {dtype} back={back}")


def compare_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad, weight = numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype), numbers(shape[-1], dtype=dtype)
    for rounds_first in (True, False):
        both = [module.norm(x, weight, 1e-6, rounds_first) for module in (kernels, reference)]
        assert_same(*both, f"norm {shape} {dtype}")
        given = (grad, x, weight, both[1][1], rounds_first, rounds_first)
        found, expected = (module.norm_backward(*given) for module in (kernels, reference))
        assert_same(found, expected, f"norm_backward {shape} {dtype}")


def compare_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up, grad = (numbers(*shape, dtype=dtype) for _ in range(3))
    limit = dict(rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(kernels.swiglu(gate, up), reference.swiglu(gate, up), **limit)
    found, expected = (module.swiglu_backward(grad, gate, up) for module in (kernels, reference))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **limit)


if __name__ == "__main__":
    torch.manual_seed(0)
    if "--break" in sys.argv:
        right = kernels.rope
        kernels.rope = lambda x, cos, sin, back: right(x, cos, sin, not back)
    kernels.FLAT = 64  # several programs and a ragged last one, several groups of heads
    for dtype in (torch.bfloat16, torch.float32):
        compare_rope(2, 3, 3, 24, dtype)
        compare_norm((1, 19, 2, 24), dtype)
        compare_norm((1, 19, 600), dtype)  # more channels than a tile of rows may have
        compare_swiglu((3, 50), dtype)
    print("all equal")
