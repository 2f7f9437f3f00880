"""The engine: a reversible walk made of ordinary autograd nodes.

Forward runs every sublayer with grad mode on and drops what it saves for backward. Layers are joined by *carriers*,
zero-storage tensors that give autograd its graph and gradients their shape, while the values live in int32 streams
beside it. In backward a step's node runs before the nodes of its sublayers: it evaluates the sublayers once on the
stream at hand (which refills what they had saved), inverts the coupling, and moves the stream one step back.
Everything else is autograd's, so DDP, FSDP2, `torch.autograd.grad` and gradient hooks work as for any module.

Every tensor that backward needs is kept by `save_for_backward`: two streams per token at the top (`Finish`), and per
step what the coupling asks for. docs/how_it_works.md tells why it is built this way.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..config import ReversibleConfig
from ..ops.streams import SATURATION, Grid, add_update, check
from .recompute import Evaluation, StateMismatchError

logger = logging.getLogger(__name__)

# B = batch, T = tokens, D = hidden size


def is_concrete(tensor: Tensor) -> bool:
    """Whether values can be read: False for fake and meta tensors."""
    return not isinstance(tensor, FakeTensor) and tensor.device.type != "meta"


@dataclass
class Tile:
    """Some sequences of the batch and their two streams at the walk's present position."""

    rows: slice
    streams: list[Tensor | None] = field(default_factory=lambda: [None, None])
    """int32, (b, T, width): innovation's s_{k-1}, s_k; cross_branch's X1, X2, which are half as wide."""
    position: int = 0
    """Number of steps between the embedding and `streams`."""
    checksums: list[Tensor] | Tensor | None = None
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    """Whose recomputed tensors are alive, by the part of the layer they belong to."""

    def make_current(self, part: str, evaluation: Evaluation | None) -> None:
        """Forget what no node of the step above asked for (inputs that need no gradient) before the next is
        recomputed."""
        previous = self.evaluations.pop(part, None)
        if previous is not None and previous is not evaluation:
            previous.recomputed = None
        if evaluation is not None:
            self.evaluations[part] = evaluation


def state_grids(config: ReversibleConfig, num_layers: int, like: Tensor) -> list[Grid]:
    """The grid of every state, s_0 to s_L, for hidden states `like` (..., D)."""
    wide = None
    if config.grids.wide_channels:
        wide = torch.zeros(like.shape[-1], dtype=torch.bool)
        wide[config.grids.wide_channels] = True
        wide = wide.to(like.device, non_blocking=True)
    states = range(num_layers + 1)
    bits = [tuple(config.fraction_bits_of(k, num_layers, wide) for wide in (False, True)) for k in states]
    grids = {b: Grid(b[0], wide, b[1]) for b in set(bits)}
    return [grids[b] for b in bits]


class Walk:
    """One forward call of a model and the walk back through it.

    Args:
        config: The model's settings.
        num_layers: Decoder layers.
        report: Where the backward walk writes what it measured; owned by the model.
    """

    def __init__(self, config: ReversibleConfig, num_layers: int, report: Report):
        self.config, self.num_layers, self.report = config, num_layers, report
        self.tiles: list[Tile] = []
        self.carriers: list[Tensor] = []
        self.grids: list[Grid] = []
        self.signs: Tensor | None = None
        self.kept: list[Tensor] = []
        self.layers_run = 0
        self.dtype: torch.dtype = torch.float32
        self.batch_size = 0
        # (2,) int32: whether an update was not finite, which a cast to int32 hides and `Finish` shows again; the
        # largest magnitude a stream has had, in grid units.
        self.flags: Tensor | None = None
        # Filled while walking back: (name of the state, differs), 0-dim bool tensors that still have to be looked at.
        self.verdicts: list[tuple[str, Tensor]] = []
        # Measurements by layer, the same while walking back. They are this walk's: if it fails, they go with it.
        self.noted: dict[int, dict[str, Any]] = {}

    # --- tensors that many layers share (masks, rotary tables) are kept once, by Finish -----------------------------

    def stash(self, tree: Any) -> Any:
        """Put the tensors of a pytree aside, each once; returns a handle for `fetch`."""
        leaves, spec = tree_flatten(tree)
        places = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                place = next((i for i, known in enumerate(self.kept) if known is leaf), len(self.kept))
                if place == len(self.kept):
                    self.kept.append(leaf)
                places.append((True, place))
            else:
                places.append((False, leaf))
        return places, spec

    def fetch(self, handle: Any, tile: Tile) -> Any:
        """The pytree of `stash`, its batched tensors narrowed to the rows of `tile`."""
        places, spec = handle
        leaves = [self.narrow(self.kept[x], tile) if is_tensor else x for is_tensor, x in places]
        return tree_unflatten(leaves, spec)

    def narrow(self, tensor: Tensor, tile: Tile) -> Tensor:
        if len(self.tiles) > 1 and tensor.dim() > 1 and tensor.shape[0] == self.batch_size:
            return tensor[tile.rows]
        return tensor

    def add(self, update: Tensor, stream: Tensor, grid: Grid) -> Tensor:
        """stream + update, both on one grid."""
        return add_update(update, stream, grid.vectors(stream)[0], grid.finer_by_channel(grid, stream), self.flags)

    def note_layer(self, layer: int, **values: Tensor | float) -> None:
        """Backward: note measurements of one layer and tile; the worst tile counts."""
        noted = self.noted.setdefault(layer, {})
        for name, value in values.items():
            if name not in noted:
                noted[name] = value
            elif isinstance(value, Tensor):
                noted[name] = torch.maximum(noted[name], value)
            else:
                noted[name] = max(noted[name], value)

    # --- life of a walk --------------------------------------------------------------------------------------------

    def begin(self, hidden: Tensor) -> None:
        """Take dtype, grids, tiles and signs from the embedding (B, T, D)."""
        batch_size, num_tokens = hidden.shape[:2]
        self.dtype, self.batch_size = hidden.dtype, batch_size
        coupling = self.config.find_coupling()
        coupling.begin(self, hidden)
        width = coupling.stream_width(hidden.shape[-1])
        self.grids = self.report.grids_of(self.config, self.num_layers, hidden.detach()[..., :width])
        self.flags = torch.zeros(2, dtype=torch.int32, device=hidden.device)
        rows = batch_size
        if self.config.tile_tokens is not None:
            rows = max(1, min(batch_size, self.config.tile_tokens // num_tokens))
        self.tiles = [Tile(slice(i, min(i + rows, batch_size))) for i in range(0, batch_size, rows)]

    def keeps(self, layer: int) -> bool:
        """Whether a decoder layer keeps what it saves for backward."""
        return layer >= self.num_layers - self.config.kept_layers

    def token_chunks(self, num_tokens: int) -> list[slice]:
        """How a sequence longer than `tile_tokens` is cut for the feed-forward."""
        size = min(self.config.tile_tokens or num_tokens, num_tokens)
        return [slice(i, min(i + size, num_tokens)) for i in range(0, num_tokens, size)]

    def expect(self, tile: Tile, position: int) -> None:
        """Raise unless `tile` stands right above the step at `position`."""
        if tile.streams[1] is None or tile.position != position + 1:
            raise StateMismatchError(
                f"Backward reached step {position} while the streams stand at "
                f"{'no step' if tile.streams[1] is None else f'step {tile.position}'}. The loss must depend on the "
                "model's last hidden state, and a forward call's graph can be walked again only with "
                "retain_graph=True."
            )

    def remember(self, tile: Tile, stream: Tensor) -> None:
        """Forward: note the checksum of a new state, and how near it came to the end of int32."""
        if self.config.verify != "off":
            tile.checksums.append(check(stream, self.flags))

    def verify(self, tile: Tile, index: int, stream: Tensor, name: str, found: Tensor | None = None) -> Tensor | None:
        """Backward: whether a rebuilt state differs from the checksum that `remember` noted as number `index`;
        `found`: its checksum, where that is known."""
        if self.config.verify == "off" or not is_concrete(stream):
            return None
        found = check(stream, self.flags) if found is None else found
        return self.note_verdict(name, found != tile.checksums[index])

    def verify_last(self, tile: Tile) -> None:
        """The streams that autograd kept since forward."""
        for i, stream in enumerate(tile.streams):
            self.verify(tile, i - 2, stream, "output of the last layer" if i else "stream beside it")

    def note_verdict(self, name: str, differs: Tensor) -> Tensor:
        """Count `differs` (0-dim bool) as a mismatch.

        Looked at once per walk, except on a CPU, where looking costs nothing.
        """
        self.verdicts.append((name, differs))
        if self.config.verify == "raise" and differs.device.type == "cpu" and bool(differs):
            self.close(aborted=True)
            raise mismatch([name])
        return differs

    def close(self, aborted: bool = False) -> None:
        """End of the backward walk: read the verdicts (one synchronisation), drop what is left, raise on a
        mismatch."""
        verdicts, self.verdicts = self.verdicts, []
        noted, self.noted = self.noted, {}
        for tile in self.tiles:
            tile.streams, tile.checksums = [None, None], None
            for part in list(tile.evaluations):
                tile.make_current(part, None)
        self.kept, self.signs = [], None
        wrong: list[str] = []
        largest = self.report.largest
        if verdicts:
            flags = torch.stack([differs for _, differs in verdicts]).to(torch.int32)
            *flags, largest = torch.cat([flags, self.flags[1:]]).tolist()
            wrong = [name for (name, _), flag in zip(verdicts, flags, strict=True) if flag]
        self.report.finish(len(verdicts), wrong, largest, noted)
        if not aborted:
            self.report.judge(self.config, wrong)

    def discard(self) -> None:
        """Forward failed half-way: untie the graph from this object."""
        self.carriers, self.tiles, self.kept = [], [], []


def mismatch(names: list[str]) -> StateMismatchError:
    return StateMismatchError(
        f"The rebuilt {names[0]} differs from the one in forward ({len(names)} state{'s' * (len(names) > 1)} in all). "
        "A sublayer gave other bits in recomputation. Usual causes: a parameter or buffer changed between forward and "
        "backward; a kernel with atomics (set the experts implementation to grouped_mm or batched_mm); other "
        "autocast, threads or shapes in backward. ReversibleConfig(verify='report') counts mismatches instead of "
        "raising."
    )


class Report:
    """What the last backward walk of a model measured. Tensors stay on the device until `as_dict` is called."""

    def __init__(self):
        self.num_verified, self.mismatched, self.walks, self.mismatched_total = 0, [], 0, 0
        self.largest, self.warned = 0, False
        self.measured: dict[int, dict[str, Any]] = {}
        self.grids: tuple[Any, list[Grid]] | None = None

    def grids_of(self, config: ReversibleConfig, num_layers: int, like: Tensor) -> list[Grid]:
        """`state_grids` with all they need by channel, made once: nothing is copied to the device in a step."""
        bits, found = [config.side_bits_of(k) for k in range(num_layers)], config.grids
        key = (config.coupling, found.fraction_bits, found.grid_growth, found.wide_growth, *bits)
        key += (*found.wide_channels, like.shape[-1], like.device, getattr(like, "fake_mode", None))
        if self.grids is None or self.grids[0] != key:
            grids = state_grids(config, num_layers, like)
            for k, grid in enumerate(grids):
                grid.vectors(like)
                grid.finer_by_channel(grid, like)
                if k:
                    grid.finer_by_channel(grids[k - 1], like)
            config.find_coupling().prepare_grids(grids, config, like)
            self.grids = key, grids
        return self.grids[1]

    def finish(
        self, num_verified: int, mismatched: list[str], largest: int, measured: dict[int, dict[str, Any]]
    ) -> None:
        self.walks += 1
        self.num_verified, self.mismatched, self.largest = num_verified, mismatched, largest
        self.measured = measured
        self.mismatched_total += len(mismatched)

    def judge(self, config: ReversibleConfig, mismatched: list[str]) -> None:
        """Act on the walk that ended: raise on a mismatch, warn where a stream comes near int32's end."""
        if mismatched and config.verify == "raise":
            raise mismatch(mismatched)
        if self.largest >= SATURATION and not self.warned:
            self.warned = True
            logger.warning(
                "A stream is within a factor of two of int32's end, where values wrap around: states are rebuilt all "
                "the same, but another function is trained. Convert with calibration data that holds such values, or "
                "without calibration and with fewer fraction_bits (now %s%s).",
                config.grids.fraction_bits,
                f", and grid_growth {config.grids.grid_growth}" if config.grids.grid_growth else "",
            )

    def as_dict(self) -> dict[str, Any]:
        return {
            "walks": self.walks,
            "verified_states": self.num_verified,
            "mismatched_states": len(self.mismatched),
            "mismatched_states_total": self.mismatched_total,
            "mismatched": list(self.mismatched),
            "largest_grid_value": self.largest,
            "saturated": self.largest >= SATURATION,
            "layers": {
                layer: {
                    name: v.item() if isinstance(v, Tensor) and is_concrete(v) else v for name, v in values.items()
                }
                for layer, values in sorted(self.measured.items())
            },
        }
