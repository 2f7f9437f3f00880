"""Decoder layers that run reversibly: a layer's own sublayers joined by a coupling.

`ReversibleLayer` is mixed in front of a Hugging Face decoder layer class. Without a walk the layer is what it was (for
cross_branch: the same function with ordinary tensors); with one it moves the walk's streams one layer on. Modules, parameter
names and hooks stay the layer's own; what a coupling adds lives in `layer.coupling`.
"""

# B = batch, T = tokens, D = hidden size, H = D / 2

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers import initialization

from .config import ReversibleConfig
from .couplings import dequantize, innovation_forward, innovation_inverse, quantize
from .reversible import (
    Enter,
    Evaluation,
    Finish,
    Leave,
    Read,
    Start,
    Tile,
    Walk,
    carrier_like,
    is_concrete,
)

RNG_SETTINGS = ("attention_dropout", "hidden_dropout", "resid_dropout", "router_jitter_noise")


def first_tensor(output: Any) -> Tensor:
    """Sublayers return the hidden states alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


# --- what a coupling adds to a layer ------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """P_k of the innovation coupling: (B, T, D) -> (B, T, D), linear with bias, zero at first (R_k = identity).

    Args:
        hidden_size: D.
        rank: None for a full matrix, else the rank of its factors (at least 1).
    """

    def __init__(self, hidden_size: int, rank: int | None):
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False) if rank is not None else None
        self.up = nn.Linear(hidden_size if rank is None else rank, hidden_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """transformers' initialisers leave alone what a checkpoint has already filled."""
        initialization.zeros_(self.up.weight)
        initialization.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x if self.down is None else self.down(x))


class InnovationCoupling(nn.Module):
    """The predictor of one layer, or nothing where the layer runs plainly or predicts by identity."""

    def __init__(self, hidden_size: int, layer: int, config: ReversibleConfig):
        super().__init__()
        coupled = layer >= config.plain_layers
        self.side_bits: int | None = config.side_bits_of(layer) if coupled else None
        self.predictor = Predictor(hidden_size, config.predictor_rank) if coupled and config.predictor_rank != 0 else None


class CrossBranchCoupling(nn.Module):
    """Projection adapters of one layer (arXiv 2512.20920): up H -> D in front of a sublayer, down D -> H behind it.

    They start as the two halves of the identity: the left stream is the first half of the hidden state, the right one the second.
    """

    def __init__(self, hidden_size: int, layer: int, config: ReversibleConfig):
        super().__init__()
        half = hidden_size // 2
        if hidden_size % 2:
            raise ValueError(f"cross_branch splits the hidden state in two; hidden_size={hidden_size} is odd.")
        self.query_stream = config.query_stream
        self.query_up = nn.Linear(half, hidden_size, bias=False)
        self.key_value_up = nn.Linear(half, hidden_size, bias=False)
        self.attention_down = nn.Linear(hidden_size, half, bias=False)
        self.mlp_up = nn.Linear(half, hidden_size, bias=False)
        self.mlp_down = nn.Linear(hidden_size, half, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        half = self.mlp_down.out_features
        for module, offset in (
            (self.query_up, 0),
            (self.key_value_up, half),
            (self.attention_down, 0),
            (self.mlp_up, 0),
            (self.mlp_down, half),
        ):
            start = torch.zeros_like(module.weight)
            wide = start if module.out_features > module.in_features else start.T
            wide[offset : offset + half].fill_diagonal_(1.0)
            initialization.copy_(module.weight, start)


class NoCoupling(nn.Module):
    """`none`: nothing is added."""

    def __init__(self, hidden_size: int, layer: int, config: ReversibleConfig):
        super().__init__()


COUPLINGS = {"innovation": InnovationCoupling, "cross_branch": CrossBranchCoupling, "none": NoCoupling}


# --- a layer's residual updates -----------------------------------------------------------------------------------------


def attention(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    return first_tensor(layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs))


def feed_forward(layer: nn.Module, hidden: Tensor, sums: dict[str, GradientSum] | None = None) -> Tensor:
    with summed(layer, sums or {}):
        return first_tensor(layer.mlp(layer.post_attention_layernorm(hidden)))


class GradientSum:
    """The gradient of one expert parameter while the walk is in its layer: one buffer for all tiles and chunks."""

    def __init__(self, num_uses: int):
        self.num_uses, self.seen = num_uses, 0
        self.total: Tensor | None = None


class SumOverTiles(Function):
    """Identity on a parameter, once per tile; backward adds the tiles' gradients up in place and passes the sum on with the last.

    Autograd alone would keep three tensors of the parameter's size (sum so far, new gradient, their sum) wherever it may not add
    in place.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, gradient_sum: GradientSum):
        ctx.gradient_sum = gradient_sum
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        its = ctx.gradient_sum
        its.total = grad if its.total is None else its.total.add_(grad)
        its.seen += 1
        if its.seen < its.num_uses:
            return None, None
        total, its.total, its.seen = its.total, None, 0
        return total, None


class TiledExperts(nn.Module):
    """Mixed in front of a family's experts class: while a tile uses them, its fused parameters are read through `SumOverTiles`.

    The node is made when the parameter is read, not before: autograd then adds a gradient up before it makes the next one.
    """

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        in_use = self.__dict__.get("in_use")
        if in_use is None or name not in in_use[0]:
            return value
        sums, views = in_use
        if name not in views:
            views[name] = SumOverTiles.apply(value, sums[name])
        return views[name]


def expert_sums(layer: nn.Module, num_uses: int) -> dict[str, GradientSum]:
    """A `GradientSum` for every fused expert parameter (E, ., .) that trains; none where the experts are used once."""
    experts = getattr(layer.mlp, "experts", None)
    if experts is None or num_uses == 1 or not torch.is_grad_enabled():
        return {}
    named = experts.named_parameters(recurse=False)
    return {name: GradientSum(num_uses) for name, parameter in named if parameter.dim() == 3 and parameter.requires_grad}


@contextlib.contextmanager
def summed(layer: nn.Module, sums: dict[str, GradientSum]) -> Iterator[None]:
    """While open, a tile uses the layer's experts."""
    if not sums:
        yield
        return
    layer.mlp.experts.in_use = (sums, {})
    try:
        yield
    finally:
        del layer.mlp.experts.in_use


@contextlib.contextmanager
def queries_from(module: nn.Module, hidden: Tensor) -> Iterator[None]:
    """While open, the linear map `module` reads `hidden` instead of what it is called with.

    Queries are the only part of an attention module that reads the hidden states through this map, so cross-branch attention works
    for every attention kind (GQA, norms on queries and keys, MLA) without a forward of its own.
    """
    handle = module.register_forward_pre_hook(lambda _, args: (hidden, *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def cross_attention(layer: nn.Module, x_query: Tensor, x_key_value: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """P_down Attn(Q from N(P_up_q x_query), K and V from N(P_up_kv x_key_value)): (B, T, H) twice -> (B, T, H)."""
    adapters, norm = layer.coupling, layer.input_layernorm
    attn = layer.self_attn
    query = norm(adapters.query_up(x_query))
    key_value = norm(adapters.key_value_up(x_key_value))
    name = next(n for n in layer.query_modules if getattr(attn, n, None) is not None)
    with queries_from(getattr(attn, name), query):
        out = first_tensor(attn(hidden_states=key_value, **kwargs))
    return adapters.attention_down(out)


def half_feed_forward(layer: nn.Module, y1: Tensor, sums: dict[str, GradientSum] | None = None) -> Tensor:
    """P_down MoE(N(P_up y1)): (B, T, H) -> (B, T, H)."""
    adapters = layer.coupling
    return adapters.mlp_down(feed_forward(layer, adapters.mlp_up(y1), sums))


def uses_rng(layer: nn.Module) -> bool:
    config = layer.self_attn.config
    return any(getattr(config, name, 0) for name in RNG_SETTINGS) or any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in layer.modules()
    )


# --- steps ----------------------------------------------------------------------------------------------------------------


class InnovationMove:
    """One layer's move (s_{k-1}, s_k) -> (s_k, s_{k+1}) of one tile; what its nodes share.

    The feed-forward may run in several chunks of tokens. The inverse is elementwise, so in backward every chunk is evaluated,
    inverted and differentiated before the next one is: no chunk's activations wait for another's.
    """

    def __init__(self, walk: Walk, tile: Tile, k: int, m: int | None, chunks: list[slice]):
        self.walk, self.tile, self.k, self.m, self.chunks = walk, tile, k, m, chunks
        self.fraction_bits = walk.config.fraction_bits
        # Alive only while forward or backward is inside the layer. Forward: the middle state on the grid; backward: what
        # the attention added to s_k, from which every chunk takes its middle state.
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
        return None if self.predicted is None else quantize(self.predicted[:, rows], self.fraction_bits)

    def forward(self, updated: Tensor) -> tuple[Tensor, ...]:
        """Move the streams on; returns the tensors that the inverse needs: packed bits per chunk, or a plain layer's past."""
        prev, cur = self.tile.streams
        kept: list[Tensor] = []
        if self.m is None:
            following = updated
            kept = [prev] if self.k else []
        else:
            parts = []
            for rows in self.chunks:
                part, bits = innovation_forward(
                    prev[:, rows], cur[:, rows], updated[:, rows], self.grid_prediction(rows), self.sign(), self.m
                )
                parts.append(part)
                kept += [] if bits is None else [bits]
            following = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        self.tile.streams, self.tile.position = [cur, following], self.k + 1
        self.walk.remember(self.tile, following)
        return tuple(kept)

    def middle_of(self, rows: slice) -> Tensor:
        """Backward: the middle state of one chunk."""
        return self.tile.streams[0][:, rows] + quantize(self.attn[:, rows], self.fraction_bits)

    def invert(self, index: int, middle: Tensor, mlp: Tensor) -> None:
        """Recover the past of one chunk from its feed-forward's result; after the last chunk move the streams back."""
        rows, tile, walk, k = self.chunks[index], self.tile, self.walk, self.k
        cur, following = tile.streams
        updated = middle + quantize(mlp, self.fraction_bits)
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

    Its backward is the layer's first node: it evaluates the attention on s_k, for everything below. The gain is applied by
    `Attended`, the layer's last node but the attention's own, so that one gradient of the state is alive in between.
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
        move.bits = ctx.saved_tensors[: ctx.num_kept]
        evaluation.restore_side_tensors(ctx.saved_tensors[ctx.num_kept :])
        tile.make_current("attention", evaluation)
        move.attn, *predicted = evaluation.again(tile.streams[0])
        move.predicted = predicted[0] if predicted else None
        move.num_left = len(move.chunks)
        return None if move.m is None else grad, grad, None, None, None


class Attended(Function):
    """Carriers of s_{k-1} and s_k, attention and prediction -> carriers of s_{k-1} and of the middle state.

    The values are added on the grid, beside the graph. Backward has the coupling's gradient: with d = the gradient of s_{k+1}
    and g = sign * 2**-m, s_{k-1} gets g d, s_k gets the middle state's less g d, the prediction gets -g d.
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
        grad_past = grad * 2.0**-move.m
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
        move.middle[:, move.chunks[index]] += quantize(mlp, move.fraction_bits)
        ctx.save_for_backward(*evaluation.side_tensors())
        return middle.view_as(middle)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        move, evaluation = ctx.move, ctx.evaluation
        rows = move.chunks[ctx.index]
        evaluation.restore_side_tensors(ctx.saved_tensors)
        move.tile.make_current("feed_forward", evaluation)
        middle = move.middle_of(rows)
        (mlp,) = evaluation.again(middle)
        move.invert(ctx.index, middle, mlp)
        return grad, grad[:, rows].to(ctx.dtype), None, None, None


class ReadChunk(Function):
    """`Read` for one chunk of several: its gradient goes into a buffer that `Attended`, which waits for it, adds."""

    @staticmethod
    def forward(ctx, carrier: Tensor, stream: Tensor, fraction_bits: int, dtype: torch.dtype, move: InnovationMove, rows: slice):
        ctx.move, ctx.rows, ctx.shape = move, rows, carrier.shape
        return dequantize(stream, fraction_bits, dtype)

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
    layer: nn.Module, walk: Walk, tile: Tile, kwargs_handle: Any, sums: dict[str, GradientSum], past: Tensor, now: Tensor
) -> tuple[Tensor, Tensor]:
    fraction_bits, dtype = walk.config.fraction_bits, walk.dtype
    predictor = layer.coupling.predictor

    def attend(carrier: Tensor, stream: Tensor) -> tuple[Tensor, ...]:
        x = Read.apply(carrier, stream, fraction_bits, dtype)
        attn = attention(layer, x, walk.fetch(kwargs_handle, tile))
        return (attn,) if predictor is None else (attn, predictor(x))

    chunks = walk.token_chunks(now.shape[1])
    move = InnovationMove(walk, tile, layer.layer_index, layer.coupling.side_bits, chunks)

    def feed(carrier: Tensor, stream: Tensor, rows: slice) -> tuple[Tensor]:
        if len(chunks) == 1:
            hidden = Read.apply(carrier, stream, fraction_bits, dtype)
        else:
            hidden = ReadChunk.apply(carrier, stream, fraction_bits, dtype, move, rows)
        return (feed_forward(layer, hidden, sums),)

    rng, device = uses_rng(layer), now.device
    attend_evaluation = Evaluation(attend, device, rng)
    cur = tile.streams[1]
    attn, *predicted = attend_evaluation.first((now,), (cur,))
    predicted = predicted[0] if predicted else None
    kept_past, middle = Attended.apply(past, now, attn, predicted, move)
    move.middle = cur + quantize(attn.detach(), fraction_bits)
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
        ctx.canaries = canary_rows(x, walk.config.num_canaries) if implicit and not ctx.anchored else None
        kept: tuple[Tensor, ...] = ()
        if ctx.anchored:
            kept = tuple(tile.streams)
        elif ctx.canaries is not None:
            kept = (x.reshape(-1, x.shape[-1])[ctx.canaries],)
        ctx.num_kept = len(kept)
        y = x + quantize(update, walk.config.fraction_bits)
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
        kept, side = ctx.saved_tensors[: ctx.num_kept], ctx.saved_tensors[ctx.num_kept :]
        evaluation.restore_side_tensors(side)
        tile.make_current(("attention", "feed_forward")[which], evaluation)
        y = tile.streams[which]
        if ctx.anchored:
            tile.streams = list(kept)
            evaluation.again(*[tile.streams[i] for i in reads])
            walk.report.note_layer(k, anchored=1, iterations=1)
        elif which not in reads:
            (update,) = evaluation.again(*[tile.streams[i] for i in reads])
            tile.streams[which] = y - quantize(update, walk.config.fraction_bits)
        else:
            tile.streams[which] = solve_fixed_point(walk, tile, k, y, evaluation)
            if kept:
                note_canary_error(walk, k, tile.streams[which], kept[0], ctx.canaries)
        exact = walk.config.query_stream == "right"
        # Checksums 0 and 1 are the two streams of the embedding; the input of a step was noted two steps before its output.
        walk.verify(tile, 2 * k + which, tile.streams[which], f"{('left', 'right')[which]} input of layer {k}", exact)
        tile.position = 2 * k + which
        return grad, grad.to(ctx.dtype), *(None,) * 6


def canary_rows(stream: Tensor, count: int) -> Tensor | None:
    """`count` token positions spread evenly over the tile (indices into B * T)."""
    num_tokens = stream.shape[0] * stream.shape[1]
    count = min(count, num_tokens)
    return torch.linspace(0, num_tokens - 1, count, device=stream.device).long() if count else None


def note_canary_error(walk: Walk, k: int, rebuilt: Tensor, true: Tensor, rows: Tensor) -> None:
    error = (rebuilt.reshape(-1, rebuilt.shape[-1])[rows].double() - true.double()).abs().amax()
    scale = true.double().square().mean().sqrt().clamp_min(1.0)
    walk.report.note_layer(k, canary_error=error / scale)


def solve_fixed_point(walk: Walk, tile: Tile, k: int, y: Tensor, evaluation: Evaluation) -> Tensor:
    """Solve x + F(x, other) = y for the left stream, on the grid, started at y.

    K and V come from the right stream, which is known, so every token is a problem of its own. On the grid an iteration that
    repeats its argument has found an exact solution, and the evaluation that showed it is the one whose tensors backward uses.
    """
    config = walk.config
    limit = config.tolerance * 2.0**config.fraction_bits
    x, other = y, tile.streams[1]
    iterations = 0
    for _ in range(config.num_iterations):
        (update,) = evaluation.again(x, other)
        iterations += 1
        following = y - quantize(update, config.fraction_bits)
        moved = (following - x).abs().amax(-1)
        x = following
        if is_concrete(moved) and bool((moved <= limit).all()):
            break
    walk.report.note_layer(k, iterations=iterations, unconverged=(moved > limit).double().mean())
    return x


def cross_branch_step(
    layer: nn.Module, walk: Walk, tile: Tile, kwargs_handle: Any, sums: dict[str, GradientSum], left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    fraction_bits, dtype = walk.config.fraction_bits, walk.dtype

    def attend_left(c1: Tensor, c2: Tensor, s1: Tensor, s2: Tensor) -> tuple[Tensor]:
        x2 = Read.apply(c2, s2, fraction_bits, dtype)
        x1 = Read.apply(c1, s1, fraction_bits, dtype)
        return (cross_attention(layer, x1, x2, walk.fetch(kwargs_handle, tile)),)

    def attend_right(c2: Tensor, s2: Tensor) -> tuple[Tensor]:
        x2 = Read.apply(c2, s2, fraction_bits, dtype)
        return (cross_attention(layer, x2, x2, walk.fetch(kwargs_handle, tile)),)

    def feed(c1: Tensor, s1: Tensor) -> tuple[Tensor]:
        return (half_feed_forward(layer, Read.apply(c1, s1, fraction_bits, dtype), sums),)

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
    """`none`: identity on a layer's output, keeping the layer's input; in backward the layer runs again from it."""

    @staticmethod
    def forward(ctx, output: Tensor, hidden: Tensor, evaluation: Evaluation):
        ctx.evaluation = evaluation
        ctx.save_for_backward(hidden, *evaluation.side_tensors())
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        hidden, *side = ctx.saved_tensors
        ctx.evaluation.restore_side_tensors(side)
        ctx.evaluation.again(hidden, carriers=(hidden.detach().requires_grad_(),))
        return grad, None, None


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


# --- the layer ------------------------------------------------------------------------------------------------------------


class ReversibleLayer(nn.Module):
    """Mixed in front of a decoder layer class by `conversion.convert`, which sets `coupling`, `layer_index`, `query_modules`."""

    coupling: nn.Module
    layer_index: int
    query_modules: tuple[str, ...]

    def forward(self, hidden_states: Tensor, *args: Any, walk: Walk | None = None, **kwargs: Any) -> Tensor:
        if walk is not None:
            return RUN[walk.config.coupling](self, walk, hidden_states, kwargs)
        if isinstance(self.coupling, CrossBranchCoupling):
            return self.forward_halves(hidden_states, kwargs)
        return super().forward(hidden_states, *args, **kwargs)

    def forward_halves(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """cross_branch with ordinary tensors: the two streams are the halves of `hidden_states`."""
        x1, x2 = hidden_states.chunk(2, dim=-1)
        y1 = x1 + cross_attention(self, x1 if self.coupling.query_stream == "left" else x2, x2, kwargs)
        return torch.cat([y1, x2 + half_feed_forward(self, y1)], dim=-1)


Step = Callable[[nn.Module, Walk, Tile, Any, dict[str, GradientSum], Tensor, Tensor], tuple[Tensor, Tensor]]


def run_on_streams(step: Step, layer: ReversibleLayer, walk: Walk, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Move every tile's streams through one layer; the first layer makes them from the embedding."""
    if layer.layer_index == 0:
        walk.begin(hidden_states)
        halves = walk.config.coupling == "cross_branch"
        split = partial(split_streams, walk.config.fraction_bits, halves)
        carriers = Start.apply(hidden_states, walk, split, JOIN_GRADS[halves])
    else:
        carriers = Enter.apply(hidden_states, *walk.carriers)
    handle = walk.stash(kwargs)
    # cross_branch feeds a tile at once.
    num_chunks = len(walk.token_chunks(hidden_states.shape[1])) if walk.config.coupling == "innovation" else 1
    sums = expert_sums(layer, len(walk.tiles) * num_chunks)
    moved: list[Tensor] = []
    for i, tile in enumerate(walk.tiles):
        moved += step(layer, walk, tile, handle, sums, carriers[2 * i], carriers[2 * i + 1])
    visible, *walk.carriers = Leave.apply(hidden_states.shape, walk.dtype, *moved)
    return visible


class ReversibleNorm(nn.Module):
    """Mixed in front of the norm behind the last layer: it reads the streams, tile by tile, and ends the forward walk.

    Outside a walk it is the plain norm. What it saves for backward is dropped and made again like a sublayer's, so that no
    hidden state of the whole batch is kept beside the streams.
    """

    walk: Walk | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        walk, self.walk = self.walk, None
        if walk is None or not walk.carriers:
            return super().forward(hidden_states)
        plain = super().forward
        halves = walk.config.coupling == "cross_branch"
        read = partial(read_streams, walk.config.fraction_bits, halves, walk.dtype)

        def function(*carriers_and_streams: Tensor) -> tuple[Tensor]:
            half = len(carriers_and_streams) // 2
            return (plain(read(carriers_and_streams[:half], carriers_and_streams[half:])),)

        carriers = Enter.apply(hidden_states, *walk.carriers)
        used = (0, 1) if halves else (1,)
        outputs, evaluations = [], []
        for i, tile in enumerate(walk.tiles):
            evaluation = Evaluation(function, hidden_states.device, False)
            mine = tuple(carriers[2 * i + j] for j in used)
            outputs += evaluation.first(mine, tuple(tile.streams[j] for j in used))
            evaluations.append(evaluation)
        return Finish.apply(walk, used, evaluations, *outputs)


def read_streams(
    fraction_bits: int, halves: bool, dtype: torch.dtype, carriers: tuple[Tensor, ...], streams: tuple[Tensor, ...]
) -> Tensor:
    values = [Read.apply(c, s, fraction_bits, dtype) for c, s in zip(carriers, streams, strict=True)]
    return torch.cat(values, dim=-1) if halves else values[0]


def split_streams(fraction_bits: int, halves: bool, hidden: Tensor) -> list[Tensor]:
    if halves:
        return [quantize(half, fraction_bits) for half in hidden.chunk(2, dim=-1)]
    stream = quantize(hidden, fraction_bits)
    return [stream, stream]


def join_halves(left: Tensor | None, right: Tensor | None) -> Tensor:
    left = torch.zeros_like(right) if left is None else left
    return torch.cat([left, torch.zeros_like(left) if right is None else right], dim=-1)


def join_states(past: Tensor | None, now: Tensor | None) -> Tensor:
    return now if past is None else past if now is None else past + now


JOIN_GRADS = {True: join_halves, False: join_states}


def run_stored(layer: ReversibleLayer, walk: Walk, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """`none`: the plain layer, its input stored per tile."""
    if layer.layer_index == 0:
        walk.begin(hidden_states)
    handle = walk.stash(kwargs)
    plain = super(ReversibleLayer, layer).forward
    on_host = torch.autograd.graph.save_on_cpu(pin_memory=hidden_states.device.type == "cuda")
    outputs = []
    for tile in walk.tiles:

        def function(carrier: Tensor, hidden: Tensor, tile: Tile = tile) -> tuple[Tensor]:
            return (plain(carrier, **walk.fetch(handle, tile)),)

        hidden = hidden_states[tile.rows] if len(walk.tiles) > 1 else hidden_states
        evaluation = Evaluation(function, hidden.device, uses_rng(layer))
        (output,) = evaluation.first((Release.apply(hidden, evaluation),), (hidden,))
        with on_host if walk.config.offload_inputs else contextlib.nullcontext():
            outputs.append(StoredStep.apply(output, hidden.detach(), evaluation))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


RUN: dict[str, Callable[..., Tensor]] = {
    "innovation": partial(run_on_streams, innovation_step),
    "cross_branch": partial(run_on_streams, cross_branch_step),
    "none": run_stored,
}
