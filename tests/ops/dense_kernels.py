"""Kernels of the dense parts against their reference; run by test_dense.py in the interpreter, by hand on a GPU.

python tests/ops/dense_kernels.py            bit for bit, SwiGLU and a shared expert's gate but for the last
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
    q, k = numbers(B, T, H, D, dtype=dtype).transpose(1, 2), numbers(B, 2, T, D, dtype=dtype)
    for batch, back in ((1, False), (B, True)):
        cos, sin = numbers(batch, T, D, dtype=dtype), numbers(batch, T, D, dtype=dtype)
        found, expected = (module.rope(q, k, cos, sin, back) for module in (kernels, reference))
        assert [x.stride() for x in found] == [x.stride() for x in expected]
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
    given = [numbers(*shape, dtype=dtype) for _ in range(3)]
    limit = dict(rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(kernels.swiglu(*given[1:]), reference.swiglu(*given[1:]), **limit)
    found, expected = ([x.clone() for x in given] for _ in range(2))
    kernels.swiglu_backward(*found)
    reference.swiglu_backward(*expected)
    torch.testing.assert_close(found, expected, **limit)


def compare_add_gated(N: int, D: int, dtype: torch.dtype) -> None:
    routed, shared, x, grad = (numbers(N, D, dtype=dtype) for _ in range(4))
    weight = numbers(1, D, dtype=dtype) * D**-0.5
    limit = dict(rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    found, expected = (module.add_gated(routed, shared, x, weight) for module in (kernels, reference))
    torch.testing.assert_close(found, expected, **limit)
    given = grad, shared, weight, expected[1]
    found, expected = (module.add_gated_backward(*given) for module in (kernels, reference))
    assert_same(found, expected, f"add_gated_backward {(N, D)} {dtype}")


if __name__ == "__main__":
    torch.manual_seed(0)
    if "--break" in sys.argv:
        right = kernels.rope
        kernels.rope = lambda q, k, cos, sin, back: right(q, k, cos, sin, not back)
    kernels.FLAT = 64  # several programs and a ragged last one, several groups of heads
    for dtype in (torch.bfloat16, torch.float32):
        compare_rope(2, 3, 3, 24, dtype)
        compare_norm((1, 19, 2, 24), dtype)
        compare_norm((1, 19, 600), dtype)  # more channels than a tile of rows may have
        compare_swiglu((3, 50), dtype)
        compare_add_gated(19, 24, dtype)
        compare_add_gated(3, 5000, dtype)
    print("all equal")
