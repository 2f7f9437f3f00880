"""A layer's dense parts in plain PyTorch: rotary embedding, SwiGLU, a shared expert's gate, RMSNorm.

Everything inside one operation is float32 (float64 for float64 tensors) and is rounded once to the model's dtype;
RMSNorm also where Llama's does, before the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..experts.reference import sigmoid, wide
from ..streams.reference import ROWS_PER_PARTIAL, sum_partials, tree_sum
from ..sums import pairs

TILE_CHANNELS = 512
"""Up to so many channels, the gradient of a norm's weight adds ROWS_PER_PARTIAL rows by neighbours; one after another
beyond."""


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    return turned(q, cos, sin, back), turned(k, cos, sin, back)


def turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    table = (1 if cos.shape[0] == 1 else x.shape[0], 1, *cos.shape[1:])
    c, s = wide(cos).view(table), wide(sin).view(table)
    first, second = wide(x).chunk(2, dim=-1)
    (c1, c2), (s1, s2) = c.chunk(2, dim=-1), s.chunk(2, dim=-1)
    if back:
        halves = first * c1 + second * s2, second * c2 - first * s1
    else:
        halves = first * c1 - second * s1, second * c2 + first * s2
    out = torch.empty_like(x)
    for half, value in zip(out.chunk(2, dim=-1), halves, strict=True):
        half.copy_(value)
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    g = wide(gate)
    return (g * sigmoid(g) * wide(up)).to(gate.dtype)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> None:
    """The gradients of gate and up in their own places, and the result of `swiglu` in that of its gradient."""
    d, g, u = wide(grad), wide(gate), wide(up)
    s = sigmoid(g)
    value = g * s
    slope = s + value * (1.0 - s)
    act, d_gate, d_up = value * u, d * u * slope, d * value
    grad.copy_(act)
    gate.copy_(d_gate)
    up.copy_(d_up)


def add_gated(routed: Tensor, shared: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """routed + gate * shared (N, D) and gate = sigmoid(x weight) (N,), which stays unrounded."""
    gate = sigmoid(tree_sum(wide(x) * wide(weight.view(-1))))
    return (wide(routed) + gate[:, None] * wide(shared)).to(routed.dtype), gate


def add_gated_backward(grad: Tensor, shared: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of shared and x (N, D), and of x weight (N,)."""
    d = wide(grad)
    d_logit = tree_sum(d * wide(shared)) * (gate * (1.0 - gate))
    d_x = d_logit[:, None] * wide(weight.view(-1))
    return (gate[:, None] * d).to(grad.dtype), d_x.to(grad.dtype), d_logit.to(grad.dtype)


def norm(x: Tensor, weight: Tensor, eps: float, rounds_first: bool) -> tuple[Tensor, Tensor]:
    values = wide(x)
    # In float64 and rounded once: the float32 root of a CPU's vector library is not always the nearest.
    rstd = 1.0 / torch.sqrt((tree_sum(values * values) * (1 / x.shape[-1]) + eps).double()).to(values.dtype)
    normed = values * rstd.unsqueeze(-1)
    if rounds_first:
        normed = wide(normed.to(x.dtype))
    return (normed * wide(weight)).to(x.dtype), rstd


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, rounds_first: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    D = x.shape[-1]
    values, dy = wide(x) * rstd.unsqueeze(-1), wide(grad)
    dn = dy * wide(weight)
    mean = tree_sum(dn * values) * (1 / D)
    found = ((dn - values * mean.unsqueeze(-1)) * rstd.unsqueeze(-1)).to(x.dtype)
    if not need_weight:
        return found, weight.new_empty(0)
    products = (dy * (wide(values.to(x.dtype)) if rounds_first else values)).reshape(-1, D)
    products = torch.nn.functional.pad(products, (0, 0, 0, -products.shape[0] % ROWS_PER_PARTIAL))
    products = products.view(-1, ROWS_PER_PARTIAL, D)
    if D <= TILE_CHANNELS:
        partials = pairs(products, 1)
    else:
        partials = products[:, 0].clone()
        for i in range(1, ROWS_PER_PARTIAL):
            partials += products[:, i]
    return found, sum_partials(partials).to(weight.dtype)
