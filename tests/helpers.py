"""Tiny models of every architecture, an independent twin of the coupled model, three-way comparison, byte counters.

`reference_forward` computes what a coupled model is meant to compute with plain tensors and plain autograd: streams
are float64 numbers on the grid (every int32 is exact there), rounding passes gradients straight through. It shares no
code with the engine but the sublayers.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import weakref
from collections.abc import Iterator
from types import MethodType

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

import revffn
from revffn.couplings.cross_branch.modules import (
    cross_attention,
    half_feed_forward,
    normed_key_value,
    normed_query,
)
from revffn.engine.routing import RecordRouting, ReplayRouting
from revffn.engine.sublayers import attention, feed_forward
from revffn.engine.walk import Tile
from revffn.models.architectures import ARCHITECTURES
from revffn.optim import OptimizerInBackward

# Worst error of ours beyond plain autograd's, relative to the largest gradient of the parameter.
# (dtype, tolerance, observed, device, date)
TOLERANCE = {
    torch.float64: 1e-12,  # observed 8.4e-16, CPU, 2026-11
    torch.float32: 2e-5,  # observed 1.9e-6, CPU, 2026-11
    torch.bfloat16: 3e-2,  # observed 2.1e-2 (the twin adds residual gradients in float64), CPU, 2026-11
}

COMMON = dict(
    vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MOE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16)
MLA = dict(
    num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, moe_intermediate_size=16,
    n_group=2, topk_group=1,
)  # fmt: skip
SETTINGS: dict[str, dict] = {
    "qwen2_moe": dict(**MOE, shared_expert_intermediate_size=24, mlp_only_layers=[2]),
    "qwen3_moe": dict(**MOE, head_dim=8, mlp_only_layers=[], norm_topk_prob=True),
    "olmoe": dict(num_experts=6, num_experts_per_tok=2, clip_qkv=3.0),
    "mixtral": dict(num_local_experts=6, num_experts_per_tok=2),
    "deepseek_v2": dict(**MLA, topk_method="group_limited_greedy"),
    "deepseek_v3": dict(**MLA),
    "glm4_moe": dict(
        n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1,
        moe_intermediate_size=16, head_dim=8, n_group=1, topk_group=1,
    ),  # fmt: skip
    "gpt_oss": dict(
        num_local_experts=6, num_experts_per_tok=2, head_dim=8, sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),  # fmt: skip
    "llama": dict(),
    "qwen3": dict(head_dim=8),
}  # fmt: skip
assert set(SETTINGS) == set(ARCHITECTURES)


def tiny_model(
    model_type: str = "qwen2_moe",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    gain: float = 4.0,
    embedding_gain: float = 1.0,
    **overrides,
):
    """A random model of the real Hugging Face class. float64 runs the experts eagerly: grouped_mm has none on a CPU.

    Matrices are `gain` times transformers' 0.02: at 4 layers change the stream and routers decide. Attention
    contracts at gain 1 and embedding_gain 10.
    """
    config = AutoConfig.for_model(model_type, **{**COMMON, **SETTINGS[model_type], **overrides})
    torch.manual_seed(seed)
    sdpa = model_type != "gpt_oss"  # attention sinks
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa" if sdpa else "eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(gain * embedding_gain if "embed_tokens" in name else gain)
            elif "norm" not in name:
                parameter.normal_(std=0.1)
    return set_dtype(model, dtype)


def set_dtype(model, dtype: torch.dtype):
    model = model.to(dtype)
    if hasattr(model, "set_experts_implementation") and model._can_set_experts_implementation():
        model.set_experts_implementation("eager" if dtype == torch.float64 else "revffn")
    return model


def tiny_batch(batch: int = 3, tokens: int = 11, seed: int = 1, padded: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (batch, tokens), generator=generator)
    inputs = {"input_ids": ids, "labels": ids.clone()}
    if padded:
        mask = torch.ones_like(ids)
        for row in range(batch):
            mask[row, tokens - row :] = 0
        inputs["attention_mask"] = mask
        inputs["labels"][mask == 0] = -100
    return inputs


def snapshot(model) -> tuple:
    """What a refused conversion must leave as it was."""
    return (
        type(model),
        type(model.config),
        model.config.to_json_string(),
        [type(module) for module in model.modules()],
        [(name, id(p)) for name, p in model.named_parameters()],
        list(model.state_dict()),
        model.training,
    )


def coupled(
    model_type: str = "qwen2_moe",
    dtype: torch.dtype = torch.float32,
    calibrate: bool = True,
    overrides=None,
    **settings,
):
    model = tiny_model(model_type, dtype, **(overrides or {}))
    calibration = [tiny_batch(4, 13, seed=7)] if calibrate else None
    settings.setdefault("train_predictor", True)  # so that every gradient there can be is looked at
    settings.setdefault("random_sign", True)  # and every factor
    settings.setdefault("stream_maps", False)  # the paper's form; adapters then start where attention contracts
    settings.setdefault("grid_growth", 2)  # all there is to spare would leave no gain to see on four layers
    return revffn.convert(model, revffn.ReversibleConfig.from_dict(settings), calibration=calibration).train()


# --- the twin --------------------------------------------------------------------------------------------------------


def grid_scale(config, state: int, num_layers: int, width: int) -> Tensor:
    """Grid units per unit of state number `state`, by channel, float64."""
    if config.coupling != "innovation":
        return torch.full((width,), 2.0**config.grids.fraction_bits, dtype=torch.float64)
    bits, wide_bits = (
        config.grids.fraction_bits + growth * state // num_layers
        for growth in (config.grids.grid_growth or 0, config.grids.wide_growth)
    )
    scale = torch.full((width,), 2.0**bits, dtype=torch.float64)
    scale[config.grids.wide_channels] = 2.0**wide_bits
    return scale


def on_grid(x: Tensor, scale: Tensor) -> Tensor:
    wide = x.double()
    x = x if x.dtype == torch.float64 else x.float()
    rounded = torch.round(x * scale.to(x.dtype)).to(torch.int32)
    return wide + (rounded.double() / scale - wide).detach()


def wrapped(stream: Tensor, scale: Tensor) -> Tensor:
    """What int32 makes of a stream that has left its range; the gradient passes."""
    grid = stream.detach() * scale
    inside = torch.remainder(grid + 2.0**31, 2.0**32) - 2.0**31
    return stream + (inside - grid) / scale


def read(stream: Tensor, dtype: torch.dtype) -> Tensor:
    return stream if dtype == torch.float64 else stream.float().to(dtype)


def tile_rows(config, batch_size: int, num_tokens: int) -> list[slice]:
    """The sequences of each tile, as the engine cuts them: a product of another number of rows rounds otherwise."""
    size = max(1, config.tile_tokens // num_tokens) if config.tile_tokens else batch_size
    return [slice(start, start + size) for start in range(0, batch_size, size)]


def sequences(value, tile: slice, batch_size: int):
    """What of a layer's keyword arguments belongs to the sequences of `tile`."""
    if isinstance(value, dict):
        return {key: sequences(item, tile, batch_size) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(sequences(item, tile, batch_size) for item in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch_size:
        return value[tile]
    return value


def rms_norm(norm: torch.nn.Module, x: Tensor) -> Tensor:
    """The walk's RMSNorm: neighbours are added first. float64 stays float64, which transformers' own does not."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    total = torch.nn.functional.pad(wide.square(), (0, (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]))
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    root = ((total * (1 / x.shape[-1]) + norm.variance_epsilon).double()).sqrt().to(wide.dtype)
    normed, weight = wide * (1 / root), norm.weight.to(wide.dtype)
    if "GptOss" in type(norm).__name__:
        return (normed * weight).to(x.dtype)
    return (normed.to(x.dtype).to(wide.dtype) * weight).to(x.dtype)


@contextlib.contextmanager
def reference_layers(model, signs: Tensor | None):
    """While open, `model`'s layers compute the coupled function with plain autograd."""
    config = model.reversible_config
    halves = config.coupling == "cross_branch"
    state: dict[str, Tensor] = {}
    num_layers = len(model.model.layers)
    last = num_layers - 1
    width = model.config.hidden_size // (2 if halves else 1)
    scales = [grid_scale(config, k, num_layers, width) for k in range(num_layers + 1)]

    def forward(layer, hidden, *args, walk=None, **kwargs):
        if walk is not None:
            walk.layers_run += 1  # it stands for the layer, and says so
        k, dtype = layer.layer_index, layer.input_layernorm.weight.dtype
        dtype = state.setdefault("dtype", hidden.dtype)
        S = scales[k + 1]
        if halves:
            if k == 0:
                start = hidden if layer.stream_maps is None else layer.stream_maps.entry(hidden)
                state["left"], state["right"] = (on_grid(x, S) for x in start.chunk(2, dim=-1))
            query = state["left"] if config.cross_branch.query_stream == "left" else state["right"]
            query = normed_query(layer, read(query, dtype))
            update = cross_attention(layer, query, normed_key_value(layer, read(state["right"], dtype)), kwargs)
            state["left"] = wrapped(state["left"] + on_grid(update, S), S)
            update = half_feed_forward(layer, read(state["left"], dtype))
            state["right"] = wrapped(state["right"] + on_grid(update, S), S)
            out = torch.cat([state["left"], state["right"]], dim=-1)
            return read(out, dtype) if k == last else out
        if k == 0:
            state["now"] = on_grid(hidden, scales[0])
        now = state["now"]
        x = read(now, dtype)
        rows = tile_rows(config, *x.shape[:2])
        update = [
            attention(layer, rms_norm(layer.input_layernorm, x[tile]), sequences(kwargs, tile, x.shape[0]))
            for tile in rows
        ]
        middle = wrapped(now + on_grid(torch.cat(update), S), S)
        read_middle, size = read(middle, dtype), config.tile_tokens or middle.shape[1]
        chunks = [read_middle[tile].split(size, dim=1) for tile in rows]
        update = [
            torch.cat([feed_forward(layer, rms_norm(layer.post_attention_layernorm, chunk)) for chunk in row], dim=1)
            for row in chunks
        ]
        following = middle + on_grid(torch.cat(update), S)
        m = layer.coupling.side_bits
        if m is not None:
            past_S = scales[k - 1]
            innovation = state["past"] - (now + (torch.floor(now.detach() * past_S) / past_S - now).detach())
            if layer.coupling.predictor is not None:
                innovation = innovation - on_grid(layer.coupling.predictor(x), past_S)
            innovation = wrapped(innovation, past_S)
            scaled = innovation * 2.0**-m * past_S / S
            floored = torch.floor(innovation.detach() * past_S * 2.0**-m) / S
            scaled = scaled + (floored - scaled).detach()
            following = following + scaled * (1 if signs is None else signs[k].view(-1, 1, 1))
        following = wrapped(following, S)
        state["past"], state["now"] = now, following
        return read(following, dtype) if k == last else following

    for layer in model.model.layers:
        layer.forward = MethodType(forward, layer)
    if not halves:
        model.model.norm.plain = lambda hidden: rms_norm(model.model.norm, hidden)
    try:
        yield
    finally:
        for layer in model.model.layers:
            del layer.forward
        model.model.norm.__dict__.pop("plain", None)


def draw_signs(model, batch_size: int) -> Tensor | None:
    config = model.reversible_config
    if config.coupling != "innovation" or not config.innovation.random_sign:
        return None
    return 2 * torch.randint(0, 2, (len(model.model.layers), batch_size), dtype=torch.int32) - 1


def gradients(model) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def run(model, inputs, seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients through the engine."""
    torch.manual_seed(seed)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def run_reference(model, inputs, seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the same function by plain autograd."""
    torch.manual_seed(seed)
    signs = draw_signs(model, inputs["input_ids"].shape[0])
    with plain_layers(model, signs) as plain:
        loss = plain(**inputs).loss
        loss.backward()
    return loss.detach(), gradients(model)


def run_truth(model, inputs, seed: int = 5) -> dict[str, Tensor]:
    """Gradients of the same function in float64 by plain autograd, with the expert choices of the test dtype."""
    torch.manual_seed(seed)
    signs = draw_signs(model, inputs["input_ids"].shape[0])
    choices: list[Tensor] = []
    with torch.no_grad(), plain_layers(model, signs) as plain, RecordRouting(choices):
        plain(**inputs)
    exact = set_dtype(copy.deepcopy(model), torch.float64)
    with plain_layers(exact, signs) as plain, ReplayRouting(choices):
        plain(**inputs).loss.backward()
    return gradients(exact)


@contextlib.contextmanager
def plain_layers(model, signs: Tensor | None):
    """A model of the same weights that computes the same function without the engine."""
    if model.reversible_config.coupling == "none":
        yield revffn.export(model)
    else:
        with reference_layers(model, signs):
            yield model


def three_way(model, inputs, seed: int = 5, ill_conditioned: bool = False) -> dict:
    """Engine, plain autograd and float64 agree: the loss bit for bit with plain autograd, every gradient within
    `TOLERANCE`.

    Args:
        ill_conditioned: Ask of gradients what `assert_as_good` does in place of `assert_no_worse`.

    Returns:
        The report of the engine's backward walk.
    """
    dtype = model.dtype
    ours_loss, ours = run(model, inputs, seed)
    report = revffn.reversible_report(model)
    plain_loss, plain = run_reference(model, inputs, seed)
    truth = run_truth(model, inputs, seed)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert torch.equal(ours_loss, plain_loss), f"loss {ours_loss.item()!r}, plain autograd {plain_loss.item()!r}"
    assert set(ours) == set(plain) == set(truth) == trainable
    if ill_conditioned:
        assert_as_good(ours, plain, truth, dtype)
    for name in () if ill_conditioned else ours:
        assert_no_worse(ours[name], plain[name], truth[name], dtype, name)
    return report


def assert_no_worse(ours: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype, name: str = "") -> None:
    """Our error against `truth` is at most plain autograd's plus the tolerance of `dtype`, element by element."""
    truth = truth.double()
    scale = truth.abs().max().clamp_min(1e-6)
    excess = ((ours.double() - truth).abs() - (plain.double() - truth).abs()) / scale - TOLERANCE[dtype]
    assert bool((excess <= 0).all()), f"{name}: worst excess {excess.max():.3e} at index {int(excess.argmax())}"


def assert_as_good(
    ours: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """For gradients that any order of summation changes visibly (differences of large numbers): the root mean square
    error of each of ours is at most four times plain autograd's, plus the tolerance, and 1.5 times on average
    (geometric mean)."""

    def error(found: Tensor, exact: Tensor) -> float:
        return float((found.double() - exact.double()).norm() / exact.double().norm())

    errors = {name: (error(ours[name], exact), error(plain[name], exact)) for name, exact in truth.items()}
    bad = {name: pair for name, pair in errors.items() if not pair[0] <= 4 * pair[1] + TOLERANCE[dtype]}
    assert not bad, f"errors of ours and of plain autograd: {bad}"
    floor = 1e-3 * TOLERANCE[dtype]
    mean = statistics.geometric_mean((o + floor) / (p + floor) for o, p in errors.values())
    assert mean <= 1.5, f"errors are {mean:.3g} times plain autograd's on average"


# --- rebuilt states --------------------------------------------------------------------------------------------------


class States:
    """A copy of the streams at every position of forward, and whether backward came by with the same bits."""

    def __init__(self):
        self.of_forward: dict[tuple[int, int], list[Tensor]] = {}
        self.rebuilt: dict[tuple[int, int], bool] = {}
        self.tiles: list[Tile] = []  # keeps their ids from being used again

    def assert_exact(self) -> None:
        assert self.of_forward
        missing = set(self.of_forward) - set(self.rebuilt)
        assert not missing, f"backward did not reach positions {sorted(position for _, position in missing)}"
        wrong = sorted(position for (_, position), same in self.rebuilt.items() if not same)
        assert not wrong, f"rebuilt streams differ at positions {wrong}"


@contextlib.contextmanager
def captured_states() -> Iterator[States]:
    """Watch the streams of every walk. Uses nothing that the engine checks itself: it copies and compares all of
    them."""
    states = States()

    def set_attribute(tile: Tile, name: str, value) -> None:
        object.__setattr__(tile, name, value)
        if name != "position" or tile.streams[1] is None:
            return
        key = id(tile), value
        if key not in states.of_forward:
            states.of_forward[key] = [stream.clone() for stream in tile.streams]
            states.tiles.append(tile)
        else:
            true = states.of_forward[key]
            states.rebuilt[key] = all(torch.equal(a, b) for a, b in zip(true, tile.streams, strict=True))

    Tile.__setattr__ = set_attribute
    try:
        yield states
    finally:
        del Tile.__setattr__


# --- bytes -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def saved_bytes(model):
    """Count the bytes that autograd keeps for backward, each storage once, parameters not. Works on fake tensors."""
    seen: dict[int, Tensor] = {}
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    counted = {"bytes": 0}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in parameters and key not in seen:
            seen[key] = tensor  # keeps the address from being used again
            counted["bytes"] += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield counted
    seen.clear()


class LiveBytes(TorchDispatchMode):
    """Bytes of every storage that an operation returned and that is still alive; works on fake tensors.

    Args:
        model: Its parameters and buffers are not counted.
    """

    def __init__(self, model=None):
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()
        for tensor in (*model.parameters(), *model.buffers()) if model is not None else ():
            self.seen.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        nbytes = storage.nbytes()
        self.seen.add(key)
        self.live += nbytes
        self.peak = max(self.peak, self.live)

        def gone():
            self.seen.discard(key)
            self.live -= nbytes

        weakref.finalize(storage, gone)


# --- shared by several test files ------------------------------------------------------------------------------------

COUPLINGS = {
    "innovation": dict(coupling="innovation"),
    "cross_right": dict(coupling="cross_branch", query_stream="right"),
    "cross_left": dict(coupling="cross_branch", query_stream="left"),
    "none": dict(coupling="none"),
}
couplings = pytest.mark.parametrize("coupling", COUPLINGS)
exact_couplings = pytest.mark.parametrize("coupling", ["innovation", "cross_right"])


def assert_equal(ours, others) -> None:
    assert set(ours) == set(others), set(ours) ^ set(others)
    for name in ours:
        assert torch.equal(ours[name], others[name]), name


def loss_of(model, inputs, seed=5):
    torch.manual_seed(seed)
    return model(**inputs).loss


RULES = {
    "sgd": dict(rule="sgd", lr=0.05),
    "sgd_momentum": dict(rule="sgd", lr=0.05, momentum=0.9),
    "adamw": dict(rule="adamw", lr=1e-3),
    "adamw8bit": dict(rule="adamw8bit", lr=1e-3),
    "adafactor": dict(rule="adafactor", lr=1e-3),
    "adafactor_momentum": dict(rule="adafactor", lr=1e-3, momentum=0.9),
}
rules = pytest.mark.parametrize("rule", RULES)


def build(rule, params, **options):
    if rule == "adamw8bit":
        pytest.importorskip("torchao", reason="optional package torchao; ends when it is installed")
    return OptimizerInBackward(params, **{**RULES[rule], **options})


# --- comparisons ---------------------------------------------------------------------------------------------------


def assert_close(ours, plain, tolerance=TOLERANCE[torch.float32]) -> None:
    """Every gradient, relative to the largest of its parameter."""
    assert set(ours) == set(plain), set(ours) ^ set(plain)
    for name in ours:
        scale = plain[name].abs().max().clamp_min(1e-6)
        error = ((ours[name] - plain[name]).abs().max() / scale).item()
        assert error <= tolerance, f"{name}: {error:.2e}"


def train_steps(model, optimizer, num_steps=3, start=0, **inputs):
    losses = []
    for step in range(start, start + num_steps):
        torch.manual_seed(step)  # signs of a coupled model
        loss = model(**tiny_batch(8, 11, seed=step), **inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same(a, b):
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x, y), name


def states_of(optimizer):
    return {k: v for k, v in optimizer.state_dict()["state"].items()}


def assert_same_state(a, b):
    a, b = states_of(a), states_of(b)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].keys() == b[key].keys()
        for name, value in a[key].items():
            other = b[key][name]
            if isinstance(value, torch.Tensor):
                assert value.dtype == other.dtype and torch.equal(value, other), (key, name)
            else:
                assert value == other


def assert_verified(model) -> None:
    report = revffn.reversible_report(model)
    assert report["mismatched_states_total"] == 0
    if model.reversible_config.coupling != "none":
        assert report["verified_states"] > 0
