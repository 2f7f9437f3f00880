"""cross_branch's layer (arXiv 2512.20920): two half-width streams, each added to in turn, as autograd nodes.

y1 = x1 + P_down Attn(Q from x1 or x2, K and V from x2), then y2 = x2 + P_down MoE(P_up y1). With queries from the left
stream, the paper's form, x1 is the solution of a fixed point (fixed_point.py).
"""

# b = sequences of one tile, T = tokens, H = D / 2

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .fixed_point import (
    Canaries,
    Recorder,
    arguments_of,
    choose_canaries,
    largest_error,
    limits,
    own_attention,
    recorded,
    solve,
)
from .nodes import Read
from .ops.streams import checksum, dequantize, quantize
from .recompute import Evaluation, StateMismatchError, carrier_like
from .reversible import Tile, Walk, is_concrete
from .sublayers import GradientSum, attention_of_queries, cross_attention, half_feed_forward, uses_rng


class AdditiveStep(Function):
    """y = x + F(.) on one stream of one tile, for `cross_branch`.

    Args of forward:
        target: Carrier of the stream that is added to.
        update: F's result, (b, T, H).
        which: 0 for the left stream (attention), 1 for the right one (feed-forward).
        reads: Indices of the streams that F reads. If `which` is among them the inverse is a fixed point.
        outlook: Of the fixed point.
    """

    @staticmethod
    def forward(ctx, target: Tensor, update: Tensor, walk, tile, k, which, reads, evaluation, outlook=None):
        ctx.walk, ctx.tile, ctx.k, ctx.which, ctx.reads, ctx.evaluation = walk, tile, k, which, reads, evaluation
        ctx.dtype = update.dtype
        x = tile.streams[which]
        ctx.anchored, ctx.measured = False, {}
        kept: tuple[Tensor, ...] = ()
        if outlook is not None:
            ctx.anchored, ctx.measured = outlook.anchored, outlook.measured
            if ctx.anchored:
                kept = tuple(tile.streams)
            elif outlook.canaries is not None:
                rows = outlook.canaries.rows(x.shape[1])
                kept = (rows, *(stream.reshape(-1, stream.shape[-1])[rows] for stream in tile.streams))
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
        walk.note_layer(k, **ctx.measured)
        name = f"{('left', 'right')[which]} input of layer {k}"
        # Checksums 0 and 1 are the two streams of the embedding; the input of a step was noted two before its output.
        number = 2 * k + which
        if ctx.anchored:
            tile.streams = list(kept)
            (update,) = evaluation.again(side, *[tile.streams[i] for i in reads])
            differs = (kept[which] + quantize(update, walk.grids[0]) != y).any()
            if walk.config.verify != "off" and is_concrete(y):
                walk.note_verdict(f"left output of layer {k}", differs, differs & exactness(tile, differs))
            tile.exact = torch.ones_like(differs)
            walk.note_layer(k, anchored=1, iterations=1)
        elif which not in reads:
            (update,) = evaluation.again(side, *[tile.streams[i] for i in reads])
            tile.streams[which] = quantize(update, walk.grids[0]).neg_().add_(y)
            if walk.config.verify != "off" and is_concrete(y):
                differs = checksum(tile.streams[which]) != tile.checksums[number]
                # What an exact state makes inexact is no drift: something changed.
                walk.note_verdict(name, differs, differs & exactness(tile, differs))
                tile.exact = exactness(tile, differs) & ~differs
        else:
            tile.streams[which] = solve_fixed_point(walk, tile, k, y, evaluation, side)
            if kept:
                note_canary_error(walk, k, tile.streams, kept[1:], kept[0])
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


def solve_fixed_point(
    walk: Walk, tile: Tile, k: int, y: Tensor, evaluation: Evaluation, side: Sequence[Tensor]
) -> Tensor:
    """The left stream before the attention of layer k. The evaluation that showed that it is a solution is the one
    whose tensors backward uses."""
    config, other = walk.config, tile.streams[1]
    limit = limits(y, config.tolerance, walk.dtype, config.fraction_bits)
    found = solve(
        lambda x: evaluation.again(side, x, other)[0], y, walk.grids[0], limit, config.num_iterations, is_concrete(y)
    )
    walk.note_layer(k, iterations=found.iterations, unconverged=found.unconverged)
    return found.x


@dataclass
class Outlook:
    """What forward knows of the inverse of a layer's attention."""

    anchored: bool
    """Its input is kept."""
    canaries: Canaries | None = None
    """The tokens that backward checks."""
    measured: dict[str, float] = field(default_factory=dict)
    """For `Walk.note_layer`."""


@torch.no_grad()
def look_ahead(
    layer: nn.Module, walk: Walk, tile: Tile, kwargs: dict[str, Any], update: Tensor, recorder: Recorder | None
) -> Outlook:
    """Solve for the canaries' left stream as backward will, and keep the layer's input if that fails.

    Args:
        kwargs: What the attention was called with.
        update: What it gave, (b, T, H).
        recorder: Its keys and values; without one all tokens are solved for, with whole attentions.
    """
    config, k, grid, report = walk.config, layer.layer_index, walk.grids[0], walk.report
    if k in (config.anchor_layers or ()) or report.keeps(k):
        return Outlook(True)
    left, right = tile.streams
    canaries = choose_canaries(left, config.num_canaries)
    # Random numbers of the attention are drawn anew for other queries.
    if canaries is None or not is_concrete(left) or uses_rng(layer):
        return Outlook(False, canaries)
    if recorder is None:
        x, update = left, update.detach()
        other = dequantize(right, grid, walk.dtype)

        def attend(x: Tensor) -> Tensor:
            return cross_attention(layer, dequantize(x, grid, walk.dtype), other, kwargs)
    else:
        x, update = canaries.of(left), canaries.of(update.detach())
        recorder.canaries = canaries
        given = arguments_of(kwargs, canaries)

        def attend(x: Tensor) -> Tensor:
            with recorded(layer.self_attn, recorder):
                return attention_of_queries(layer, dequantize(x, grid, walk.dtype), given)

    y = quantize(update, grid).add_(x)
    limit = limits(y, config.tolerance, walk.dtype, config.fraction_bits)
    found = solve(attend, y, grid, limit, config.num_iterations)
    error, unconverged = float(largest_error(found.x, x)), float(found.unconverged)
    measured = {"contraction": float(found.contraction), "error_in_forward": error}
    anchored = not (error <= config.max_drift / 2 and unconverged <= config.max_unconverged)
    report.note_anchor(k, anchored)
    return Outlook(anchored, canaries, measured)


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
    implicit = len(reads) == 2
    attend = Evaluation(attend_left if implicit else attend_right, left.device, rng)
    function = own_attention(layer.self_attn) if implicit else None
    recorder = None if function is None else Recorder(function)
    with recorded(layer.self_attn, recorder):
        (update,) = attend.first(tuple((left, right)[i] for i in reads), tuple(tile.streams[i] for i in reads))
    outlook = None
    if implicit:
        outlook = look_ahead(layer, walk, tile, walk.fetch(kwargs_handle, tile), update, recorder)
    left = AdditiveStep.apply(left, update, walk, tile, k, 0, reads, attend, outlook)
    feed_evaluation = Evaluation(feed, left.device, rng)
    (update,) = feed_evaluation.first((left,), (tile.streams[0],))
    right = AdditiveStep.apply(right, update, walk, tile, k, 1, (0,), feed_evaluation)
    return left, right
