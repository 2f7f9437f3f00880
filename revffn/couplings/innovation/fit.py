"""innovation's predictors, and what calibration finds for them and for the states' grids."""

# B = batch, T = tokens, D = hidden size

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...config import Grids, ReversibleConfig
from ...upstream import initialization
from .. import observe
from ..base import Added
from ..observe import MAX_FRACTION_BITS, fitting, one_grid, ridge_weight

MARGIN = 2
"""Of one grid for all states, a factor 2**MARGIN is left for what training and other text bring."""


class Predictor(Added):
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


class PredictorOfLayer(nn.Module):
    """What a layer gets: its predictor, or None where it runs plainly or predicts by identity; and m."""

    def __init__(self, hidden_size: int, layer: int, config: ReversibleConfig):
        super().__init__()
        coupled, rank = layer >= config.innovation.plain_layers, config.innovation.predictor_rank
        self.side_bits: int | None = config.side_bits_of(layer) if coupled else None
        self.predictor = Predictor(hidden_size, rank) if coupled and rank != 0 else None


def choose_grids(most: int | None, largest: Tensor, typical: float) -> Grids:
    """The grids that suit what was seen.

    Args:
        most: Digits that the last grid may have more than the first; None: as many as int32 has.
        largest: (D,) the largest magnitude seen in each channel.
        typical: Of the state with the smallest values: the root mean square of the median channel.
    """
    plain = one_grid(float(largest.max()), MARGIN)
    widest = plain.fraction_bits
    if most == 0:
        return plain
    # The first grid rounds a typical value by about one per cent, once: the first layers add much more to it. The last
    # leaves a factor of 8 for what training and other text bring, but in the wide channels, which have a factor of 4.
    first = max(0, min(widest, 5 + math.ceil(-math.log2(max(typical, 1e-6)))))
    fit = torch.tensor([fitting(magnitude, 3) for magnitude in largest.tolist()])
    most = MAX_FRACTION_BITS - first if most is None else most

    def spare(growth: int) -> float:
        """Digits won, on average over the channels. That wide ones may come nearer to the end counts as nothing won:
        or all of them would be wide where all are alike."""
        wide = (fit < first + growth).double().mean().item()
        return (1 - wide) * growth + wide * min(growth, max(0, int(fit.min()) - first))

    growth = max(range(most + 1), key=spare)
    if growth == 0:
        return plain
    wide = torch.nonzero(fit < first + growth).flatten().tolist()
    wide_growth = min(growth, widest - first) if wide else 0
    return Grids(fraction_bits=first, grid_growth=growth, wide_channels=wide, wide_growth=wide_growth)


def regress(moments: Tensor, rank: int | None) -> tuple[Tensor, Tensor | None, Tensor, float]:
    """Ridge regression with intercept from second moments (2D + 1, 2D + 1); reduced-rank if `rank` is given.

    Returns:
        (up (D, D or r), down (r, D) or None, bias (D,), share of the target's energy explained).
    """
    D = (moments.shape[0] - 1) // 2
    count = moments[D, D]
    mean_x, mean_y = moments[:D, D] / count, moments[D, D + 1 :] / count
    covariance = moments[:D, :D] / count - torch.outer(mean_x, mean_x)
    cross = moments[:D, D + 1 :] / count - torch.outer(mean_x, mean_y)
    energy_y = (moments[D + 1 :, D + 1 :].diagonal() / count).sum()
    variance_y = energy_y - mean_y.square().sum()
    weight = ridge_weight(covariance, cross, observe.RIDGE)
    down = None
    up = weight
    if rank is not None and rank < D:
        _, vectors = torch.linalg.eigh(weight.T @ covariance @ weight)
        basis = vectors[:, -rank:]
        down, up = (weight @ basis).T.contiguous(), basis.T
        weight = down.T @ up
    residual = variance_y - 2 * (weight * cross).sum() + (weight * (covariance @ weight)).sum()
    bias = mean_y - mean_x @ weight
    explained = float(1 - residual / energy_y.clamp_min(1e-30))
    return up.T.contiguous(), down, bias, explained


@torch.no_grad()
def load_predictors(model: PreTrainedModel, solutions: dict[int, tuple[Tensor, Tensor | None, Tensor, float]]) -> None:
    """What `regress` found, by layer."""
    for index, (up, down, bias, _) in solutions.items():
        predictor = model.model.layers[index].coupling.predictor
        predictor.up.bias.copy_(bias)
        if down is None and predictor.down is not None:  # a rank of D or more: a full map in factored form
            down = torch.eye(predictor.down.in_features, dtype=up.dtype)[: predictor.down.out_features]
            up = nn.functional.pad(up, (0, predictor.up.in_features - up.shape[1]))
            down = nn.functional.pad(down, (0, 0, 0, predictor.down.out_features - down.shape[0]))
        predictor.up.weight.copy_(up)
        if down is not None:
            predictor.down.weight.copy_(down)
