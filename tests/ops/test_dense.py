"""Rotary embedding, SwiGLU and RMSNorm of queries and keys: the models' own functions, and kernels like the reference.

Run: pytest tests/ops/test_dense.py
"""

import pytest
import torch
from interpreter import interpret, needs_triton, on_gpu
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from revffn.ops import dense

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])


@needs_triton
def test_kernels_equal_the_reference():
    done = interpret("dense_kernels.py")
    assert done.returncode == 0 and "all equal" in done.stdout, done.stdout + done.stderr


@pytest.mark.gpu
def test_kernels_equal_the_reference_on_a_gpu():
    done = on_gpu("dense_kernels.py")
    assert done.returncode == 0 and "all equal" in done.stdout, done.stdout + done.stderr


@needs_triton
def test_the_comparison_fails_where_a_kernel_is_wrong():
    done = interpret("dense_kernels.py", "--break")
    assert done.returncode == 1 and "elements differ" in done.stderr


def check(ours, exact, inputs: list[torch.Tensor]) -> None:
    """Values and gradients of `ours` in the inputs' dtype against `exact` in float64."""
    dtype = inputs[0].dtype
    limit = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6  # LlamaRMSNorm is float32 inside
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found, truth = ours(*inputs), exact(*wide)
    found, truth = ((x,) if isinstance(x, torch.Tensor) else x for x in (found, truth))
    grads = [torch.randn_like(x) for x in found]
    ours_grads = torch.autograd.grad(found, inputs, grads)
    true_grads = torch.autograd.grad(truth, wide, [g.double() for g in grads])
    for a, b in zip((*found, *ours_grads), (*truth, *true_grads), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=limit, atol=limit * b.abs().max().item())


@DTYPES
def test_rotate_is_llamas(dtype):
    q, k = (torch.randn(2, 5, heads, 8, dtype=dtype).transpose(1, 2).requires_grad_() for heads in (4, 2))
    cos, sin = torch.randn(1, 5, 8, dtype=dtype), torch.randn(1, 5, 8, dtype=dtype)
    check(
        lambda q, k: dense.rotate(q, k, cos, sin),
        lambda q, k: apply_rotary_pos_emb(q, k, cos.double(), sin.double()),
        [q, k],
    )


@DTYPES
def test_gated_mlp(dtype):
    shapes = (2, 3, 8), (12, 8), (12, 8), (8, 12)
    inputs = [torch.randn(shape, dtype=dtype).mul_(0.5).requires_grad_() for shape in shapes]
    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu

    def exact(x, gate, up, down):
        return linear(silu(linear(x, gate)) * linear(x, up), down)

    # The product's inputs are rounded too: a few units of the largest value.
    check(dense.gated_mlp, exact, inputs)


def test_of_gated_mlp_only_what_trains_has_a_gradient():
    x, gate, up, down = (torch.randn(shape) for shape in ((3, 8), (12, 8), (12, 8), (8, 12)))
    for trained in (x, gate, up, down):
        trained.requires_grad_()
        (grad,) = torch.autograd.grad(dense.gated_mlp(x, gate, up, down).sum(), [trained])
        assert grad.shape == trained.shape
        trained.requires_grad_(False)


@DTYPES
def test_add_gated(dtype):
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((9, 24), (9, 24), (9, 24), (1, 24))]

    def exact(routed, shared, x, weight):
        return routed + torch.sigmoid(torch.nn.functional.linear(x, weight)) * shared

    check(dense.add_gated, exact, inputs)


@DTYPES
@pytest.mark.parametrize("D", [24, 600])
def test_rms_norm_is_llamas(dtype, D):
    x, weight = torch.randn(2, 9, 3, D, dtype=dtype), torch.rand(D, dtype=dtype) + 0.5

    def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        module = LlamaRMSNorm(D, 1e-6).double()
        del module._parameters["weight"]
        module.weight = weight
        return module(x)

    check(lambda x, w: dense.rms_norm(x, w, 1e-6, True), exact, [x.requires_grad_(), weight.requires_grad_()])
