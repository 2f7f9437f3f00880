"""A layer's dense parts in one operation each: rotary embedding, SwiGLU, RMSNorm.

    rotate(q, k, cos, sin)            both turned; keeps only the tables for backward
    silu_mul(gate, up)                silu(gate) * up
    rms_norm(x, weight, eps, rounds_first)

All differentiate; `reference.py` defines them, `kernels.py` makes each one launch (`rotate` two).
"""

# B = batch, T = tokens, H = heads, D = a head's width

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..dispatch import kernel_of, probe_of, register
from . import reference

__all__ = ["rms_norm", "rotate", "silu_mul"]

MOST_CHANNELS = 16384
"""A program of a norm holds a whole row."""
FLOATS = (torch.bfloat16, torch.float32)


def _fits(*tensors: Tensor) -> bool:
    return all(t.dtype in FLOATS and t.is_contiguous() for t in tensors)


def _turns(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> bool:
    return x.dtype in FLOATS and x.stride(-1) == 1 and x.shape[-1] % 2 == 0 and _fits(cos, sin)


_rope = register(
    "dense_rope(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor",
    reference.rope,
    lambda x, cos, sin, back: torch.empty_like(x),
    kernel_of(__name__, "rope"),
    _turns,
    probe=probe_of(__name__, "rope"),
)
_swiglu = register(
    "dense_swiglu(Tensor gate, Tensor up) -> Tensor",
    reference.swiglu,
    lambda gate, up: torch.empty_like(gate),
    kernel_of(__name__, "swiglu"),
    _fits,
    probe=probe_of(__name__, "swiglu"),
    exact=False,
)
_swiglu_backward = register(
    "dense_swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    reference.swiglu_backward,
    lambda grad, gate, up: (torch.empty_like(gate), torch.empty_like(up)),
    kernel_of(__name__, "swiglu_backward"),
    _fits,
    probe=probe_of(__name__, "swiglu_backward"),
    exact=False,
)
_norm = register(
    "dense_norm(Tensor x, Tensor weight, float eps, bool rounds_first) -> (Tensor, Tensor)",
    reference.norm,
    lambda x, weight, eps, rounds_first: (
        torch.empty_like(x),
        x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32)),
    ),
    kernel_of(__name__, "norm"),
    lambda x, weight, eps, rounds_first: _fits(x, weight) and x.shape[-1] <= MOST_CHANNELS,
    probe=probe_of(__name__, "norm"),
)
_norm_backward = register(
    "dense_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, bool rounds_first, bool need_weight) "
    "-> (Tensor, Tensor)",
    reference.norm_backward,
    lambda grad, x, weight, rstd, rounds_first, need_weight: (
        torch.empty_like(x),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
    ),
    kernel_of(__name__, "norm_backward"),
    lambda grad, x, weight, rstd, rounds_first, need_weight: _fits(grad, x, weight) and x.shape[-1] <= MOST_CHANNELS,
    probe=probe_of(__name__, "norm_backward"),
)


class _Rotate(Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor):
        ctx.save_for_backward(cos, sin)
        return _rope(q, cos, sin, False), _rope(k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q: Tensor, grad_k: Tensor):
        cos, sin = ctx.saved_tensors
        return _rope(grad_q, cos, sin, True), _rope(grad_k, cos, sin, True), None, None


class _SiluMul(Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor):
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return tuple(_swiglu_backward(grad.contiguous(), *ctx.saved_tensors))


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, rounds_first: bool):
        normed, rstd = _norm(x, weight, eps, rounds_first)
        ctx.save_for_backward(x, weight, rstd)
        ctx.rounds_first = rounds_first
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        need = ctx.needs_input_grad[1]
        dx, dw = _norm_backward(grad.contiguous(), *ctx.saved_tensors, ctx.rounds_first, need)
        return dx, dw if need else None, None, None


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864) with halves, as Llama has it.

    Args:
        q, k: (B, H, T, D), any strides whose last is 1; k may have fewer heads.
        cos, sin: (B or 1, T, D); no gradient is made for them.

    Returns:
        x * cos + rotate_half(x) * sin for both, rounded once.
    """
    return _Rotate.apply(q, k, cos, sin)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of one shape and dtype, rounded once (GLU variants, https://arxiv.org/abs/2002.05202)."""
    return _SiluMul.apply(gate, up)


def rms_norm(x: Tensor, weight: Tensor, eps: float, rounds_first: bool) -> Tensor:
    """RMSNorm (https://arxiv.org/abs/1910.07467) over the last dimension.

    Args:
        x: (..., D). weight: (D,). eps: Added to the mean square.
        rounds_first: The normalised value is rounded to x's dtype before it is multiplied by `weight`.
    """
    return _RMSNorm.apply(x, weight, eps, rounds_first)
