"""One layer's move of the streams, as autograd nodes: innovation, cross_branch, and `none`.

Each `*_step` function runs a layer's sublayers on one tile in forward, moves the tile's streams (pure functions of
couplings.py), and leaves nodes behind whose backward evaluates the sublayers again, inverts the move, and states the
coupling's gradient.
"""

# B = batch, b = sequences of one tile, T = tokens, D = hidden size, H = D / 2

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .couplings import Grid, add_refined, checksum, dequantize, innovation_forward, innovation_inverse, quantize
from .reversible import Evaluation, Read, Tile, Walk, carrier_like, is_concrete
from .sublayers import GradientSum, attention, cross_attention, feed_forward, half_feed_forward, uses_rng


class InnovationMove:
    """One layer's move (s_{k-1}, s_k) -> (s_k, s_{k+1}) of one tile; what its nodes share.

    The feed-forward may run in several chunks of tokens. The inverse is elementwise, so in backward every chunk is
    evaluated, inverted and differentiated before the next one is: no chunk's activations wait for another's.
    """

    def __init__(self, walk: Walk, tile: Tile, k: int, m: int | None, chunks: list[slice]):
        self.walk, self.tile, self.k, self.m, self.chunks = walk, tile, k, m, chunks
        # Of s_{k-1}, s_k and s_{k+1}; what is added in between is on the last.
        self.past_grid, self.grid, self.next_grid = walk.grids[max(k - 1, 0)], walk.grids[k], walk.grids[k + 1]
        # Alive only while forward or backward is inside the layer. Forward: the middle state on the grid; backward:
        # what the attention added to s_k, from which every chunk takes its middle state.
        self.middle: Tensor | None = None
        self.attn: Tensor | None = None
        self.predicted: Tensor | None = None
        self.prev: Tensor | None = None
        self.bits: tuple[Tensor, ...] = ()
        self.num_left = 0
        self.grad_mlp: Tensor | None = None

    def sign(self) -> Tensor | None:
        walk = self.walk
        return None if walk.signs is None else walk.signs[self.k, self.tile.rows].view(-1, 1, 1)

    def grid_prediction(self, rows: slice) -> Tensor | None:
        return None if self.predicted is None else quantize(self.predicted[:, rows], self.past_grid)

    def gain(self, like: Tensor) -> float | Tensor:
        """2**-m, and less where the grid has become finer in between."""
        gain = 2.0**-self.m * self.past_grid.scale * self.next_grid.step
        return gain.to(like.dtype) if isinstance(gain, Tensor) else gain

    def add_now(self, update: Tensor, now: Tensor) -> Tensor:
        """s_k and the attention's result on the grid of s_{k+1}: the middle state."""
        return add_refined(quantize(update, self.next_grid), now, self.next_grid.finer_than(self.grid))

    def forward(self, updated: Tensor) -> tuple[Tensor, ...]:
        """Move the streams on; returns the tensors that the inverse needs: packed bits per chunk, or a plain layer's
        past."""
        prev, cur = self.tile.streams
        kept: list[Tensor] = []
        if self.m is None:
            following = updated
            kept = [prev] if self.k else []
        else:
            parts = []
            finer = self.grid.finer_than(self.past_grid)
            for rows in self.chunks:
                part, bits = innovation_forward(
                    prev[:, rows],
                    cur[:, rows],
                    updated[:, rows],
                    self.grid_prediction(rows),
                    self.sign(),
                    self.m,
                    finer,
                )
                parts.append(part)
                kept += [] if bits is None else [bits]
            following = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        self.tile.streams, self.tile.position = [cur, following], self.k + 1
        self.walk.remember(self.tile, following)
        return tuple(kept)

    def middle_of(self, rows: slice) -> Tensor:
        """Backward: the middle state of one chunk."""
        return self.add_now(self.attn[:, rows], self.tile.streams[0][:, rows])

    def invert(self, index: int, middle: Tensor, mlp: Tensor) -> None:
        """Recover the past of one chunk from its feed-forward's result; after the last chunk move the streams back."""
        rows, tile, walk, k = self.chunks[index], self.tile, self.walk, self.k
        cur, following = tile.streams
        updated = quantize(mlp, self.next_grid).add_(middle)
        if self.m is None:
            if walk.config.verify != "off" and is_concrete(updated):
                walk.note_verdict(f"output of layer {k}", (updated != following[:, rows]).any())
            past = self.bits[0][:, rows] if k else cur[:, rows]
        else:
            past = innovation_inverse(
                following[:, rows],
                cur[:, rows],
                updated,
                self.grid_prediction(rows),
                self.sign(),
                self.bits[index] if self.m else None,
                self.m,
                self.grid.finer_than(self.past_grid),
            )
        if len(self.chunks) == 1:
            self.prev = past
        else:
            if self.prev is None:
                # s_{k+1} is not needed once inverted; the last layer's is autograd's, for a second walk.
                self.prev = torch.empty_like(cur) if k == walk.num_layers - 1 else following
            self.prev[:, rows] = past
        self.num_left -= 1
        if self.num_left == 0:
            tile.streams, tile.position = [self.prev, cur], k
            self.attn = self.predicted = self.prev = None
            self.bits = ()
            if self.m is not None:
                walk.verify(tile, k - 1, tile.streams[0], f"input of layer {k - 1}")


class InnovationStep(Function):
    """The coupling itself: carriers of s_{k-1} and s_k + f_k(s_k) -> carrier of s_{k+1}.

    Its backward is the layer's first node: it evaluates the attention on s_k, for everything below. The gain is
    applied by `Attended`, the layer's last node but the attention's own, so that one gradient of the state is alive
    in between.
    """

    @staticmethod
    def forward(ctx, past: Tensor, updated: Tensor, predicted: Tensor | None, move, evaluation):
        ctx.move, ctx.evaluation = move, evaluation
        move.predicted = predicted
        kept = move.forward(move.middle)
        move.middle = move.predicted = None
        ctx.num_kept = len(kept)
        ctx.save_for_backward(*kept, *evaluation.side_tensors())
        return carrier_like(past.shape, past.device, past.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        move, evaluation = ctx.move, ctx.evaluation
        tile = move.tile
        move.walk.expect(tile, move.k)
        tensors = ctx.saved_tensors  # once: every access unpacks, which may be a copy from the host
        move.bits = tensors[: ctx.num_kept]
        tile.make_current("attention", evaluation)
        move.attn, *predicted = evaluation.again(tensors[ctx.num_kept :], tile.streams[0])
        move.predicted = predicted[0] if predicted else None
        move.num_left = len(move.chunks)
        return None if move.m is None else grad, grad, None, None, None


class Attended(Function):
    """Carriers of s_{k-1} and s_k, attention and prediction -> carriers of s_{k-1} and of the middle state.

    The values are added on the grid, beside the graph. Backward has the coupling's gradient: with d = the gradient of
    s_{k+1} and g = sign * 2**-m, s_{k-1} gets g d, s_k gets the middle state's less g d, the prediction gets -g d.
    """

    @staticmethod
    def forward(ctx, past: Tensor, now: Tensor, attn: Tensor, predicted: Tensor | None, move: InnovationMove):
        ctx.move, ctx.dtypes = move, (attn.dtype, None if predicted is None else predicted.dtype)
        ctx.set_materialize_grads(False)
        return past.view_as(past), now.view_as(now)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_middle: Tensor):
        move, (attn_dtype, predicted_dtype) = ctx.move, ctx.dtypes
        ours = move.grad_mlp is not None
        if ours:
            grad_middle, move.grad_mlp = grad_middle + move.grad_mlp, None
        grad_attn = grad_middle.to(attn_dtype)
        # In place only where the tensor is ours, and not handed on as the attention's gradient.
        ours = ours and grad_attn is not grad_middle
        if grad is None:
            return None, grad_middle, grad_attn, None, None
        grad_past = grad * move.gain(grad)
        sign = move.sign()
        if sign is not None:
            grad_past *= sign
        grad_predicted = None if predicted_dtype is None else -grad_past.to(predicted_dtype)
        grad_now = grad_middle.sub_(grad_past) if ours else grad_middle - grad_past
        return grad_past, grad_now, grad_attn, grad_predicted, None


class FeedStep(Function):
    """Adds one chunk's feed-forward to the middle state, on the grid; in backward evaluates it and inverts the chunk.

    Takes and returns the carrier of the whole state; backward passes the gradient through.
    """

    @staticmethod
    def forward(ctx, middle: Tensor, mlp: Tensor, move: InnovationMove, index: int, evaluation: Evaluation):
        ctx.move, ctx.index, ctx.evaluation, ctx.dtype = move, index, evaluation, mlp.dtype
        move.walk.note_finite(mlp)
        move.middle[:, move.chunks[index]] += quantize(mlp, move.next_grid)
        ctx.save_for_backward(*evaluation.side_tensors())
        return middle.view_as(middle)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        move, evaluation = ctx.move, ctx.evaluation
        rows = move.chunks[ctx.index]
        move.tile.make_current("feed_forward", evaluation)
        middle = move.middle_of(rows)
        (mlp,) = evaluation.again(ctx.saved_tensors, middle)
        move.invert(ctx.index, middle, mlp)
        return grad, grad[:, rows].to(ctx.dtype), None, None, None


class ReadChunk(Function):
    """`Read` for one chunk of several: its gradient goes into a buffer that `Attended`, which waits for it, adds."""

    @staticmethod
    def forward(
        ctx, carrier: Tensor, stream: Tensor, grid: Grid, dtype: torch.dtype, move: InnovationMove, rows: slice
    ):
        ctx.move, ctx.rows, ctx.shape = move, rows, carrier.shape
        return dequantize(stream, grid, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        move = ctx.move
        if move.grad_mlp is None:
            # Every row is written by exactly one chunk.
            move.grad_mlp = grad.new_zeros(ctx.shape)
        move.grad_mlp[:, ctx.rows] = grad
        return None, None, None, None, None, None


def innovation_step(
    layer: nn.Module,
    walk: Walk,
    tile: Tile,
    kwargs_handle: Any,
    sums: dict[str, GradientSum] | None,
    past: Tensor,
    now: Tensor,
) -> tuple[Tensor, Tensor]:
    dtype, predictor = walk.dtype, layer.coupling.predictor

    def attend(carrier: Tensor, stream: Tensor) -> tuple[Tensor, ...]:
        x = Read.apply(carrier, stream, move.grid, dtype)
        attn = attention(layer, x, walk.fetch(kwargs_handle, tile))
        return (attn,) if predictor is None else (attn, predictor(x))

    chunks = walk.token_chunks(now.shape[1])
    move = InnovationMove(walk, tile, layer.layer_index, layer.coupling.side_bits, chunks)

    def feed(carrier: Tensor, stream: Tensor, rows: slice) -> tuple[Tensor]:
        if len(chunks) == 1:
            hidden = Read.apply(carrier, stream, move.next_grid, dtype)
        else:
            hidden = ReadChunk.apply(carrier, stream, move.next_grid, dtype, move, rows)
        return (feed_forward(layer, hidden, sums),)

    rng, device = uses_rng(layer), now.device
    attend_evaluation = Evaluation(attend, device, rng)
    cur = tile.streams[1]
    attn, *predicted = attend_evaluation.first((now,), (cur,))
    predicted = predicted[0] if predicted else None
    kept_past, middle = Attended.apply(past, now, attn, predicted, move)
    walk.note_finite(attn.detach())
    if predicted is not None:
        walk.note_finite(predicted.detach())
    move.middle = move.add_now(attn.detach(), cur)
    updated = middle
    for index, rows in enumerate(chunks):
        evaluation = Evaluation(partial(feed, rows=rows), device, rng)
        (mlp,) = evaluation.first((middle,), (move.middle[:, rows],))
        updated = FeedStep.apply(updated, mlp, move, index, evaluation)
    following = InnovationStep.apply(kept_past, updated, predicted, move, attend_evaluation)
    return now, following


class AdditiveStep(Function):
    """y = x + F(.) on one stream of one tile, for `cross_branch`.

    Args of forward:
        target: Carrier of the stream that is added to.
        update: F's result, (b, T, H).
        which: 0 for the left stream (attention), 1 for the right one (feed-forward).
        reads: Indices of the streams that F reads. If `which` is among them the inverse is a fixed point.
    """

    @staticmethod
    def forward(ctx, target: Tensor, update: Tensor, walk, tile, k, which, reads, evaluation):
        ctx.walk, ctx.tile, ctx.k, ctx.which, ctx.reads, ctx.evaluation = walk, tile, k, which, reads, evaluation
        ctx.dtype = update.dtype
        x = tile.streams[which]
        implicit = which in reads
        ctx.anchored = implicit and (k in walk.report.anchors or k in (walk.config.anchor_layers or ()))
        canaries = canary_rows(x, walk.config.num_canaries) if implicit and not ctx.anchored else None
        kept: tuple[Tensor, ...] = ()
        if ctx.anchored:
            kept = tuple(tile.streams)
        elif canaries is not None:
            kept = (canaries, *(stream.reshape(-1, stream.shape[-1])[canaries] for stream in tile.streams))
        ctx.num_kept = len(kept)
        walk.note_finite(update)
        y = quantize(update, walk.grids[0]).add_(x)
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
        return grad, grad.to(ctx.dtype), *(None,) * 6


def canary_rows(stream: Tensor, count: int) -> Tensor | None:
    """`count` token positions spread evenly over the tile (indices into B * T)."""
    num_tokens = stream.shape[0] * stream.shape[1]
    count = min(count, num_tokens)
    return torch.linspace(0, num_tokens - 1, count, device=stream.device).long() if count else None


def exactness(tile: Tile, like: Tensor) -> Tensor:
    return torch.ones_like(like) if tile.exact is None else tile.exact


def note_canary_error(walk: Walk, k: int, rebuilt: list[Tensor], true: tuple[Tensor, ...], rows: Tensor) -> None:
    """The largest error of both streams at the canary tokens, relative to the streams' root mean square there."""
    errors = []
    for stream, values in zip(rebuilt, true, strict=True):
        error = (stream.reshape(-1, stream.shape[-1])[rows].double() - values.double()).abs().amax()
        errors.append(error / values.double().square().mean().sqrt().clamp_min(1.0))
    walk.note_layer(k, canary_error=torch.stack(errors).amax())


def solve_fixed_point(
    walk: Walk, tile: Tile, k: int, y: Tensor, evaluation: Evaluation, side: Sequence[Tensor]
) -> Tensor:
    """Solve x + F(x, other) = y for the left stream, on the grid, started at y.

    K and V come from the right stream, which is known, so every token is a problem of its own. On the grid an
    iteration that repeats its argument has found an exact solution, and the evaluation that showed it is the one
    whose tensors backward uses.
    """
    config = walk.config
    if config.tolerance is None:
        # The rounding of what is read: an iteration that moves by less goes round in circles there.
        limit = (y.abs().amax(-1) * torch.finfo(walk.dtype).eps).clamp_min(2.0)
    else:
        limit = config.tolerance * 2.0**config.fraction_bits
    x, other = y, tile.streams[1]
    iterations = 0
    for _ in range(config.num_iterations):
        (update,) = evaluation.again(side, x, other)
        iterations += 1
        following = quantize(update, walk.grids[0]).neg_().add_(y)
        moved = (following - x).abs().amax(-1)
        x = following
        if is_concrete(moved) and bool((moved <= limit).all()):
            break
    walk.note_layer(k, iterations=iterations, unconverged=(moved > limit).double().mean())
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
    attend = Evaluation(attend_left if len(reads) == 2 else attend_right, left.device, rng)
    (update,) = attend.first(tuple((left, right)[i] for i in reads), tuple(tile.streams[i] for i in reads))
    left = AdditiveStep.apply(left, update, walk, tile, k, 0, reads, attend)
    feed_evaluation = Evaluation(feed, left.device, rng)
    (update,) = feed_evaluation.first((left,), (tile.streams[0],))
    right = AdditiveStep.apply(right, update, walk, tile, k, 1, (0,), feed_evaluation)
    return left, right


class StoredStep(Function):
    """`none`: identity on a layer's output, keeping the layer's input; in backward the layer runs again from it.

    `is_last`: the last layer's last tile, whose backward runs first, keeps what all layers share.
    """

    @staticmethod
    def forward(ctx, output: Tensor, hidden: Tensor, walk: Walk, evaluation: Evaluation, is_last: bool):
        ctx.walk, ctx.evaluation, ctx.is_last = walk, evaluation, is_last
        ctx.num_kept = len(walk.kept) if is_last else 0
        ctx.save_for_backward(hidden, *walk.kept[: ctx.num_kept], *evaluation.side_tensors())
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        hidden, *tensors = ctx.saved_tensors
        evaluation, walk = ctx.evaluation, ctx.walk
        if ctx.is_last:
            walk.kept = tensors[: ctx.num_kept]
            torch.autograd.Variable._execution_engine.queue_callback(walk.kept.clear)
        leaf = hidden.detach().requires_grad_(evaluation.differentiable[0])
        evaluation.again(tensors[ctx.num_kept :], hidden, carriers=(leaf,))
        return grad, None, None, None, None


class Release(Function):
    """Identity whose backward is a layer's last node and drops what was recomputed."""

    @staticmethod
    def forward(ctx, hidden: Tensor, evaluation: Evaluation):
        ctx.evaluation = evaluation
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        ctx.evaluation.recomputed = None
        return grad, None
