"""What transformers captures of modules in a walk: router logits, attentions and the losses that are made of them.

Run: pytest tests/engine/test_captured.py
"""

from __future__ import annotations

import pytest
import torch
from helpers import (
    COUPLINGS,
    assert_close,
    assert_equal,
    coupled,
    couplings,
    draw_signs,
    gradients,
    plain_layers,
    run,
    run_reference,
    tiny_batch,
)

import revffn
from revffn.models.architectures import ARCHITECTURES, router_parameters
from revffn.models.losses import router_z_loss


@couplings
@pytest.mark.parametrize("model_type", ["qwen2_moe", "olmoe", "mixtral", "gpt_oss"])
def test_load_balancing_loss_keeps_its_gradient(model_type, coupling):
    overrides = dict(output_router_logits=True, router_aux_loss_coef=5.0)
    model = coupled(model_type, overrides=overrides, **COUPLINGS[coupling])
    inputs = tiny_batch(padded=True)
    loss, ours = run(model, inputs)
    plain_loss, plain = run_reference(model, inputs)
    assert torch.equal(loss, plain_loss)
    assert_close(ours, plain)
    model.config.output_router_logits = False
    without_loss, without = run(model, inputs)
    assert loss > without_loss
    router = next(name for name, p in model.named_parameters() if any(p is q for q in router_parameters(model)))
    assert not torch.allclose(ours[router], without[router], rtol=0.1), "the auxiliary loss is too small to be seen"


def with_z_loss(model, inputs) -> torch.Tensor:
    torch.manual_seed(5)
    out = model(**inputs, output_router_logits=True)
    return out.loss + 2.0 * router_z_loss(out.router_logits, inputs["attention_mask"])


@couplings
@pytest.mark.parametrize("tile_tokens", [None, 11], ids=["whole", "tiles"])
def test_router_z_loss_keeps_its_gradient(coupling, tile_tokens):
    """Through the walk, over the whole batch or a sequence at a time, as plain autograd has it."""
    model = coupled(overrides=dict(router_aux_loss_coef=0.0), tile_tokens=tile_tokens, **COUPLINGS[coupling])
    inputs = tiny_batch(padded=True)
    loss = with_z_loss(model, inputs)
    loss.backward()
    ours = gradients(model)
    whole = coupled(overrides=dict(router_aux_loss_coef=0.0), **COUPLINGS[coupling])  # the twin captures by tile
    torch.manual_seed(5)
    with plain_layers(whole, draw_signs(whole, 3)) as plain:
        expected_loss = with_z_loss(plain, inputs)
        expected_loss.backward()
    expected = gradients(whole)
    torch.testing.assert_close(loss, expected_loss)
    assert_close(ours, expected)
    _, without = run(model, inputs)
    router = next(name for name, p in model.named_parameters() if any(p is q for q in router_parameters(model)))
    assert not torch.allclose(ours[router], without[router], rtol=0.1), "the loss is too small to be seen"


@couplings
def test_router_logits_are_those_of_plain_autograd(coupling):
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    torch.manual_seed(5)
    ours = model(**inputs, output_router_logits=True).router_logits
    torch.manual_seed(5)
    with plain_layers(model, draw_signs(model, 3)) as plain:
        expected = plain(**inputs, output_router_logits=True).router_logits
    assert len(ours) == len(expected) > 0
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


ASKED = {"output_router_logits": "router_logits", "output_attentions": "attentions"}


@couplings
@pytest.mark.parametrize("model_type", [t for t in ARCHITECTURES if t not in ("llama", "qwen3")])
def test_what_transformers_captures_is_the_untiled_models(model_type, coupling):
    """Router logits and attentions, one of each layer, whatever the tiles; and the load-balancing loss of a mask."""
    if model_type == "gpt_oss":
        asked = dict(output_router_logits=True)
    else:
        asked = dict(output_router_logits=True, output_attentions=True)
    outputs = []
    for tile_tokens in (None, 22, 11, 4):
        model = coupled(model_type, tile_tokens=tile_tokens, **COUPLINGS[coupling])
        model.set_attn_implementation("eager")
        torch.manual_seed(5)
        outputs.append(model(**tiny_batch(padded=True), **asked))
    whole, *tiled = outputs
    for found in tiled:
        torch.testing.assert_close(found.loss, whole.loss)
        for name in (ASKED[key] for key in asked):
            expected = getattr(whole, name, None) or ()
            assert len(getattr(found, name, None) or ()) == len(expected)
            for a, b in zip(getattr(found, name, None) or (), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)  # sums in another order
    assert len(whole.attentions or ()) == (0 if "output_attentions" not in asked else 4)


@pytest.mark.parametrize("coupling", ["innovation", "cross_right", "cross_left"])
def test_loss_that_misses_the_last_hidden_state_raises(coupling):
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    _, expected = run(model, inputs)
    out = model(**inputs, output_router_logits=True)
    with pytest.raises(revffn.StateMismatchError, match="last hidden state"):
        sum(logits.square().mean() for logits in out.router_logits).backward()
    model.zero_grad()
    assert_equal(run(model, inputs)[1], expected)


def test_output_hidden_states_is_refused():
    with pytest.raises(ValueError, match="output_hidden_states"):
        coupled()(**tiny_batch(), output_hidden_states=True)
