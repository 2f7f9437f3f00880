"""What couplings share where `convert(calibration=...)` looks at a few batches: the plain model's states, ridge
regression, and the grid that holds a value.

Everything is second moments in float64 and a linear solve; nothing trains.
"""

# B = batch, T = tokens, N = tokens seen, D = hidden size, L = decoder layers

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import Grids

# Relative to the (unit) variance of a channel. The map is fitted on the plain model's states and used on those of the
# coupled one, which carry more noise: a smaller ridge fits better and predicts worse (docs/experiments.md).
RIDGE = 0.1
# A finer grid than this says more than the float32 values it is rounded from.
MAX_FRACTION_BITS = 24

# What is seen of one state on one batch: its number (0 to L), the state (B, T, D), which of its B * T rows are tokens
# (None: all), and the keyword arguments of the layer that reads it (None for the last state).
See = Callable[[int, Tensor, Tensor | None, dict[str, Any] | None], None]


@torch.no_grad()
def run_plain(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], see: See) -> None:
    """Run the model as it is on every batch and show the states in their order."""
    layers = model.model.layers
    mask: Tensor | None = None

    def before(index: int, args: tuple, kwargs: dict[str, Any]) -> None:
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        see(index, args[0] if args else kwargs["hidden_states"], mask, rest)

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs, i=i: before(i, args, kwargs), with_kwargs=True)
        for i, layer in enumerate(layers)
    ]
    hooks.append(layers[-1].register_forward_hook(lambda _, args, output: see(len(layers), output, mask, None)))
    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        for batch in batches:
            inputs = {
                name: batch[name].to(device)
                for name in ("input_ids", "attention_mask", "position_ids")
                if name in batch
            }
            given = inputs.get("attention_mask")
            mask = given.reshape(-1).bool() if given is not None and given.dim() == 2 else None
            model.model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)


def tokens_of(state: Tensor, mask: Tensor | None) -> Tensor:
    """The rows (N, D) of a state (B, T, D) that are tokens, float64."""
    rows = state.reshape(-1, state.shape[-1])
    return (rows if mask is None else rows[mask]).double()


def check_seen(num_rows: int, largest: Tensor) -> None:
    if num_rows == 0:
        raise ValueError("calibration holds no token. Give at least one batch with input_ids, or calibration=None.")
    if not largest.isfinite().all():
        raise ValueError(
            "The model's hidden states are not finite on the calibration batches; check its weights and dtype."
        )


def ridge_weight(covariance: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """The weight (d in, n out) of a ridge regression from cov(x, x) (d, d) and cov(x, y) (d, n).

    `ridge` is relative to a channel's variance: one massive channel would otherwise decide it for all others.
    """
    scale = covariance.diagonal().clamp_min(1e-12).sqrt()
    standard = covariance / torch.outer(scale, scale)
    standard.diagonal().add_(ridge)
    return torch.linalg.solve(standard, cross / scale[:, None]) / scale[:, None]


@dataclass
class Seen:
    """Of the plain model's states on all batches."""

    largest: Tensor
    """(D,) float64: the largest magnitude in each channel, of all states."""
    num_rows: int = 0
    """Tokens."""
    energy: dict[int, Tensor] = field(default_factory=dict)
    """By state: (D,) sums of squares."""
    moments: dict[int, Tensor] = field(default_factory=dict)
    """By state, where asked for: (2D + 1, 2D + 1) second moments of the state, 1, and what the one before it is less
    this one."""

    @property
    def typical(self) -> float:
        """Of the state with the smallest values: the root mean square of the median channel."""
        return min(float((squares / self.num_rows).sqrt().median()) for squares in self.energy.values())


@torch.no_grad()
def see_magnitudes(
    model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], with_moments: Iterable[int] = ()
) -> Seen:
    """Run the plain model and note its states' magnitudes, and `moments` of those numbers of states."""
    seen, wanted = Seen(torch.zeros(model.config.hidden_size, dtype=torch.float64)), set(with_moments)
    previous: Tensor | None = None

    def see(index: int, hidden: Tensor, mask: Tensor | None, kwargs: dict[str, Any] | None) -> None:
        nonlocal previous
        seen.largest = torch.maximum(seen.largest, hidden.abs().flatten(0, -2).amax(0).double().cpu())
        current = tokens_of(hidden, mask)
        seen.num_rows += current.shape[0] if index == 0 else 0
        squares = current.square().sum(0)
        seen.energy[index] = seen.energy[index] + squares if index in seen.energy else squares
        if index in wanted:
            ones = current.new_ones(current.shape[0], 1)
            rows = torch.cat([current, ones, previous - current], dim=1)
            # [x, 1]^T [x, 1, y] and the energy of y, in one product.
            product = rows.T @ rows
            seen.moments[index] = seen.moments[index] + product if index in seen.moments else product
        previous = current

    run_plain(model, batches, see)
    check_seen(seen.num_rows, seen.largest)
    return seen


def fitting(magnitude: float, margin: int) -> int:
    """Binary digits with which 2**margin times `magnitude` is inside int32."""
    return min(MAX_FRACTION_BITS, 31 - margin - math.ceil(math.log2(max(magnitude, 1e-6))))


def one_grid(magnitude: float, margin: int) -> Grids:
    """One grid for all states: 2**margin times `magnitude` is inside int32."""
    bits = max(0, fitting(magnitude, margin))
    return Grids(fraction_bits=bits, grid_growth=0)
