"""cross_branch with queries from the left (arXiv 2512.20920): x + F(x, other) = y is solved for x in backward, and
forward asks beforehand whether it can be.

Keys and values come from the other stream, which backward knows, so every token is a problem of its own. An iteration
ends near x, not at it, and what is left would grow from layer to layer on the way down; so forward keeps the low bits
of x, and what the iteration finds is moved to the nearest number that ends with them. That is x itself, bit for bit,
where the iteration came near enough.

Whether it does is asked in forward, where x is at hand: some tokens, the *canaries*, are solved there already, a few
queries against the keys and values that the layer has just made. They say how many bits are kept, and a layer whose
canaries do not come back keeps its whole input, in this very step, before there is any gradient. Backward checks the
same tokens again.
"""

# B = sequences of a tile, T = tokens, H = width of a stream, S = sequences with canaries, P = canaries in each

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...ops.streams import Grid, pack_bits, quantize, unpack_bits

DEPTH, DEPTH_ALONE = 5, 16
"""Differences that an accelerated iteration takes into account: of all tokens, and of a few that it left over."""
ALONE = 200
"""Evaluations for those few, at most."""
WIDTHS = (4, 8, 16)
"""Numbers of low bits that may be kept of each element."""
MARGIN = 4
"""How many times worse than the canaries other tokens may come back."""


# --- the iteration ---------------------------------------------------------------------------------------------------


@dataclass
class Solution:
    x: Tensor
    """int32, the shape of y."""
    iterations: int
    unconverged: Tensor
    """Share of the tokens that still moved by more than the limit, 0-dim."""
    contraction: Tensor
    """By how much an iteration shrank a token's step, on average over the iterations, of the token where that was
    worst; 0-dim, 0 after a single iteration."""


def limits(y: Tensor, tolerance: float | None, dtype: torch.dtype, fraction_bits: int) -> Tensor | float:
    """By how much, in grid units, a token may still move when it counts as converged."""
    if tolerance is None:
        # The rounding of what is read: an iteration that moves by less goes round in circles there.
        return (y.abs().amax(-1) * torch.finfo(dtype).eps).clamp_min(2.0)
    return tolerance * 2.0**fraction_bits


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
    Anal. 2011) with `depth` differences for each token; a token that has converged takes plain steps only. An
    iteration that repeats its argument has found an exact solution.

    Args:
        function: F; int32 (..., H) -> floating point.
        y: (..., H), int32.
        limit: See `limits`.
        most: Evaluations of F at most.
        look: Whether values can be read (not of fake tensors), to stop when all tokens have converged. If not, there
            are as many evaluations as it takes until further ones need no further memory.
        depth: Differences to accelerate with.
    """
    x, past = y, []
    most = most if look else min(most, depth + 2)
    contraction = torch.zeros((), device=y.device)
    for iteration in range(1, most + 1):
        following = quantize(function(x), grid).neg_().add_(y)
        step = (following - x).float()
        moved = step.abs().amax(-1)
        converged = moved <= limit
        if iteration == 1:
            first = step.norm(dim=-1)
        else:
            contraction = (step.norm(dim=-1) / first.clamp_min(1.0)).pow(1 / (iteration - 1)).amax()
        if iteration == most or (look and bool(converged.all())):
            break
        x = torch.where(converged[..., None], following, accelerated(following, step, past))
        past = [*past, (following, step)][-depth:]
    return Solution(following, iteration, (~converged).double().mean(), contraction)


def settle(function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, grid: Grid, most: int) -> Tensor:
    """Plain iterations from x near a solution, until one repeats its argument: where a step hardly shrinks, one of a
    unit may still be many units from the end."""
    for _ in range(most):
        before, x = x, quantize(function(x), grid).neg_().add_(y)
        if torch.equal(x, before):
            break
    return x


def accelerated(following: Tensor, step: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Of all combinations of the last iterations that one whose step would be the smallest."""
    if not past:
        return following
    steps = torch.stack([step - its for _, its in past], -2)  # (..., m, H)
    values = torch.stack([(following - its).float() for its, _ in past], -2)
    gram = steps @ steps.mT
    # Relative to each token's own size; a difference of nothing changes nothing.
    gram = gram + torch.diag_embed(1e-6 * gram.diagonal(dim1=-2, dim2=-1) + 1e-20)
    weights = torch.linalg.solve_ex(gram, steps @ step[..., None])[0]
    change = (values * weights).sum(-2).nan_to_num(0.0, 0.0, 0.0)
    return following - change.clamp(-(2.0**30), 2.0**30).round().to(torch.int32)


# --- low bits --------------------------------------------------------------------------------------------------------


def usual_width(dtype: torch.dtype) -> int:
    """Where nothing was asked: what layers of a real model need (the rounding of bf16 is many units of the grid)."""
    return WIDTHS[0] if dtype.itemsize > 2 else WIDTHS[-1]


def width_for(error: int) -> int | None:
    """Low bits that make good an error of so many grid units, with a margin; None if there are not enough."""
    return next((width for width in WIDTHS if MARGIN * error <= 1 << (width - 1)), None)


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


# --- canaries --------------------------------------------------------------------------------------------------------


@dataclass
class Canaries:
    """The same positions in each of some sequences, spread evenly."""

    sequences: Tensor
    """(S,) of B."""
    positions: Tensor
    """(P,) of T."""

    def of(self, stream: Tensor) -> Tensor:
        """(B, T, ...) -> (S, P, ...)."""
        return stream[self.sequences[:, None], self.positions]

    def put(self, stream: Tensor, values: Tensor) -> None:
        """The inverse of `of`."""
        stream[self.sequences[:, None], self.positions] = values

    def rows(self, num_tokens: int) -> Tensor:
        """(S P,) of B T."""
        return (self.sequences[:, None] * num_tokens + self.positions).flatten()


def covering(tokens: Tensor) -> Canaries:
    """All that `tokens` (B, T) bool says, and where sequences differ, more."""
    return Canaries(tokens.any(1).nonzero().flatten(), tokens.any(0).nonzero().flatten())


def choose_canaries(stream: Tensor, count: int) -> Canaries | None:
    """At most `count` tokens of a stream (B, T, H)."""
    num_sequences, num_tokens = stream.shape[:2]
    if not count:
        return None

    def spread(most: int, length: int) -> Tensor:
        return torch.linspace(0, length - 1, min(most, length), device=stream.device).long()

    sequences = spread(count, num_sequences)
    return Canaries(sequences, spread(max(1, count // len(sequences)), num_tokens))


def largest_error(found: Tensor, true: Tensor) -> Tensor:
    """Relative to the root mean square of the true values, 0-dim float64."""
    error = (found.double() - true.double()).abs().amax()
    return error / true.double().square().mean().sqrt().clamp_min(1.0)


# --- attention for a few queries -------------------------------------------------------------------------------------

RECORDED = "revffn_recorded"
INTERCEPTED = ("sdpa", "eager")
"""Attention implementations whose masks are (B or 1, 1, T, T) or None."""


class Recorder:
    """Remembers what a layer's attention was called with, and answers other queries from it."""

    def __init__(self, attention: Callable[..., tuple[Tensor, Any]]):
        self.attention = attention
        self.key = self.value = self.mask = None
        self.canaries: Canaries | None = None

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any):
        if self.canaries is None:
            self.key, self.value, self.mask = key.detach(), value.detach(), mask
            return self.attention(module, query, key, value, mask, **kwargs)
        sequences = self.canaries.sequences
        key, value = self.key[sequences], self.value[sequences]
        return self.attention(module, query, key, value, self.rows_of_mask(query.dtype), **kwargs)

    def rows_of_mask(self, dtype: torch.dtype) -> Tensor:
        """(S or 1, 1, P, T)."""
        positions = self.canaries.positions
        if self.mask is not None:
            return rows_of(self.mask, self.canaries)[..., positions, :]
        # None stands for a causal mask.
        later = torch.arange(self.key.shape[-2], device=positions.device) > positions[:, None]
        return torch.zeros(later.shape, dtype=dtype, device=later.device).masked_fill_(later, torch.finfo(dtype).min)[
            None, None
        ]


_recorder: Recorder | None = None


def _answer(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any):
    return _recorder(module, query, key, value, mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(RECORDED, _answer)


def rows_of(tensor: Tensor, canaries: Canaries) -> Tensor:
    """Of a tensor with the batch in front, or 1."""
    return tensor if tensor.shape[0] == 1 else tensor[canaries.sequences]


def arguments_of(kwargs: dict[str, Any], canaries: Canaries) -> dict[str, Any]:
    """A layer's keyword arguments for the canaries alone; the mask is the recorder's."""

    def table(x: Tensor) -> Tensor:  # (B or 1, T, channels)
        return rows_of(x, canaries)[:, canaries.positions]

    given = dict(kwargs)
    given["attention_mask"] = None
    tables = given.get("position_embeddings")
    if tables is not None:
        given["position_embeddings"] = tuple(map(table, tables)) if isinstance(tables, tuple) else table(tables)
    if given.get("position_ids") is not None:
        given["position_ids"] = rows_of(given["position_ids"], canaries)[:, canaries.positions]
    if given.get("cache_position") is not None:
        given["cache_position"] = given["cache_position"][canaries.positions]
    return given


def own_attention(attn: nn.Module) -> Callable[..., tuple[Tensor, Any]] | None:
    """The function that an attention module would call; None where it cannot be intercepted."""
    name = attn.config._attn_implementation
    if name not in INTERCEPTED:
        return None
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    modules = (sys.modules[c.__module__] for c in type(attn).__mro__)
    return next((m.eager_attention_forward for m in modules if hasattr(m, "eager_attention_forward")), None)


@contextlib.contextmanager
def recorded(attn: nn.Module, recorder: Recorder | None) -> Iterator[None]:
    """While open, the module's attention goes through the recorder."""
    global _recorder
    if recorder is None:
        yield
        return
    name, _recorder = attn.config._attn_implementation, recorder
    attn.config._attn_implementation = RECORDED
    try:
        yield
    finally:
        attn.config._attn_implementation, _recorder = name, None
