"""The two documents on adding a coupling and an architecture, followed: their code runs, and what it makes trains.

Run: pytest tests/couplings/test_adding.py
"""

import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import COMMON, tiny_batch, tiny_model
from transformers import AutoModelForCausalLM
from transformers.models.llama import configuration_llama, modeling_llama

import revffn
from revffn import couplings
from revffn.engine.sublayers import attention, feed_forward
from revffn.models import conversion
from revffn.models.architectures import ARCHITECTURES

DOCS = Path(__file__).parents[2] / "docs"


def code_of(document: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / document).read_text(), re.DOTALL)
    return code


@pytest.fixture
def leapfrog():
    names = {}
    exec(compile(code_of("adding_a_coupling.md"), "adding_a_coupling.md", "exec"), names)
    yield
    del couplings.COUPLINGS["leapfrog"]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Llama's code in a module of its own, under another name."""
    text = ""
    for source in (configuration_llama, modeling_llama):
        text += Path(source.__file__).read_text().replace("Llama", "Toy").replace('"llama"', '"toy"')
    text = text.replace("from .configuration_toy import ToyConfig", "").replace("from ...", "from transformers.")
    text = text.replace("from .configuration_llama import ToyConfig", "")
    (tmp_path / "toy_family.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    exec(code_of("adding_an_architecture.md"), {})
    yield sys.modules["toy_family"]
    del sys.modules["toy_family"]
    for table in (ARCHITECTURES, conversion.CLASSES, conversion.DENSE):
        del table["toy"]


def train(model, inputs, num_steps=12):
    optimizer = revffn.OptimizerInBackward(revffn.parameter_groups(model, 0.0), rule="adamw", lr=3e-3)
    losses = []
    for _ in range(num_steps):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
        report = revffn.reversible_report(model)
        assert report["mismatched_states"] == 0 and report["verified_states"] > 0
    return losses


def leapfrog_twin(model, inputs):
    """The same function in ordinary autograd."""
    plain, seen = model.model, {}
    hook = plain.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs, hidden=args[0]), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    kwargs = {name: value for name, value in seen.items() if name not in ("hidden", "walk")}
    past = now = plain.embed_tokens(inputs["input_ids"])
    for layer in plain.layers:
        attn = attention(layer, layer.input_layernorm(now), kwargs)
        past, now = now, past + attn + feed_forward(layer, layer.post_attention_layernorm(now + attn))
    logits = model.lm_head(plain.norm(now))
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


@pytest.mark.parametrize("tile_tokens", [None, 16])
def test_a_coupling_from_outside_trains(leapfrog, tile_tokens):
    inputs = tiny_batch()
    model = tiny_model("qwen2_moe")
    settings = revffn.ReversibleConfig.from_dict(dict(coupling="leapfrog", tile_tokens=tile_tokens, fraction_bits=22))
    model = revffn.convert(model, settings).train()
    expected = torch.autograd.grad(leapfrog_twin(model, inputs), list(model.parameters()), allow_unused=True)
    loss = model(**inputs).loss
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for (name, _), a, b in zip(model.named_parameters(), found, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    losses = train(model, inputs)
    assert losses[-1] < losses[0] - 0.1
    with pytest.raises(ValueError, match="leapfrog computes another function"):
        revffn.export(model)


def test_its_inverse_is_checked(leapfrog, monkeypatch):
    """An inverse that is off by one unit is found."""
    model = revffn.convert(tiny_model("qwen2_moe"), revffn.ReversibleConfig(coupling="leapfrog")).train()
    node = model.model.layers[0].behaviour.step.__globals__
    right = node["quantize"]
    monkeypatch.setitem(node, "quantize", lambda update, grid: right(update, grid) + 1)
    with pytest.raises(revffn.StateMismatchError):
        model(**tiny_batch()).loss.backward()


def test_an_unknown_coupling_is_refused():
    with pytest.raises(ValueError, match="coupling must be one of 'innovation', 'cross_branch', 'none', got 'leap"):
        revffn.ReversibleConfig(coupling="leapfrog")


def test_an_architecture_from_outside_trains(toy, tmp_path):
    model = toy.ToyForCausalLM(toy.ToyConfig(**COMMON))
    inputs = tiny_batch()
    plain = model.eval()(**inputs).logits
    model = revffn.convert(model, calibration=[inputs])
    assert type(model).__name__ == "RevFFNToyForCausalLM"
    assert torch.equal(model.eval()(**inputs).logits, plain)
    revffn.use_linear_cross_entropy(model)
    losses = train(model.train(), inputs)
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    del model.forward
    assert torch.equal(again.eval()(**inputs).logits, model.eval()(**inputs).logits)
    assert type(revffn.export(again)) is toy.ToyForCausalLM
