"""innovation's move of the streams, as autograd nodes.

`innovation_step` runs a layer's sublayers on one tile in forward, moves the tile's streams (pure functions of
ops/streams), and leaves nodes behind whose backward evaluates the sublayers again, inverts the move, and states the
coupling's gradient.
"""

# b = sequences of one tile, T = tokens, D = hidden size

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...engine.nodes import read_normed
from ...engine.recompute import Evaluation, carrier_like
from ...engine.sublayers import attention, feed_forward, uses_rng
from ...engine.walk import Tile, Walk, is_concrete
from ...ops.experts import GradientSum
from ...ops.streams import add_update, gradients, move, undo


class InnovationMove:
    """One layer's move (s_{k-1}, s_k) -> (s_k, s_{k+1}) of one tile; what its nodes share.

    The feed-forward may run in several chunks of tokens. The move is elementwise, so every chunk is evaluated and
    moved, and in backward evaluated, inverted and differentiated, before the next one is: no chunk's activations wait
    for another's.
    """

    def __init__(self, walk: Walk, tile: Tile, k: int, m: int | None, chunks: list[slice]):
        self.walk, self.tile, self.k, self.m, self.chunks = walk, tile, k, m, chunks
        # Of s_{k-1}, s_k and s_{k+1}; what is added in between is on the last.
        self.past_grid, self.grid, self.next_grid = walk.grids[max(k - 1, 0)], walk.grids[k], walk.grids[k + 1]
        # Alive only while forward or backward is inside the layer. Forward: the middle state, which becomes s_{k+1}
        # chunk by chunk; backward: what the attention added to s_k, from which every chunk takes its middle state.
        self.middle: Tensor | None = None
        self.attn: Tensor | None = None
        self.predicted: Tensor | None = None
        self.prev: Tensor | None = None
        self.plain_past: Tensor | None = None
        self.num_left = 0
        self.grad_mlp: Tensor | None = None
        # Of the state that is being made, from its chunks.
        self.checksum: Tensor | None = None

    def sign(self) -> Tensor | None:
        walk = self.walk
        return None if walk.signs is None else walk.signs[self.k, self.tile.rows].view(-1, 1, 1)

    def gain(self, like: Tensor) -> Tensor:
        """2**-m, and less where the grid has become finer in between; (D,), or (b, 1, D) with signs."""
        gain, sign = self.next_grid.gain_by_channel(self.past_grid, self.m, like), self.sign()
        return gain if sign is None else gain * sign

    def add_now(self, update: Tensor, now: Tensor) -> Tensor:
        """s_k and the attention's result on the grid of s_{k+1}: the middle state."""
        finer = self.next_grid.finer_by_channel(self.grid, now)
        return add_update(update, now, self.next_grid.vectors(now)[0], finer, self.walk.flags)

    def settings(self, rows: slice, like: Tensor) -> tuple[Any, ...]:
        """What `move` and `undo` take alike."""
        scales = (self.past_grid.vectors(like)[0], self.next_grid.vectors(like)[0])
        return (*scales, self.grid.finer_by_channel(self.past_grid, like), self.m, rows.start)

    def add_checksum(self, part: Tensor) -> None:
        self.checksum = part if self.checksum is None else self.checksum + part

    def predicted_of(self, rows: slice) -> Tensor | None:
        return None if self.predicted is None else self.predicted[:, rows]

    def forward_chunk(self, index: int, mlp: Tensor) -> Tensor:
        """Turn one chunk of the middle state into s_{k+1}; returns its side bits."""
        rows = self.chunks[index]
        middle = self.middle[:, rows]
        if self.m is None:
            middle.copy_(self.walk.add(mlp, middle, self.next_grid))
            return middle.new_empty(0, dtype=torch.uint8)
        prev, cur = (stream[:, rows] for stream in self.tile.streams)
        bits, part = move(
            middle, prev, cur, mlp, self.predicted_of(rows), self.sign(), *self.settings(rows, cur), self.walk.flags
        )
        self.add_checksum(part)
        return bits

    def forward_end(self) -> tuple[Tensor, ...]:
        """Move the streams on; returns a plain layer's past, which its inverse needs."""
        prev, cur = self.tile.streams
        walk, tile, following = self.walk, self.tile, self.middle
        tile.streams, tile.position = [cur, following], self.k + 1
        if self.m is None:
            walk.remember(tile, following)
        elif walk.config.verify != "off":
            tile.checksums.append(self.checksum)
        self.middle = self.predicted = self.checksum = None
        return (prev,) if self.m is None and self.k else ()

    def middle_of(self, rows: slice) -> Tensor:
        """Backward: the middle state of one chunk."""
        return self.add_now(self.attn[:, rows], self.tile.streams[0][:, rows])

    def invert(self, index: int, middle: Tensor, mlp: Tensor, bits: Tensor) -> None:
        """Recover the past of one chunk from its feed-forward's result; after the last chunk move the streams back."""
        rows, tile, walk, k = self.chunks[index], self.tile, self.walk, self.k
        cur, following = tile.streams
        if self.m is None:
            updated = walk.add(mlp, middle, self.next_grid)
            if walk.config.verify != "off" and is_concrete(updated):
                walk.note_verdict(f"output of layer {k}", (updated != following[:, rows]).any())
            self.prev = self.plain_past if k else cur
        else:
            if self.prev is None:
                # s_{k+1} is not needed once inverted; the last two states are autograd's, for a second walk.
                self.prev = torch.empty_like(cur) if k >= walk.num_layers - 2 else following
            past, following, cur_rows = self.prev[:, rows], following[:, rows], cur[:, rows]
            predicted, sign = self.predicted_of(rows), self.sign()
            part = undo(past, following, cur_rows, middle, mlp, predicted, sign, bits, *self.settings(rows, cur_rows))
            self.add_checksum(part)
        self.num_left -= 1
        if self.num_left == 0:
            tile.streams, tile.position = [self.prev, cur], k
            if self.m is not None:
                walk.verify(tile, k - 1, self.prev, f"input of layer {k - 1}", self.checksum)
            self.attn = self.predicted = self.prev = self.plain_past = self.checksum = None


class InnovationStep(Function):
    """The coupling itself: carriers of s_{k-1} and s_k + f_k(s_k) -> carrier of s_{k+1}.

    Its backward is the layer's first node: it evaluates the attention on s_k, for everything below. The gain is
    applied by `Attended`, the layer's last node but the attention's own, so that one gradient of the state is alive
    in between.
    """

    @staticmethod
    def forward(ctx, past: Tensor, updated: Tensor, move: InnovationMove, evaluation: Evaluation):
        ctx.move, ctx.evaluation = move, evaluation
        kept = move.forward_end()
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
        move.plain_past = tensors[0] if ctx.num_kept else None
        tile.make_current("attention", evaluation)
        _, _, move.attn, *predicted = evaluation.again(tensors[ctx.num_kept :], tile.streams[0])
        move.predicted = predicted[0] if predicted else None
        move.num_left = len(move.chunks)
        return None if move.m is None else grad, grad, None, None


class Attended(Function):
    """Carriers of s_{k-1} and s_k, attention and prediction -> carriers of s_{k-1} and of the middle state.

    The values are added on the grid, beside the graph. Backward has the coupling's gradient: with d = the gradient of
    s_{k+1} and g = sign * 2**-m, s_{k-1} gets g d, s_k gets the middle state's less g d, the prediction gets -g d.
    """

    @staticmethod
    def forward(ctx, past: Tensor, now: Tensor, attn: Tensor, predicted: Tensor | None, move: InnovationMove):
        ctx.move, ctx.dtype, ctx.has_prediction = move, attn.dtype, predicted is not None
        ctx.set_materialize_grads(False)
        return past.view_as(past), now.view_as(now)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_middle: Tensor):
        move = ctx.move
        if move.grad_mlp is not None:
            grad_middle, move.grad_mlp = move.grad_mlp.add_(grad_middle), None
        if grad is None:
            return None, grad_middle, grad_middle.to(ctx.dtype), None, None
        past, now, attn, predicted = gradients(grad, grad_middle, move.gain(grad), ctx.dtype, ctx.has_prediction)
        return past, now, attn, predicted if ctx.has_prediction else None, None


class FeedStep(Function):
    """Adds one chunk's feed-forward to the middle state, on the grid; in backward evaluates it and inverts the chunk.

    Takes and returns the carrier of the whole state; backward passes the gradient through.
    """

    @staticmethod
    def forward(ctx, middle: Tensor, mlp: Tensor, move: InnovationMove, index: int, evaluation: Evaluation):
        ctx.move, ctx.index, ctx.evaluation, ctx.dtype = move, index, evaluation, mlp.dtype
        ctx.save_for_backward(move.forward_chunk(index, mlp), *evaluation.side_tensors())
        return middle.view_as(middle)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        move, evaluation = ctx.move, ctx.evaluation
        rows = move.chunks[ctx.index]
        move.tile.make_current("feed_forward", evaluation)
        bits, *side = ctx.saved_tensors
        middle = move.middle_of(rows)
        *_, mlp = evaluation.again(side, middle)
        move.invert(ctx.index, middle, mlp, bits)
        return grad, grad[:, rows].to(ctx.dtype), None, None, None


class Rows(Function):
    """The carrier of some tokens of a state; the gradient goes into a buffer that `Attended`, which waits for it,
    adds."""

    @staticmethod
    def forward(ctx, carrier: Tensor, move: InnovationMove, rows: slice):
        ctx.move, ctx.rows, ctx.shape = move, rows, carrier.shape
        return carrier[:, rows].view(carrier[:, rows].shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        move = ctx.move
        if move.grad_mlp is None:
            # Every row is written by exactly one chunk.
            move.grad_mlp = grad.new_zeros(ctx.shape)
        move.grad_mlp[:, ctx.rows] = grad
        return None, None, None


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
        through, past, x, normed = read_normed(
            carrier, stream, move.grid, layer.input_layernorm, dtype, want_value=predictor is not None
        )
        attn = attention(layer, normed, walk.fetch(kwargs_handle, tile))
        return (through, past, attn) if predictor is None else (through, past, attn, predictor(x))

    chunks = walk.token_chunks(now.shape[1])
    move = InnovationMove(walk, tile, layer.layer_index, layer.coupling.side_bits, chunks)

    def feed(carrier: Tensor, stream: Tensor, rows: slice) -> tuple[Tensor, ...]:
        if len(chunks) > 1 and carrier.shape != stream.shape:
            carrier = Rows.apply(carrier, move, rows)
        through, *_, normed = read_normed(carrier, stream, move.next_grid, layer.post_attention_layernorm, dtype)
        return through, feed_forward(layer, normed, sums)

    settings = now.device, uses_rng(layer), walk.keeps(layer.layer_index)
    attend_evaluation = Evaluation(attend, *settings)
    cur = tile.streams[1]
    through, following_past, attn, *predicted = attend_evaluation.first((now,), (cur,))
    predicted = predicted[0] if predicted else None
    kept_past, middle = Attended.apply(past, through, attn, predicted, move)
    move.predicted = None if predicted is None else predicted.detach()
    move.middle = move.add_now(attn.detach(), cur)
    updated = middle
    for index, rows in enumerate(chunks):
        evaluation = Evaluation(partial(feed, rows=rows), *settings)
        through, mlp = evaluation.first((middle,), (move.middle[:, rows],))
        # A whole state's gradient passes through the norm's node, that of a chunk goes by its own way.
        updated = FeedStep.apply(through if len(chunks) == 1 else updated, mlp, move, index, evaluation)
    following = InnovationStep.apply(kept_past, updated, move, attend_evaluation)
    return following_past, following
