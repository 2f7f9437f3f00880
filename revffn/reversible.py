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

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from .config import ReversibleConfig
from .dense import fused_parts, is_plain, norm_kind
from .ops.streams import SATURATION, Grid, add_update, check, dequantize, read_norm, read_norm_backward
from .routing import RecordRouting, ReplayRouting, routing

logger = logging.getLogger(__name__)

# B = batch, T = tokens, D = hidden size


def is_concrete(tensor: Tensor) -> bool:
    """Whether values can be read: False for fake and meta tensors."""
    return not isinstance(tensor, FakeTensor) and tensor.device.type != "meta"


def carrier_like(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of one element's storage, expanded to `shape`."""
    return torch.zeros(1, dtype=dtype, device=device).expand(shape)


class StateMismatchError(RuntimeError):
    """A rebuilt state differs from the one of forward, or a walk was entered in the wrong order."""


@dataclass
class Tile:
    """Some sequences of the batch and their two streams at the walk's present position."""

    rows: slice
    streams: list[Tensor | None] = field(default_factory=lambda: [None, None])
    """innovation: s_{k-1}, s_k of (b, T, D); cross_branch: X1, X2 of (b, T, D / 2); int32."""
    position: int = 0
    """Number of steps between the embedding and `streams`."""
    checksums: list[Tensor] | Tensor | None = None
    exact: Tensor | None = None
    """cross_branch, backward: 0-dim bool, whether every state that the present streams came from was rebuilt
    exactly."""
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
    if config.wide_channels:
        wide = torch.zeros(like.shape[-1], dtype=torch.bool)
        wide[config.wide_channels] = True
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
        self.dtype: torch.dtype = torch.float32
        self.batch_size = 0
        # (2,) int32: whether an update was not finite, which a cast to int32 hides and `Finish` shows again; the
        # largest magnitude a stream has had, in grid units.
        self.flags: Tensor | None = None
        # Filled while walking back: (name of the state, differs, fatal), 0-dim bool tensors that still have to be
        # looked at.
        self.verdicts: list[tuple[str, Tensor, Tensor]] = []
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

    def note_layer(self, layer: int, **values: Tensor | int) -> None:
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
        if self.config.coupling == "innovation" and self.config.random_sign:
            # From the default generator: seeds, checkpoints of its state and ranks then behave as they do for dropout.
            flips = torch.randint(0, 2, (self.num_layers, batch_size), dtype=torch.int32, device=hidden.device)
            self.signs = 2 * flips - 1
        width = hidden.shape[-1] // (2 if self.config.coupling == "cross_branch" else 1)
        self.grids = self.report.grids_of(self.config, self.num_layers, hidden.detach()[..., :width])
        self.flags = torch.zeros(2, dtype=torch.int32, device=hidden.device)
        rows = batch_size
        if self.config.tile_tokens is not None:
            rows = max(1, min(batch_size, self.config.tile_tokens // num_tokens))
        self.tiles = [Tile(slice(i, min(i + rows, batch_size))) for i in range(0, batch_size, rows)]

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

    def note_verdict(self, name: str, differs: Tensor, fatal: Tensor | None = None) -> Tensor:
        """Count `differs` (0-dim bool) as a mismatch; `fatal`, by default the same, is what `verify="raise"` raises
        on.

        Looked at once per walk, except on a CPU, where looking costs nothing.
        """
        fatal = differs if fatal is None else fatal
        self.verdicts.append((name, differs, fatal))
        if self.config.verify == "raise" and fatal.device.type == "cpu" and bool(fatal):
            self.close(aborted=True)
            raise mismatch([name])
        return differs

    def close(self, aborted: bool = False) -> None:
        """End of the backward walk: read the verdicts (one synchronisation), drop what is left, raise on a
        mismatch."""
        verdicts, self.verdicts = self.verdicts, []
        noted, self.noted = self.noted, {}
        for tile in self.tiles:
            tile.streams, tile.checksums, tile.exact = [None, None], None, None
            for part in list(tile.evaluations):
                tile.make_current(part, None)
        self.kept, self.signs = [], None
        wrong: list[str] = []
        fatal: list[str] = []
        largest = self.report.largest
        if verdicts:
            flags = torch.stack([flag for _, *pair in verdicts for flag in pair])
            *flags, largest = torch.cat([flags.to(torch.int32), self.flags[1:]]).tolist()
            wrong = [name for (name, *_), flag in zip(verdicts, flags[::2], strict=True) if flag]
            fatal = [name for (name, *_), flag in zip(verdicts, flags[1::2], strict=True) if flag]
        self.report.finish(len(verdicts), wrong, largest, noted)
        if not aborted:
            self.report.judge(self.config, fatal)

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
        self.anchors: set[int] = set()
        self.grids: tuple[Any, list[Grid]] | None = None

    def grids_of(self, config: ReversibleConfig, num_layers: int, like: Tensor) -> list[Grid]:
        """`state_grids` with all they need by channel, made once: nothing is copied to the device in a step."""
        bits = [config.side_bits_of(k) for k in range(num_layers)]
        key = (config.coupling, config.fraction_bits, config.grid_growth, config.wide_growth, *bits)
        key += (*config.wide_channels, like.shape[-1], like.device, getattr(like, "fake_mode", None))
        if self.grids is None or self.grids[0] != key:
            grids = state_grids(config, num_layers, like)
            for k, grid in enumerate(grids):
                grid.vectors(like)
                grid.finer_by_channel(grid, like)
                if k:
                    grid.finer_by_channel(grids[k - 1], like)
                if k > 1 and config.coupling == "innovation":
                    grid.gain_by_channel(grids[k - 2], bits[k - 1], like)
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
        """Act on the walk that ended: raise on a mismatch, or choose anchors for the next step (cross_branch,
        left)."""
        if mismatched and config.verify == "raise":
            raise mismatch(mismatched)
        if self.largest >= SATURATION and not self.warned:
            self.warned = True
            logger.warning(
                "A stream is within a factor of two of int32's end, where values wrap around: states are rebuilt all "
                "the same, but another function is trained. Convert with calibration data that holds such values, or "
                "without calibration and with fewer fraction_bits (now %s%s).",
                config.fraction_bits,
                f", and grid_growth {config.grid_growth}" if config.grid_growth else "",
            )
        if config.coupling == "cross_branch" and config.query_stream == "left":
            self.judge_fixed_point(config)

    def judge_fixed_point(self, config: ReversibleConfig) -> None:
        worst, where = 0.0, None
        for layer, values in self.measured.items():
            if not all(is_concrete(v) for v in values.values() if isinstance(v, Tensor)):
                return
            measured = {name: float(v) for name, v in values.items()}
            if measured.get("unconverged", 0.0) > config.max_unconverged:
                self.anchors.add(layer)
            error = measured.get("canary_error", 0.0)
            if not error <= worst:
                worst, where = error, layer
        if config.verify == "raise" and not worst <= config.max_drift:
            raise StateMismatchError(
                f"The rebuilt input of layer {where} is off by {worst:.2g} of its root mean square (canary tokens; "
                f"accepted: {config.max_drift}). The fixed point does not contract there. Set "
                f"anchor_layers=[{where}], query_stream='right', or max_drift."
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
            "anchor_layers": sorted(self.anchors),
            "layers": {
                layer: {
                    name: v.item() if isinstance(v, Tensor) and is_concrete(v) else v for name, v in values.items()
                }
                for layer, values in sorted(self.measured.items())
            },
        }


# --- one sublayer evaluation, twice ----------------------------------------------------------------------------------


class Evaluation:
    """A sublayer as it ran in forward, able to run again in backward on the same code path.

    In forward what it saves for backward is dropped (parameters are only referenced); `again` records what the same
    code saves the second time and hands each tensor to autograd once. Random state, autocast state and expert choices
    are replayed.

    Args:
        function: Called as `function(*carriers, *streams)`; returns a tuple of tensors.
        device_type: For autocast.
        uses_rng: Whether random numbers are drawn (dropout, router jitter).
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], device: torch.device, uses_rng: bool):
        self.function, self.device, self.uses_rng = function, device, uses_rng
        kind = device.type
        self.autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        self.saved: list[tuple[torch.Size, torch.dtype]] = []
        self.recomputed: list[Tensor | None] | None = None
        self.routing: list[Tensor] = []
        self.rng: list[Tensor] = []
        self.differentiable: list[bool] = []
        self.num_routing = 0

    def first(self, carriers: tuple[Tensor, ...], streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run in forward, saving nothing but references to parameters."""
        self.differentiable = [carrier.requires_grad for carrier in carriers]
        if self.uses_rng:
            self.rng = [torch.get_rng_state()]
            if self.device.type == "cuda":
                self.rng.append(torch.cuda.get_rng_state(self.device))
        with (
            self.autocast_state(),
            fused_parts(self.device.type),
            routing(RecordRouting(self.routing)),
            torch.autograd.graph.saved_tensors_hooks(self.drop, self.serve),
        ):
            return self.function(*carriers, *streams)

    def again(
        self, side: Sequence[Tensor], *streams: Tensor, carriers: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, ...]:
        """Run in backward on rebuilt streams; afterwards the nodes of forward find what they had saved.

        `side`: what `side_tensors` handed over.
        """
        choices, rng = list(side[: self.num_routing]), side[self.num_routing :]
        self.recomputed = []
        if carriers is None:
            # They only give the values that are read a graph, where they had one in forward.
            carriers = tuple(
                carrier_like(s.shape, s.device, torch.float32).requires_grad_(needed)
                for s, needed in zip(streams, self.differentiable, strict=True)
            )
        with (
            torch.enable_grad(),
            self.rng_state(rng),
            self.autocast_state(),
            fused_parts(self.device.type),
            routing(ReplayRouting(choices)),
            torch.autograd.graph.saved_tensors_hooks(self.record, never_asked),
        ):
            outputs = self.function(*carriers, *streams)
        if len(self.recomputed) != len(self.saved):
            raise StateMismatchError(
                f"A sublayer saved {len(self.saved)} tensors in forward and {len(self.recomputed)} in recomputation: "
                "its code path depends on something that changed in between (grad mode, global flags, a module's "
                "attributes)."
            )
        return tuple(out.detach() for out in outputs)

    def side_tensors(self) -> tuple[Tensor, ...]:
        """Hand over what `again` needs beside the streams, for save_for_backward."""
        tensors = (*self.routing, *self.rng)
        self.num_routing = len(self.routing)
        self.routing, self.rng = [], []
        return tensors

    def drop(self, tensor: Tensor) -> Tensor | int:
        if isinstance(tensor, nn.Parameter):
            return tensor
        self.saved.append((tensor.shape, tensor.dtype))
        return len(self.saved) - 1

    def serve(self, handle: Tensor | int) -> Tensor:
        if isinstance(handle, Tensor):
            return handle
        if self.recomputed is None or self.recomputed[handle] is None:
            raise StateMismatchError(
                "Backward entered a reversible layer without passing through the model's last hidden state, or twice "
                "in one walk. Make the loss depend on the model's output; walk again only with retain_graph=True."
            )
        # Served once and forgotten: otherwise the whole layer's activations would live until its last node has run.
        tensor, self.recomputed[handle] = self.recomputed[handle], None
        return tensor

    def record(self, tensor: Tensor) -> int:
        if not isinstance(tensor, nn.Parameter):
            place = len(self.recomputed)
            if place < len(self.saved) and self.saved[place] != (tensor.shape, tensor.dtype):
                raise StateMismatchError(
                    f"Recomputation saved {tensor.dtype} {tuple(tensor.shape)} where forward saved "
                    f"{self.saved[place][1]} {tuple(self.saved[place][0])}."
                )
            self.recomputed.append(tensor)
        # The graph of this run is never walked and holds no tensor: its nodes get 0 for each. (Returning the tensor
        # would tie saved outputs into an uncollectable cycle.)
        return 0

    def autocast_state(self) -> contextlib.AbstractContextManager:
        enabled, dtype = self.autocast
        if not enabled and not torch.is_autocast_enabled(self.device.type):
            return contextlib.nullcontext()
        # Without the weight cache: it would keep a low-precision copy of every weight alive, and survive optimizer
        # steps.
        return torch.autocast(self.device.type, dtype=dtype, enabled=enabled, cache_enabled=False)

    @contextlib.contextmanager
    def rng_state(self, states: Sequence[Tensor]) -> Iterator[None]:
        if not states:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.set_rng_state(states[0])
            if devices:
                torch.cuda.set_rng_state(states[1], self.device)
            yield


def never_asked(handle: Any) -> Tensor:
    raise AssertionError("the graph of a recomputation is never walked")


# --- autograd nodes --------------------------------------------------------------------------------------------------


class Read(Function):
    """carrier, int32 stream -> the stream's value in the model's dtype."""

    @staticmethod
    def forward(ctx, carrier: Tensor, stream: Tensor, grid: Grid, dtype: torch.dtype):
        ctx.carrier_dtype = carrier.dtype
        return dequantize(stream, grid, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad.to(ctx.carrier_dtype), None, None, None


class ReadNorm(Function):
    """carrier, int32 stream -> the carrier again, the stream's value (or None), and its RMSNorm.

    What the residual connection gets of the gradient passes through here, so that it is added to the norm's in one
    pass.
    """

    @staticmethod
    def forward(
        ctx,
        carrier: Tensor,
        weight: Tensor,
        stream: Tensor,
        step: Tensor,
        eps: float,
        dtype: torch.dtype,
        rounds_first: bool,
        want_value: bool,
    ):
        value, normed, rstd = read_norm(stream, step, weight, eps, dtype, rounds_first, want_value)
        ctx.save_for_backward(stream, weight, rstd)
        ctx.step, ctx.rounds_first = step, rounds_first  # the grid's, made once for the model
        ctx.set_materialize_grads(False)
        return carrier.view_as(carrier), value if want_value else None, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_through: Tensor | None, grad_value: Tensor | None, grad_normed: Tensor | None):
        stream, weight, rstd = ctx.saved_tensors
        if grad_normed is None:
            parts = [g.to(rstd.dtype) for g in (grad_through, grad_value) if g is not None]
            return sum(parts) if parts else None, *(None,) * 7
        grad, grad_weight = read_norm_backward(
            grad_normed.contiguous(),
            grad_value,
            grad_through,
            stream,
            ctx.step,
            weight,
            rstd,
            ctx.rounds_first,
            ctx.needs_input_grad[1],
        )
        return grad, grad_weight if ctx.needs_input_grad[1] else None, *(None,) * 6


def read_normed(
    carrier: Tensor, stream: Tensor, grid: Grid, norm: nn.Module, dtype: torch.dtype, want_value: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Carrier, value (where wanted) and `norm` of a stream: in one operation where the norm is a plain RMSNorm, by
    the module itself where it is not."""
    kind = norm_kind(norm) if is_plain(norm) else None
    if kind is None:
        value = Read.apply(carrier, stream, grid, dtype)
        return carrier, value, norm(value)
    eps, rounds_first = kind
    return ReadNorm.apply(carrier, norm.weight, stream, grid.vectors(stream)[1], eps, dtype, rounds_first, want_value)


class Start(Function):
    """The embedding (B, T, D) -> streams of every tile, and two carriers for each."""

    @staticmethod
    def forward(ctx, hidden: Tensor, walk: Walk, split: Callable[[Tensor], list[Tensor]], join: Callable[..., Tensor]):
        ctx.walk, ctx.join, ctx.dtype = walk, join, hidden.dtype
        ctx.set_materialize_grads(False)
        carriers = []
        for tile in walk.tiles:
            tile.streams, tile.position, tile.checksums = split(hidden[tile.rows]), 0, []
            for stream in dict.fromkeys(tile.streams):
                walk.remember(tile, stream)
            dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
            carriers += [carrier_like(s.shape, hidden.device, dtype) for s in tile.streams]
        return tuple(carriers)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):
        pairs = [ctx.join(*grads[i : i + 2]) for i in range(0, len(grads), 2)]
        grad = (torch.cat(pairs) if len(pairs) > 1 else pairs[0]).to(ctx.dtype)
        return grad, None, None, None


class Finish(Function):
    """What the final norm made of every tile -> one tensor (B, T, D). Keeps the streams; its backward begins the walk
    back.

    Args of forward:
        reads: Which of a tile's two streams the norm read.
        evaluations: The norm's, one per tile, run again here before its nodes.
    """

    @staticmethod
    def forward(ctx, walk: Walk, reads: tuple[int, ...], evaluations: list[Evaluation], *outputs: Tensor):
        ctx.walk, ctx.reads, ctx.evaluations = walk, reads, evaluations
        ctx.positions = [tile.position for tile in walk.tiles]
        tensors = [stream for tile in walk.tiles for stream in tile.streams]
        ctx.verified = bool(walk.tiles[0].checksums)
        if ctx.verified:
            tensors += [torch.stack(tile.checksums) for tile in walk.tiles]
        ctx.num_kept = len(walk.kept)
        tensors += walk.kept
        ctx.signed = walk.signs is not None
        if ctx.signed:
            tensors.append(walk.signs)
        ctx.save_for_backward(*tensors)
        for tile in walk.tiles:
            tile.streams, tile.checksums = [None, None], None
        walk.kept, walk.signs, walk.carriers = [], None, []
        out = torch.cat(outputs) if len(outputs) > 1 else outputs[0].view_as(outputs[0])
        return torch.where(walk.flags[0] == 0, out, float("nan"))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        walk, tensors = ctx.walk, list(ctx.saved_tensors)
        n = len(walk.tiles)
        walk.verdicts, walk.noted = [], {}
        for i, (tile, evaluation) in enumerate(zip(walk.tiles, ctx.evaluations, strict=True)):
            tile.streams, tile.position = tensors[2 * i : 2 * i + 2], ctx.positions[i]
            tile.checksums = tensors[2 * n + i] if ctx.verified else None
            tile.make_current("attention", evaluation)
            tile.exact = None
            walk.verify_last(tile)
            evaluation.again((), *[tile.streams[j] for j in ctx.reads])
        if ctx.signed:
            walk.signs = tensors.pop()
        walk.kept = tensors[len(tensors) - ctx.num_kept :] if ctx.num_kept else []
        torch.autograd.Variable._execution_engine.queue_callback(walk.close)
        return (None, None, None, *(grad[tile.rows] for tile in walk.tiles))


class Enter(Function):
    """visible, *carriers -> *carriers, at a layer's begin.

    The carriers travel beside the model's own loop; `visible` is what the loop hands from layer to layer. `Enter` and
    `Leave` tie both together, so that hooks on a layer's inputs and outputs (FSDP2) fire before and after all of the
    layer's work, and every tile has left a layer before any tile enters the one below.
    """

    @staticmethod
    def forward(ctx, visible: Tensor, *carriers: Tensor):
        ctx.visible = visible.shape, visible.dtype, visible.device
        ctx.set_materialize_grads(False)
        return tuple(c.view_as(c) for c in carriers)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):
        shape, dtype, device = ctx.visible
        return (carrier_like(shape, device, dtype), *grads)


class Leave(Function):
    """*carriers -> visible, *carriers, at a layer's end; see `Enter`."""

    @staticmethod
    def forward(ctx, shape: torch.Size, dtype: torch.dtype, *carriers: Tensor):
        ctx.set_materialize_grads(False)
        return (carrier_like(shape, carriers[0].device, dtype), *(c.view_as(c) for c in carriers))

    @staticmethod
    @once_differentiable
    def backward(ctx, _, *grads: Tensor | None):
        return (None, None, *grads)
