"""Sums whose order is fixed, in PyTorch; `triton_parts.py` has the same for kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def pairs(x: Tensor, dim: int = -1) -> Tensor:
    """Sum along `dim` by neighbours; zero where there is nothing."""
    if not x.shape[dim]:
        return x.sum(dim)
    while (n := x.shape[dim]) > 1:
        half = x.narrow(dim, 0, n - n % 2).unflatten(dim, (n // 2, 2))
        at = dim - 1 if dim < 0 else dim
        even, odd = half.select(at + 1, 0), half.select(at + 1, 1)
        # A last one without a neighbour stays as it is: x + 0.
        x = torch.cat([even + odd, x.narrow(dim, n - 1, 1)], dim) if n % 2 else even + odd
    return x.squeeze(dim)
