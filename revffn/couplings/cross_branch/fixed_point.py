"""cross_branch with queries from the left (arXiv 2512.20920): x + F(x, other) = y is solved for x in backward, and
forward keeps what the solution lacks.

Keys and values come from the other stream, which backward knows, so every token is a problem of its own. An iteration
ends near x, or, where F does not contract, at another solution or nowhere. Forward has x: it runs the very iteration
that backward will run, on the same numbers, so that both end at the same place bit for bit; and it keeps the
difference. That is a few low bits of each element, the whole row of a token that ended elsewhere, or, of a layer where
that would be more, all of x. What backward gets is x itself.
"""

# N = tokens, H = width of a stream

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.anderson import DEPTH, combine, move
from ...ops.streams import Grid, pack_bits, unpack_bits

WIDTHS = (4, 8, 16)
"""Numbers of low bits that may be kept of each element."""
WHOLE = 32
"""Stands for keeping x."""


# --- the iteration ---------------------------------------------------------------------------------------------------


@dataclass
class Solution:
    x: Tensor
    """int32, the shape of y."""
    iterations: int
    contraction: Tensor
    """By how much an iteration shrank a token's step, on average over the iterations, of the token where that was
    worst; 0-dim, 0 after a single iteration."""


def limits(y: Tensor, dtype: torch.dtype) -> Tensor:
    """By how many grid units a token may still move when it counts as converged: the rounding of what is read. An
    iteration that moves by less goes round in circles there."""
    return (y.abs().amax(-1) * torch.finfo(dtype).eps).clamp_min(2.0)


def solve(
    function: Callable[[Tensor], Tensor],
    y: Tensor,
    grid: Grid,
    limit: Tensor | float,
    most: int,
    look: bool = True,
    depth: int = DEPTH,
) -> Solution:
    """Solve x + F(x) = y on the grid, token by token, started at x = y.

    Anderson's acceleration (type II; Walker and Ni, Anderson Acceleration for Fixed-Point Iterations, SIAM J. Numer.
    Anal. 2011) with `depth` differences for each token; a token that has converged takes plain steps only. The same
    arguments give the same bits: nothing else decides.

    Args:
        function: F; int32 (..., H) -> floating point.
        y: (..., H), int32.
        limit: See `limits`.
        most: Evaluations of F at most.
        look: Stop when all tokens have converged, for which values are read. If not, there are `most` evaluations.
        depth: Differences to accelerate with.
    """
    scale, _ = grid.vectors(y)
    x = y
    steps: list[Tensor] = []
    values: list[Tensor] = []
    for iteration in range(1, most + 1):
        is_last = iteration == most
        following, step, largest, products = move(function(x), x, y, scale, [] if is_last else steps)
        size = products[..., -1, -1].sqrt()
        if iteration == 1:
            first = size.clamp_min(1.0)
        converged = largest <= limit
        if is_last or (look and bool(converged.all())):
            break
        x = combine(following, products, converged, values)
        steps, values = [*steps, step][-depth:], [*values, following][-depth:]
    contraction = (size / first).pow(1 / (iteration - 1)).amax() if iteration > 1 else size.new_zeros(())
    return Solution(following, iteration, contraction)


# --- what a solution lacks -------------------------------------------------------------------------------------------


def usual_width(dtype: torch.dtype) -> int:
    """Where values cannot be read: what layers of a real model need (the rounding of bf16 is many units of the
    grid)."""
    return WIDTHS[0] if dtype.itemsize > 2 else WIDTHS[-1]


def low_bits(x: Tensor, width: int) -> Tensor:
    """The low bits of int32, packed: width / 8 bytes an element."""
    if width == 4:
        return pack_bits((x & 15).to(torch.uint8), 4)
    return x.to(torch.uint8 if width == 8 else torch.int16)


def with_low_bits(x: Tensor, kept: Tensor, width: int) -> Tensor:
    """The number nearest to x that ends with the bits of `low_bits`."""
    bits = unpack_bits(kept, 4, x.shape) if width == 4 else kept
    half = 1 << (width - 1)
    return (bits.to(torch.int32) - x + half).bitwise_and_(2 * half - 1).sub_(half).add_(x)


@dataclass
class Lack:
    """What is kept of x (..., H), so that it comes back from a solution."""

    width: int
    """Low bits of each element, or WHOLE."""
    num_rows: int
    """Tokens that are kept whole."""
    tensors: tuple[Tensor, ...]

    def share_of_rows(self, x: Tensor) -> float:
        return self.num_rows * x.shape[-1] / max(x.numel(), 1)


def lack_of(found: Tensor, x: Tensor, width: int | None = None) -> Lack:
    """The least that makes x of `found`.

    Args:
        found, x: int32, (..., H).
        width: Taken unseen, where values cannot be read; no token is kept whole then.
    """
    rows = torch.empty(0, dtype=torch.int64, device=x.device)
    if width is None:
        off = x - found
        low, high = off.amin(-1).flatten(), off.amax(-1).flatten()
        wrong = [(low <= -(1 << (width - 1))) | (high >= 1 << (width - 1)) for width in WIDTHS]
        numbers = torch.stack([w.sum() for w in wrong]).tolist()
        row_bytes = 4 * x.shape[-1] + 8
        sizes = [x.numel() * w // 8 + number * row_bytes for w, number in zip(WIDTHS, numbers, strict=True)]
        if min(sizes) >= 4 * x.numel():
            return Lack(WHOLE, 0, (x,))
        best = sizes.index(min(sizes))
        width, rows = WIDTHS[best], wrong[best].nonzero().flatten()
    return Lack(width, len(rows), (low_bits(x, width), rows, x.reshape(-1, x.shape[-1])[rows]))


def made_good(found: Tensor, width: int, kept: tuple[Tensor, ...]) -> Tensor:
    """x again."""
    bits, rows, values = kept
    x = with_low_bits(found, bits, width)
    x.view(-1, x.shape[-1])[rows] = values
    return x
