"""Operations on streams: kernels equal the reference bit for bit; fake tensors see shapes and dtypes of the results.

Run: pytest tests/ops/test_streams.py
"""

import pytest
import torch
from interpreter import interpret, needs_triton, on_gpu
from torch._subclasses.fake_tensor import FakeTensorMode

from revffn.ops import streams
from revffn.ops.streams import reference


@needs_triton
def test_kernels_equal_the_reference():
    done = interpret("stream_kernels.py")
    assert done.returncode == 0 and "all equal" in done.stdout, done.stdout + done.stderr


@pytest.mark.gpu
def test_kernels_equal_the_reference_on_a_gpu():
    done = on_gpu("stream_kernels.py")
    assert done.returncode == 0 and "all equal" in done.stdout, done.stdout + done.stderr


@needs_triton
def test_the_comparison_fails_where_a_kernel_is_wrong():
    done = interpret("stream_kernels.py", "--break")
    assert done.returncode == 1 and "add_update" in done.stderr and "elements differ" in done.stderr


@pytest.mark.gpu
def test_rows_beyond_two_billion_elements():
    """Offsets do not overflow 32 bits: the last tokens of a stream of 2.2 billion elements."""
    T, D, last = 1_080_000, 2048, slice(-3, None)
    now = torch.randint(-(2**20), 2**20, (1, T, D), dtype=torch.int32, device="cuda")
    update = torch.randn(1, T, D, dtype=torch.bfloat16, device="cuda")
    scale, finer = torch.full((D,), 2.0**12, device="cuda"), torch.ones(D, dtype=torch.int32, device="cuda")
    flags = torch.zeros(2, dtype=torch.int32, device="cuda")
    found = streams.add_update(update, now, scale, finer, flags)[:, last]
    assert torch.equal(found, reference.add_update(update[:, last], now[:, last], scale, finer, flags))
    weight = torch.ones(D, dtype=torch.bfloat16, device="cuda")
    normed = streams.read_norm(now, 1 / scale, weight, 1e-6, torch.bfloat16, True, False)[1][:, last]
    expected = reference.read_norm(now[:, last], 1 / scale, weight, 1e-6, torch.bfloat16, True, False)[1]
    assert torch.equal(normed, expected)


def arguments() -> dict[str, tuple]:
    shape, dtype = (2, 5, 16), torch.bfloat16

    def stream() -> torch.Tensor:
        return torch.randint(-(2**20), 2**20, shape, dtype=torch.int32)

    def numbers(dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype)

    scale, finer, flags = torch.full((16,), 2.0**12), torch.ones(16, dtype=torch.int32), torch.zeros(2).int()
    moved = (stream(), stream(), stream(), numbers(), numbers(), None, scale, scale, finer, 2, 0)
    bits = reference.innovation_move(*moved, flags)[0]
    wide, rstd, weight = torch.float32, torch.rand(2, 5), torch.ones(16, dtype=dtype)
    undone = (numbers(), numbers(), None, bits, scale, scale, finer, 2, 0)
    return {
        "check": (stream(), flags),
        "add_update": (numbers(), stream(), scale, finer, flags),
        "move": (*moved, flags),
        "undo": (stream(), stream(), stream(), stream(), *undone),
        "gradients": (numbers(wide), numbers(wide), 1 / scale, dtype, True),
        "read_norm": (stream(), 1 / scale, weight, 1e-6, dtype, True, True),
        "read_norm_backward": (numbers(), None, numbers(wide), None, stream(), 1 / scale, weight, rstd, True, True),
    }


@pytest.mark.parametrize("name", arguments())
def test_fake_tensors_have_the_results_shapes(name):
    given, operation = arguments()[name], getattr(streams, name)
    real = operation(*given)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = operation(*[mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in given])
    for a, b in zip(*(x if isinstance(x, (tuple, list)) else (x,) for x in (real, fake)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_norm_is_llamas(dtype):
    """Value and gradients, against autograd in float64."""
    D, wide = 48, torch.promote_types(dtype, torch.float32)
    stream, step = torch.randint(-(2**16), 2**16, (2, 7, D), dtype=torch.int32), torch.full((D,), 2.0**-12)
    weight = torch.rand(D, dtype=dtype) + 0.5
    value, normed, rstd = streams.read_norm(stream, step, weight, 1e-6, dtype, True, True)
    x, exact_weight = value.double().clone().requires_grad_(), weight.double().clone().requires_grad_()
    exact = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * exact_weight
    limit = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(normed.double(), exact.detach(), rtol=limit, atol=limit)
    grad, through, also = torch.randn_like(normed), *torch.randn(2, 2, 7, D, dtype=wide)
    found = streams.read_norm_backward(grad, value, through, also, stream, step, weight, rstd, True, True)
    expected = torch.autograd.grad(exact, (x, exact_weight), grad.double())
    expected = expected[0] + value.double() + through.double() + also.double(), expected[1]
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=limit, atol=limit * truth.abs().max().item())
    assert found[0].dtype == wide and found[1].dtype == dtype


def test_a_checksum_is_the_sum_of_its_parts():
    stream = torch.randint(-(2**30), 2**30, (1, 9, 16), dtype=torch.int32)
    parts = reference.checksum(stream[:, :4]), reference.checksum(stream[:, 4:], first_row=4)
    assert parts[0] + parts[1] == reference.checksum(stream)
