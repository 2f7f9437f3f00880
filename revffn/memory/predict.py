"""What a training step takes: the bytes of a run, part by part, before it is started and without its weights.

Parameters, gradients and optimizer state are counted on the model built on the meta device: exactly. What the code
makes on top is measured: a model of full width and a few layers runs one step on fake tensors (`simulation.py`), and
every phase of that step is extended to the real depth, batch and length,

    peak = max over phases [ weights + optimizer + gradients alive + sum over layers of what they keep + the phase's
    own tensors ]

which is linear in each of them within a phase (attention that makes its scores is quadratic in the length, and
treated so). Two or three small steps of a few seconds each do, whatever the size. docs/memory.md goes through the
terms, benchmarks/planner.py compares with full simulated steps.

Not counted are bytes outside tensors; `RESERVE_BYTES` stands for them. `plan.py` asks the questions.
"""

# B = batch, T = tokens, L = decoder layers

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, wraps
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from ..couplings import COUPLINGS
from ..engine.host_weights import NUM_SLOTS, blocks, layer_states, num_bytes, pinned_bytes
from ..models import losses
from ..models.architectures import ARCHITECTURES, num_dense_layers
from ..models.losses import chunk_size
from ..optim import OptimizerInBackward
from ..optim.rules import local_part
from ..upstream import attention_implementation
from . import disk
from .answers import Plan
from .fake import RememberingFakeTensorMode
from .live_bytes import PARTS, LiveBytes
from .ranks import one_of
from .simulation import Method, RealOptimizer, build, run_step

RESERVE_BYTES = 2**30
"""On a GPU: CUDA context and loaded kernels (about half a GiB), workspaces of the matrix libraries, what the
allocator rounds up."""
HOST_BYTES = 4 * 2**30
"""In host memory: Python with torch and the CUDA libraries, and the part of a weight file being read."""
SMALL_STEP_TOKENS = 8192
"""A step of at most so many tokens is measured as it is; larger ones are extended from two of about that size."""
POINTS_OF_BATCH, POINTS_OF_LENGTH = [2, 4], [4096, 8192, 12288]
"""Where a step is measured that is not walked in tiles."""
SHIPPED = {**ARCHITECTURES, **COUPLINGS, None: None}
"""Families and couplings that are not a caller's own."""

Phases = dict[str, dict[str, int]]


# --- exact: what is counted on the meta device -----------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """Sizes that follow from the model alone."""

    num_parameters: int
    num_trainable: int
    weight_bytes: int
    """Parameters and buffers, on the device."""
    trainable_bytes: int
    optimizer_bytes: int
    """On the device."""
    host_bytes: int
    """Of weights and states in host memory, as pinned memory is handed out: in powers of two."""
    makes_scores: bool
    """The attention makes its scores (attention sinks have no fused kernel): T x T per head."""


def cached(kept_as: type) -> Callable:
    """Remember results, dataclasses of JSON values, by the config's content (configs themselves cannot be hashed): in
    this process, and on disk where that is in use."""

    def decorate(function: Callable) -> Callable:
        configs: dict[str, tuple[PreTrainedConfig, Method]] = {}

        @lru_cache(maxsize=512)
        def remembered(text: str, *args: Any) -> Any:
            key = [function.__name__, text, *args]
            known = disk.recall(key) if is_shipped(*configs[text]) else None
            if known is not None:
                return kept_as(**known)
            value = function(*configs[text], *args)
            if is_shipped(*configs[text]):
                disk.remember(key, asdict(value))
            return value

        @wraps(function)
        def call(hf_config: PreTrainedConfig, method: Method, *args: Any) -> Any:
            # ReversibleConfig is mutable, so the methods' text stands for them.
            text = f"{hf_config.to_json_string(use_diff=False)} {attention_implementation(hf_config)} {method}"
            configs[text] = (hf_config, method)
            return remembered(text, *args)

        return call

    return decorate


def is_shipped(hf_config: PreTrainedConfig, method: Method) -> bool:
    """Whether all code that a measurement runs is this package's or transformers'."""
    coupling = method.reversible.coupling if method.reversible else None
    return (
        type(hf_config).__module__.startswith("transformers.")
        and ARCHITECTURES.get(hf_config.model_type) is SHIPPED.get(hf_config.model_type)
        and COUPLINGS.get(coupling) is SHIPPED.get(coupling)
    )


@cached(Counts)
def count(hf_config: PreTrainedConfig, method: Method) -> Counts:
    with one_of(method.gpus) as mesh:
        with torch.device("meta"):
            model = build(hf_config, method, mesh)
        # Its states follow the parameters' device; what it computes of its own (8-bit codes) has to be real.
        optimizer = RealOptimizer(model, method)
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    weight_bytes = sum(local_part(t).nbytes for t in (*parameters, *model.buffers()))
    optimizer_bytes = sum(local_part(t).nbytes for t in optimizer.state_tensors())
    host_bytes = 0
    if method.weights == "host":
        layers = [list(layer.parameters()) for layer in model.model.layers]
        states = [layer_states(optimizer.optimizer, parameters) for parameters in layers]
        states = [[values[name] for values, name in of_layer] for of_layer in states]
        on_host = sum(t.nbytes for t in chain(*layers)), sum(t.nbytes for t in chain(*states))
        slots = (min(NUM_SLOTS, len(layers)) * max(map(num_bytes, tensors)) for tensors in (layers, states))
        weight_bytes, optimizer_bytes = (
            total - moved + slot
            for total, moved, slot in zip((weight_bytes, optimizer_bytes), on_host, slots, strict=True)
        )
        host_bytes = sum(pinned_bytes(num_bytes(block)) for block in blocks([*chain(*layers)]))
        host_bytes += sum(pinned_bytes(t.nbytes) for t in chain(*states))
    return Counts(
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in trainable),
        weight_bytes,
        sum(local_part(p).nbytes for p in trainable),
        optimizer_bytes,
        host_bytes,
        # Known only now: a config leaves the choice to the model.
        attention_implementation(model.config) == "eager",
    )


# --- measured: a few layers at full width ----------------------------------------------------------------------------


def num_special_layers(hf_config: PreTrainedConfig, method: Method) -> int:
    """Leading decoder layers unlike those above: dense ones of DeepSeek and GLM, the coupling's."""
    settings = method.reversible
    special = settings.find_coupling().num_special_layers(settings) if settings else 0
    return max(num_dense_layers(hf_config), special, 1)


def of_depth(hf_config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """The same model with its first layers alone."""
    hf_config = copy.deepcopy(hf_config)
    hf_config.num_hidden_layers = num_layers
    if getattr(hf_config, "layer_types", None):
        hf_config.layer_types = hf_config.layer_types[:num_layers]
    if getattr(hf_config, "mlp_only_layers", None):
        hf_config.mlp_only_layers = [layer for layer in hf_config.mlp_only_layers if layer < num_layers]
    return hf_config


def shallow(hf_config: PreTrainedConfig, method: Method, more: int = 0) -> tuple[PreTrainedConfig, Method]:
    """The same model with its special layers and three more (two at least for kinds that alternate, and the last), and
    `more` than that."""
    num_layers = min(hf_config.num_hidden_layers, num_special_layers(hf_config, method) + 3 + more)
    hf_config = of_depth(hf_config, num_layers)
    settings = method.reversible
    if settings is not None:
        bits = settings.side_bits
        settings = replace(
            settings,
            side_bits=bits if isinstance(bits, int) else [round(sum(bits) / len(bits))] * num_layers,
        )
    return hf_config, replace(method, reversible=settings)


@dataclass(frozen=True)
class SmallStep:
    """What a step of a few layers was found to take."""

    phases: Phases
    stored_per_layer: list[dict[str, int]]
    """Bytes per part that each layer's forward kept for backward."""


class StandInOptimizer:
    """Allocates what an update allocates and frees the gradient, in three operations instead of thousands."""

    def __init__(self, model: PreTrainedModel, method: Method):
        self.method = method
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # Without fake tensors around: the answers are cached.
        self.temporary = {p: update_bytes(tuple(local_part(p).shape), method) for p in self.parameters}
        self.handles = []
        if method.optimizer_in_backward:
            self.handles = [p.register_post_accumulate_grad_hook(self.update) for p in self.parameters]

    def state_tensors(self) -> Iterator[Tensor]:
        return iter(())

    @torch.no_grad()
    def update(self, parameter: nn.Parameter) -> None:
        torch.empty(self.temporary[parameter] // 4)
        # Of a sharded one, DTensor would work out the operation on tensors of the whole shape, and they would count.
        local_part(parameter).zero_()
        torch.autograd.graph.increment_version(parameter)
        parameter.grad = None

    def step(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is not None:
                self.update(parameter)

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()


@lru_cache(maxsize=1024)
def _update_bytes(shape: tuple[int, ...], optimizer: str, rounding: str, dtype: torch.dtype) -> int:
    with FakeTensorMode():
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype))
        rule = OptimizerInBackward([parameter], rule=optimizer, rounding=rounding)
        state = list(rule.state_tensors())
        parameter.grad = torch.empty_like(parameter)
        counter = LiveBytes()
        for tensor in (parameter, parameter.grad, *state):
            counter.add(tensor)
        counter.begin("update")
        before = counter.live_bytes
        with counter, torch.no_grad():
            rule.step_parameter(parameter)
        rule.detach()
        counter.begin("after")
        return sum(s.num_bytes for s in counter.at_peak["update"]) - before


def update_bytes(shape: tuple[int, ...], method: Method) -> int:
    """The most that one parameter's update allocates for a moment; chunks are alike, so three are looked at."""
    if len(shape) > 1:
        chunk = 32 * 2**20 // 4
        per_row = math.prod(shape[1:])
        shape = (min(shape[0], max(1, 3 * chunk // per_row)), *shape[1:])
        if len(shape) == 3:
            shape = (shape[0], min(shape[1], max(1, 3 * chunk // shape[2])), shape[2])
    return _update_bytes(shape, method.optimizer, method.rounding, method.dtype)


def few_starts(num_tokens: int, chunk: int) -> list[int]:
    """The first chunks of the loss and the last: those between take what the second does, and most of the time."""
    starts = range(0, num_tokens, chunk)
    return sorted({*starts[:2], *starts[-1:]})


@cached(SmallStep)
def small_step(hf_config: PreTrainedConfig, method: Method, batch: int, tokens: int, special: int) -> SmallStep:
    """One step of a few layers on fake tensors."""
    for shape in {tuple(p) for p in parameter_shapes(hf_config, method)}:
        update_bytes(shape, method)
    with one_of(method.gpus) as mesh, RememberingFakeTensorMode(), patch.object(losses, "chunk_starts", few_starts):
        step = run_step(build(hf_config, method, mesh), batch, tokens, method, StandInOptimizer, special)
    return SmallStep(step["phases"], step["stored_per_layer"])


def measure(hf_config: PreTrainedConfig, method: Method, batch: int, tokens: int) -> Phases:
    """Bytes per part in every phase of a step of B x T tokens, of the model's full depth."""
    full = count(hf_config, method)
    # Where weights lie makes no difference to what the step makes on top.
    small_config, small_method = shallow(hf_config, replace(method, weights="device"))
    small = count(small_config, small_method)
    step = small_step(small_config, small_method, batch, tokens, num_special_layers(hf_config, method))
    more_layers = hf_config.num_hidden_layers - small_config.num_hidden_layers
    fixed = {"weights": full.weight_bytes, "optimizer": full.optimizer_bytes}
    if more_layers and (method.router_aux_loss or method.router_z_loss):
        # Losses that are made of all layers' routers at once take more with each, in nearly every phase.
        deeper = small_step(*shallow(hf_config, small_method, 1), batch, tokens, num_special_layers(hf_config, method))
        return {
            phase: {part: size + more_layers * (deeper.phases[phase][part] - size) for part, size in parts.items()}
            | fixed
            for phase, parts in step.phases.items()
            if phase in deeper.phases
        }
    # Not of the last two: what they keep includes the streams, which move on.
    kept = {name: more_layers * size for name, size in step.stored_per_layer[-3 if more_layers else -1].items()}
    held = {} if method.optimizer_in_backward else {"gradients": full.trainable_bytes - small.trainable_bytes}
    phases = {}
    for phase, parts in step.phases.items():
        where = phase.split(" ")[0]
        # Between top and bottom the layers below still keep theirs, and those above already hold gradients.
        middle = max(kept, held, key=lambda d: sum(d.values()))
        more = {"embedding": {}, "middle": middle, "bottom": held, "optimizer": held}.get(where, kept)
        parts = {name: size + more.get(name, 0) for name, size in parts.items()}
        phases[phase] = parts | fixed
    return phases


def parameter_shapes(hf_config: PreTrainedConfig, method: Method) -> list[torch.Size]:
    """Of what one rank has of them."""
    with one_of(method.gpus) as mesh, torch.device("meta"):
        parameters = build(hf_config, method, mesh).parameters()
    return [local_part(p).shape for p in parameters if p.requires_grad]


# --- extended: any batch, any length ---------------------------------------------------------------------------------


def rows_per_tile(method: Method, tokens: int) -> int | None:
    """Sequences of one tile; None where the batch is not tiled."""
    tile = method.reversible.tile_tokens if method.reversible else None
    return None if tile is None else max(1, tile // tokens)


def fewest_tiles(hf_config: PreTrainedConfig, tokens_per_tile: int) -> int:
    """From so many tiles on a step is linear in their number: a first, an inner and a last one, and not fewer tokens
    than a chunk of the loss, which grows up to its size."""
    return max(3, math.ceil(chunk_size(2**40, hf_config.get_text_config().vocab_size) / tokens_per_tile))


def sample_batches(hf_config: PreTrainedConfig, method: Method, batch: int, tokens: int) -> list[int]:
    """Batch sizes whose measurements say what `batch` takes: itself if the step is small."""
    rows = rows_per_tile(method, tokens)
    unit = max(1, SMALL_STEP_TOKENS // (2 * tokens)) if rows is None else rows
    first = fewest_tiles(hf_config, unit * tokens)
    points = [first * unit, (first + 1) * unit]
    # Full logits come in one piece, whatever their size.
    return [batch] if batch <= points[1] or (rows is None and not method.linear_cross_entropy) else points


def sample_tokens(hf_config: PreTrainedConfig, method: Method, tokens: int) -> list[int]:
    """The same for the length."""
    tile = method.reversible.tile_tokens if method.reversible else None
    tile_or_step = tile or SMALL_STEP_TOKENS
    unit = fewest_tiles(hf_config, tile_or_step) * tile_or_step
    if tokens <= 2 * unit or (tile is None and not method.linear_cross_entropy):
        return [tokens]
    return [unit, 2 * unit] + [3 * unit] * is_quadratic(hf_config, method)


def is_quadratic(hf_config: PreTrainedConfig, method: Method) -> bool:
    """Does a step make something of the square of the length?"""
    # transformers may make a mask for a sliding window whether or not a layer reads it; a reversible walk does not.
    mask = method.name != "reversible" and getattr(hf_config, "sliding_window", None) is not None
    return mask or count(hf_config, method).makes_scores


def interpolate(points: list[int], x: int) -> list[float]:
    """Lagrange weights: the value at x of the polynomial through values at `points`."""
    return [math.prod((x - q) / (p - q) for q in points if q != p) for p in points]


def extend(
    hf_config: PreTrainedConfig, method: Method, batches: list[int], lengths: list[int], batch: int, tokens: int
) -> Phases:
    """Phases at (batch, tokens) from measurements on a grid of batch sizes and lengths."""
    grid = [
        (measure(hf_config, method, b, t), weight_b * weight_t)
        for b, weight_b in zip(batches, interpolate(batches, batch), strict=True)
        for t, weight_t in zip(lengths, interpolate(lengths, tokens), strict=True)
    ]
    out = {}
    for phase in grid[0][0]:
        if not all(phase in phases for phases, _ in grid):
            continue
        parts = {part: round(sum(weight * phases[phase][part] for phases, weight in grid)) for part in PARTS}
        total = max(0, sum(parts.values()))
        # The peaks of one phase may be at different moments. The sum of their parts is right: what one part lacks, the
        # working set has; what they have too much, all of them.
        parts = {part: max(0, size) for part, size in parts.items()}
        parts["working_set"] = max(0, parts["working_set"] + total - sum(parts.values()))
        found = sum(parts.values())
        if found > total:
            parts = {part: size * total // found for part, size in parts.items()}
        out[phase] = parts
    return out


def worst_phase(phases: Phases) -> str:
    return max(phases, key=lambda phase: sum(phases[phase].values()))


# --- the plan --------------------------------------------------------------------------------------------------------


Change = Callable[[Phases, int, int], tuple[Phases, int]]


class Predictor:
    """One way to train one model.

    Args:
        change: Turns the measured phases of (batch, tokens) into those of a way that is not measured itself, and says
            how many bytes go to the host.
    """

    def __init__(self, label: str, hf_config: PreTrainedConfig, method: Method, change: Change | None = None):
        self.label, self.hf_config, self.method, self.change = label, hf_config, method, change

    def finish(self, phases: Phases, batch: int, tokens: int) -> tuple[Phases, int]:
        return (phases, 0) if self.change is None else self.change(phases, batch, tokens)

    def phases(self, batch: int, tokens: int) -> tuple[Phases, int]:
        batches = sample_batches(self.hf_config, self.method, batch, tokens)
        lengths = sample_tokens(self.hf_config, self.method, tokens)
        return self.finish(extend(self.hf_config, self.method, batches, lengths, batch, tokens), batch, tokens)

    def least(self) -> int:
        """Bytes that no batch is too small for, known without measuring anything."""
        counts = count(self.hf_config, self.method)
        return counts.weight_bytes + counts.optimizer_bytes

    def peak(self, batch: int, tokens: int) -> int:
        phases, _ = self.phases(batch, tokens)
        return sum(phases[worst_phase(phases)].values())

    def plan(self, batch: int, tokens: int) -> Plan:
        phases, offloaded = self.phases(batch, tokens)
        phase = worst_phase(phases)
        counts = count(self.hf_config, self.method)
        return Plan(
            label=self.label,
            batch=batch,
            tokens=tokens,
            num_parameters=counts.num_parameters,
            num_trainable=counts.num_trainable,
            parts=phases[phase],
            phase=phase,
            reserve_bytes=RESERVE_BYTES,
            host_bytes=HOST_BYTES + offloaded + counts.host_bytes,
        )

    def largest_batch(self, tokens: int, budget: int) -> int:
        """Largest B whose peak is within `budget`, 0 if none."""
        if self.least() > budget:
            return 0
        first = sample_batches(self.hf_config, self.method, 2**40, tokens)
        if len(first) == 1:
            first = POINTS_OF_BATCH
        lengths = sample_tokens(self.hf_config, self.method, tokens)

        def fits(batch: int) -> bool:
            if batch < first[0]:
                return self.peak(batch, tokens) <= budget
            phases, _ = self.finish(extend(self.hf_config, self.method, first, lengths, batch, tokens), batch, tokens)
            return sum(phases[worst_phase(phases)].values()) <= budget

        return largest(fits, first[0])

    def longest_sequence(self, budget: int) -> int:
        """Largest T of a single sequence whose peak is within `budget`, 0 if none."""
        if self.least() > budget:
            return 0
        points = sample_tokens(self.hf_config, self.method, 2**40)
        if len(points) == 1:
            points = POINTS_OF_LENGTH if is_quadratic(self.hf_config, self.method) else POINTS_OF_LENGTH[:2]

        def fits(tokens: int) -> bool:
            phases, _ = self.finish(extend(self.hf_config, self.method, [1], points, 1, tokens), 1, tokens)
            return sum(phases[worst_phase(phases)].values()) <= budget

        return largest(fits, points[0])


def largest(fits: Callable[[int], bool], first: int) -> int:
    """Largest number for which a condition holds that fails from some number on; `first` is tried first."""
    low, high = 0, first
    while fits(high):
        low, high = high, 2 * high
        if high > 2**40:
            return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
