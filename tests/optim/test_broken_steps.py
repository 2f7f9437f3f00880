"""Steps that go wrong: misuse, a backward that is broken off, gradients that are not finite.

Run: pytest tests/optim/test_broken_steps.py (adamw8bit needs torchao)
"""

import copy
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_same,
    assert_same_state,
    build,
    coupled,
    rules,
    states_of,
    tiny_batch,
    tiny_model,
    train_steps,
)
from torch import nn

from revffn.optim import NonFiniteGradientError, OptimizerInBackward


@pytest.mark.parametrize("in_backward", [True, False])
@rules
def test_a_broken_backward_is_given_up_by_zero_grad(rule, in_backward, caplog):
    """Out of memory half-way: `zero_grad()` names what had stepped, and the optimizer goes on from there as one does
    that has the same weights and states."""
    model = coupled(calibrate=False).train()
    optimizer = build(rule, model.named_parameters(), lr=1e-3, in_backward=in_backward)
    train_steps(model, optimizer, 1)
    before = copy.deepcopy(model.state_dict())

    def out_of_memory(grad):
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.model.layers[1].self_attn.q_proj.weight.register_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        model(**tiny_batch(8, 11, seed=5)).loss.backward()
    handle.remove()
    if in_backward:
        with pytest.raises(RuntimeError, match=r"broken off, call optimizer\.zero_grad\(\)"):
            model(**tiny_batch(8, 11, seed=5)).loss.backward()
    optimizer.zero_grad()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    said = [record.getMessage() for record in caplog.records if "given up" in record.getMessage()]
    if in_backward:
        assert len(said) == 1 and f"{len(moved)} of " in said[0] and "number 0" not in said[0]
        assert "lm_head.weight" in moved and "model.layers.1.self_attn.q_proj.weight" not in moved
    else:
        assert not moved and not said
    assert all(parameter.grad is None for parameter in model.parameters())
    other = coupled(calibrate=False).train()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    others = build(rule, other.named_parameters(), lr=1e-3, in_backward=in_backward)
    others.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    caplog.clear()
    assert train_steps(model, optimizer, 2, start=7) == train_steps(other, others, 2, start=7)
    assert_same(model, other)
    assert not caplog.records


# --- misuse --------------------------------------------------------------------------------------------------------


def test_second_backward_before_step_is_refused():
    model = tiny_model("llama").train()
    optimizer = build("sgd", model.named_parameters())
    model(**tiny_batch()).loss.backward()
    with pytest.raises(RuntimeError, match=r"lm_head.weight got a second gradient.*tile_tokens"):
        model(**tiny_batch()).loss.backward()
    del optimizer


def test_a_deferred_group_collects_its_parts():
    """in_backward=False for one group: its gradient may come from several graphs, and steps when it is whole."""
    early, shared = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    groups = [{"params": [early]}, {"params": [shared], "in_backward": False}]
    optimizer = OptimizerInBackward(groups, rule="sgd", lr=1.0)
    (early + shared).sum().backward()
    shared.sum().backward()
    assert early[0] == -1 and shared[0] == 0
    optimizer.step()
    assert shared[0] == -2 and optimizer.grad_norm == pytest.approx(math.sqrt(2 * 1 + 2 * 4))


def test_two_owners_are_refused():
    weight = nn.Parameter(torch.zeros(2))
    owners = [OptimizerInBackward([weight], rule="sgd") for _ in range(2)]
    with pytest.raises(RuntimeError, match="another hook consumed it"):
        weight.sum().backward()
    owners[1].detach()


def test_a_gradient_scaler_is_refused():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = OptimizerInBackward([weight], rule="sgd")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(optimizer)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rule": "lion"}, "rule must be one of 'adafactor', 'adamw'"),
        ({"rounding": "up"}, "rounding must be one of"),
        ({"lr": -1.0}, "lr must not be negative"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be at least 0 and below 1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
    ],
)
def test_refused_settings(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerInBackward([nn.Parameter(torch.zeros(2))], **options)


def test_float16_is_refused():
    with pytest.raises(ValueError, match="number 0 of shape .* is torch.float16"):
        OptimizerInBackward([nn.Parameter(torch.zeros(2, dtype=torch.float16))])


def test_missing_torchao_is_named(monkeypatch):
    for module in ("torchao", "torchao.optim", "torchao.optim.quant_utils"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install torchao"):
        OptimizerInBackward([nn.Parameter(torch.zeros(2))], rule="adamw8bit")


# --- gradients that are not finite -----------------------------------------------------------------------------------


class Chain(nn.Module):
    """Three layers; the gradient of one of them is spoiled."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(96, 96, bias=False, dtype=dtype) for _ in range(3))

    def forward(self, spoiled=None, value=float("nan")):
        x = torch.ones(2, 96, dtype=self.layers[0].weight.dtype)
        for i, layer in enumerate(self.layers):
            weight = layer.weight * 1.0
            if i == spoiled:
                weight.register_hook(lambda g: torch.where(torch.arange(96)[:, None] == 7, value, g))
            x = F.linear(x, weight).tanh()
        return x.float().square().sum()


@rules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("first_step", [True, False], ids=["no_state", "state"])
def test_nothing_moves_after_a_non_finite_gradient(rule, dtype, value, first_step):
    model = Chain(dtype)
    optimizer = build(rule, model.named_parameters(), weight_decay=0.1, max_grad_norm=0.1)
    if not first_step:
        model().backward(), optimizer.step()
    before, state = copy.deepcopy(model), copy.deepcopy(states_of(optimizer))
    model(spoiled=1, value=value).backward()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)]
    assert moved == [False, False, True]  # the last layer had stepped; the others never see the gradient
    optimizer.last_checkpoint = "runs/7/checkpoint-40"
    with pytest.raises(NonFiniteGradientError, match=r"layers.1.weight .*1 of 3 .*runs/7/checkpoint-40") as caught:
        optimizer.step()
    assert caught.value.weights_changed and caught.value.parameter == "layers.1.weight"
    for key in (0, 1):
        for name, kept in states_of(optimizer)[key].items():
            expected = state[key][name] if key in state else (torch.zeros_like(kept) if torch.is_tensor(kept) else 0)
            if name == "master" and key not in state:
                continue
            assert torch.equal(kept, expected) if torch.is_tensor(kept) else kept == expected, name


@pytest.mark.parametrize("in_backward", [True, False])
def test_a_step_that_changed_nothing_can_be_skipped(in_backward):
    """First gradient not finite (in backward), or any of them (after backward): refused; the next batch goes on."""
    models = [Chain(torch.bfloat16) for _ in range(2)]
    optimizers = [build("adamw", m.named_parameters(), in_backward=in_backward) for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        model().backward(), optimizer.step()
    before = copy.deepcopy(models[0])
    models[0](spoiled=2 if in_backward else 0).backward()
    with pytest.raises(NonFiniteGradientError, match="No weight has changed") as caught:
        optimizers[0].step()
    assert not caught.value.weights_changed
    assert_same(models[0], before)
    for model, optimizer in zip(models, optimizers, strict=True):
        model().backward(), optimizer.step()
    assert_same(*models)
    assert_same_state(*optimizers)
