"""The checkers are checked: each one turns red when what it looks for is there."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    TOLERANCE,
    LiveBytes,
    assert_as_good,
    assert_no_worse,
    captured_states,
    coupled,
    run,
    run_reference,
    run_truth,
    saved_bytes,
    three_way,
    tiny_batch,
)

from revffn.couplings.cross_branch import step as cross_branch
from revffn.couplings.innovation import step as steps
from revffn.models.architectures import routers

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


# --- gradients -------------------------------------------------------------------------------------------------------


@DTYPES
def test_assert_no_worse(dtype):
    truth = torch.randn(20, dtype=torch.float64)
    plain = truth.to(dtype)
    assert_no_worse(plain, plain, truth, dtype)
    wrong = plain.clone()
    wrong[3] += 1.5 * TOLERANCE[dtype] * truth.abs().max().to(dtype)
    for bad in (wrong, -plain, plain * 1.1, torch.full_like(plain, float("nan"))):
        with pytest.raises(AssertionError, match="excess"):
            assert_no_worse(bad, plain, truth, dtype)


@DTYPES
def test_assert_as_good(dtype):
    torch.manual_seed(0)
    truth = {f"p{i}": torch.randn(20, dtype=torch.float64) for i in range(30)}
    noise = 2 * TOLERANCE[dtype]

    def noisy(times):
        return {name: (x + noise * times * torch.randn(20)).to(dtype) for name, x in truth.items()}

    plain = noisy(1)
    assert_as_good(noisy(1), plain, truth, dtype)
    with pytest.raises(AssertionError, match="on average"):
        assert_as_good(noisy(2), plain, truth, dtype)
    with pytest.raises(AssertionError, match="'p3'"):
        assert_as_good({**noisy(1), "p3": -plain["p3"]}, plain, truth, dtype)
    with pytest.raises(AssertionError, match=r"'p3': \(nan"):
        assert_as_good({**noisy(1), "p3": plain["p3"] * float("nan")}, plain, truth, dtype)


class Scaled(torch.autograd.Function):
    """Identity with a gradient that is 5 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 1.05 * grad


@DTYPES
@pytest.mark.parametrize("settings", [dict(), dict(coupling="cross_branch", query_stream="right")], ids=str)
def test_three_way_sees_a_wrong_gradient(settings, dtype, monkeypatch):
    """In the engine alone: forward and every rebuilt state stay what they were."""
    model, inputs = coupled(dtype=dtype, **settings), tiny_batch()
    three_way(model, inputs)
    module, name = (cross_branch, "half_feed_forward") if settings else (steps, "feed_forward")
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: Scaled.apply(original(*args)))
    with pytest.raises(AssertionError, match="excess"):
        three_way(model, inputs)


def test_three_way_sees_a_missing_gradient():
    """A parameter that the engine does not reach."""
    model, inputs = coupled(), tiny_batch()
    original = steps.attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "attention", lambda *args: original(*args).detach())
        with pytest.raises(AssertionError):
            three_way(model, inputs)


def test_three_way_sees_another_function():
    """The engine with every sign the other way round: exact in itself, and not the function that was asked for."""
    model, inputs = coupled(random_sign=False), tiny_batch()
    three_way(model, inputs)
    minus = torch.tensor(-1, dtype=torch.int32)

    def with_minus(operation, place):
        return lambda *args: operation(*args[:place], minus, *args[place + 1 :])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "move", with_minus(steps.move, 5))
        patch.setattr(steps, "undo", with_minus(steps.undo, 6))
        with pytest.raises(AssertionError, match="loss"):
            three_way(model, inputs)


def test_three_way_sees_a_flipped_expert():
    """A wrong expert in recomputation, with the engine's own check switched off, is a wrong gradient."""
    model, inputs = coupled(verify="off"), tiny_batch()
    plain, truth = run_reference(model, inputs)[1], run_truth(model, inputs)
    flipped = []

    def unpack(tensor):
        if tensor.dtype == torch.uint8 and tensor.shape == (33, 2) and not flipped:
            flipped.append(1)
            tensor = tensor.clone()
            tensor[4] = (tensor[4] + 2) % 6
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        _, ours = run(model, inputs)
    assert flipped
    with pytest.raises(AssertionError, match="excess"):
        for name in ours:
            assert_no_worse(ours[name], plain[name], truth[name], torch.float32, name)


def test_truth_takes_the_experts_of_the_test_dtype():
    """With bf16 weights float64 would choose other experts for some tokens; the truth must not."""
    model, inputs = coupled(dtype=torch.bfloat16, overrides=dict(num_experts_per_tok=1)), tiny_batch(4, 40)
    with torch.no_grad():  # nearly tied experts: rounding decides
        for router in routers(model):
            either_way = torch.randint_like(router.weight[::2], 0, 2) * 2 - 1
            router.weight[1::2] = router.weight[::2] * (1 + 2**-8 * either_way)
    seen = {}
    for dtype in (torch.bfloat16, torch.float64):
        other, choices = copy.deepcopy(model), []
        seen[dtype] = choices

        def note(_, args, choices=choices):
            choices.append(args[1].clone())

        for module in other.modules():
            if hasattr(module, "experts"):
                module.experts.register_forward_pre_hook(note)
        run_reference(other.to(dtype) if dtype == torch.bfloat16 else _double(other), inputs)
    both = zip(*seen.values(), strict=True)
    assert not all(torch.equal(a, b) for a, b in both), "rounding does not decide anywhere"
    three_way(model, inputs)


def _double(model):
    model = model.double()
    model.set_experts_implementation("eager")
    return model


# --- rebuilt states --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [dict(), dict(coupling="cross_branch", query_stream="right")], ids=str)
def test_captured_states_see_a_disturbed_stream(settings):
    """One bit of one saved stream, with the engine's own check switched off."""
    model, inputs = coupled(verify="off", **settings), tiny_batch()
    with captured_states() as states:
        run(model, inputs)
    states.assert_exact()
    disturbed = []

    def unpack(tensor):
        if tensor.dtype == torch.int32 and tensor.dim() == 3 and not disturbed:
            disturbed.append(1)
            tensor = tensor.clone()
            tensor[0, 0, 0] ^= 1
        return tensor

    with captured_states() as states, torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        run(model, inputs)
    assert disturbed
    with pytest.raises(AssertionError, match="differ at positions"):
        states.assert_exact()


def test_captured_states_see_a_walk_that_ends_early():
    model, inputs = coupled(), tiny_batch()
    with captured_states() as states:
        loss = model(**inputs).loss
        torch.autograd.grad(loss, [model.model.layers[3].mlp.gate.weight])
    with pytest.raises(AssertionError, match="did not reach"):
        states.assert_exact()
    with captured_states() as states:
        pass
    with pytest.raises(AssertionError):
        states.assert_exact()


# --- bytes -----------------------------------------------------------------------------------------------------------


def leak_in(layer) -> None:
    """A module attribute that keeps the layer's activation of every call."""
    layer.kept = []
    layer.mlp.register_forward_hook(lambda _, args, out: layer.kept.append(out.detach() * 1.0))


def test_live_bytes_see_a_leaked_activation():
    model, inputs = coupled(), tiny_batch()

    def left() -> int:
        with LiveBytes(model) as counter:
            model(**inputs).loss.backward()
            for parameter in model.parameters():
                parameter.grad = None
            return counter.live

    clean = left()
    leak_in(model.model.layers[1])
    activation = 3 * 11 * 32 * 4
    assert left() - clean >= 2 * activation  # one in forward, one in recomputation
    model.model.layers[1].kept.clear()


class Keep(torch.autograd.Function):
    """Identity that saves its input for backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x * 1.0)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_saved_bytes_see_what_a_layer_saves():
    model, inputs = coupled(), tiny_batch()

    def saved() -> int:
        with saved_bytes(model) as counted:
            model(**inputs)
        return counted["bytes"]

    clean = saved()
    model.model.norm.register_forward_hook(lambda _, args, out: Keep.apply(out))
    assert saved() - clean == 3 * 11 * 32 * 4


def test_byte_counters_count_a_storage_once():
    x = torch.randn(100, requires_grad=True)
    module = torch.nn.Linear(100, 1)
    with saved_bytes(module) as counted:
        y = x * 2.0
        z = y.sin() + y.cos() + module(y)  # saves y three times, and the weight
    assert counted["bytes"] == 400
    with LiveBytes() as counter:
        a = torch.zeros(100)
        b = a.view(10, 10)
        assert counter.live == 400
        del a
        assert counter.live == 400
        del b
        assert counter.live == 0 and counter.peak == 400
    del z
