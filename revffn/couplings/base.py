"""What a coupling is: one object, asked by the engine, by `convert` and `export`, by the planner and the trainer.

The object has no state. What belongs to a model lies in the modules that the coupling adds, what belongs to a forward
call in its `Walk`. docs/adding_a_coupling.md shows how to add one.
"""

# B = batch, b = sequences of one tile, T = tokens, D = hidden size, L = decoder layers

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..config import ReversibleConfig
from ..engine.nodes import Enter, Leave, Start
from ..engine.sublayers import expert_sums
from ..engine.walk import Tile, Walk
from ..ops.experts import GradientSum
from ..ops.streams import Grid, quantize


class Added(nn.Module, ABC):
    """A module that a coupling adds to a model. `reset_parameters` fills it, but for what a checkpoint has filled
    (transformers.initialization)."""

    @abstractmethod
    def reset_parameters(self) -> None: ...


class Coupling(ABC):
    """How a layer's two residual updates are made invertible."""

    name: str
    """As `ReversibleConfig.coupling` has it."""
    has_streams = True
    """Whether states live in int32 streams and are rebuilt; otherwise layers keep their inputs."""
    grids_grow = False
    """Whether `Grids.grid_growth` has a meaning."""
    keeps_function = True
    """Whether a model in eval mode computes what it did before it was converted."""
    trains_another = False
    """Whether training computes another function than eval mode."""
    export_problem: str | None = None
    """Why a model cannot become a plain one again."""
    norm_reads: tuple[int, ...] = (1,)
    """Which of the two streams the final norm reads; several are put side by side."""

    # --- settings ----------------------------------------------------------------------------------------------------

    def resolve(self, config: ReversibleConfig, calibrated: bool) -> ReversibleConfig:
        """Put values for settings that depend on whether there will be a calibration."""
        return config

    def validate(self, config: ReversibleConfig, hf_config: PreTrainedConfig) -> None:
        """Raise ValueError where the settings do not fit the model."""
        return

    def runs(self, training: bool) -> bool:
        """Whether a forward call walks, in training mode and in eval mode."""
        return training

    def label(self, config: ReversibleConfig) -> str:
        """What a table of plans calls it."""
        return self.name

    def savings(self, config: ReversibleConfig) -> Iterator[tuple[dict[str, Any], str]]:
        """Settings that take less memory, and the words for them."""
        yield from ()

    def num_special_layers(self, config: ReversibleConfig) -> int:
        """Leading layers that take other memory than those above."""
        return 0

    # --- what it adds to a model -------------------------------------------------------------------------------------

    def layer_module(self, hidden_size: int, layer: int, config: ReversibleConfig) -> nn.Module:
        """What every decoder layer gets as `layer.coupling`."""
        return nn.Module()

    def model_module(self, hidden_size: int, config: ReversibleConfig) -> nn.Module | None:
        """What the backbone gets as `model.model.coupling`, if anything."""
        return None

    def trains_what_it_adds(self, config: ReversibleConfig) -> bool:
        return True

    def observe(
        self, model: PreTrainedModel, config: ReversibleConfig, batches: Iterable[dict[str, Tensor]]
    ) -> tuple[ReversibleConfig, Any]:
        """Look at the plain model on calibration batches: the settings found, and what `fit` needs."""
        return config, None

    def fit(self, model: PreTrainedModel, observed: Any) -> dict[str, Any] | None:
        """Fill what was added to the converted model; returns what is noted in its config: `num_tokens`,
        `largest_hidden_state`, `explained` (by layer)."""
        return None

    # --- a forward call ----------------------------------------------------------------------------------------------

    def stream_width(self, hidden_size: int) -> int:
        return hidden_size

    def prepare_grids(self, grids: list[Grid], config: ReversibleConfig, like: Tensor) -> None:
        """Make by-channel tables of the states' grids once, beside those that all couplings need."""
        return

    def begin(self, walk: Walk, hidden: Tensor) -> None:
        """A walk begins with the embedding (B, T, D)."""
        return

    def plain(self, layer: nn.Module, hidden_states: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """A layer outside walks: (B, T, D) -> (B, T, D)."""
        return layer.plain(hidden_states, *args, **kwargs)

    @abstractmethod
    def run(self, layer: nn.Module, walk: Walk, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """A layer in a walk. The values are in the streams; returns what the model's own loop hands on (B, T, D)."""


class StreamCoupling(Coupling):
    """A coupling whose layer moves the two streams of every tile: `step` does it."""

    @abstractmethod
    def step(
        self,
        layer: nn.Module,
        walk: Walk,
        tile: Tile,
        kwargs_handle: Any,
        sums: dict[str, GradientSum] | None,
        first: Tensor,
        second: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Run a layer's sublayers on one tile, move its streams and leave the nodes of the way back.

        Args:
            kwargs_handle: Of what the layer was called with, for `walk.fetch`.
            sums: Where the tiles' gradients of expert parameters are added up.
            first, second: Carriers of the two streams, (b, T, width).

        Returns:
            The carriers of the moved streams.
        """

    def num_chunks(self, walk: Walk, num_tokens: int) -> int:
        """Into how many pieces `step` cuts a tile's tokens for the feed-forward."""
        return 1

    def split(self, hidden: Tensor, grid: Grid) -> list[Tensor]:
        """The two streams of an embedding."""
        stream = quantize(hidden, grid)
        return [stream, stream]

    def join(self, first: Tensor | None, second: Tensor | None) -> Tensor:
        """The gradient of an embedding from those of its two streams, one of which may be missing."""
        return second if first is None else first if second is None else first + second

    def run(self, layer: nn.Module, walk: Walk, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Move every tile's streams through one layer; the first layer makes them from the embedding."""
        if layer.layer_index == 0:
            if layer.stream_maps is not None:
                hidden_states = layer.stream_maps.entry(hidden_states)
            walk.begin(hidden_states)
            grid = walk.grids[0]
            carriers = Start.apply(hidden_states, walk, lambda hidden: self.split(hidden, grid), self.join)
        else:
            carriers = Enter.apply(hidden_states, *walk.carriers)
        handle = walk.stash(kwargs)
        sums = expert_sums(layer, len(walk.tiles) * self.num_chunks(walk, hidden_states.shape[1]))
        moved: list[Tensor] = []
        for i, tile in enumerate(walk.tiles):
            moved += self.step(layer, walk, tile, handle, sums, carriers[2 * i], carriers[2 * i + 1])
        visible, *walk.carriers = Leave.apply(hidden_states.shape, walk.dtype, *moved)
        return visible
