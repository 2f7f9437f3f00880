"""Decoder layers and the final norm as they run in a walk.

`ReversibleLayer` is mixed in front of a Hugging Face decoder layer class. Without a walk the layer is what it was (for
cross_branch: the same function with ordinary tensors); with one it moves the walk's streams one layer on. Modules,
parameter names and hooks stay the layer's own; what a coupling adds lives in `layer.coupling`.
"""

# B = batch, T = tokens, D = hidden size

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..couplings.cross_branch import cross_branch_step
from ..couplings.steps import Release, StoredStep, innovation_step
from ..engine.dense import RunsInWalk, is_plain, norm_kind
from ..engine.nodes import Enter, Finish, Leave, Read, Start, read_normed
from ..engine.recompute import Evaluation
from ..engine.sublayers import (
    CrossBranchCoupling,
    GradientSum,
    StreamMaps,
    cross_attention,
    expert_sums,
    half_feed_forward,
    summed,
    uses_rng,
)
from ..engine.walk import Tile, Walk
from ..ops.streams import Grid, quantize


class ReversibleLayer(nn.Module):
    """Mixed in front of a decoder layer class by `conversion.convert`, which sets `coupling`, `layer_index`,
    `query_modules`."""

    coupling: nn.Module
    layer_index: int
    query_modules: tuple[str, ...]
    stream_maps: StreamMaps | None = None
    """The model's, in its first layer and its final norm; they belong to the backbone."""

    def forward(self, hidden_states: Tensor, *args: Any, walk: Walk | None = None, **kwargs: Any) -> Tensor:
        if walk is not None:
            return RUN[walk.config.coupling](self, walk, hidden_states, kwargs)
        if isinstance(self.coupling, CrossBranchCoupling):
            return self.forward_halves(hidden_states, kwargs)
        return super().forward(hidden_states, *args, **kwargs)

    def forward_halves(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """cross_branch with ordinary tensors: the two streams are the halves of `hidden_states`."""
        if self.stream_maps is not None:
            hidden_states = self.stream_maps.entry(hidden_states)
        x1, x2 = hidden_states.chunk(2, dim=-1)
        y1 = x1 + cross_attention(self, x1 if self.coupling.query_stream == "left" else x2, x2, kwargs)
        return torch.cat([y1, x2 + half_feed_forward(self, y1)], dim=-1)


Step = Callable[[nn.Module, Walk, Tile, Any, dict[str, GradientSum] | None, Tensor, Tensor], tuple[Tensor, Tensor]]


def run_on_streams(
    step: Step, layer: ReversibleLayer, walk: Walk, hidden_states: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """Move every tile's streams through one layer; the first layer makes them from the embedding."""
    if layer.layer_index == 0:
        if layer.stream_maps is not None:
            hidden_states = layer.stream_maps.entry(hidden_states)
        walk.begin(hidden_states)
        halves = walk.config.coupling == "cross_branch"
        split = partial(split_streams, walk.grids[0], halves)
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


class ReversibleNorm(RunsInWalk, nn.Module):
    """Mixed in front of the norm behind the last layer: it reads the streams, tile by tile, and ends the forward walk.

    Outside a walk it is the plain norm. What it saves for backward is dropped and made again like a sublayer's, so
    that no hidden state of the whole batch is kept beside the streams.
    """

    walk: Walk | None = None
    stream_maps: StreamMaps | None = None

    def plain(self, hidden_states: Tensor) -> Tensor:
        """The norm of a hidden state, or of what two streams side by side say it is."""
        return super().forward(hidden_states if self.stream_maps is None else self.stream_maps.exit(hidden_states))

    def forward(self, hidden_states: Tensor) -> Tensor:
        walk, self.walk = self.walk, None
        if walk is None or not walk.carriers:
            return self.plain(hidden_states)
        halves = walk.config.coupling == "cross_branch"
        read = partial(read_streams, walk.grids[-1], halves, walk.dtype)

        def function(*carriers_and_streams: Tensor) -> tuple[Tensor]:
            if not halves and is_plain(self) and norm_kind(self) is not None:
                return (read_normed(*carriers_and_streams, walk.grids[-1], self, walk.dtype)[2],)
            half = len(carriers_and_streams) // 2
            return (self.plain(read(carriers_and_streams[:half], carriers_and_streams[half:])),)

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
    grid: Grid, halves: bool, dtype: torch.dtype, carriers: tuple[Tensor, ...], streams: tuple[Tensor, ...]
) -> Tensor:
    values = [Read.apply(c, s, grid, dtype) for c, s in zip(carriers, streams, strict=True)]
    return torch.cat(values, dim=-1) if halves else values[0]


def split_streams(grid: Grid, halves: bool, hidden: Tensor) -> list[Tensor]:
    if halves:
        return [quantize(half, grid) for half in hidden.chunk(2, dim=-1)]
    stream = quantize(hidden, grid)
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
    sums = expert_sums(layer, len(walk.tiles))
    outputs = []
    for tile in walk.tiles:

        def function(carrier: Tensor, hidden: Tensor, tile: Tile = tile) -> tuple[Tensor]:
            with summed(layer, sums):
                return (plain(carrier, **walk.fetch(handle, tile)),)

        hidden = hidden_states[tile.rows] if len(walk.tiles) > 1 else hidden_states
        evaluation = Evaluation(function, hidden.device, uses_rng(layer))
        (output,) = evaluation.first((Release.apply(hidden, evaluation),), (hidden,))
        with on_host if walk.config.offload_inputs else contextlib.nullcontext():
            is_last = layer.layer_index == walk.num_layers - 1 and tile is walk.tiles[-1]
            outputs.append(StoredStep.apply(output, hidden.detach(), walk, evaluation, is_last))
    if layer.layer_index == walk.num_layers - 1:
        walk.kept = []
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


RUN: dict[str, Callable[..., Tensor]] = {
    "innovation": partial(run_on_streams, innovation_step),
    "cross_branch": partial(run_on_streams, cross_branch_step),
    "none": run_stored,
}
