"""A layer's dense parts, what is around their products in one operation each: rotary embedding, gated feed-forward,
a shared expert's gate, RMSNorm.

    rotate(q, k, cos, sin)            both turned; keeps only the tables for backward
    gated_mlp(x, gate_weight, up_weight, down_weight)
    add_gated(routed, shared, x, weight)
    rms_norm(x, weight, eps, rounds_first)

All differentiate; `reference.py` defines them, `kernels.py` makes each one launch.
"""

# B = batch, T = tokens, N = B * T, H = heads, D = hidden size or a head's width, I = a feed-forward's width

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..dispatch import kernel_of, probe_of, register
from . import reference

__all__ = ["add_gated", "gated_mlp", "rms_norm", "rotate"]

MOST_CHANNELS = 16384
"""A program of a norm holds a whole row."""
FLOATS = (torch.bfloat16, torch.float32)


def _fits(*tensors: Tensor) -> bool:
    return all(t.dtype in FLOATS and t.is_contiguous() for t in tensors)


def _wide(like: Tensor, shape: torch.Size) -> Tensor:
    return like.new_empty(shape, dtype=torch.promote_types(like.dtype, torch.float32))


def _turns(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> bool:
    return q.dtype in FLOATS and q.stride(-1) == k.stride(-1) == 1 and q.shape[-1] % 2 == 0 and _fits(cos, sin)


_rope = register(
    "dense_rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool back) -> (Tensor, Tensor)",
    reference.rope,
    lambda q, k, cos, sin, back: (torch.empty_like(q), torch.empty_like(k)),
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
    "dense_swiglu_backward(Tensor(a!) grad, Tensor(b!) gate, Tensor(c!) up) -> ()",
    reference.swiglu_backward,
    lambda *_: None,
    kernel_of(__name__, "swiglu_backward"),
    _fits,
    probe=probe_of(__name__, "swiglu_backward"),
    exact=False,
)
_add_gated = register(
    "dense_add_gated(Tensor routed, Tensor shared, Tensor x, Tensor weight) -> (Tensor, Tensor)",
    reference.add_gated,
    lambda routed, shared, x, weight: (torch.empty_like(routed), _wide(x, x.shape[:1])),
    kernel_of(__name__, "add_gated"),
    lambda *tensors: _fits(*tensors) and tensors[0].shape[1] <= MOST_CHANNELS,
    probe=probe_of(__name__, "add_gated"),
    exact=False,
)
_add_gated_backward = register(
    "dense_add_gated_backward(Tensor grad, Tensor shared, Tensor weight, Tensor gate) -> (Tensor, Tensor, Tensor)",
    reference.add_gated_backward,
    lambda grad, *_: (torch.empty_like(grad), torch.empty_like(grad), grad.new_empty(grad.shape[:1])),
    kernel_of(__name__, "add_gated_backward"),
    lambda *tensors: _fits(*tensors) and tensors[0].shape[1] <= MOST_CHANNELS,
    probe=probe_of(__name__, "add_gated_backward"),
)
_norm = register(
    "dense_norm(Tensor x, Tensor weight, float eps, bool rounds_first) -> (Tensor, Tensor)",
    reference.norm,
    lambda x, weight, eps, rounds_first: (torch.empty_like(x), _wide(x, x.shape[:-1])),
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
        return tuple(_rope(q, k, cos, sin, False))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q: Tensor, grad_k: Tensor):
        cos, sin = ctx.saved_tensors
        return *_rope(grad_q, grad_k, cos, sin, True), None, None


class _GatedMLP(Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor):
        gate, up = F.linear(x, gate_weight), F.linear(x, up_weight)
        ctx.save_for_backward(x, gate, up, gate_weight, up_weight, down_weight)
        return F.linear(_swiglu(gate, up), down_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        need_x, *need = ctx.needs_input_grad
        shape = x.shape
        x, gate, up, grad = (t.reshape(-1, t.shape[-1]) for t in (x, gate, up, grad))
        act = grad @ down_weight
        _swiglu_backward(act, gate, up)  # now the activation itself, and the gradients of gate and up
        d_down = grad.t() @ act if need[2] else None
        del act, grad
        d_x = torch.mm(gate, gate_weight).addmm_(up, up_weight).view(shape) if need_x else None
        return d_x, gate.t() @ x if need[0] else None, up.t() @ x if need[1] else None, d_down


class _AddGated(Function):
    @staticmethod
    def forward(ctx, routed: Tensor, shared: Tensor, x: Tensor, weight: Tensor):
        out, gate = _add_gated(routed, shared, x, weight)
        ctx.save_for_backward(shared, x, weight, gate)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        shared, x, weight, gate = ctx.saved_tensors
        grad = grad.contiguous()
        d_shared, d_x, d_logit = _add_gated_backward(grad, shared, weight, gate)
        return grad, d_shared, d_x, d_logit[None] @ x if ctx.needs_input_grad[3] else None


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


def gated_mlp(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """SwiGLU (https://arxiv.org/abs/2002.05202): (silu(x gate^T) * (x up^T)) down^T, of one dtype.

    The activation is rounded once; it is not kept, but made again in backward, which runs once on what forward saved
    and writes over it.

    Args:
        x: (..., D). gate_weight, up_weight: (I, D). down_weight: (D, I).
    """
    return _GatedMLP.apply(x, gate_weight, up_weight, down_weight)


def add_gated(routed: Tensor, shared: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """routed + sigmoid(x weight^T) * shared, rounded once: how Qwen's blocks join a shared expert to the others.

    Args:
        routed, shared, x: (N, D) of one dtype. weight: (1, D).
    """
    return _AddGated.apply(routed.contiguous(), shared.contiguous(), x.contiguous(), weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float, rounds_first: bool) -> Tensor:
    """RMSNorm (https://arxiv.org/abs/1910.07467) over the last dimension.

    Args:
        x: (..., D). weight: (D,). eps: Added to the mean square.
        rounds_first: The normalised value is rounded to x's dtype before it is multiplied by `weight`.
    """
    return _RMSNorm.apply(x, weight, eps, rounds_first)
