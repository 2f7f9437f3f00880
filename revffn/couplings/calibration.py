"""What `convert(calibration=...)` finds out on a few batches: grids, the innovation coupling's predictors, and
cross_branch's adapters.

Everything is second moments in float64 and a linear solve; nothing trains.
"""

# N = tokens seen, D = hidden size, H = D / 2, L = decoder layers

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import ReversibleConfig
from ..engine.sublayers import attention, feed_forward, full_cross_attention

# Relative to the (unit) variance of a channel. The map is fitted on the plain model's states and used on those of the
# coupled one, which carry more noise: a smaller ridge fits better and predicts worse (docs/experiments.md).
RIDGE = 0.1
# A finer grid than this says more than the float32 values it is rounded from.
MAX_FRACTION_BITS = 24
# Binary digits that cross_branch's grid has of a typical value, with queries from the left: bf16 models, others.
LEFT_DIGITS = (8, 13)
# Of the map in front of the final norm, on which no further layer builds.
EXIT_RIDGE = 0.01


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


# --- innovation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fit_predictors(
    model: PreTrainedModel, config: ReversibleConfig, batches: Iterable[dict[str, Tensor]]
) -> dict[str, Any]:
    """Run the plain model; choose the grids, and regress s_{k-1} - s_k on s_k for every coupled layer k."""
    coupled = (
        range(config.plain_layers, len(model.model.layers))
        if config.coupling == "innovation" and config.predictor_rank != 0
        else ()
    )
    moments: dict[int, Tensor] = {}
    # Of all states: the largest magnitude in each channel; of each: the sum of squares in each channel.
    largest = torch.zeros(model.config.hidden_size, dtype=torch.float64)
    energy: dict[int, Tensor] = {}
    num_rows = 0
    previous: Tensor | None = None

    def see(index: int, hidden: Tensor, mask: Tensor | None, kwargs: dict[str, Any] | None) -> None:
        nonlocal largest, num_rows, previous
        largest = torch.maximum(largest, hidden.abs().flatten(0, -2).amax(0).double().cpu())
        current = tokens_of(hidden, mask)
        num_rows = num_rows + current.shape[0] if index == 0 else num_rows
        squares = current.square().sum(0)
        energy[index] = energy[index] + squares if index in energy else squares
        if index in coupled:
            ones = current.new_ones(current.shape[0], 1)
            rows = torch.cat([current, ones, previous - current], dim=1)
            # [x, 1]^T [x, 1, y] and the energy of y, in one product.
            product = rows.T @ rows
            moments[index] = moments[index] + product if index in moments else product
        previous = current

    run_plain(model, batches, see)
    check_seen(num_rows, largest)
    typical = min(float((squares / num_rows).sqrt().median()) for squares in energy.values())
    grids = choose_grids(config, largest, typical)
    if config.coupling == "cross_branch" and config.query_stream == "left":
        # A grid much finer than what the model computes with would only have more low bits to keep.
        kept = LEFT_DIGITS[model.dtype.itemsize > 2] + math.ceil(-math.log2(max(typical, 1e-6)))
        grids["fraction_bits"] = max(0, min(grids["fraction_bits"], kept))
    solutions = {index: solve(moments.pop(index), config.predictor_rank) for index in coupled}
    return {
        "grids": grids,
        "largest_hidden_state": float(largest.max()),
        "num_tokens": num_rows,
        "explained": {str(index): round(solution[-1], 4) for index, solution in solutions.items()},
        "solutions": solutions,
    }


def fitting(magnitude: float, margin: int) -> int:
    """Binary digits with which 2**margin times `magnitude` is inside int32."""
    return min(MAX_FRACTION_BITS, 31 - margin - math.ceil(math.log2(max(magnitude, 1e-6))))


def one_grid(coupling: str, magnitude: float) -> int:
    """`fraction_bits` of one grid for all states, the largest of which is `magnitude`. cross_branch learns its
    function anew, and training moves its streams further; they keep no side bits, so that room costs only rounding."""
    return max(0, fitting(magnitude, 4 if coupling == "cross_branch" else 2))


def choose_grids(config: ReversibleConfig, largest: Tensor, typical: float) -> dict[str, Any]:
    """`fraction_bits`, `grid_growth`, `wide_channels` and `wide_growth`.

    Args:
        largest: (D,) the largest magnitude seen in each channel.
        typical: Of the state with the smallest values: the root mean square of the median channel.
    """

    widest = one_grid(config.coupling, float(largest.max()))
    plain = {"fraction_bits": widest, "grid_growth": 0, "wide_channels": [], "wide_growth": 0}
    if config.coupling != "innovation" or config.grid_growth == 0:
        return plain
    # The first grid rounds a typical value by about one per cent, once: the first layers add much more to it. The last
    # leaves a factor of 8 for what training and other text bring, but in the wide channels, which have a factor of 4.
    first = max(0, min(widest, 5 + math.ceil(-math.log2(max(typical, 1e-6)))))
    fit = torch.tensor([fitting(magnitude, 3) for magnitude in largest.tolist()])
    most = MAX_FRACTION_BITS - first if config.grid_growth is None else config.grid_growth

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
    return {"fraction_bits": first, "grid_growth": growth, "wide_channels": wide, "wide_growth": wide_growth}


def solve(moments: Tensor, rank: int | None) -> tuple[Tensor, Tensor | None, Tensor, float]:
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
    weight = ridge_weight(covariance, cross, RIDGE)
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
def load_predictors(model: PreTrainedModel, fitted: dict[str, Any]) -> None:
    for index, (up, down, bias, _) in fitted["solutions"].items():
        predictor = model.model.layers[index].coupling.predictor
        predictor.up.bias.copy_(bias)
        if down is None and predictor.down is not None:  # a rank of D or more: a full map in factored form
            down = torch.eye(predictor.down.in_features, dtype=up.dtype)[: predictor.down.out_features]
            up = nn.functional.pad(up, (0, predictor.up.in_features - up.shape[1]))
            down = nn.functional.pad(down, (0, 0, 0, predictor.down.out_features - down.shape[0]))
        predictor.up.weight.copy_(up)
        if down is not None:
            predictor.down.weight.copy_(down)


# --- cross_branch ----------------------------------------------------------------------------------------------------


@dataclass
class SeenBatch:
    """What the adapters are fitted on: a batch's embedding, and how its layers are called."""

    embedding: Tensor
    mask: Tensor | None
    kwargs: list[dict[str, Any]]


@dataclass
class Seen:
    """One run of the plain model on the calibration batches.

    `code` (H, D), float64, is what both streams are to carry of a hidden state: its H principal components in all
    states behind a layer, in the coordinates that the layers read (scaled to norm 1 and by the weights of their
    norms), each divided by its standard deviation there.
    """

    batches: list[SeenBatch]
    num_tokens: int
    largest: float
    code: Tensor


@torch.no_grad()
def see_states(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> Seen:
    """Run the plain model and keep what `fit_adapters` needs: N D numbers, and D D."""
    layers = model.model.layers
    norms = [norm.weight for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    # Not zero: a channel that no norm reads would have no direction.
    scale = torch.stack([w.double() for w in norms]).square().mean(0).sqrt().clamp_min(1e-6)
    covariance = torch.zeros(len(scale), len(scale), dtype=torch.float64, device=scale.device)
    largest = torch.zeros(len(scale), dtype=torch.float64)
    seen: list[SeenBatch] = []
    num_rows = num_states = 0

    def see(index: int, hidden: Tensor, mask: Tensor | None, kwargs: dict[str, Any] | None) -> None:
        nonlocal largest, num_rows, num_states
        largest = torch.maximum(largest, hidden.abs().flatten(0, -2).amax(0).double().cpu())
        rows = tokens_of(hidden, mask)
        if index == 0:
            seen.append(SeenBatch(hidden, mask, []))
            num_rows += len(rows)
        else:
            num_states += len(rows)
            rows = rows * scale
            rows *= rows.square().mean(1, keepdim=True).clamp_min(1e-30).rsqrt()
            covariance.add_(rows.T @ rows)
        if kwargs is not None:
            seen[-1].kwargs.append(kwargs)

    run_plain(model, batches, see)
    check_seen(num_rows, largest)
    energies, directions = (part.flip(-1)[..., : len(scale) // 2] for part in torch.linalg.eigh(covariance))
    # All components of one size, or a training step that suits the small ones would be too large for the others.
    deviation = (energies / num_states).clamp_min(1e-6).sqrt()
    code = directions.T / deviation[:, None] * scale
    return Seen(seen, num_rows, float(largest.max()), code)


class Regression:
    """y (., n) on x (., d), without intercept, from second moments of all batches; a token counts by 1 / the mean
    square of the state that the norm in front of a sublayer sees, for so much of it is left behind the norm."""

    def __init__(self) -> None:
        self.covariance: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0
        self.energy = 0.0

    def add(self, x: Tensor, y: Tensor, state: Tensor, mask: Tensor | None) -> None:
        x, y, state = (tokens_of(t, mask) for t in (x, y, state))
        weighted = x * (1 / state.square().mean(1, keepdim=True).clamp_min(1e-30))
        self.covariance = self.covariance + weighted.T @ x
        self.cross = self.cross + weighted.T @ y
        self.energy += float((y.square().sum(1) / state.square().mean(1).clamp_min(1e-30)).sum())

    def solve(self, ridge: float) -> tuple[Tensor, float]:
        """The map (n, d), and the share of y's energy it explains."""
        weight = ridge_weight(self.covariance, self.cross, ridge)
        left = self.energy - 2 * (weight * self.cross).sum() + (weight * (self.covariance @ weight)).sum()
        return weight.T.contiguous(), 1 - float(left) / max(self.energy, 1e-30)


@torch.no_grad()
def fit_adapters(model: PreTrainedModel, seen: Seen) -> dict[str, Any]:
    """Fit a converted model's adapters in closed form, by sublayer, on the states of the coupled model itself.

    Both streams start as the code of the embedding. In front of a sublayer the plain model's hidden state is regressed
    on the stream that is read; behind it, what the stream lacks of the plain model's code there, on what the sublayer
    gives. So a sublayer makes good what the ones before it missed. At the end the last hidden state is regressed on
    both streams.

    Returns:
        What `convert` notes: `num_tokens`, `largest_hidden_state`, `explained` (by layer: of what the feed-forward is
        to read), and `largest_stream_value`.
    """
    maps = model.model.coupling
    code = seen.code.to(maps.entry.weight.dtype)
    maps.entry.weight.copy_(torch.cat([code, code]))
    training, dtype = model.training, maps.entry.weight.dtype
    model.eval()
    runs = [CoupledRun(batch, code) for batch in seen.batches]
    explained: dict[str, float] = {}
    largest = 0.0
    for k, layer in enumerate(model.model.layers):
        adapters = layer.coupling
        left = adapters.query_stream == "left"
        read_left, read_right = Regression(), Regression()
        for run in runs:
            read_right.add(run.right, run.plain, run.plain, run.mask)
            if left:
                read_left.add(run.left, run.plain, run.plain, run.mask)
        adapters.key_value_up.weight.copy_(read_right.solve(RIDGE)[0])
        adapters.query_up.weight.copy_((read_left if left else read_right).solve(RIDGE)[0])
        write = Regression()
        for run in runs:
            kwargs = run.kwargs[k]
            middle = run.plain + attention(layer, layer.input_layernorm(run.plain), kwargs)
            query = run.left if left else run.right
            run.update = full_cross_attention(layer, query.to(dtype), run.right.to(dtype), kwargs)
            write.add(run.update, middle.double() @ seen.code.T - run.left, run.plain, run.mask)
            run.plain = middle
        adapters.attention_down.weight.copy_(write.solve(RIDGE)[0])
        read = Regression()
        for run in runs:
            run.left = run.left + adapters.attention_down(run.update).double()
            read.add(run.left, run.plain, run.plain, run.mask)
        weight, share = read.solve(RIDGE)
        adapters.feed_up.weight.copy_(weight)
        explained[str(k)] = round(share, 4)
        write = Regression()
        for run in runs:
            following = run.plain + feed_forward(layer, layer.post_attention_layernorm(run.plain))
            run.update = feed_forward(layer, layer.post_attention_layernorm(adapters.feed_up(run.left.to(dtype))))
            write.add(run.update, following.double() @ seen.code.T - run.right, run.plain, run.mask)
            run.plain = following
        adapters.feed_down.weight.copy_(write.solve(RIDGE)[0])
        for run in runs:
            run.right = run.right + adapters.feed_down(run.update).double()
            run.update = None
            largest = max(largest, float(run.left.abs().max()), float(run.right.abs().max()))
    last = Regression()
    for run in runs:
        last.add(torch.cat([run.left, run.right], -1), run.plain, run.plain, run.mask)
    maps.exit.weight.copy_(last.solve(EXIT_RIDGE)[0])
    model.train(training)
    return {
        "num_tokens": seen.num_tokens,
        "largest_hidden_state": seen.largest,
        "largest_stream_value": largest,
        "explained": explained,
    }


class CoupledRun:
    """A batch on its way through the plain and the coupled model: `plain` (B, T, D), `left` and `right` (B, T, H),
    float64."""

    def __init__(self, batch: SeenBatch, code: Tensor):
        self.plain, self.mask, self.kwargs = batch.embedding, batch.mask, batch.kwargs
        self.left = self.right = (batch.embedding @ code.T).double()
        self.update: Tensor | None = None
