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
from ...engine.recompute import Evaluation, StateMismatchError, carrier_like
from ...engine.sublayers import uses_rng
from ...engine.walk import Tile, Walk, is_concrete
from ...ops.experts import GradientSum
from ...ops.streams import checksum, dequantize, quantize
from .fixed_point import (
    ALONE,
    DEPTH_ALONE,
    Canaries,
    Recorder,
    arguments_of,
    choose_canaries,
    covering,
    largest_error,
    limits,
    low_bits,
    own_attention,
    recorded,
    settle,
    solve,
    usual_width,
    width_for,
    with_low_bits,
)
from .modules import attention_of_queries, cross_attention, half_feed_forward


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
        ctx.dtype = update.dtype
        x = tile.streams[which]
        ctx.inverse = inverse
        kept = () if inverse is None else inverse.keep(x)
        ctx.num_kept = len(kept)
        y = walk.add(update, x, walk.grids[0])
        tile.streams = [y if i == which else s for i, s in enumerate(tile.streams)]
        tile.position = 2 * k + which + 1
        walk.remember(tile, y)
        ctx.save_for_backward(*kept, *evaluation.side_tensors())
        return carrier_like(target.shape, target.device, target.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        walk, tile, k, which, reads, evaluation = ctx.walk, ctx.tile, ctx.k, ctx.which, ctx.reads, ctx.evaluation
        walk.expect(tile, 2 * k + which)
        tensors = ctx.saved_tensors
        kept, side = tensors[: ctx.num_kept], tensors[ctx.num_kept :]
        tile.make_current(("attention", "feed_forward")[which], evaluation)
        y = tile.streams[which]
        name = f"{('left', 'right')[which]} input of layer {k}"
        # Checksums 0 and 1 are the two streams of the embedding; the input of a step was noted two before its output.
        number = 2 * k + which
        if ctx.inverse is not None and ctx.inverse.anchored:
            tile.streams = list(kept)
            (update,) = evaluation.again(side, *[tile.streams[i] for i in reads])
            differs = (kept[which] + quantize(update, walk.grids[0]) != y).any()
            if walk.config.verify != "off" and is_concrete(y):
                walk.note_verdict(f"left output of layer {k}", differs, differs & exactness(tile, differs))
            tile.exact = torch.ones_like(differs)
            walk.note_layer(k, anchored=1, iterations=1, **ctx.inverse.measured)
        elif which not in reads:
            (update,) = evaluation.again(side, *[tile.streams[i] for i in reads])
            tile.streams[which] = quantize(update, walk.grids[0]).neg_().add_(y)
            if walk.config.verify != "off" and is_concrete(y):
                differs = checksum(tile.streams[which]) != tile.checksums[number]
                # What an exact state makes inexact is no drift: something changed.
                walk.note_verdict(name, differs, differs & exactness(tile, differs))
                tile.exact = exactness(tile, differs) & ~differs
        else:
            tile.streams[which] = ctx.inverse.solve(y, evaluation, side, kept[0])
            if kept[1:]:
                note_canary_error(walk, k, tile.streams, kept[2:], kept[1])
            if walk.config.verify != "off" and is_concrete(y):
                differs = checksum(tile.streams[which]) != tile.checksums[number]
                walk.note_verdict(name, differs, torch.zeros_like(differs))
                tile.exact = exactness(tile, differs) & ~differs
        tile.position = 2 * k + which
        return grad, grad.to(ctx.dtype), *(None,) * 7


def exactness(tile: Tile, like: Tensor) -> Tensor:
    return torch.ones_like(like) if tile.exact is None else tile.exact


def note_canary_error(walk: Walk, k: int, rebuilt: list[Tensor], true: tuple[Tensor, ...], rows: Tensor) -> None:
    """The largest error of both streams at the canary tokens, relative to the streams' root mean square there."""
    errors = []
    for stream, values in zip(rebuilt, true, strict=True):
        error = (stream.reshape(-1, stream.shape[-1])[rows].double() - values.double()).abs().amax()
        errors.append(error / values.double().square().mean().sqrt().clamp_min(1.0))
    worst = torch.stack(errors).amax()
    walk.note_layer(k, canary_error=worst)
    # At once, while no gradient of this layer has been made, or an optimizer in backward would step with it.
    if walk.config.verify == "raise" and is_concrete(worst) and not bool(worst <= walk.config.max_drift):
        walk.close(aborted=True)
        raise StateMismatchError(
            f"The rebuilt input of layer {k} is off by {float(worst):.2g} of its root mean square (canary tokens; "
            f"accepted: {walk.config.max_drift}): errors of the layers above have grown on their way down. Set "
            f"anchor_layers=[{k}], query_stream='right', or max_drift."
        )


class LeftInverse:
    """How one tile's left stream comes back from a layer's attention.

    Args:
        kwargs_handle: Of what the attention is called with; see `Walk.stash`.
    """

    def __init__(self, layer: nn.Module, walk: Walk, tile: Tile, kwargs_handle: Any):
        self.layer, self.walk, self.tile, self.kwargs_handle = layer, walk, tile, kwargs_handle
        self.k, self.grid = layer.layer_index, walk.grids[0]
        self.anchored = self.k in (walk.config.anchor_layers or ()) or walk.report.keeps(self.k)
        """The layer's input is kept."""
        self.width = usual_width(walk.dtype)
        """Low bits of the left stream that are kept where the input is not."""
        self.canaries: Canaries | None = None
        self.measured: dict[str, float] = {}
        """In forward, for `Walk.note_layer`."""

    def recorder(self) -> Recorder | None:
        """None where few queries cannot be asked: random numbers would be drawn anew for them, and flash attention
        takes no mask for them."""
        function = None if uses_rng(self.layer) else own_attention(self.layer.self_attn)
        return None if function is None else Recorder(function)

    def limit(self, y: Tensor) -> Tensor | float:
        return limits(y, self.walk.config.tolerance, self.walk.dtype, self.walk.config.fraction_bits)

    def few_queries(self, recorder: Recorder, canaries: Canaries) -> Callable[[Tensor], Tensor]:
        """The attention of some tokens, of their left stream (S, P, H), with the keys and values recorded."""
        recorder.canaries = canaries
        given = arguments_of(self.walk.fetch(self.kwargs_handle, self.tile), canaries)

        def attend(x: Tensor) -> Tensor:
            with torch.no_grad(), recorded(self.layer.self_attn, recorder):
                return attention_of_queries(self.layer, dequantize(x, self.grid, self.walk.dtype), given)

        return attend

    @torch.no_grad()
    def look_ahead(self, update: Tensor, recorder: Recorder | None) -> None:
        """Forward: solve for the canaries as backward will.

        Args:
            update: What the attention gave, (b, T, H).
            recorder: Its keys and values. Without them nothing is asked, and backward alone sees what it meets.
        """
        left = self.tile.streams[0]
        self.canaries = choose_canaries(left, self.walk.config.num_canaries)
        if self.anchored or self.canaries is None or recorder is None or not is_concrete(left):
            return
        x = self.canaries.of(left)
        y = quantize(self.canaries.of(update.detach()), self.grid).add_(x)
        attend = self.few_queries(recorder, self.canaries)
        found = solve(attend, y, self.grid, self.limit(y), self.walk.config.num_iterations)
        width = width_for(int((found.x - x).abs().amax()))
        self.anchored, self.width = width is None, width or self.width
        self.walk.report.note_anchor(self.k, self.anchored)
        self.measured["contraction"] = float(found.contraction)
        self.measured["error_in_forward"] = float(largest_error(found.x, x))

    def keep(self, x: Tensor) -> tuple[Tensor, ...]:
        """Forward: what backward will need, of the left stream x (b, T, H)."""
        streams = self.tile.streams
        if self.anchored:
            return tuple(streams)
        if self.canaries is None:
            return (low_bits(x, self.width),)
        rows, self.canaries = self.canaries.rows(x.shape[1]), None
        return (low_bits(x, self.width), rows, *(stream.reshape(-1, stream.shape[-1])[rows] for stream in streams))

    def solve(self, y: Tensor, evaluation: Evaluation, side: Sequence[Tensor], kept: Tensor) -> Tensor:
        """Backward: the left stream, of which `kept` are the low bits; the last evaluation is on it."""
        other, most = self.tile.streams[1], self.walk.config.num_iterations

        def attend(x: Tensor) -> Tensor:
            return evaluation.again(side, x, other)[0]

        # Twice what the canaries had: other tokens may be slower.
        found = solve(attend, y, self.grid, self.limit(y), 2 * most, is_concrete(y))
        x = with_low_bits(found.x, kept, self.width)

        def wrong() -> Tensor:
            return (quantize(attend(x), self.grid).add_(x) != y).any(-1)

        left_over = wrong()
        if is_concrete(y) and 0 < int(left_over.sum()) <= left_over.numel() // 8:
            recorder = self.recorder()
            if recorder is not None:
                with recorded(self.layer.self_attn, recorder):
                    attend(x)
                those = covering(left_over)
                few = self.few_queries(recorder, those)
                target = those.of(y)
                again = solve(few, target, self.grid, 1.0, ALONE, depth=DEPTH_ALONE).x
                again = settle(few, again, target, self.grid, ALONE)
                at_all = torch.zeros_like(x)
                those.put(at_all, again)
                x = torch.where(left_over[..., None], with_low_bits(at_all, kept, self.width), x)
                left_over = wrong()
        self.walk.note_layer(
            self.k,
            iterations=found.iterations,
            unconverged=left_over.double().mean(),
            kept_bits=self.width,
            **self.measured,
        )
        return x


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
        x2 = Read.apply(c2, s2, grid, dtype)
        x1 = Read.apply(c1, s1, grid, dtype)
        return (cross_attention(layer, x1, x2, walk.fetch(kwargs_handle, tile)),)

    def attend_right(c2: Tensor, s2: Tensor) -> tuple[Tensor]:
        x2 = Read.apply(c2, s2, grid, dtype)
        return (cross_attention(layer, x2, x2, walk.fetch(kwargs_handle, tile)),)

    def feed(c1: Tensor, s1: Tensor) -> tuple[Tensor]:
        return (half_feed_forward(layer, Read.apply(c1, s1, grid, dtype), sums),)

    k, rng = layer.layer_index, uses_rng(layer)
    reads = (0, 1) if walk.config.query_stream == "left" else (1,)
    inverse = LeftInverse(layer, walk, tile, kwargs_handle) if len(reads) == 2 else None
    attend = Evaluation(attend_right if inverse is None else attend_left, left.device, rng)
    recorder = None if inverse is None or inverse.anchored else inverse.recorder()
    with recorded(layer.self_attn, recorder):
        (update,) = attend.first(tuple((left, right)[i] for i in reads), tuple(tile.streams[i] for i in reads))
    if inverse is not None:
        inverse.look_ahead(update, recorder)
    left = AdditiveStep.apply(left, update, walk, tile, k, 0, reads, attend, inverse)
    feed_evaluation = Evaluation(feed, left.device, rng)
    (update,) = feed_evaluation.first((left,), (tile.streams[0],))
    right = AdditiveStep.apply(right, update, walk, tile, k, 1, (0,), feed_evaluation)
    return left, right
