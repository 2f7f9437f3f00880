"""Kernels of Anderson's acceleration against their reference; run by test_anderson.py in the interpreter, by hand on a
GPU.

python tests/ops/anderson_kernels.py            everything
python tests/ops/anderson_kernels.py --break    one kernel goes on from the wrong iteration: must fail
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from interpreter import assert_same

from revffn.ops.anderson import kernels, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT, REAL = 60, 2**20
"""Largest steps: small ones have products with one sum, whatever its order; those of a run have not."""


def compare(shape: tuple[int, ...], dtype: torch.dtype, m: int, size: int) -> None:
    def stream(most: int) -> torch.Tensor:
        return torch.randint(-most, most, shape, dtype=torch.int32).to(DEVICE)

    update, x = torch.randn(shape).to(dtype).to(DEVICE), stream(2**24)
    scale = torch.full(shape[-1:], size / 8, device=DEVICE)
    y, steps, values = x + stream(size), [stream(size).float() for _ in range(m)], [stream(2**24) for _ in range(m)]
    what = f"{shape} {dtype} m={m} {size}"
    *found, products = kernels.anderson_move(update, x, y, scale, steps)
    *expected, wanted = reference.anderson_move(update, x, y, scale, steps)
    assert_same(tuple(found), tuple(expected), f"anderson_move {what}")
    if size == EXACT:
        assert_same(products, wanted, f"products {what}")
    largest = wanted.diagonal(dim1=-2, dim2=-1).sqrt()
    limit = shape[-1] * torch.finfo(torch.float32).eps * largest[..., None] * largest[..., None, :]
    assert ((products - wanted).abs() <= limit).all(), f"products {what}"
    settled = torch.rand(shape[:-1]).to(DEVICE) < 0.3
    for given in (wanted, torch.zeros_like(wanted), torch.full_like(wanted, float("nan"))):
        pair = (kind.anderson_combine(expected[0], given, settled, values) for kind in (kernels, reference))
        assert_same(*pair, f"anderson_combine {what}")


if __name__ == "__main__":
    torch.manual_seed(0)
    if "--break" in sys.argv:
        right = kernels.anderson_combine
        kernels.anderson_combine = lambda following, products, settled, values: right(
            following, products, settled, values[::-1]
        )
    for shape, dtype in (((1, 1, 16), torch.float32), ((2, 5, 48), torch.bfloat16), ((1, 3, 1440), torch.bfloat16)):
        for m in range(reference.DEPTH + 1):
            for size in (EXACT, REAL):
                compare(shape, dtype, m, size)
    print("all equal")
