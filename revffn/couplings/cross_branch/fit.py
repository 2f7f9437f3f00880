"""cross_branch's adapters and stream maps, fitted in closed form on the coupled model's own states."""

# N = tokens seen, D = hidden size, H = D / 2

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...engine.sublayers import attention, feed_forward
from ..observe import RIDGE, check_seen, ridge_weight, run_plain, tokens_of
from .modules import full_cross_attention, normed_key_value, normed_query

# Of the map in front of the final norm, on which no further layer builds.
EXIT_RIDGE = 0.01


@dataclass
class SeenBatch:
    """What the adapters are fitted on: a batch's embedding, and how its layers are called."""

    embedding: Tensor
    mask: Tensor | None
    kwargs: list[dict[str, Any]]


@dataclass
class SeenStates:
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
def see_states(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> SeenStates:
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
    return SeenStates(seen, num_rows, float(largest.max()), code)


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
def fit_adapters(model: PreTrainedModel, seen: SeenStates) -> dict[str, Any]:
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
            query = normed_query(layer, (run.left if left else run.right).to(dtype))
            run.update = full_cross_attention(layer, query, normed_key_value(layer, run.right.to(dtype)), kwargs)
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
