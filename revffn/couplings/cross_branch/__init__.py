"""cross_branch, the RevFFN paper's coupling (arXiv 2512.20920): two streams of half width, each added to in turn.

modules.py      projection adapters, and the layer's sublayers with them
fixed_point.py  the inverse of the paper's attention: an iteration, and what it lacks
fit.py          adapters from a few batches, in closed form
step.py         the layer, as autograd nodes
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...config import ReversibleConfig
from ...ops.streams import Grid, quantize
from ..base import StreamCoupling
from ..observe import one_grid, see_magnitudes
from .fit import fit_adapters, see_states
from .modules import Adapters, StreamMaps, forward_halves
from .step import cross_branch_step

MARGIN = 4
"""A factor 2**MARGIN is left in int32: the function is learnt anew, and training moves the streams further. They keep
no side bits, so that room costs only rounding."""
LEFT_DIGITS = {2: 8, 4: 13}
"""Binary digits that the grid has of a typical value, with queries from the left, by bytes of the model's dtype."""


class CrossBranch(StreamCoupling):
    """The left stream takes in attention, the right one the feed-forward."""

    name = "cross_branch"
    keeps_function = False
    norm_reads = (0, 1)
    step = staticmethod(cross_branch_step)
    export_problem = (
        "A cross_branch model cannot be exported: half-width streams and projection adapters compute another function "
        "than the original architecture. Keep it with save_pretrained, or train with coupling='innovation'."
    )

    def resolve(self, config: ReversibleConfig, calibrated: bool) -> ReversibleConfig:
        own = config.cross_branch
        if own.stream_maps is not None:
            return config
        fitted = calibrated and own.query_stream == "right"
        return replace(config, cross_branch=replace(own, stream_maps=fitted))

    def validate(self, config: ReversibleConfig, hf_config: PreTrainedConfig) -> None:
        if hf_config.hidden_size % 2:
            raise ValueError(
                f"cross_branch splits the hidden state in two; hidden_size={hf_config.hidden_size} is odd."
            )

    def label(self, config: ReversibleConfig) -> str:
        return f"cross_branch {config.cross_branch.query_stream}"

    def layer_module(self, hidden_size: int, layer: int, config: ReversibleConfig) -> Adapters:
        return Adapters(hidden_size, layer, config)

    def model_module(self, hidden_size: int, config: ReversibleConfig) -> StreamMaps | None:
        return StreamMaps(hidden_size) if config.cross_branch.stream_maps else None

    def observe(
        self, model: PreTrainedModel, config: ReversibleConfig, batches: Iterable[dict[str, Tensor]]
    ) -> tuple[ReversibleConfig, Any]:
        if config.cross_branch.stream_maps:
            return config, see_states(model, batches)
        seen = see_magnitudes(model, batches)
        grid = one_grid(float(seen.largest.max()), MARGIN)
        if config.cross_branch.query_stream == "left":
            # A grid much finer than what the model computes with would only have more low bits to keep.
            kept = LEFT_DIGITS[min(model.dtype.itemsize, 4)] + math.ceil(-math.log2(max(seen.typical, 1e-6)))
            grid = replace(grid, fraction_bits=max(0, min(grid.fraction_bits, kept)))
        return replace(config, grids=grid), seen

    def fit(self, model: PreTrainedModel, observed: Any) -> dict[str, Any]:
        if model.reversible_config.cross_branch.stream_maps:
            notes = fit_adapters(model, observed)
            grid = one_grid(notes.pop("largest_stream_value"), MARGIN)
            model.config.revffn["grids"]["fraction_bits"] = grid.fraction_bits
            return notes
        largest = float(observed.largest.max())
        return {"num_tokens": observed.num_rows, "largest_hidden_state": largest, "explained": {}}

    def stream_width(self, hidden_size: int) -> int:
        return hidden_size // 2

    def split(self, hidden: Tensor, grid: Grid) -> list[Tensor]:
        return [quantize(half, grid) for half in hidden.chunk(2, dim=-1)]

    def join(self, first: Tensor | None, second: Tensor | None) -> Tensor:
        first = torch.zeros_like(second) if first is None else first
        return torch.cat([first, torch.zeros_like(first) if second is None else second], dim=-1)

    def plain(self, layer: nn.Module, hidden_states: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        return forward_halves(layer, hidden_states, kwargs)
