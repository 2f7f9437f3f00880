"""What a walk replays beside expert choices: random numbers (dropout, signs, jitter) and the state of autocast.

Run: pytest tests/engine/test_random_numbers.py
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    COUPLINGS,
    TOLERANCE,
    assert_close,
    assert_verified,
    captured_states,
    coupled,
    couplings,
    draw_signs,
    exact_couplings,
    gradients,
    loss_of,
    plain_layers,
    run,
    run_reference,
    tiny_batch,
)


@couplings
@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral"])
def test_dropout_and_router_jitter(model_type, coupling):
    overrides = dict(attention_dropout=0.3) if model_type == "qwen2_moe" else dict(router_jitter_noise=0.2)
    model, inputs = coupled(model_type, overrides=overrides, **COUPLINGS[coupling]), tiny_batch()
    with captured_states() as states:
        loss, ours = run(model, inputs)
    plain_loss, plain = run_reference(model, inputs)
    other_loss, _ = run(model, inputs, seed=6)
    assert torch.equal(loss, plain_loss) and loss != other_loss
    assert_close(ours, plain)
    assert all(states.rebuilt.values())
    assert_verified(model)


@couplings
def test_backward_leaves_the_random_state_alone(coupling):
    model, inputs = coupled(overrides=dict(attention_dropout=0.3), **COUPLINGS[coupling]), tiny_batch()
    loss = loss_of(model, inputs)
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


@couplings
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(coupling, backward_inside):
    """bf16 autocast over fp32 weights."""
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()

    def once(make):
        torch.manual_seed(5)
        signs = draw_signs(model, 3) if make is not None else None
        with make(signs) if make is not None else torch.autograd.graph.save_on_cpu() as plain:
            with torch.autocast("cpu", torch.bfloat16):
                loss = (plain if make is not None else model)(**inputs).loss
                if backward_inside:
                    loss.backward()
            if not backward_inside:
                loss.backward()
        return loss.detach(), gradients(model)

    def engine():
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        return loss.detach(), gradients(model)

    with captured_states() as states:
        loss, ours = engine()
    plain_loss, plain = once(lambda signs: plain_layers(model, signs))
    assert torch.equal(loss, plain_loss)
    assert {g.dtype for g in ours.values()} == {torch.float32}
    assert_close(ours, plain, TOLERANCE[torch.bfloat16])
    assert all(states.rebuilt.values())
    assert_verified(model)


@couplings
def test_autocast_only_around_backward(coupling):
    """Recomputation runs as forward did, not as backward's surroundings say."""
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    with captured_states() as states:
        loss = loss_of(model, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
    assert all(states.rebuilt.values())
    assert_verified(model)
    gradients(model)


@exact_couplings
def test_weights_changed_between_two_forwards_in_one_autocast_block(coupling):
    """Autocast's cache of low-precision weights would survive the step."""
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    stepped = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in stepped.model.layers.parameters():
            parameter.mul_(1.1)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = stepped(**inputs).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, inputs).backward()
        with torch.no_grad():
            for parameter in model.model.layers.parameters():
                parameter.mul_(1.1)
        again = loss_of(model, inputs)
        again.backward()
    assert torch.equal(again, expected)
    assert_verified(model)
