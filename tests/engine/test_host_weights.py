"""Weights in host memory: training is bit for bit the resident one, with two layers in the slots at a time.

pytest tests/engine/test_host_weights.py            # seconds; on a CPU both kinds of memory are the same kind
pytest tests/engine/test_host_weights.py -m slow    # Qwen1.5-MoE-A2.7B at 16 x 2048 on fake tensors: minutes
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import tiny_model
from transformers import AutoModelForCausalLM

import revffn
from revffn import HostWeights, ReversibleConfig
from revffn.engine import host_weights
from revffn.memory.measure import count
from revffn.memory.plan import check, plan, traffic, what_would_fit
from revffn.memory.simulation import Method, simulate_step
from revffn.models.known import load_config
from revffn.optim import OptimizerInBackward, parameter_groups

COUPLINGS = {
    "innovation": dict(coupling="innovation"),
    "innovation, all trained": dict(coupling="innovation", train_predictor=True),
    "cross_branch": dict(coupling="cross_branch", query_stream="right"),
    "cross_branch, maps": dict(coupling="cross_branch", query_stream="right", stream_maps=True),
    "none": dict(coupling="none"),
}


def pair(coupling: str = "innovation", num_layers: int = 5, dtype: torch.dtype = torch.bfloat16, **settings):
    """The same model twice; the second is to keep its weights in host memory."""
    torch.manual_seed(0)
    model = tiny_model(num_hidden_layers=num_layers).to(dtype)
    revffn.convert(model, ReversibleConfig.from_dict(COUPLINGS[coupling] | settings))
    return model.train(), copy.deepcopy(model).train()


def batch(seed: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 90, (4, 16), generator=torch.Generator().manual_seed(seed)).to(device)
    return dict(input_ids=ids, labels=ids, use_cache=False)


def train(model, optimizer, steps: range, device: str = "cpu") -> list[float]:
    """Losses of training steps, and of an evaluation after each."""
    losses = []
    for step in steps:
        torch.manual_seed(step)
        loss = model(**batch(step, device)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            losses.append(model.eval()(**batch(100, device)).loss.item())
        model.train()
    return losses


def optimizer_of(model, rule: str = "adafactor", **settings) -> OptimizerInBackward:
    return OptimizerInBackward(parameter_groups(model, 0.01), rule=rule, lr=1e-2, **settings)


def assert_same(model, other) -> None:
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("coupling", "rule", "tile_tokens"),
    [(coupling, "adafactor", 16) for coupling in COUPLINGS]
    + [("innovation", rule, None) for rule in ("adafactor", "adamw", "adamw8bit", "sgd")],
)
def test_training_is_bit_for_bit_the_resident_one(coupling, rule, tile_tokens):
    resident, streamed = pair(coupling, tile_tokens=tile_tokens)
    optimizers = [optimizer_of(model, rule) for model in (resident, streamed)]
    HostWeights(streamed).keep_states_of(optimizers[1])
    assert train(resident, optimizers[0], range(3)) == train(streamed, optimizers[1], range(3))
    assert_same(resident, streamed)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["adafactor", "adamw"])
def test_on_a_gpu_it_is_the_resident_training_too(rule):
    """With copies on streams of their own, a few steps long enough for them to be late."""
    torch.manual_seed(0)
    plain = tiny_model(num_hidden_layers=6, hidden_size=256, moe_intermediate_size=512).to(torch.bfloat16)
    models = [revffn.convert(copy.deepcopy(plain)).train() for _ in range(2)]
    models[0].cuda()
    store = HostWeights(models[1], "cuda")
    optimizers = [optimizer_of(model, rule) for model in models]
    store.keep_states_of(optimizers[1])
    assert train(models[0], optimizers[0], range(4), "cuda") == train(models[1], optimizers[1], range(4), "cuda")
    models[0].cpu()
    models[1].cpu()
    assert_same(*models)
    assert all(p.is_pinned() for layer in models[1].model.layers for p in layer.parameters())


def test_master_weights_and_states_are_the_resident_ones_too():
    resident, streamed = pair()
    optimizers = [optimizer_of(model, "adamw", rounding="master") for model in (resident, streamed)]
    HostWeights(streamed).keep_states_of(optimizers[1])
    assert train(resident, optimizers[0], range(2)) == train(streamed, optimizers[1], range(2))
    for p, q in zip(resident.parameters(), streamed.parameters(), strict=True):
        ours, theirs = (optimizer.state.get(x, {}) for optimizer, x in zip(optimizers, (p, q), strict=True))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours if isinstance(ours[k], torch.Tensor))


def test_a_write_back_that_is_left_out_shows(monkeypatch):
    """The comparison can fail."""
    resident, streamed = pair()
    monkeypatch.setattr(HostWeights, "release", lambda self, index, backward: RELEASE(self, index, False))
    optimizers = [optimizer_of(model) for model in (resident, streamed)]
    HostWeights(streamed)
    assert train(resident, optimizers[0], range(2)) != train(streamed, optimizers[1], range(2))


RELEASE = HostWeights.release


@pytest.mark.parametrize("tile_tokens", [None, 16])
def test_a_layer_is_copied_once_per_pass_whatever_the_number_of_tiles(tile_tokens):
    """Forward all of them, backward all but the two that are still there, in order, one ahead."""
    _, model = pair(num_layers=6, tile_tokens=tile_tokens)
    store, loads, load = HostWeights(model), [], HostWeights.load

    def noting(index: int, with_states: bool) -> None:
        before = store.slots[index % 2].layer
        load(store, index, with_states)
        if before != index:
            loads.append(index)

    store.load = noting
    store.keep_states_of(optimizer := optimizer_of(model))
    train_loss = model(**batch(0)).loss
    assert loads == [0, 1, 2, 3, 4, 5]
    train_loss.backward()
    optimizer.step()
    assert loads == [0, 1, 2, 3, 4, 5, 3, 2, 1, 0]


def test_at_most_one_layer_is_in_use_and_two_have_room():
    _, model = pair()
    store = HostWeights(model)
    layer_bytes = max(sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers)
    assert len(store.slots) == 2
    assert all(layer_bytes <= slot.weights.nbytes <= layer_bytes + 256 * len(store.host[0]) for slot in store.slots)
    seen = []

    def look(index: int) -> None:
        room = {slot.weights.untyped_storage().data_ptr() for slot in store.slots}
        inside = [
            all(p.untyped_storage().data_ptr() in room for p in layer.parameters()) for layer in model.model.layers
        ]
        seen.append((index, [i for i, there in enumerate(inside) if there]))

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, i=index: look(i))
    store.keep_states_of(optimizer := optimizer_of(model))
    train(model, optimizer, range(1))
    assert len(seen) == 15 and all(there == [index] for index, there in seen)
    assert all(
        p.untyped_storage().data_ptr() not in {s.weights.data_ptr() for s in store.slots} for p in model.parameters()
    )


def test_gradients_that_stay_are_added_up_on_the_host():
    resident, streamed = pair(dtype=torch.float32, random_sign=False)
    HostWeights(streamed)
    for model in (resident, streamed):
        for seed in range(2):
            model(**batch(seed)).loss.backward()
    for (name, p), q in zip(resident.named_parameters(), streamed.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert torch.equal(p.grad, q.grad) and q.grad.device == q.device, name
    # Any optimizer steps there.
    for model in (resident, streamed):
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    assert_same(resident, streamed)


def test_a_pass_that_failed_leaves_nothing_behind():
    resident, streamed = pair()
    optimizers = [optimizer_of(model) for model in (resident, streamed)]
    HostWeights(streamed).keep_states_of(optimizers[1])

    def fail(*_):
        raise KeyboardInterrupt

    for layer in (1, 3):
        handle = streamed.model.layers[layer].mlp.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            streamed(**batch(9))
        handle.remove()
    assert train(resident, optimizers[0], range(2)) == train(streamed, optimizers[1], range(2))


def test_weights_can_be_changed_saved_and_loaded_between_steps(tmp_path):
    resident, streamed = pair(num_layers=2)  # both layers stay in their slots over a whole step
    optimizers = [optimizer_of(model) for model in (resident, streamed)]
    HostWeights(streamed).keep_states_of(optimizers[1])
    for model, optimizer in zip((resident, streamed), optimizers, strict=True):
        train(model, optimizer, range(1))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
    assert train(resident, optimizers[0], range(1, 2)) == train(streamed, optimizers[1], range(1, 2))
    streamed.save_pretrained(tmp_path)
    _, again = pair(num_layers=2)
    store = HostWeights(again)
    again.load_state_dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict())
    assert_same(resident, again)
    state = copy.deepcopy(optimizers[1].state_dict())
    optimizer = optimizer_of(again)
    store.keep_states_of(optimizer)
    optimizer.load_state_dict(state)
    assert train(resident, optimizers[0], range(2, 4)) == train(again, optimizer, range(2, 4))


def test_blocks_of_host_memory_train_and_are_saved_as_any(tmp_path, monkeypatch):
    """As on a GPU, where several parameters lie in one block of pinned memory."""
    monkeypatch.setattr(host_weights.blocks, "__defaults__", (20_000,))
    resident, streamed = pair()
    layer_parameters = [p for layer in streamed.model.layers for p in layer.parameters()]
    host_weights.into_blocks(layer_parameters, pin=False)
    storages = {p.untyped_storage().data_ptr() for p in layer_parameters}
    assert 5 < len(storages) < len(layer_parameters)
    optimizers = [optimizer_of(model) for model in (resident, streamed)]
    HostWeights(streamed).keep_states_of(optimizers[1])
    assert train(resident, optimizers[0], range(2)) == train(streamed, optimizers[1], range(2))
    assert {p.untyped_storage().data_ptr() for p in layer_parameters} == storages
    streamed.save_pretrained(tmp_path)
    assert_same(resident, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))


def test_frozen_layers_and_embeddings_are_passed():
    resident, streamed = pair()
    for model in (resident, streamed):
        model.model.embed_tokens.requires_grad_(False)
        model.model.layers[1].requires_grad_(False)
        model.model.layers[4].requires_grad_(False)
    optimizers = [optimizer_of(model) for model in (resident, streamed)]
    HostWeights(streamed).keep_states_of(optimizers[1])
    assert train(resident, optimizers[0], range(2)) == train(streamed, optimizers[1], range(2))
    assert_same(resident, streamed)


def test_conversion_and_export_on_the_way():
    """Calibration runs through the slots; what it adds to layers is taken over by `refresh`."""
    torch.manual_seed(0)
    plain = tiny_model(num_hidden_layers=4)
    models = [plain, copy.deepcopy(plain)]
    store = HostWeights(models[1])
    for model in models:
        revffn.convert(model, calibration=[{"input_ids": batch(0)["input_ids"]}])
        model.train()
    store.refresh()
    optimizers = [optimizer_of(model) for model in models]
    store.keep_states_of(optimizers[1])
    assert train(models[0], optimizers[0], range(2)) == train(models[1], optimizers[1], range(2))
    store.remove()
    assert_same(*map(revffn.export, models))


def test_what_cannot_be_is_said():
    _, model = pair()
    store = HostWeights(model)
    with pytest.raises(ValueError, match="in host memory already"):
        HostWeights(model)
    with pytest.raises(RuntimeError, match="reversible walk"):
        model.eval()(**batch(0))
    with pytest.raises(RuntimeError, match="dtype"):
        model.to(torch.float64)
    store.remove()
    model.to(torch.float32).train()
    model(**batch(0)).loss.backward()
    with pytest.raises(ValueError, match="optimizer in backward"):
        Method(weights="host", optimizer_in_backward=False)


# --- bytes -----------------------------------------------------------------------------------------------------------


def small_config(**changes):
    config = dict(num_hidden_layers=4, hidden_size=512, moe_intermediate_size=256, vocab_size=4096)
    return load_config("qwen1.5-moe-a2.7b", **(config | changes))


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_simulated_peak_is_the_planned_one_and_flat_in_depth(optimizer):
    method = Method(weights="host", optimizer=optimizer)
    answer = plan(small_config(), 4, 512, method, with_alternatives=False)
    simulated = simulate_step(small_config(), 4, 512, method)
    assert simulated["leaked_bytes"] == 0
    assert answer.peak_bytes == pytest.approx(simulated["peak_bytes"], rel=0.01)
    deeper = simulate_step(small_config(num_hidden_layers=8), 4, 512, method)
    more = deeper["peak_bytes"] - simulated["peak_bytes"]
    # Side bits and routing of four layers: 4 / 8 bytes per element, and 4 experts of one byte per token.
    assert 0 <= more <= 4 * 4 * 512 * (512 // 2 + 4 * 2) + 2**20
    resident = simulate_step(small_config(num_hidden_layers=8), 4, 512, Method(optimizer=optimizer))
    counts = [
        count(small_config(num_hidden_layers=8), Method(optimizer=optimizer, weights=w)) for w in ("device", "host")
    ]
    saved = sum((c.weight_bytes + c.optimizer_bytes) * sign for c, sign in zip(counts, (1, -1), strict=True))
    assert resident["peak_bytes"] - deeper["peak_bytes"] == pytest.approx(saved, rel=0.05)


def test_the_planner_offers_it_and_says_from_when_it_is_free():
    config = load_config("qwen1.5-moe-a2.7b", num_hidden_layers=8)
    resident = plan(config, 1, 2048, with_alternatives=False)
    found = what_would_fit(config, 1, 2048, gpu_bytes=resident.total_bytes * 2 // 3)
    assert {"weights": "host"} in [change.settings for change in found]
    method = Method(weights="host")
    assert check(config, 1, 2048, method, plan(config, 1, 2048, method, with_alternatives=False)).problem is None
    slow, fast = (traffic(config, method, link, 400e12) for link in (12.5e9, 25e9))
    assert slow.break_even_tokens == pytest.approx(2 * fast.break_even_tokens, abs=1)
    layers = sum(p.numel() for p in layer_parameters(config)) * 2
    assert fast.to_device_bytes == pytest.approx(2 * layers, rel=0.01)


def test_host_memory_is_counted_as_it_is_pinned():
    """In powers of two, several tensors to a block."""
    sizes = [3 * 2**20, 5 * 2**20, 2**20, 9 * 2**20, 100]
    tensors = [torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes]
    groups = host_weights.blocks(tensors, 9 * 2**20)
    assert [[t.nbytes for t in group] for group in groups] == [sizes[:3], sizes[3:4], sizes[4:]]
    assert [host_weights.pinned_bytes(size) for size in (1, 2, 3, 2**20, 2**20 + 1)] == [1, 2, 4, 2**20, 2**21]
    config = load_config("qwen1.5-moe-a2.7b")
    layers = sum(2 * p.numel() for p in layer_parameters(config))
    predictors = 23 * 2048 * 2048 * 2
    assert layers + predictors < count(config, Method(weights="host")).host_bytes < 1.25 * (layers + predictors)


def layer_parameters(config):
    with torch.device("meta"):
        return [p for layer in AutoModelForCausalLM.from_config(config).model.layers for p in layer.parameters()]


@pytest.mark.slow
def test_qwen_trains_within_ten_gib_of_device_memory():
    assert simulate_step(load_config("qwen1.5-moe-a2.7b"), 16, 2048, Method(weights="host"))["peak_bytes"] < 10 * 2**30
