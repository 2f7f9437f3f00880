"""Decoder layers and the final norm as they run in a walk.

`ReversibleLayer` is mixed in front of a Hugging Face decoder layer class. Without a walk the layer is what it was, or
what its coupling makes of ordinary tensors; with one it moves the walk's streams one layer on. Modules, parameter
names and hooks stay the layer's own; what a coupling adds lives in `layer.coupling`.
"""

# B = batch, T = tokens, D = hidden size

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..couplings import Coupling
from ..engine.captured import as_one_layer
from ..engine.dense import RunsInWalk, is_plain, norm_kind
from ..engine.nodes import Enter, Finish, Read, read_normed
from ..engine.recompute import Evaluation
from ..engine.walk import Walk


class ReversibleLayer(nn.Module):
    """Mixed in front of a decoder layer class by `conversion.convert`, which sets what is declared here."""

    behaviour: Coupling
    coupling: nn.Module
    """What the coupling adds to the layer."""
    layer_index: int
    query_modules: tuple[str, ...]
    key_value_modules: tuple[str, ...]
    stream_maps: nn.Module | None = None
    """The model's, in its first layer and its final norm; they belong to the backbone."""

    @property
    def gradient_checkpointing(self) -> bool:
        """transformers' switch, which is off: what a walk keeps is less, and it recomputes by itself."""
        return False

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        # A walk goes past what `compile()` has put on the layer: a compiler would not see what is dropped.
        return super().__call__(*args, **kwargs) if kwargs.get("walk") is None else self._call_impl(*args, **kwargs)

    def forward(self, hidden_states: Tensor, *args: Any, walk: Walk | None = None, **kwargs: Any) -> Tensor:
        if walk is None:
            return self.behaviour.plain(self, hidden_states, args, kwargs)
        walk.layers_run += 1
        with as_one_layer(lambda: len(walk.tiles)):
            return self.behaviour.run(self, walk, hidden_states, kwargs)

    def plain(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer as its family wrote it."""
        return super().forward(hidden_states, *args, **kwargs)


_WITHIN: ContextVar[nn.Module | None] = ContextVar("revffn_patched_norm", default=None)
"""The norm whose patch runs."""


class ReversibleNorm(RunsInWalk, nn.Module):
    """Mixed in front of the norm behind the last layer: it reads the streams, tile by tile, and ends the forward walk.

    Outside a walk it is the plain norm. What it saves for backward is dropped and made again like a sublayer's, so
    that no hidden state of the whole batch is kept beside the streams.
    """

    walk: Walk | None = None
    stream_maps: nn.Module | None = None

    patch: Callable[[Tensor], Tensor] | None = None
    """What was put in place of `forward` on the instance (a kernel): it stays in force, and reads the streams."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if "forward" not in self.__dict__:
            return super().__call__(*args, **kwargs)
        self.patch = self.__dict__.pop("forward")
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.__dict__["forward"], self.patch = self.patch, None

    def patched(self) -> Callable[[Tensor], Tensor] | None:
        return self.patch or self.__dict__.get("forward")

    def plain(self, hidden_states: Tensor) -> Tensor:
        """The norm of a hidden state, or of what two streams side by side say it is."""
        if _WITHIN.get() is self:  # a patch that calls what it stands for
            return super().forward(hidden_states)
        patch = self.patched()
        hidden_states = hidden_states if self.stream_maps is None else self.stream_maps.exit(hidden_states)
        if patch is None:
            return super().forward(hidden_states)
        before = _WITHIN.set(self)
        try:
            return patch(hidden_states)
        finally:
            _WITHIN.reset(before)

    def forward(self, hidden_states: Tensor) -> Tensor:
        walk, self.walk = self.walk, None
        if walk is None or not walk.carriers:
            return self.plain(hidden_states)
        grid, used = walk.grids[-1], walk.config.find_coupling().norm_reads

        def function(*carriers_and_streams: Tensor) -> tuple[Tensor]:
            if len(used) == 1 and self.patched() is None and is_plain(self) and norm_kind(self) is not None:
                return (read_normed(*carriers_and_streams, grid, self, walk.dtype)[-1],)
            pairs = zip(carriers_and_streams[: len(used)], carriers_and_streams[len(used) :], strict=True)
            values = [Read.apply(carrier, stream, grid, walk.dtype) for carrier, stream in pairs]
            return (self.plain(torch.cat(values, dim=-1) if len(values) > 1 else values[0]),)

        carriers = Enter.apply(hidden_states, *walk.carriers)
        outputs, evaluations = [], []
        for i, tile in enumerate(walk.tiles):
            evaluation = Evaluation(function, hidden_states.device, False)
            mine = tuple(carriers[2 * i + j] for j in used)
            outputs += evaluation.first(mine, tuple(tile.streams[j] for j in used))
            evaluations.append(evaluation)
        return Finish.apply(walk, used, evaluations, *outputs)
