"""Anderson's acceleration: kernels equal the reference, weights are those of the least squares, fake tensors see the
results' shapes.

Run: pytest tests/ops/test_anderson.py
"""

import pytest
import torch
from interpreter import interpret, needs_triton, on_gpu
from torch._subclasses.fake_tensor import FakeTensorMode

from revffn.ops import anderson
from revffn.ops.anderson.reference import anderson_move, weights_of


@needs_triton
def test_kernels_equal_the_reference():
    done = interpret("anderson_kernels.py")
    assert done.returncode == 0 and "all equal" in done.stdout, done.stdout + done.stderr


@pytest.mark.gpu
def test_kernels_equal_the_reference_on_a_gpu():
    done = on_gpu("anderson_kernels.py")
    assert done.returncode == 0 and "all equal" in done.stdout, done.stdout + done.stderr


@needs_triton
def test_the_comparison_fails_where_a_kernel_is_wrong():
    done = interpret("anderson_kernels.py", "--break")
    assert done.returncode == 1 and "anderson_combine" in done.stderr and "elements differ" in done.stderr


def moved(m: int, H: int = 24) -> tuple:
    def stream(most: int) -> torch.Tensor:
        return torch.randint(-most, most, (2, 7, H), dtype=torch.int32)

    x = stream(2**20)
    steps = [stream(2**14).float() for _ in range(m)]
    return torch.randn(2, 7, H, dtype=torch.bfloat16), x, x + stream(2**14), torch.full((H,), 2.0**10), steps


@pytest.mark.parametrize("m", range(anderson.DEPTH + 1))
def test_weights_are_the_least_squares(m):
    *_, step, _, products = anderson_move(*(given := moved(m)))
    if not m:
        assert weights_of(products) == []
        return
    differences = torch.stack([step - past for past in given[-1]], -1).double()
    expected = torch.linalg.lstsq(differences, step.double()[..., None]).solution[..., 0]
    torch.testing.assert_close(torch.stack(weights_of(products), -1).double(), expected, rtol=1e-3, atol=1e-4)


def test_a_step_that_was_made_twice_weighs_once():
    """The products are singular then; the weights stay finite, and what they combine is as near as with one."""
    update, x, y, scale, (past,) = moved(1)
    _, step, _, once = anderson_move(update, x, y, scale, [past])
    *_, twice = anderson_move(update, x, y, scale, [past, past])
    (single,), pair = weights_of(once), weights_of(twice)
    assert all(w.isfinite().all() for w in pair)
    torch.testing.assert_close(sum(pair), single, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("m", [0, 3])
def test_fake_tensors_have_the_results_shapes(m):
    given = moved(m)
    following, _, largest, products = real = anderson.move(*given)
    values = [torch.randint_like(following, 9) for _ in range(m)]
    real = (*real, anderson.combine(following, products, largest < 3, values))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:

        def fake(value):
            return [mode.from_tensor(v) for v in value] if isinstance(value, list) else mode.from_tensor(value)

        found = anderson.move(*map(fake, given))
        found = (*found, anderson.combine(found[0], found[3], found[2] < 3, fake(values)))
    for a, b in zip(real, found, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
