"""innovation: the pretrained function, each state added to with what the one before it did not foretell.

s_{k+1} = s_k + f_k(s_k) + 2^-m (s_{k-1} - R_k(s_k)) on the grid, m low bits kept; docs/how_it_works.md.

    fit.py   predictors R_k, and what calibration finds
    step.py  the move of the streams, as autograd nodes
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ...config import ReversibleConfig
from ...engine.walk import Walk
from ...ops.streams import Grid
from ..base import StreamCoupling
from ..observe import see_magnitudes
from .fit import PredictorOfLayer, choose_grids, load_predictors, regress
from .step import innovation_step


class Innovation(StreamCoupling):
    """Eval mode is the pretrained model; training adds the past with gain 2^-m."""

    name = "innovation"
    grids_grow = True
    trains_another = True
    step = staticmethod(innovation_step)

    def validate(self, config: ReversibleConfig, hf_config: PreTrainedConfig) -> None:
        num_layers, plain_layers = hf_config.num_hidden_layers, config.innovation.plain_layers
        if plain_layers >= num_layers > 1:
            raise ValueError(f"plain_layers={plain_layers} leaves none of the model's {num_layers} layers to couple.")

    def label(self, config: ReversibleConfig) -> str:
        return f"innovation m={config.side_bits}"

    def savings(self, config: ReversibleConfig) -> Iterator[tuple[dict[str, Any], str]]:
        if config.side_bits not in (0, 1):
            yield {"side_bits": 1}, f"side_bits 1 instead of {config.side_bits} (a worse held-out loss)"

    def num_special_layers(self, config: ReversibleConfig) -> int:
        return config.innovation.plain_layers

    def layer_module(self, hidden_size: int, layer: int, config: ReversibleConfig) -> PredictorOfLayer:
        return PredictorOfLayer(hidden_size, layer, config)

    def trains_what_it_adds(self, config: ReversibleConfig) -> bool:
        return config.innovation.train_predictor

    def observe(
        self, model: PreTrainedModel, config: ReversibleConfig, batches: Iterable[dict[str, Tensor]]
    ) -> tuple[ReversibleConfig, Any]:
        """Choose the grids, and regress s_{k-1} - s_k on s_k for every coupled layer k."""
        rank = config.innovation.predictor_rank
        coupled = range(config.innovation.plain_layers, len(model.model.layers)) if rank != 0 else ()
        seen = see_magnitudes(model, batches, coupled)
        grids = choose_grids(config.grids.grid_growth, seen.largest, seen.typical)
        solutions = {index: regress(seen.moments.pop(index), rank) for index in coupled}
        return replace(config, grids=grids), (seen, solutions)

    def fit(self, model: PreTrainedModel, observed: Any) -> dict[str, Any]:
        seen, solutions = observed
        load_predictors(model, solutions)
        return {
            "num_tokens": seen.num_rows,
            "largest_hidden_state": float(seen.largest.max()),
            "explained": {str(index): round(solution[-1], 4) for index, solution in solutions.items()},
        }

    def prepare_grids(self, grids: list[Grid], config: ReversibleConfig, like: Tensor) -> None:
        for k in range(2, len(grids)):
            grids[k].gain_by_channel(grids[k - 2], config.side_bits_of(k - 1), like)

    def begin(self, walk: Walk, hidden: Tensor) -> None:
        if walk.config.innovation.random_sign:
            # From the default generator: seeds, checkpoints of its state and ranks then behave as they do for dropout.
            shape = (walk.num_layers, hidden.shape[0])
            walk.signs = 2 * torch.randint(0, 2, shape, dtype=torch.int32, device=hidden.device) - 1

    def num_chunks(self, walk: Walk, num_tokens: int) -> int:
        return len(walk.token_chunks(num_tokens))
