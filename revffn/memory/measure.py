"""What the planner measures: a model's sizes, counted, and the bytes of a step in every phase, at the full depth.

Parameters, gradients and optimizer state are counted on the model built on the meta device: exactly. What the code
makes on top is measured on a model of full width and a few layers, which runs one step on fake tensors
(`simulation.py`); the layers that it has not are added phase by phase. `predict.py` extends it to any batch and
length.
"""

# B = batch, T = tokens, L = decoder layers

from __future__ import annotations

import copy
import math
from collections import Counter
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
from ..optim import OptimizerInBackward
from ..optim.rules import local_part
from ..upstream import attention_implementation
from . import disk
from .fake import RememberingFakeTensorMode
from .live_bytes import LiveBytes
from .ranks import one_of
from .simulation import Method, RealOptimizer, build, run_step

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


@dataclass(frozen=True)
class Depth:
    """Decoder layers of a model, those from below that run again in backward first."""

    recomputed: int
    kept: int

    @classmethod
    def of(cls, hf_config: PreTrainedConfig, method: Method) -> Depth:
        num_layers = hf_config.num_hidden_layers
        kept = min(num_layers, method.reversible.kept_layers if method.reversible else 0)
        return cls(num_layers - kept, kept)

    def few(self, num_special: int) -> Depth:
        """So many that the rest of either kind is known from one of them: the special layers and three more (two at
        least for kinds that alternate, and the last); where there are both kinds, of those that run again two more,
        because the upper one hands over what a kept layer may keep, and three of the others."""
        kept = min(self.kept, 3 + max(0, num_special - self.recomputed))
        return Depth(min(self.recomputed, num_special + (2 if kept else 3)), kept)


def shallow(
    hf_config: PreTrainedConfig, method: Method, depth: Depth | None = None
) -> tuple[PreTrainedConfig, Method]:
    """The same model with so many layers; without a number as few as tell how the others are."""
    if depth is None:
        depth = Depth.of(hf_config, method).few(num_special_layers(hf_config, method))
    num_layers = depth.recomputed + depth.kept
    hf_config = of_depth(hf_config, num_layers)
    settings = method.reversible
    if settings is not None:
        bits = settings.side_bits
        settings = replace(
            settings,
            side_bits=bits if isinstance(bits, int) else [round(sum(bits) / len(bits))] * num_layers,
            kept_layers=depth.kept,
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
    method, special = replace(method, weights="device"), num_special_layers(hf_config, method)
    depth = Depth.of(hf_config, method)
    few = depth.few(special)
    small_config, small_method = shallow(hf_config, method, few)
    step = small_step(small_config, small_method, batch, tokens, special)
    more = Depth(depth.recomputed - few.recomputed, depth.kept - few.kept)
    fixed = {"weights": full.weight_bytes, "optimizer": full.optimizer_bytes}
    if method.router_aux_loss or method.router_z_loss:
        # Losses that are made of all layers' routers at once take more with each, in nearly every phase.
        one_more = Depth(few.recomputed + 1, few.kept), Depth(few.recomputed, few.kept + 1)
        deeper = [
            (number, small_step(*shallow(hf_config, method, depth), batch, tokens, special).phases)
            for number, depth in zip((more.recomputed, more.kept), one_more, strict=True)
            if number
        ]
        return {
            phase: {
                part: size + sum(number * (phases[phase][part] - size) for number, phases in deeper)
                for part, size in parts.items()
            }
            | fixed
            for phase, parts in step.phases.items()
            if all(phase in phases for _, phases in deeper)
        }

    def of_more(number: int, layer: int) -> Counter[str]:
        return Counter({name: number * size for name, size in step.stored_per_layer[layer].items()} if number else {})

    # Not of the last two, whose outputs are the walk's, nor of the one below a kept layer.
    below, above = of_more(more.recomputed, -(few.kept + 2) if few.kept else -3), of_more(more.kept, -3)
    held, held_above = Counter(), Counter()
    if not method.optimizer_in_backward:
        held["gradients"] = full.trainable_bytes - count(small_config, small_method).trainable_bytes
        held_above["gradients"] = held["gradients"] * more.kept // max(1, more.recomputed + more.kept)
    # On the way from top to bottom the layers below still keep theirs, and those above already hold gradients.
    added = {
        "embedding": Counter(),
        "kept": max(below + above, below + held_above, key=Counter.total),
        "middle": max(below + held_above, held, key=Counter.total),
        "bottom": held,
        "optimizer": held,
    }
    phases = {}
    for phase, parts in step.phases.items():
        of_phase = added.get(phase.split(" ")[0], below + above)
        phases[phase] = {name: size + of_phase[name] for name, size in parts.items()} | fixed
    return phases


def parameter_shapes(hf_config: PreTrainedConfig, method: Method) -> list[torch.Size]:
    """Of what one rank has of them."""
    with one_of(method.gpus) as mesh, torch.device("meta"):
        parameters = build(hf_config, method, mesh).parameters()
    return [local_part(p).shape for p in parameters if p.requires_grad]
