"""Anderson's acceleration in plain PyTorch, which defines what the kernels compute."""

from __future__ import annotations

import torch
from torch import Tensor

DEPTH = 5
"""Past iterations that are taken into account, at most."""
RIDGE, LEAST = 1e-6, 1e-20
"""Added to the diagonal of the products: relative to it, and whatever it is. A difference of nothing changes
nothing."""
FARTHEST = 2.0**30


def anderson_move(
    update: Tensor, x: Tensor, y: Tensor, scale: Tensor, steps: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(update.dtype, scale.dtype)
    following = y - (update.to(wide) * scale).round_().to(torch.int32)
    step = (following - x).to(scale.dtype)
    rows = torch.stack([*(step - past for past in steps), step], -2)
    return following, step, step.abs().amax(-1), rows @ rows.mT


def weights_of(products: Tensor) -> list[Tensor]:
    """The weights (...,) of m differences that leave the least of the step, from `products` (..., m + 1, m + 1): a
    positive definite system, solved by L D L^T without pivoting."""
    m = products.shape[-1] - 1
    a = [[products[..., i, j] for j in range(m + 1)] for i in range(m)]
    lower: list[list[Tensor]] = []
    pivots: list[Tensor] = []
    found: list[Tensor] = []
    for i in range(m):
        row: list[Tensor] = []  # of L D
        for j in range(i):
            value = a[i][j]
            for k in range(j):
                value = value - row[k] * lower[j][k]
            row.append(value)
        diagonal = a[i][i] * (1 + RIDGE) + LEAST
        least = diagonal * RIDGE
        right = a[i][m]
        lower.append([])
        for k in range(i):
            lower[i].append(row[k] / pivots[k])
            diagonal = diagonal - row[k] * lower[i][k]
            right = right - lower[i][k] * found[k]
        pivots.append(torch.maximum(diagonal, least))
        found.append(right)
    for i in reversed(range(m)):
        value = found[i] / pivots[i]
        for k in range(i + 1, m):
            value = value - lower[k][i] * found[k]
        found[i] = value
    return found


def anderson_combine(following: Tensor, products: Tensor, settled: Tensor, values: list[Tensor]) -> Tensor:
    change = torch.zeros((), dtype=products.dtype, device=products.device)
    for weight, value in zip(weights_of(products), values, strict=True):
        change = change + (following - value).to(products.dtype) * weight[..., None]
    change = change.nan_to_num_(0.0, 0.0, 0.0).clamp_(-FARTHEST, FARTHEST).round_().to(torch.int32)
    return torch.where(settled[..., None], following, following - change)
