"""cross_branch's layer (arXiv 2512.20920): two half-width streams, each added to in turn, as autograd nodes.

y1 = x1 + P_down Attn(Q from x1 or x2, K and V from x2), then y2 = x2 + P_down MoE(P_up y1). With queries from the left
stream, the paper's form, x1 is the solution of a fixed point (fixed_point.py).
"""

# b = sequences of one tile, T = tokens, H = D / 2

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...engine.nodes import Read
from ...engine.recompute import Evaluation, carrier_like
from ...engine.sublayers import uses_rng
from ...engine.walk import Tile, Walk, is_concrete
from ...ops.experts import GradientSum
from ...ops.streams import quantize
from .fixed_point import DEPTH, WHOLE, Solution, lack_of, limits, made_good, solve, usual_width
from .modules import cross_attention, half_feed_forward, normed_key_value, normed_query, same_keys_and_values


class AdditiveStep(Function):
    """y = x + F(.) on one stream of one tile, for `cross_branch`.

    Args of forward:
        target: Carrier of the stream that is added to.
        update: F's result, (b, T, H).
        which: 0 for the left stream (attention), 1 for the right one (feed-forward).
        reads: Indices of the streams that F reads. If `which` is among them the inverse is a fixed point.
        inverse: Of the fixed point.
    """

    @staticmethod
    def forward(ctx, target: Tensor, update: Tensor, walk, tile, k, which, reads, evaluation, inverse=None):
        ctx.walk, ctx.tile, ctx.k, ctx.which, ctx.reads, ctx.evaluation = walk, tile, k, which, reads, evaluation
        ctx.dtype, ctx.inverse = update.dtype, inverse
        x = tile.streams[which]
        y = walk.add(update, x, walk.grids[0])
        kept = () if inverse is None else inverse.keep(x, y, evaluation)
        ctx.num_kept = len(kept)
        tile.streams = [y if i == which else s for i, s in enumerate(tile.streams)]
        tile.position = 2 * k + which + 1
        walk.remember(tile, y)
        ctx.save_for_backward(*kept, *evaluation.side_tensors())
        return carrier_like(target.shape, target.device, target.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        walk, tile, k, which, evaluation = ctx.walk, ctx.tile, ctx.k, ctx.which, ctx.evaluation
        walk.expect(tile, 2 * k + which)
        tensors = ctx.saved_tensors  # once: every access unpacks, which may be a copy from the host
        kept, side = tensors[: ctx.num_kept], tensors[ctx.num_kept :]
        tile.make_current(("attention", "feed_forward")[which], evaluation)
        y = tile.streams[which]
        if ctx.inverse is not None:
            tile.streams[which] = ctx.inverse.restore(y, kept, side, evaluation)
        (update,) = evaluation.again(side, *[tile.streams[i] for i in ctx.reads])
        if ctx.inverse is None:
            tile.streams[which] = quantize(update, walk.grids[0]).neg_().add_(y)
        elif walk.config.verify != "off" and is_concrete(y):
            update = quantize(update, walk.grids[0]).add_(tile.streams[which])
            walk.note_verdict(f"left output of layer {k}", (update != y).any())
        # Checksums 0 and 1 are the two streams of the embedding; the input of a step was noted two before its output.
        walk.verify(tile, 2 * k + which, tile.streams[which], f"{('left', 'right')[which]} input of layer {k}")
        tile.position = 2 * k + which
        return grad, grad.to(ctx.dtype), *(None,) * 7


class LeftInverse:
    """How one tile's left stream comes back from a layer's attention."""

    def __init__(self, layer: nn.Module, walk: Walk, tile: Tile):
        self.layer, self.walk, self.tile, self.grid = layer, walk, tile, walk.grids[0]
        self.width = self.iterations = 0
        self.measured: dict[str, float | Tensor] = {}
        self.is_solving = False
        self.key_value: Tensor | None = None

    def other(self, make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes of the other stream; once in an iteration, which does not change it."""
        if not self.is_solving:
            return make()
        if self.key_value is None:
            self.key_value = make()
        return self.key_value

    def solve(self, y: Tensor, rng: Sequence[Tensor], evaluation: Evaluation, most: int, look: bool) -> Solution:
        other = self.tile.streams[1]

        def attend(x: Tensor) -> Tensor:
            return evaluation.value(rng, x, other)[0]

        self.is_solving = True
        try:
            # The iteration's own arithmetic is float32, whatever surrounds forward or backward; `value` has its own
            # state.
            with same_keys_and_values(self.layer), torch.autocast(y.device.type, enabled=False):
                return solve(attend, y, self.grid, limits(y, self.walk.dtype), most, look)
        finally:
            self.is_solving, self.key_value = False, None

    def keep(self, x: Tensor, y: Tensor, evaluation: Evaluation) -> tuple[Tensor, ...]:
        """Forward: solve as backward will, and keep what the solution lacks of x (b, T, H); of a layer that keeps what
        it saves, x itself, which is a small part of that."""
        if evaluation.keeps:
            self.width = WHOLE
            return (x,)
        look, most = is_concrete(y), self.walk.config.cross_branch.num_iterations
        # Further evaluations than fill the memory of past ones need no further memory.
        found = self.solve(y, evaluation.rng, evaluation, most if look else min(most, DEPTH + 2), look)
        lack = lack_of(found.x, x, None if look else usual_width(self.walk.dtype))
        self.width, self.iterations = lack.width, found.iterations
        self.measured = dict(
            iterations=found.iterations,
            contraction=found.contraction,
            kept_bits=lack.width,
            kept_rows=lack.share_of_rows(x),
        )
        return lack.tensors

    def restore(self, y: Tensor, kept: Sequence[Tensor], side: Sequence[Tensor], evaluation: Evaluation) -> Tensor:
        """Backward: x."""
        self.walk.note_layer(self.layer.layer_index, **self.measured)
        if self.width == WHOLE:
            return kept[0]
        found = self.solve(y, side[evaluation.num_routing :], evaluation, self.iterations, look=False)
        return made_good(found.x, self.width, tuple(kept))


def cross_branch_step(
    layer: nn.Module,
    walk: Walk,
    tile: Tile,
    kwargs_handle: Any,
    sums: dict[str, GradientSum] | None,
    left: Tensor,
    right: Tensor,
) -> tuple[Tensor, Tensor]:
    grid, dtype = walk.grids[0], walk.dtype  # the same for all states

    def attend_left(c1: Tensor, c2: Tensor, s1: Tensor, s2: Tensor) -> tuple[Tensor]:
        def key_value() -> Tensor:
            return normed_key_value(layer, Read.apply(c2, s2, grid, dtype))

        query = normed_query(layer, Read.apply(c1, s1, grid, dtype))
        made = key_value() if inverse is None else inverse.other(key_value)
        return (cross_attention(layer, query, made, walk.fetch(kwargs_handle, tile)),)

    def attend_right(c2: Tensor, s2: Tensor) -> tuple[Tensor]:
        x2 = Read.apply(c2, s2, grid, dtype)
        query, key_value = normed_query(layer, x2), normed_key_value(layer, x2)
        return (cross_attention(layer, query, key_value, walk.fetch(kwargs_handle, tile)),)

    def feed(c1: Tensor, s1: Tensor) -> tuple[Tensor]:
        return (half_feed_forward(layer, Read.apply(c1, s1, grid, dtype), sums),)

    k = layer.layer_index
    settings = left.device, uses_rng(layer), walk.keeps(k)
    reads = (0, 1) if walk.config.cross_branch.query_stream == "left" else (1,)
    function = attend_left if len(reads) == 2 else attend_right
    # Without gradients there is no way back, and nothing to solve for.
    inverse = LeftInverse(layer, walk, tile) if len(reads) == 2 and torch.is_grad_enabled() else None
    attend = Evaluation(function, *settings)
    (update,) = attend.first(tuple((left, right)[i] for i in reads), tuple(tile.streams[i] for i in reads))
    left = AdditiveStep.apply(left, update, walk, tile, k, 0, reads, attend, inverse)
    feed_evaluation = Evaluation(feed, *settings)
    (update,) = feed_evaluation.first((left,), (tile.streams[0],))
    right = AdditiveStep.apply(right, update, walk, tile, k, 1, (0,), feed_evaluation)
    return left, right
