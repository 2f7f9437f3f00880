"""Anderson's acceleration of a fixed-point iteration, token by token, on int32 streams (cross_branch, queries from the
left).

    move     what the iteration came to, its step, and the products of the steps
    combine  where it goes on from: the combination of past iterations whose step would be the smallest

`reference.py` defines them; `kernels.py` makes each one launch. Walker and Ni, Anderson Acceleration for Fixed-Point
Iterations, SIAM J. Numer. Anal. 2011 (type II).
"""

# b = sequences of one tile, T = tokens, H = width of a stream, m = past iterations, at most DEPTH

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import kernel_of, probe_of, register
from . import reference
from .reference import DEPTH

__all__ = ["DEPTH", "combine", "move"]

MOST_CHANNELS = 8192


def _fits(past: list[Tensor], *tensors: Tensor) -> bool:
    rows = tensors[0].shape[-1] <= MOST_CHANNELS and len(past) <= DEPTH
    return rows and all(t.is_contiguous() for t in (*past, *tensors))


def _shapes_of_move(update: Tensor, x: Tensor, y: Tensor, scale: Tensor, steps: list[Tensor]) -> tuple[Tensor, ...]:
    step = torch.empty_like(y, dtype=scale.dtype)
    rows = len(steps) + 1
    return torch.empty_like(y), step, step.new_empty(y.shape[:-1]), step.new_empty(*y.shape[:-1], rows, rows)


move = register(
    "anderson_move(Tensor update, Tensor x, Tensor y, Tensor scale, Tensor[] steps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference.anderson_move,
    _shapes_of_move,
    kernel_of(__name__, "anderson_move"),
    lambda update, x, y, scale, steps: _fits(steps, y, x, update) and update.dtype.itemsize <= 4,
    probe=probe_of(__name__, "anderson_move"),
)
"""One evaluation of x + F(x) = y: `update` is F(x) (b, T, H), floating point; x and y are int32; `scale` (H,) float32,
grid units of 1.

Returns what x should have been, y - round(update * scale), int32; the step there from x, float32; the step's largest
magnitude (b, T); and the inner products (b, T, m + 1, m + 1) of [step - s for s in steps] and, last, the step itself.
The products are sums in an order that is the device's own, the same in every call."""

combine = register(
    "anderson_combine(Tensor following, Tensor products, Tensor settled, Tensor[] values) -> Tensor",
    reference.anderson_combine,
    lambda following, products, settled, values: torch.empty_like(following),
    kernel_of(__name__, "anderson_combine"),
    lambda following, products, settled, values: _fits(values, following, products, settled),
    probe=probe_of(__name__, "anderson_combine"),
)
"""following - sum_i w_i (following - values_i), rounded, int32: the weights w make the combination's step the smallest
by `products` of `move`. A token that is `settled` (b, T), bool, goes on from `following`."""
