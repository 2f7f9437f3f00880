"""The nodes that a walk's graph is made of, but for a layer's own: reading a stream, its norm, the walk's two ends,
and what ties the carriers to the model's own loop.
"""

# B = batch, T = tokens, D = hidden size

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..ops.streams import Grid, dequantize, read_norm, read_norm_backward
from .dense import is_plain, norm_kind
from .recompute import Evaluation, at_end_of_backward, carrier_like, zeros_like_carrier
from .walk import Walk


class Read(Function):
    """carrier, int32 stream -> the stream's value in the model's dtype."""

    @staticmethod
    def forward(ctx, carrier: Tensor, stream: Tensor, grid: Grid, dtype: torch.dtype):
        ctx.carrier_dtype = carrier.dtype
        return dequantize(stream, grid, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad.to(ctx.carrier_dtype), None, None, None


class ReadNorm(Function):
    """carrier, int32 stream -> the carrier again, twice, the stream's value (or None), and its RMSNorm.

    What the residual connection gets of the gradient passes through here, and what else there is of the stream's
    gradient, so that they are added to the norm's in one pass.
    """

    @staticmethod
    def forward(
        ctx,
        carrier: Tensor,
        weight: Tensor,
        stream: Tensor,
        step: Tensor,
        eps: float,
        dtype: torch.dtype,
        rounds_first: bool,
        want_value: bool,
    ):
        value, normed, rstd = read_norm(stream, step, weight, eps, dtype, rounds_first, want_value)
        ctx.save_for_backward(stream, weight, rstd)
        ctx.step, ctx.rounds_first = step, rounds_first  # the grid's, made once for the model
        ctx.set_materialize_grads(False)
        return carrier.view_as(carrier), carrier.view_as(carrier), value if want_value else None, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_through: Tensor | None, grad_also: Tensor | None, *grads: Tensor | None):
        stream, weight, rstd = ctx.saved_tensors
        grad_value, grad_normed = grads
        if grad_normed is None:
            parts = [g.to(rstd.dtype) for g in (grad_through, grad_also, grad_value) if g is not None]
            return sum(parts) if parts else None, *(None,) * 7
        grad, grad_weight = read_norm_backward(
            grad_normed.contiguous(),
            grad_value,
            grad_through,
            grad_also,
            stream,
            ctx.step,
            weight,
            rstd,
            ctx.rounds_first,
            ctx.needs_input_grad[1],
        )
        return grad, grad_weight if ctx.needs_input_grad[1] else None, *(None,) * 6


def read_normed(
    carrier: Tensor, stream: Tensor, grid: Grid, norm: nn.Module, dtype: torch.dtype, want_value: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The carrier twice, value (where wanted) and `norm` of a stream: in one operation where the norm is a plain
    RMSNorm, by the module itself where it is not."""
    kind = norm_kind(norm) if is_plain(norm) else None
    if kind is None:
        value = Read.apply(carrier, stream, grid, dtype)
        return carrier, carrier, value, norm(value)
    eps, rounds_first = kind
    return ReadNorm.apply(carrier, norm.weight, stream, grid.vectors(stream)[1], eps, dtype, rounds_first, want_value)


class Start(Function):
    """The embedding (B, T, D) -> streams of every tile, and two carriers for each."""

    @staticmethod
    def forward(ctx, hidden: Tensor, walk: Walk, split: Callable[[Tensor], list[Tensor]], join: Callable[..., Tensor]):
        ctx.walk, ctx.join, ctx.dtype = walk, join, hidden.dtype
        ctx.set_materialize_grads(False)
        carriers = []
        for tile in walk.tiles:
            tile.streams, tile.position, tile.checksums = split(hidden[tile.rows]), 0, []
            for stream in dict.fromkeys(tile.streams):
                walk.remember(tile, stream)
            dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
            carriers += [carrier_like(s.shape, hidden.device, dtype) for s in tile.streams]
        return tuple(carriers)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):
        pairs = [ctx.join(*grads[i : i + 2]) for i in range(0, len(grads), 2)]
        grad = (torch.cat(pairs) if len(pairs) > 1 else pairs[0]).to(ctx.dtype)
        return grad, None, None, None


class Finish(Function):
    """What the final norm made of every tile -> one tensor (B, T, D). Keeps the streams; its backward begins the walk
    back.

    Args of forward:
        reads: Which of a tile's two streams the norm read.
        evaluations: The norm's, one per tile, run again here before its nodes.
    """

    @staticmethod
    def forward(ctx, walk: Walk, reads: tuple[int, ...], evaluations: list[Evaluation], *outputs: Tensor):
        ctx.walk, ctx.reads, ctx.evaluations = walk, reads, evaluations
        ctx.positions = [tile.position for tile in walk.tiles]
        tensors = [stream for tile in walk.tiles for stream in tile.streams]
        ctx.verified = bool(walk.tiles[0].checksums)
        if ctx.verified:
            tensors += [torch.stack(tile.checksums) for tile in walk.tiles]
        ctx.num_kept = len(walk.kept)
        tensors += walk.kept
        ctx.signed = walk.signs is not None
        if ctx.signed:
            tensors.append(walk.signs)
        ctx.save_for_backward(*tensors)
        for tile in walk.tiles:
            tile.streams, tile.checksums = [None, None], None
        walk.kept, walk.signs, walk.carriers = [], None, []
        out = torch.cat(outputs) if len(outputs) > 1 else outputs[0].view_as(outputs[0])
        return torch.where(walk.flags[0] == 0, out, float("nan"))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        walk, tensors = ctx.walk, list(ctx.saved_tensors)
        n = len(walk.tiles)
        walk.verdicts, walk.noted = [], {}
        for i, (tile, evaluation) in enumerate(zip(walk.tiles, ctx.evaluations, strict=True)):
            tile.streams, tile.position = tensors[2 * i : 2 * i + 2], ctx.positions[i]
            tile.checksums = tensors[2 * n + i] if ctx.verified else None
            tile.make_current("attention", evaluation)
            walk.verify_last(tile)
            evaluation.again((), *[tile.streams[j] for j in ctx.reads])
        if ctx.signed:
            walk.signs = tensors.pop()
        walk.kept = tensors[len(tensors) - ctx.num_kept :] if ctx.num_kept else []
        at_end_of_backward(walk.close)
        return (None, None, None, *(grad[tile.rows] for tile in walk.tiles))


class Enter(Function):
    """visible, *carriers -> *carriers, at a layer's begin.

    The carriers travel beside the model's own loop; `visible` is what the loop hands from layer to layer. `Enter` and
    `Leave` tie both together, so that hooks on a layer's inputs and outputs (FSDP2) fire before and after all of the
    layer's work, and every tile has left a layer before any tile enters the one below.
    """

    @staticmethod
    def forward(ctx, visible: Tensor, *carriers: Tensor):
        ctx.visible = visible.shape, visible.dtype, visible.device
        ctx.set_materialize_grads(False)
        return tuple(c.view_as(c) for c in carriers)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):
        shape, dtype, device = ctx.visible
        return (zeros_like_carrier(shape, device, dtype), *grads)


class Leave(Function):
    """*carriers -> visible, *carriers, at a layer's end; see `Enter`."""

    @staticmethod
    def forward(ctx, shape: torch.Size, dtype: torch.dtype, *carriers: Tensor):
        ctx.set_materialize_grads(False)
        return (zeros_like_carrier(shape, carriers[0].device, dtype), *(c.view_as(c) for c in carriers))

    @staticmethod
    @once_differentiable
    def backward(ctx, _, *grads: Tensor | None):
        return (None, None, *grads)
