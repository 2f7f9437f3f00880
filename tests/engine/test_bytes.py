"""Bytes kept for backward, counted by a saved-tensors hook and as live storage, here and at Qwen1.5-MoE's true size
on fake tensors.

Per extra layer and token nothing grows but what the coupling needs: m D / 8 bytes for innovation, nothing for
cross_branch, the layer's input for none; each with the routing record of K bytes.
"""

from __future__ import annotations

import gc

import pytest
import torch
from helpers import LiveBytes, coupled, gradients, loss_of, saved_bytes, tiny_batch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

import revffn
from revffn.couplings.cross_branch import fixed_point
from revffn.couplings.cross_branch import step as cross_branch

D, K, CHECKSUM, SIGN = 32, 2, 8, 4  # of the tiny model; bytes
LEFT = dict(coupling="cross_branch", query_stream="left")
RIGHT = dict(coupling="cross_branch", query_stream="right")


def model_of(num_layers: int, model_type: str = "qwen2_moe", dtype=torch.bfloat16, **settings):
    overrides = dict(num_hidden_layers=num_layers)
    if model_type == "qwen2_moe":
        overrides["mlp_only_layers"] = []
    return coupled(model_type, dtype, overrides=overrides, **settings)


def bytes_saved(num_layers: int, batch: int, tokens: int, **settings) -> int:
    model = model_of(num_layers, **settings)
    with saved_bytes(model) as counted:
        model(**tiny_batch(batch, tokens))
    return counted["bytes"]


def packed(elements: int, m: int) -> int:
    """Bytes of `elements` side bits: m planes; three bits are two and one."""
    return {0: 0, 1: -(-elements // 8), 2: -(-elements // 4), 4: -(-elements // 2)}.get(
        m, -(-elements // 4) + -(-elements // 8)
    )


def per_layer(settings: dict, batch: int, tokens: int) -> int:
    """What the documentation promises for one more sparse layer."""
    routing = batch * tokens * K
    if settings["coupling"] == "none":
        return batch * tokens * D * 2 + routing
    if settings["coupling"] == "innovation":
        side_bits = packed(batch * tokens * D, settings.get("side_bits", 2))
        return side_bits + routing + CHECKSUM + SIGN * batch * settings.get("random_sign", True)
    low_bits = 2 * batch * tokens * D // 2 if settings["query_stream"] == "left" else 0  # sixteen of each element
    return routing + 2 * CHECKSUM + low_bits


CASES = {
    **{f"innovation, m = {m}": dict(coupling="innovation", side_bits=m) for m in range(5)},
    "innovation, fixed sign": dict(coupling="innovation", random_sign=False),
    "innovation, low-rank predictor": dict(coupling="innovation", predictor_rank=4),
    "cross_branch, right": RIGHT,
    "cross_branch, left": LEFT,
    "none": dict(coupling="none"),
}


@pytest.mark.parametrize("shape", [(2, 8), (1, 63)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_bytes_per_layer(case, shape, monkeypatch):
    """Growth with depth is the documented formula, exactly and at every depth."""
    settings = CASES[case]
    monkeypatch.setattr(cross_branch, "lack_of", lambda found, x, width: fixed_point.lack_of(found, x, 16))
    two, four, eight = (bytes_saved(num_layers, *shape, **settings) for num_layers in (2, 4, 8))
    growth = per_layer(settings, *shape)
    assert (four - two, eight - four) == (2 * growth, 4 * growth)


def test_stream_maps_keep_the_embedding():
    """Once, in the model's dtype, for the gradient of the map; nothing more per layer."""
    shape = 2, 16
    for num_layers in (2, 4):
        without, maps = (bytes_saved(num_layers, *shape, stream_maps=there, **RIGHT) for there in (False, True))
        assert maps - without == 2 * 16 * D * 2


@pytest.mark.parametrize("width", fixed_point.WIDTHS)
def test_low_bits(width, monkeypatch):
    """Of every element of the left stream `width` bits."""
    monkeypatch.setattr(cross_branch, "lack_of", lambda found, x, _: fixed_point.lack_of(found, x, width))
    for tokens in (16, 96):
        two, four = (bytes_saved(n, 1, tokens, **LEFT) for n in (2, 4))
        assert four - two == 2 * (tokens * (K + D // 2 * width // 8) + 2 * CHECKSUM)


def test_tokens_that_are_kept_whole(monkeypatch):
    """A place and a row each, beside the bits of all."""

    def three_elsewhere(*args):
        found = solve(*args)
        found.x[0, :3] += 100_000
        return found

    solve = fixed_point.solve
    monkeypatch.setattr(cross_branch, "solve", three_elsewhere)
    sizes = []
    for num_layers in (2, 4):
        model = model_of(num_layers, dtype=torch.float32, **LEFT)
        with saved_bytes(model) as counted:
            loss = loss_of(model, tiny_batch(1, 60))
        loss.backward()
        layers = revffn.reversible_report(model)["layers"].values()
        assert all(layer["kept_rows"] >= 3 / 60 for layer in layers)
        bits = sum(60 * D // 2 * layer["kept_bits"] // 8 for layer in layers)
        rows = sum(round(60 * layer["kept_rows"]) * (8 + D // 2 * 4) for layer in layers)
        sizes.append(counted["bytes"] - bits - rows)
    assert sizes[1] - sizes[0] == 2 * (60 * K + 2 * CHECKSUM)


def test_a_layer_that_keeps_its_input(monkeypatch):
    """Four bytes of every element of the left stream, where the rows would be more."""
    monkeypatch.setattr(cross_branch, "lack_of", lambda found, x, _: fixed_point.lack_of(found + (1 << 20), x))
    two, four = (bytes_saved(n, 1, 16, **LEFT) for n in (2, 4))
    assert four - two == 2 * (16 * (K + D // 2 * 4) + 2 * CHECKSUM)


@pytest.mark.parametrize("settings", [dict(coupling="innovation"), RIGHT], ids=["innovation", "cross_right"])
def test_dense_layers_record_nothing(settings):
    shape = 2, 16
    two, four = (bytes_saved(n, *shape, model_type="llama", **settings) for n in (2, 4))
    assert four - two == 2 * (per_layer(settings, *shape) - 2 * 16 * K)


def test_a_plain_layer_keeps_its_predecessors_input():
    """plain_layers = 3: layers 1 and 2 keep int32 states instead of side bits."""
    shape = 2, 16
    one, three = (bytes_saved(4, *shape, coupling="innovation", plain_layers=n) for n in (1, 3))
    elements = 2 * 16 * D
    assert three - one == 2 * (elements * 4 - packed(elements, 2))


@pytest.mark.parametrize("settings", [dict(coupling="innovation"), RIGHT], ids=["innovation", "cross_right"])
@pytest.mark.parametrize("tile_tokens", [16, 8])
def test_tiles_keep_the_same(settings, tile_tokens):
    """In tiles of one sequence, and in chunks of half a sequence, a layer keeps as much as at once (checksums per
    tile)."""
    shape = 4, 16
    growth = [
        bytes_saved(4, *shape, tile_tokens=t, **settings) - bytes_saved(2, *shape, tile_tokens=t, **settings)
        for t in (None, tile_tokens)
    ]
    num_checksums = {"innovation": 1, "cross_branch": 2}[settings["coupling"]]
    assert growth[1] - growth[0] == 2 * 3 * num_checksums * CHECKSUM


FEW = ["innovation, m = 2", "cross_branch, right", "cross_branch, left", "none"]


@pytest.mark.parametrize("case", FEW)
def test_live_storage_is_what_the_hook_counts(case):
    """Nothing per layer escapes the saved-tensors hook: live storage after forward grows by the same bytes."""
    live = []
    for num_layers in (2, 4):
        model, inputs = model_of(num_layers, **CASES[case]), tiny_batch(2, 32)
        with LiveBytes(model) as counter:
            loss = model(**inputs).loss
            live.append(counter.live)
            del loss
    saved = bytes_saved(4, 2, 32, **CASES[case]) - bytes_saved(2, 2, 32, **CASES[case])
    assert live[1] - live[0] - saved in range(0, 2 * 16)  # a 0-dim tensor per layer or so


def live_after_backward(num_layers: int, padded: bool, **settings) -> tuple[int, int]:
    """Live bytes after backward with the loss still alive, and after it is dropped; gradients not counted."""
    model, inputs = model_of(num_layers, **settings), tiny_batch(2, 64, padded=padded)
    gc.collect()
    gc.disable()  # cycles would hide behind the collector
    try:
        with LiveBytes(model) as counter:
            loss = model(**inputs).loss
            loss.backward()
            gradients(model)
            alive = counter.live
            del loss
            return alive, counter.live
    finally:
        gc.enable()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", FEW)
def test_nothing_is_left_after_backward(case, padded):
    """Back to zero without the garbage collector's help, but for the report's few scalars."""
    for num_layers in (2, 6):
        _, dropped = live_after_backward(num_layers, padded, **CASES[case])
        assert dropped <= 64 + 16 * num_layers


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", FEW)
def test_nothing_is_left_while_the_loss_is_alive(case, padded):
    """The graph's nodes are there as long as the loss is; they hold no tensor of a layer's size."""
    for num_layers in (2, 6):
        alive, _ = live_after_backward(num_layers, padded, **CASES[case])
        assert alive <= 128 + 32 * num_layers


@pytest.mark.parametrize("case", FEW)
def test_nothing_is_left_when_a_forward_is_dropped(case):
    model, inputs = model_of(4, **CASES[case]), tiny_batch(2, 64)
    gc.collect()
    gc.disable()
    try:
        with LiveBytes(model) as counter:
            loss = model(**inputs).loss
            del loss
            assert counter.live <= 128
            with torch.no_grad():
                del_me = model(**inputs).loss
            del del_me
            assert counter.live <= 128
    finally:
        gc.enable()


def test_backward_holds_one_layer_at_a_time():
    """Peak live storage does not grow with depth by more than what is kept per layer and the gradients."""
    peaks = []
    for num_layers in (4, 12):
        model, inputs = model_of(num_layers, "llama", coupling="innovation", side_bits=2), tiny_batch(4, 64)
        for parameter in model.parameters():  # gradients are consumed as they come
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with LiveBytes(model) as counter:
            model(**inputs).loss.backward()
            peaks.append(counter.peak)
    assert peaks[1] - peaks[0] <= 8 * (packed(4 * 64 * D, 2) + CHECKSUM + 4 * SIGN + 64)


# --- true size -------------------------------------------------------------------------------------------------------

FULL_D, FULL_K, TOKENS = 2048, 4, 2048
FULL = {
    "innovation": (dict(side_bits=2), TOKENS * (FULL_D * 2 // 8 + FULL_K) + CHECKSUM),
    "cross_right": (RIGHT, TOKENS * FULL_K + 2 * CHECKSUM),
    "none": (dict(coupling="none"), TOKENS * (FULL_D * 2 + FULL_K)),
}


def full_size(num_layers: int, settings: dict) -> dict[str, int]:
    """One step of Qwen1.5-MoE-A2.7B with `num_layers` layers on 1 x 2048 fake tokens."""
    with FakeTensorMode():
        config = Qwen2MoeConfig(num_hidden_layers=num_layers)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        model = revffn.convert(model, revffn.ReversibleConfig.from_dict(settings)).train()
        input_ids = torch.randint(0, 1000, (1, TOKENS))
        with LiveBytes(model) as counter:
            with saved_bytes(model) as counted:
                loss = model.model(input_ids=input_ids).last_hidden_state.float().square().mean()
            live = counter.live
            loss.backward()
            num_bytes = sum(p.grad.nbytes for p in model.model.parameters() if p.grad is not None)
            alive = counter.live - num_bytes
            del loss
            return {
                "parameters": num_parameters,
                "saved": counted["bytes"],
                "live": live,
                "left while the loss is alive": alive,
                "left": counter.live - num_bytes,
            }


@pytest.mark.parametrize("coupling", FULL)
def test_bytes_at_true_size(coupling):
    settings, growth = FULL[coupling]
    four, six = full_size(4, settings), full_size(6, settings)
    assert six["saved"] - four["saved"] == 2 * growth
    assert six["live"] - four["live"] == 2 * growth
    for measured in (four, six):
        assert measured["left"] <= 1024
        assert measured["left while the loss is alive"] <= 1024


def test_whole_model_at_true_size():
    """All 24 layers, 14.316 billion parameters: side bits, routing, two int32 streams, and little else."""
    settings, growth = FULL["innovation"]
    measured = full_size(24, settings)
    assert measured["parameters"] == 14_315_784_192
    streams = 2 * 4 * TOKENS * FULL_D
    head = (
        TOKENS * FULL_D * 4 + TOKENS * FULL_D * 2
    )  # the loss of this test: float32 and bf16 output of the final norm
    shared = 2 * TOKENS * 128 * 2 * 2  # rotary tables
    assert measured["saved"] <= 23 * growth + TOKENS * FULL_K + streams + head + shared + 64 * 1024


def test_operations_within_five_percent_of_activation_checkpointing():
    """Layers of true width (Qwen1.5-MoE), no head: the default coupling against transformers with checkpointing."""

    def operations(convert: bool) -> int:
        with FakeTensorMode():
            model = AutoModelForCausalLM.from_config(
                Qwen2MoeConfig(num_hidden_layers=4), dtype=torch.bfloat16, experts_implementation="grouped_mm"
            ).train()
            if convert:
                revffn.convert(model)
            else:
                model.gradient_checkpointing_enable()
            with FlopCounterMode(display=False) as counter:
                hidden = model.model(input_ids=torch.randint(0, 1000, (1, 2048)), use_cache=False).last_hidden_state
                hidden.float().sum().backward()
        return counter.get_total_flops()

    assert 1.0 <= operations(True) / operations(False) <= 1.05
