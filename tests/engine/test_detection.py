"""The engine notices disturbed states, and a fixed point that drifts; it works on after an error."""

from __future__ import annotations

import gc

import pytest
import torch
from helpers import (
    COUPLINGS,
    assert_equal,
    captured_states,
    coupled,
    couplings,
    exact_couplings,
    gradients,
    loss_of,
    run,
    tiny_batch,
)

import revffn
from revffn.couplings.cross_branch import fixed_point
from revffn.couplings.cross_branch import step as cross_branch

# --- detection -------------------------------------------------------------------------------------------------------


def disturb(model, name, amount=0.5):
    with torch.no_grad():
        model.get_parameter(name).add_(amount)


@exact_couplings
@pytest.mark.parametrize(
    "name, layer",
    [
        ("layers.3.self_attn.o_proj.weight", 3),
        ("layers.3.mlp.experts.down_proj", 3),
        ("layers.2.input_layernorm.weight", 2),
        ("layers.1.mlp.gate.weight", 1),
        ("layers.0.self_attn.q_proj.bias", 0),
        ("layers.0.mlp.shared_expert.up_proj.weight", 0),
    ],
)
def test_changed_parameter_raises_and_names_the_layer(coupling, name, layer):
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    loss = loss_of(model, inputs)
    disturb(model, "model." + name, torch.randn_like(model.get_parameter("model." + name)))
    with pytest.raises(revffn.StateMismatchError, match=r"layer \d") as raised:
        loss.backward()
    # The first state found wrong is the input of the layer (cross_branch), of the one below it, or layer 0's output.
    named = int(str(raised.value).split("layer ")[1][0])
    assert named in (layer, layer - 1)


@pytest.mark.parametrize("part", ["up.weight", "up.bias"])
def test_changed_predictor_raises(part):
    model, inputs = coupled(), tiny_batch()
    loss = loss_of(model, inputs)
    disturb(model, f"model.layers.2.coupling.predictor.{part}")
    with pytest.raises(revffn.StateMismatchError, match="input of layer 1"):
        loss.backward()


@exact_couplings
def test_smallest_change_of_a_parameter_raises(coupling):
    """One weight, by one part in 2**10."""
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    loss = loss_of(model, inputs)
    with torch.no_grad():
        # The last input channel: the first ones of keys and values begin as zero in cross_branch.
        model.model.layers[2].self_attn.v_proj.weight[0, -1] *= 1 + 2**-10
    with pytest.raises(revffn.StateMismatchError):
        loss.backward()


@pytest.mark.parametrize("disturbed", ["attention", "experts"])
@pytest.mark.parametrize("whole", [False, True])
def test_changed_parameter_raises_under_the_fixed_point(disturbed, whole):
    """Where a layer's solution is made good, and where its input is kept."""
    settings = dict(calibrate=False, fraction_bits=22, num_iterations=1) if whole else {}
    model, inputs = coupled(coupling="cross_branch", **settings), tiny_batch()
    run(model, inputs)
    kept = revffn.reversible_report(model)["layers"][3]["kept_bits"]
    assert (kept == fixed_point.WHOLE) == whole
    loss = loss_of(model, inputs)
    name = "self_attn.v_proj.weight" if disturbed == "attention" else "mlp.experts.down_proj"
    disturb(model, f"model.layers.3.{name}")
    with pytest.raises(revffn.StateMismatchError):
        loss.backward()


def saved_tensors_of_forward(model, inputs, change):
    """Loss of a forward whose saved int32 tensors come back changed."""

    def unpack(tensor):
        return change(tensor) if tensor.dtype == torch.int32 and tensor.dim() == 3 else tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        return loss_of(model, inputs)


@pytest.mark.parametrize("bit", [0, 13, 30])
@pytest.mark.parametrize("which", [0, 1])
@exact_couplings
def test_flipped_bit_of_a_saved_stream_raises(coupling, which, bit):
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    seen = []

    def change(tensor):
        seen.append(tensor)
        if len(seen) - 1 == which:
            tensor = tensor.clone()
            tensor[1, 4, 9] ^= 1 << bit
        return tensor

    loss = saved_tensors_of_forward(model, inputs, change)
    with pytest.raises(revffn.StateMismatchError):
        loss.backward()
    assert len(seen) == 2, "the two streams, and nothing else of their shape"


def test_flipped_side_bit_raises():
    model, inputs = coupled(side_bits=2), tiny_batch()
    flipped = []

    def unpack(tensor):
        if tensor.dtype == torch.uint8 and tensor.dim() == 1 and tensor.numel() > 200 and not flipped:
            flipped.append(tensor.numel())
            tensor = tensor.clone()
            tensor[7] ^= 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        loss = loss_of(model, inputs)
    with pytest.raises(revffn.StateMismatchError):
        loss.backward()
    assert flipped == [3 * 11 * 32 * 2 // 8]


@pytest.mark.parametrize("plain_layers", [1, 3])
@couplings
def test_every_saved_tensor_is_unpacked_once(coupling, plain_layers):
    """An offloading hook fetches each tensor once a walk."""
    model, inputs = coupled(plain_layers=plain_layers, **COUPLINGS[coupling]), tiny_batch()
    packed, unpacked = [], []

    def pack(tensor):
        packed.append(tensor)
        return len(packed) - 1, tensor

    def unpack(handle):
        unpacked.append(handle[0])
        return handle[1]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = loss_of(model, inputs)
    loss.backward()
    twice = {place for place in unpacked if unpacked.count(place) > 1}
    assert not twice, [(packed[place].dtype, tuple(packed[place].shape)) for place in twice]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["self_attn.o_proj", "mlp.shared_expert.down_proj"])
@couplings
def test_a_value_that_is_not_finite_is_not_hidden(coupling, where, value):
    """int32 knows no NaN: the loss must not come out finite, as if nothing had happened."""
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    with torch.no_grad():
        model.model.layers[1].get_submodule(where).weight[0, 0] = value
    try:
        loss = loss_of(model, inputs)
        loss.backward()
    except (ValueError, RuntimeError, FloatingPointError) as error:
        assert "finite" in str(error)
    else:
        assert not loss.isfinite()


def test_inputs_on_the_host_go_there_once():
    """offload_inputs moves each layer's input, and not the mask that all layers share, layer by layer."""
    model, inputs = coupled(coupling="none"), tiny_batch(padded=True)
    moved = []

    def pack(tensor):
        moved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**inputs)
    assert len([shape for shape in moved if shape == (3, 1, 11, 11)]) <= 1


@exact_couplings
def test_report_counts_instead_of_raising(coupling):
    model, inputs = coupled(verify="report", **COUPLINGS[coupling]), tiny_batch()
    run(model, inputs)
    assert revffn.reversible_report(model)["mismatched_states_total"] == 0
    loss = loss_of(model, inputs)
    disturb(model, "model.layers.3.self_attn.v_proj.bias")
    loss.backward()
    report = revffn.reversible_report(model)
    assert report["mismatched_states"] == len(report["mismatched"]) > 1
    assert report["mismatched_states_total"] == report["mismatched_states"]
    assert report["walks"] == 2
    gradients(model)
    run(model, inputs)
    report = revffn.reversible_report(model)
    assert report["mismatched_states"] == 0 and report["mismatched_states_total"] > 0


@exact_couplings
def test_verify_off_checks_nothing(coupling):
    model, inputs = coupled(verify="off", **COUPLINGS[coupling]), tiny_batch()
    _, ours = run(model, inputs)
    _, expected = run(coupled(**COUPLINGS[coupling]), inputs)
    assert_equal(ours, expected)
    assert revffn.reversible_report(model)["verified_states"] == 0


@exact_couplings
@pytest.mark.parametrize("where", ["self_attn", "mlp"])
def test_nondeterministic_sublayer_raises(coupling, where):
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()

    def noise(module, args, output):
        tensor = output[0] if isinstance(output, tuple) else output
        # Not from torch's generator, which would be noticed as dropout is.
        tensor = tensor + 1e-3 * calls.pop()
        return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

    calls = [float(i) for i in range(10)]
    getattr(model.model.layers[2], where).register_forward_hook(noise)
    loss = loss_of(model, inputs)
    with pytest.raises(revffn.StateMismatchError):
        loss.backward()


@exact_couplings
def test_random_numbers_nobody_announced_raise(coupling):
    """Dropout from a hook is not known to the engine, which therefore must notice."""
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    model.model.layers[2].mlp.register_forward_hook(lambda m, a, out: torch.nn.functional.dropout(out, 0.5))
    loss = loss_of(model, inputs)
    with pytest.raises(revffn.StateMismatchError):
        loss.backward()


@exact_couplings
def test_code_path_that_changes_raises(coupling):
    """A sublayer that saves other tensors in recomputation."""
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    state = {"extra": False}

    def hook(module, args, output):
        return output.exp().log() if state["extra"] else output

    model.model.layers[2].mlp.register_forward_hook(hook)
    loss = loss_of(model, inputs)
    state["extra"] = True
    with pytest.raises(revffn.StateMismatchError):
        loss.backward()


@couplings
def test_model_works_after_an_error(coupling):
    """An exception in forward, one in backward, and then a normal step."""
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    _, expected = run(model, inputs)

    def fail(module, args, output):
        raise KeyError("on purpose")

    handle = model.model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(KeyError):
        loss_of(model, inputs)
    handle.remove()
    loss = loss_of(model, inputs)
    handle = model.model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(KeyError):
        loss.backward()
    handle.remove()
    model.zero_grad()
    assert_equal(run(model, inputs)[1], expected)
    with torch.no_grad():
        model.eval()(**inputs)
    gc.collect()


def test_gradient_checkpointing_is_ignored_with_a_warning(caplog):
    model, inputs = coupled(), tiny_batch()
    _, expected = run(model, inputs)
    model.gradient_checkpointing_enable()
    assert "ignored" in caplog.text
    assert_equal(run(model, inputs)[1], expected)


# --- the fixed point -------------------------------------------------------------------------------------------------


FINE = dict(coupling="cross_branch", calibrate=False, fraction_bits=22, overrides=dict(gain=1.0, embedding_gain=10.0))
"""A grid so fine that no number of low bits makes a large error good."""


def expanding(model, layer: int = 2, factor: float = 100.0):
    """Sharp attention in one layer: its queries matter too much for the iteration."""
    with torch.no_grad():
        for projection in ("q_proj", "k_proj"):
            getattr(model.model.layers[layer].self_attn, projection).weight.mul_(factor)
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_layer_that_does_not_contract_keeps_more_in_the_same_step(padded, implementation):
    """Those of its tokens that end elsewhere. All states are exact."""
    model = expanding(coupled(**FINE))
    model.config._attn_implementation = implementation
    with captured_states() as states:
        run(model, tiny_batch(padded=padded))
    states.assert_exact()
    layers = revffn.reversible_report(model)["layers"]
    assert [layers[k]["kept_rows"] > 0 for k in range(4)] == [False, False, True, False]
    assert [layers[k]["iterations"] == 16 for k in range(4)] == [False, False, True, False]
    assert all(0 < layers[k]["contraction"] < 0.1 for k in (0, 1, 3))


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss", "deepseek_v2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, dict(num_iterations=1), dict(tile_tokens=16)], ids=str)
def test_the_fixed_point_is_exact(model_type, dtype, settings):
    """Bit for bit, however near the iteration comes."""
    model = coupled(model_type, dtype, coupling="cross_branch", **settings)
    with captured_states() as states:
        run(model, tiny_batch(padded=True))
    states.assert_exact()
    report = revffn.reversible_report(model)
    assert report["mismatched_states"] == 0 and report["verified_states"] > 0


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3"])
def test_keys_and_values_are_made_once_in_an_iteration(model_type):
    """Once in forward for the layer itself and once for all its iterations; the same in backward."""
    model, counts = coupled(model_type, coupling="cross_branch"), {}
    layer = model.model.layers[1]
    watched = [getattr(layer.self_attn, name) for name in (*layer.key_value_modules, "o_proj")]
    for module in watched:

        def count(x, module=module, original=module.forward):
            counts[module] = counts.get(module, 0) + 1
            return original(x)

        module.forward = count
    run(model, tiny_batch())
    iterations = revffn.reversible_report(model)["layers"][1]["iterations"]
    *maps, output = watched
    assert iterations > 2 and [counts[module] for module in maps] == [4, 4]
    assert counts[output] == 2 + 2 * iterations
    assert all(module.forward.__name__ == "count" for module in watched)


def test_nothing_is_solved_for_without_gradients(monkeypatch):
    model, inputs = coupled(coupling="cross_branch"), tiny_batch()
    expected = model(**inputs).loss
    monkeypatch.setattr(cross_branch, "solve", None)
    with torch.no_grad():
        assert torch.equal(model(**inputs).loss, expected)


def test_random_numbers_are_the_same_in_every_evaluation():
    model = coupled(coupling="cross_branch", overrides=dict(attention_dropout=0.3))
    with captured_states() as states:
        run(model, tiny_batch())
    states.assert_exact()
    assert revffn.reversible_report(model)["layers"][3]["kept_bits"] < fixed_point.WHOLE


def test_a_solution_alone_only_comes_near(monkeypatch):
    """Without what is kept, the states differ, and that is seen before anything is differentiated."""
    monkeypatch.setattr(cross_branch, "made_good", lambda found, width, kept: found)
    model = coupled(coupling="cross_branch")
    loss = loss_of(model, tiny_batch())
    with pytest.raises(revffn.StateMismatchError, match="left output of layer 3"):
        loss.backward()
    # An optimizer in backward would have stepped.
    assert all(p.grad is None for p in model.model.layers[3].self_attn.parameters())


def test_a_token_that_ends_elsewhere_is_kept(monkeypatch):
    """There can be several solutions: forward, which ends where backward will, sees that it is another one."""
    solve = cross_branch.solve

    def elsewhere(*args):
        found = solve(*args)
        found.x[1, 3:5] += 10_000_000
        return found

    monkeypatch.setattr(cross_branch, "solve", elsewhere)
    model = coupled(coupling="cross_branch")
    with captured_states() as states:
        run(model, tiny_batch(2, 30))
    states.assert_exact()
    assert all(layer["kept_rows"] >= 2 / 60 for layer in revffn.reversible_report(model)["layers"].values())


def test_an_iteration_that_goes_another_way_in_backward_is_seen(monkeypatch):
    """A unit more in one element of what it finds, in backward alone."""
    solve = cross_branch.solve

    def solving(function, y, grid, limit, most, look):
        found = solve(function, y, grid, limit, most, look)
        if not look:
            found.x[0, 0, 0] += 1 << 20
        return found

    monkeypatch.setattr(cross_branch, "solve", solving)
    with pytest.raises(revffn.StateMismatchError, match="left"):
        loss_of(coupled(coupling="cross_branch"), tiny_batch()).backward()


def test_measurements_are_the_last_walks():
    """Of a walk that ended in an exception there is nothing left."""
    model, inputs = coupled(coupling="cross_branch"), tiny_batch()
    loss_of(model, inputs).backward()
    before = revffn.reversible_report(model)["layers"]

    def fail(module, args, output):
        raise KeyError("on purpose")

    loss = loss_of(model, tiny_batch(3, 5))
    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(KeyError):
        loss.backward()
    handle.remove()
    model.zero_grad()
    loss_of(model, inputs).backward()
    assert revffn.reversible_report(model)["layers"] == before
