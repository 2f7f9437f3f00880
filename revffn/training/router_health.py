"""How routers spread tokens over experts while training, and how far their choices have moved from the base model's.

Both read the choices that forward passes make anyway (models/router_choices.py). Load counts training forwards only;
drift compares the held-out evaluations, which see the same tokens each time.
"""

# L = sparse layers, E = experts, K = experts per token

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..files import append_line, new_file
from ..models.router_choices import num_experts, router_choices, sparse_layers
from ..parallel.processes import from_all, summed

COMPARED_TOKENS = 16384
"""Of the held-out examples, at most: what is kept of the base model's choices."""
ROWS = 50
"""In router.jsonl for each stage, about: each has the load of all experts."""


class RouterLoad:
    """Tokens that went to each expert.

    Args:
        model: Any model; a dense or unknown one has nothing to count.
        file: Receives a JSON line now and then: `stage`, `step`, `layers` (L indices) and `load`, (L, E), the tokens
            that chose each expert since the line before.
    """

    def __init__(self, model: PreTrainedModel, file: Path | None = None):
        self.model, self.file = model, file
        self.place = {layer: i for i, layer in enumerate(sparse_layers(model))}
        self.window: Tensor | None = None
        """(L, E) int64, since the last log."""
        self.row: Tensor | None = None
        """(L, E) int64, since the last line in the file."""

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Training forwards inside are counted."""
        with router_choices(self.model, self.see):
            yield

    def see(self, layer: int, indices: Tensor, mask: Tensor | None) -> None:
        if self.window is None:
            shape = len(self.place), num_experts(self.model)
            self.window, self.row = (torch.zeros(shape, dtype=torch.int64, device=indices.device) for _ in range(2))
        counts = torch.ones_like(indices, dtype=torch.int64) if mask is None else mask[:, None].expand_as(indices)
        self.window[self.place[layer]].scatter_add_(0, indices.flatten().long(), counts.flatten().long())

    def take(self) -> dict[str, float]:
        """For a log line, of all tokens since the last: `router_entropy`, mean over layers, 1 where all experts get
        the same; `router_max_load`, the fullest expert's tokens over an even share, in the worst layer;
        `router_idle_experts`, how many got none, in all layers together."""
        if self.window is None:
            return {}
        counted = summed(self.window)
        load, self.row = counted.double(), self.row + counted
        self.window = torch.zeros_like(self.window)
        share = load / load.sum(-1, keepdim=True).clamp_min(1)
        entropy = torch.special.entr(share).sum(-1).mean() / math.log(max(share.shape[-1], 2))
        values = torch.stack([entropy, share.max() * share.shape[-1], (load == 0).sum()]).tolist()
        return dict(zip(("router_entropy", "router_max_load", "router_idle_experts"), values, strict=True))

    def write_row(self, stage: int, step: int, num_steps: int) -> None:
        """A line in the file, where one is due."""
        if self.file is None or self.row is None or not (step == num_steps or step % max(1, num_steps // ROWS) == 0):
            return
        row = {"stage": stage, "step": step, "layers": list(self.place), "load": self.row.tolist()}
        append_line(self.file, json.dumps(row))
        self.row = torch.zeros_like(self.row)


class RouterDrift:
    """Share of the base model's expert choices that are not made any more.

    Args:
        model: Any model; a dense or unknown one has no drift.
        file: Keeps the base model's choices, for runs that are interrupted.
        shared: All processes see their parts of the batches; otherwise this one sees all.
    """

    def __init__(self, model: PreTrainedModel, file: Path, shared: bool = False):
        self.shared = shared
        self.model, self.file = model, file
        self.base: dict[int, Tensor] = {}
        self.by_layer: dict[int, float] = {}
        """Of the last comparison."""
        with contextlib.suppress(OSError, SafetensorError, ValueError):
            self.base = {int(layer): choices for layer, choices in load_file(file).items()}

    def keep_base(self) -> contextlib.AbstractContextManager[None]:
        """The forward passes inside are the base model's."""
        return self.collecting(is_base=True)

    def comparing(self) -> contextlib.AbstractContextManager[None]:
        """The forward passes inside, of the same examples in the same order, give `by_layer`."""
        return self.collecting(is_base=False)

    @contextlib.contextmanager
    def collecting(self, is_base: bool) -> Iterator[None]:
        found: dict[int, list[Tensor]] = {}
        num_tokens: dict[int, int] = {}

        def see(layer: int, indices: Tensor, mask: Tensor | None) -> None:
            missing = COMPARED_TOKENS - num_tokens.get(layer, 0)
            if missing > 0:
                kept = (indices if mask is None else indices[mask.bool()]).cpu()
                found.setdefault(layer, []).append(kept)
                num_tokens[layer] = num_tokens.get(layer, 0) + len(kept)

        with router_choices(self.model, see):
            yield
        everybodys = from_all if self.shared else lambda parts: [parts]
        choices = {layer: in_order(everybodys(parts)) for layer, parts in sorted(found.items())}
        if is_base:
            self.base = choices
            if choices:
                with new_file(self.file) as partial:
                    save_file({str(layer): tensor for layer, tensor in choices.items()}, partial)
        else:
            same = {layer: c for layer, c in choices.items() if getattr(self.base.get(layer), "shape", 0) == c.shape}
            self.by_layer = {layer: changed(self.base[layer], now) for layer, now in same.items()}

    def values(self) -> dict[str, float]:
        """`router_drift`, the mean over layers, for a log line."""
        if not self.by_layer:
            return {}
        return {"router_drift": sum(self.by_layer.values()) / len(self.by_layer)}

    def summary(self) -> dict[str, Any] | None:
        return {"drift_by_layer": self.by_layer} if self.by_layer else None


def in_order(parts: list[list[Tensor]]) -> Tensor:
    """The first choices of all processes (ranks, batches, (n, K)), as one process would have them."""
    return torch.cat([part for batch in zip(*parts, strict=True) for part in batch])[:COMPARED_TOKENS]


def changed(base: Tensor, now: Tensor) -> float:
    """Share of the choices in `base` (N, K) that are not in `now` (N, K)."""
    return 1 - (base[:, :, None] == now[:, None, :]).any(-1).double().mean().item()
