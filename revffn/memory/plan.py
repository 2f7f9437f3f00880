"""Planner: will a run fit, what else would, and what do the other ways of training take.

`plan` predicts one way to train (predict.py) and, if asked, the alternatives; `choose_tile` finds the largest tile
that fits, `choose_kept` the layers that need not run again; `what_would_fit` names changes that bring a run under a
limit; `check` runs the whole step on fake tensors and puts the outcome beside the prediction.

The alternatives are those of plain transformers: full logits, all gradients held until backward has ended, the
same update rule; and checkpointing once more with this library's loss and optimizer in backward. Three are derived
instead of measured: fewer checkpoints (every n layers), and stored inputs moved to host memory, of which the device is
left with two layers' (the one in use and the one on its way).
"""

# B = batch, T = tokens, L = decoder layers

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..config import ReversibleConfig
from ..engine.host_weights import layer_states
from ..models.architectures import ARCHITECTURES
from .amounts import gib
from .answers import USUAL_TILE, Change, Comparison, KeptChoice, Plan, TileChoice, Traffic
from .measure import Phases, count, of_depth
from .predict import POINTS_OF_BATCH, POINTS_OF_LENGTH, RESERVE_BYTES, Predictor, extend, largest
from .simulation import Method, RealOptimizer, build, simulate_step
from .wire import active_weights

OUTSIDE_LAYERS = ("embedding", "forward", "loss", "top", "top after lm_head.weight", "optimizer")
"""Phases in which backward is not among the decoder layers."""
SMALLEST_TILE = 256
"""Tokens of the smallest tile that `choose_tile` takes."""
TILE_SLACK = 0.2
"""By how much more than its share of a tile's tokens a working set may shrink."""
KEPT_SLACK = 0.08
"""Of a device's memory: left to the allocator where layers are kept. In reversible steps of ours on an H100 it held up
to 2.3 GiB more than was allocated, where there was room (`peak_reserved_bytes` in benchmarks/results/gpu)."""
LAYERS_ON_DEVICE = 2
"""Of stored inputs in host memory: that of the layer in use, and one on its way."""


# --- the ways --------------------------------------------------------------------------------------------------------


def to_host(hf_config: PreTrainedConfig, method: Method, phases: Phases, batch: int, tokens: int):
    """Stored layer inputs go to host memory, all but those of the layers being worked on."""
    each = batch * tokens * hf_config.hidden_size * method.dtype.itemsize
    moved = max(0, hf_config.num_hidden_layers - LAYERS_ON_DEVICE) * each
    moved_phases = {}
    for name, parts in phases.items():
        stored = parts["stored_activations"]
        moved_phases[name] = parts | {"stored_activations": max(stored - moved, min(stored, each))}
    return moved_phases, moved


def every_n_layers(n: int, hf_config: PreTrainedConfig, plain: Method, phases: Phases, batch: int, tokens: int):
    """Checkpoints of every n-th layer input: fewer of them, and n layers' activations while a group is walked back."""
    L = hf_config.num_hidden_layers
    each = batch * tokens * hf_config.hidden_size * plain.dtype.itemsize
    # Of layers that store everything the last one's share; it grows with B, and with T as attention makes it.
    batches, lengths = ([1], POINTS_OF_LENGTH) if batch == 1 else (POINTS_OF_BATCH, [tokens])
    stored, less = (
        extend(of_depth(hf_config, depth), plain, batches, lengths, batch, tokens)["loss"]["stored_activations"]
        for depth in (L, L - 1)
    )
    one_layer = stored - less
    fewer = (L - math.ceil(L / n)) * each
    out = {}
    for name, parts in phases.items():
        group = 0 if name in OUTSIDE_LAYERS else (n - 1) * one_layer
        stored = max(parts["stored_activations"] - fewer, min(parts["stored_activations"], each))
        out[name] = parts | {"stored_activations": stored, "working_set": parts["working_set"] + group}
    return out, 0


def label_of(method: Method) -> str:
    if method.name != "reversible":
        return method.name + f", {method.parallel}" * (method.gpus > 1)
    settings = method.reversible
    where = ", weights on the host" * (method.weights == "host")
    where += f", {method.parallel}" * (method.gpus > 1)
    where += f", {settings.kept_layers} layers kept" * (settings.kept_layers > 0)
    return f"{settings.find_coupling().label(settings)}, {method.optimizer}{where}"


def predictor(hf_config: PreTrainedConfig, method: Method, label: str | None = None) -> Predictor:
    """Of a method as it stands, offloading included."""
    label = label or label_of(method)
    settings = method.reversible
    if settings is None or settings.find_coupling().has_streams or not settings.offload_inputs:
        return Predictor(label, hf_config, method)
    # On a CPU, where the steps are measured, host memory is the only one.
    on_device = replace(method, reversible=replace(settings, offload_inputs=False))
    return Predictor(label, hf_config, on_device, partial(to_host, hf_config, on_device))


def alternatives(hf_config: PreTrainedConfig, method: Method) -> Iterator[Predictor]:
    """Other ways to train the same model: this library's without rebuilding, and plain transformers; on several GPUs
    those that divide the parameters as well."""
    common = dict(optimizer=method.optimizer, rounding=method.rounding, dtype=method.dtype)
    if method.gpus > 1:
        yield from alternatives_on_several(hf_config, method, common)
        return
    if hf_config.model_type in ARCHITECTURES:
        tile_tokens = method.reversible.tile_tokens if method.reversible else 2048
        for offload in (False, True):
            settings = ReversibleConfig(coupling="none", tile_tokens=tile_tokens, offload_inputs=offload)
            yield predictor(hf_config, Method(reversible=settings, **common))
    usual = dict(optimizer_in_backward=False, linear_cross_entropy=False, **common)
    plain, checkpointing = Method(name="plain", **usual), Method(name="checkpointing", **usual)
    lora = replace(checkpointing, optimizer="adamw", rounding="nearest", lora_rank=16)
    n = round(math.sqrt(hf_config.num_hidden_layers))
    in_groups = partial(every_n_layers, n, hf_config, plain)
    offloaded = partial(to_host, hf_config, checkpointing)
    yield Predictor("checkpointing", hf_config, checkpointing)
    yield Predictor("checkpointing, with our loss and optimizer", hf_config, Method(name="checkpointing", **common))
    yield Predictor(f"checkpointing every {n} layers", hf_config, checkpointing, in_groups)
    yield Predictor("checkpointing in host memory", hf_config, checkpointing, offloaded)
    yield Predictor("plain transformers", hf_config, plain)
    yield Predictor("LoRA, checkpointing, adamw", hf_config, lora)


def alternatives_on_several(
    hf_config: PreTrainedConfig, method: Method, common: dict[str, Any]
) -> Iterator[Predictor]:
    other = replace(method, parallel=other_strategy(method))
    if is_divided(hf_config, other):
        yield predictor(hf_config, other)
    settings = ReversibleConfig(coupling="none", tile_tokens=method.reversible.tile_tokens)
    yield predictor(hf_config, replace(method, reversible=settings))
    checkpointing = Method(name="checkpointing", gpus=method.gpus, **common)
    yield Predictor("checkpointing, with our loss and optimizer, fsdp", hf_config, checkpointing)
    usual = replace(checkpointing, optimizer_in_backward=False, linear_cross_entropy=False)
    yield Predictor("checkpointing, fsdp", hf_config, usual)


def other_strategy(method: Method) -> str:
    return "ep" if method.parallel == "fsdp" else "fsdp"


def is_divided(hf_config: PreTrainedConfig, method: Method) -> bool:
    """Whether the ranks can share the model so."""
    try:
        count(hf_config, method)
    except ValueError:
        return False
    return True


# --- the questions ---------------------------------------------------------------------------------------------------


def plan(
    hf_config: PreTrainedConfig,
    batch: int,
    tokens: int,
    method: Method | None = None,
    *,
    gpu_bytes: int | None = None,
    with_alternatives: bool = True,
    roomiest: Method | None = None,
) -> Plan:
    """Predict the memory of training, from a config alone.

    Args:
        hf_config: The model's.
        batch, tokens: B sequences of T tokens each per step, of all GPUs together.
        method: How; the default is this library's.
        gpu_bytes: Memory of a device; the largest batch and the longest sequence that fit it are then looked for.
        with_alternatives: Plan the other ways too.
        roomiest: The method when the largest batch and the longest sequence are looked for; None is the same.

    Raises:
        ValueError: B or T below 1, a batch or a model that the GPUs cannot share, or a model that the method does not
            know.
    """
    method = method or Method()
    require(hf_config, batch, tokens, method)

    def ways_of(method: Method) -> list[Predictor]:
        return [predictor(hf_config, method), *(alternatives(hf_config, method) if with_alternatives else ())]

    ways = ways_of(method)
    bounds = ways_of(roomiest) if roomiest else list(ways)
    if with_alternatives and method.reversible is not None and method.reversible.kept_layers:
        # So that the others, which spend no memory that is free, stand beside one that does not either.
        ways.insert(1, predictor(hf_config, keeping(method, 0)))
        bounds.insert(1, bounds[0] if roomiest else ways[1])
    plans = []
    for way, bound in zip(ways, bounds, strict=True):
        plans.append(replace(way.plan(method.share(batch), tokens), batch=batch, gpus=method.gpus))
        if gpu_bytes is not None:
            budget = gpu_bytes - RESERVE_BYTES
            plans[-1].largest_batch = method.gpus * bound.largest_batch(tokens, budget)
            plans[-1].longest_sequence = bound.longest_sequence(budget)
    if method.gpus > 1 and method.parallel == "ep":
        more = predictor(hf_config, with_room(method)).peak(method.share(batch), tokens) - plans[0].peak_bytes
        plans[0].second_part_bytes = max(0, more)
    plans[0].alternatives = plans[1:]
    return plans[0]


def with_room(method: Method) -> Method:
    """ep: for a rank that receives twice its even part of the rows."""
    several = method.gpus > 1 and method.parallel == "ep"
    return replace(method, received=2.0) if several else method


def choose_tile(
    hf_config: PreTrainedConfig,
    batch: int,
    tokens: int,
    method: Method,
    *,
    limit_bytes: int,
    reserve_bytes: int = RESERVE_BYTES,
    largest: int | None = None,
) -> TileChoice:
    """The largest tile whose step fits: the whole batch, or a power of two of tokens that is less.

    A smaller tile has a smaller working set; but where there is more than one, gradients of experts are added up
    beside each tile's share, so that for small batches the whole one takes least. With ep there has to be room for a
    rank that receives twice its part of the rows. Sizes that would be too large even
    with their share of the working set are passed over without a measurement. Where none fits: the usual tile, or the
    one of those measured that takes less.

    Args:
        hf_config, batch, tokens, method: As in `plan`; the tile that `method` has is not looked at.
        limit_bytes: Memory of the device.
        reserve_bytes: Of it, outside tensors.
        largest: Tokens of the largest tile to try, instead of the whole batch of one rank.

    Raises:
        ValueError: See `plan`.
    """
    require(hf_config, batch, tokens, method)
    batch, method = method.share(batch), with_room(method)
    budget = limit_bytes - reserve_bytes
    sizes: list[int | None] = [largest]
    size = 2 ** ((largest or batch * tokens) - 1).bit_length() // 2
    while size >= SMALLEST_TILE:
        sizes.append(size)
        size //= 2
    if predictor(hf_config, method).least() > budget:
        usual = USUAL_TILE if USUAL_TILE in sizes else largest
        return TileChoice(usual, "weights and optimizer state alone do not fit")
    peaks: dict[int | None, int] = {}
    peak = working_set = 0
    tile = 1
    for size in sizes:
        share = at_once(size, batch, tokens) / tile
        if peaks and peak - (1 + TILE_SLACK) * (1 - share) * working_set > budget:
            continue
        answer = predictor(hf_config, tiled(method, size)).plan(batch, tokens)
        peaks[size] = peak = answer.peak_bytes
        working_set, tile = answer.parts["working_set"], at_once(size, batch, tokens)
        if peak <= budget:
            which = "fits" if size is None else "the largest that fits"
            if size is not None and size == largest:
                which = "fits; larger ones are no faster on a CPU"
            return TileChoice(size, f"{which}: {gib(peak + reserve_bytes)} of {gib(limit_bytes)}")
    if USUAL_TILE in sizes and USUAL_TILE not in peaks:
        peaks[USUAL_TILE] = predictor(hf_config, tiled(method, USUAL_TILE)).peak(batch, tokens)
    least = min(peaks, key=peaks.__getitem__)
    return TileChoice(least, f"none fits: {gib(peaks[least] + reserve_bytes)}, and {gib(limit_bytes)} there are")


def choose_kept(
    hf_config: PreTrainedConfig, batch: int, tokens: int, method: Method, *, limit_bytes: int
) -> KeptChoice:
    """How many decoder layers can keep what they save for backward, so that the step still fits.

    Args:
        hf_config, batch, tokens, method: As in `plan`; the number that `method` has is not looked at.
        limit_bytes: Memory of a GPU, of which `KEPT_SLACK` and the reserve are left alone.

    Raises:
        ValueError: See `plan`.
    """
    require(hf_config, batch, tokens, method)
    batch, method = method.share(batch), with_room(method)
    budget = round((1 - KEPT_SLACK) * limit_bytes) - RESERVE_BYTES
    num_layers = hf_config.num_hidden_layers

    def peak(number: int) -> int:
        return predictor(hf_config, keeping(method, number)).peak(batch, tokens)

    number = 0
    if predictor(hf_config, method).least() <= budget:
        number = largest(lambda number: number <= num_layers and peak(number) <= budget, num_layers)
    if number == 0:
        return KeptChoice(0, num_layers, "no memory to spare")
    return KeptChoice(number, num_layers, f"fit: {gib(peak(number) + RESERVE_BYTES)} of {gib(limit_bytes)}")


def at_once(tile_tokens: int | None, batch: int, tokens: int) -> int:
    """Tokens that are in a tile: whole sequences, or a part of one."""
    if tile_tokens is None or tile_tokens < tokens:
        return tile_tokens or batch * tokens
    return min(batch, tile_tokens // tokens) * tokens


def tiled(method: Method, tile_tokens: int | None) -> Method:
    """A method with tiles of that size; one that has none is as it was."""
    if method.reversible is None:
        return method
    return replace(method, reversible=replace(method.reversible, tile_tokens=tile_tokens))


def keeping(method: Method, kept_layers: int) -> Method:
    """The same for layers that keep what they save."""
    if method.reversible is None:
        return method
    return replace(method, reversible=replace(method.reversible, kept_layers=kept_layers))


def require(hf_config: PreTrainedConfig, batch: int, tokens: int, method: Method) -> None:
    if batch < 1 or tokens < 1:
        raise ValueError(f"batch and tokens must be at least 1, got {batch} and {tokens}.")
    if method.name == "reversible" and hf_config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"No reversible layout for model_type={hf_config.model_type!r}. Known: "
            f"{', '.join(sorted(ARCHITECTURES))}. docs/adding_an_architecture.md shows how to add one."
        )
    method.share(batch)
    if method.gpus > 1:
        count(hf_config, method)  # which divides the model


def what_would_fit(
    hf_config: PreTrainedConfig, batch: int, tokens: int, method: Method | None = None, *, gpu_bytes: int
) -> list[Change]:
    """Changes that bring a run under `gpu_bytes`, each alone; together with others only where none does alone.

    Args:
        hf_config, batch, tokens, method: As in `plan`.
        gpu_bytes: Memory of the device.

    Returns:
        The list, empty if nothing helps (the weights themselves do not fit) or the run fits as it is.

    Raises:
        ValueError: See `plan`.
    """
    method = method or Method()
    require(hf_config, batch, tokens, method)
    budget = gpu_bytes - RESERVE_BYTES

    def attempt(changed: Method, settings: dict[str, Any], words: str) -> list[Change]:
        """The change alone; with a smaller batch or a shorter sequence where that is not enough."""
        way = predictor(hf_config, changed)
        # Weights and optimizer state take a second to count, a step several to measure.
        if way.least() > budget:
            return []
        if words and (peak := way.peak(changed.share(batch), tokens)) <= budget:
            return [Change(settings, words, peak + RESERVE_BYTES)]
        words, each = f"{words} and " if words else "", changed.share(batch)
        if each > 1 and (fewer := way.largest_batch(tokens, budget)):
            total, of_all = way.peak(fewer, tokens) + RESERVE_BYTES, changed.gpus * fewer
            return [Change(settings | {"batch": of_all}, f"{words}batch {of_all} instead of {batch}", total)]
        length = way.longest_sequence(budget)
        if not 0 < length < tokens:
            return []
        total = way.peak(1, length) + RESERVE_BYTES
        text = f"{words}one sequence of {length} tokens" + " on each GPU" * (changed.gpus > 1)
        return [Change(settings | {"batch": changed.gpus, "tokens": length}, text, total)]

    asked = predictor(hf_config, method)
    if asked.least() <= budget and asked.peak(method.share(batch), tokens) <= budget:
        return []
    changes = attempt(method, {}, "")
    together, all_words = {}, {}
    for settings, words in single_changes(method):
        # One change of a setting is enough.
        if any(change.settings.keys() == settings.keys() for change in changes):
            continue
        changed = changed_method(method, settings)
        if changed.gpus > 1 and (batch % changed.gpus or not is_divided(hf_config, changed)):
            continue
        found = attempt(changed, settings, words)
        # With a smaller batch too, a change is no news beside the smaller batch alone.
        changes += [change for change in found if change.settings == settings or not changes]
        together |= settings
        all_words |= dict.fromkeys(settings, words)
    if not changes and len(all_words) > 1:
        changes = attempt(changed_method(method, together), together, ", ".join(all_words.values()))
    return changes


def changed_method(method: Method, settings: dict[str, Any]) -> Method:
    """A method with new values, those of its `ReversibleConfig` included; `batch` and `tokens` are none of it."""
    names = ("optimizer", "rounding", "weights", "gpus", "parallel")
    outer = {name: settings[name] for name in names if name in settings}
    inner = {name: value for name, value in settings.items() if name not in (*outer, "batch", "tokens")}
    if inner:
        outer["reversible"] = replace(method.reversible, **inner)
    return replace(method, **outer)


def single_changes(method: Method) -> Iterator[tuple[dict[str, Any], str]]:
    """Settings that take less than the method's, and the words for them."""
    if method.optimizer in ("adamw", "adamw8bit"):
        yield {"optimizer": "adafactor"}, f"optimizer adafactor instead of {method.optimizer}"
    if method.rounding == "master" and method.dtype == torch.bfloat16:
        yield {"rounding": "stochastic"}, "rounding stochastic instead of master"
    if method.gpus > 1:
        other = other_strategy(method)
        if method.name == "reversible":
            yield {"parallel": other}, f"parallel {other} instead of {method.parallel}"
        for gpus in (2 * method.gpus, 4 * method.gpus, 8 * method.gpus):
            yield {"gpus": gpus}, f"{gpus} GPUs instead of {method.gpus}"
    reversible = method.reversible
    if reversible is None:
        return
    if reversible.kept_layers:
        yield {"kept_layers": 0}, f"kept_layers 0 instead of {reversible.kept_layers}"
    yield from reversible.find_coupling().savings(reversible)
    if method.weights == "device" and method.optimizer_in_backward and method.gpus == 1:
        yield {"weights": "host"}, "weights in host memory"
    before = reversible.tile_tokens
    for tile_tokens in (1024, 512, 256):
        if before is None or tile_tokens <= before // 2:
            yield {"tile_tokens": tile_tokens}, f"tile_tokens {tile_tokens} instead of {before or 'the whole batch'}"


# --- weights in host memory: what is copied -------------------------------------------------------------------------


def traffic(hf_config: PreTrainedConfig, method: Method, link_bytes_per_s: float, flops_per_s: float) -> Traffic:
    """From the model's sizes and two rates of the machine, which are the caller's.

    Forward copies every layer in and computes 2 operations per active weight and token, backward copies weights and
    states in and what was trained out again, through one slot one after the other, and computes 6. Attention's scores
    are left out: they only make computing longer.
    """
    with torch.device("meta"):
        model = build(hf_config, method)
    parameters = list(model.model.layers.parameters())
    active = active_weights(hf_config, parameters)
    weights = sum(p.nbytes for p in parameters)
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    states = sum(
        values[name].nbytes for values, name in layer_states(RealOptimizer(model, method).optimizer, parameters)
    )
    forward = weights / link_bytes_per_s * flops_per_s / (2 * active)
    backward = (weights + trained + 2 * states) / link_bytes_per_s * flops_per_s / (6 * active)
    return Traffic(2 * weights + states, trained + states, math.ceil(max(forward, backward)))


# --- predicted against simulated -------------------------------------------------------------------------------------


def check(hf_config: PreTrainedConfig, batch: int, tokens: int, method: Method, answer: Plan) -> Comparison:
    """Run the whole step on fake tensors, at full depth, batch and length: a minute or several.

    Raises:
        ValueError: The method offloads, which a simulation on a CPU cannot tell from not doing so.
    """
    if method.reversible is not None and method.reversible.offload_inputs:
        raise ValueError(
            "A step that offloads cannot be simulated: fake tensors know one memory. Leave offloading out."
        )
    simulated = simulate_step(hf_config, batch, tokens, method)
    return Comparison(answer.parts, simulated["parts"], simulated["seconds"])
