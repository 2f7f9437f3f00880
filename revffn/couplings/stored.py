"""`none`: the plain layer run by this engine, its input stored per tile, on the device or on the host."""

# B = batch, T = tokens, D = hidden size

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..config import ReversibleConfig
from ..engine.recompute import Evaluation, at_end_of_backward
from ..engine.sublayers import expert_sums, summed, uses_rng
from ..engine.walk import Tile, Walk
from .base import Coupling


class Stored(Coupling):
    """The plain function, each layer's input kept."""

    name = "none"
    has_streams = False

    def runs(self, training: bool) -> bool:
        return training and torch.is_grad_enabled()

    def label(self, config: ReversibleConfig) -> str:
        return f"none, inputs {'in host memory' if config.offload_inputs else 'stored'}"

    def savings(self, config: ReversibleConfig) -> Iterator[tuple[dict[str, Any], str]]:
        yield {"coupling": "innovation"}, "coupling innovation instead of none"

    def run(self, layer: nn.Module, walk: Walk, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if layer.layer_index == 0:
            walk.begin(hidden_states)
        handle = walk.stash(kwargs)
        on_host = torch.autograd.graph.save_on_cpu(pin_memory=hidden_states.device.type == "cuda")
        sums = expert_sums(layer, len(walk.tiles))
        outputs = []
        for tile in walk.tiles:

            def function(carrier: Tensor, hidden: Tensor, tile: Tile = tile) -> tuple[Tensor]:
                with summed(layer, sums):
                    return (layer.plain(carrier, **walk.fetch(handle, tile)),)

            hidden = hidden_states[tile.rows] if len(walk.tiles) > 1 else hidden_states
            evaluation = Evaluation(function, hidden.device, uses_rng(layer), walk.keeps(layer.layer_index))
            (output,) = evaluation.first((Release.apply(hidden, evaluation),), (hidden,))
            with on_host if walk.config.offload_inputs else contextlib.nullcontext():
                is_last = layer.layer_index == walk.num_layers - 1 and tile is walk.tiles[-1]
                outputs.append(StoredStep.apply(output, hidden.detach(), walk, evaluation, is_last))
        if layer.layer_index == walk.num_layers - 1:
            walk.kept = []
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class StoredStep(Function):
    """Identity on a layer's output, keeping the layer's input; in backward the layer runs again from it.

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
            at_end_of_backward(walk.kept.clear)
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
