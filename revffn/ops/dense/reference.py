"""A layer's dense parts in plain PyTorch: rotary embedding, SwiGLU, RMSNorm.

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


def rope(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    table = (1 if cos.shape[0] == 1 else x.shape[0], 1, *cos.shape[1:])
    c, s = wide(cos).view(table), wide(sin).view(table)
    first, second = wide(x).chunk(2, dim=-1)
    (c1, c2), (s1, s2) = c.chunk(2, dim=-1), s.chunk(2, dim=-1)
    if back:
        turned = first * c1 + second * s2, second * c2 - first * s1
    else:
        turned = first * c1 - second * s1, second * c2 + first * s2
    out = torch.empty_like(x)
    for half, value in zip(out.chunk(2, dim=-1), turned, strict=True):
        half.copy_(value)
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    g = wide(gate)
    return (g * sigmoid(g) * wide(up)).to(gate.dtype)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d, g, u = wide(grad), wide(gate), wide(up)
    s = sigmoid(g)
    value = g * s
    slope = s + value * (1.0 - s)
    return (d * u * slope).to(gate.dtype), (d * value).to(up.dtype)


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
