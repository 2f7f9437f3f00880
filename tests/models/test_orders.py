"""What people do with a model, before it is converted, after it and twice: it works, or is refused, nothing changed.

A converted model that works trains reversibly: every state is verified, and the loss is that of the same model without
the other operation, or of plain autograd.

Run: pytest tests/models/test_orders.py
"""

import types

import accelerate.hooks
import pytest
import torch
import transformers.models.qwen2_moe.modeling_qwen2_moe as qwen2_moe
from helpers import tiny_batch, tiny_model
from torch import nn

import revffn

COUPLINGS = {
    "innovation": revffn.ReversibleConfig(tile_tokens=11),
    "cross_right": revffn.ReversibleConfig(
        coupling="cross_branch", cross_branch=revffn.CrossBranchConfig(query_stream="right"), tile_tokens=22
    ),
    "cross_left": revffn.ReversibleConfig(coupling="cross_branch"),
    "none": revffn.ReversibleConfig(coupling="none", tile_tokens=11),
}
couplings = pytest.mark.parametrize("coupling", COUPLINGS)


def converted(model, coupling):
    return revffn.convert(model, COUPLINGS[coupling], calibration=[tiny_batch(4, 13, seed=7)])


def trained(model, **kwargs):
    """Loss and gradients of one step."""
    loss = model(**tiny_batch(padded=True), **kwargs).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def walked(model):
    report = revffn.reversible_report(model)
    return report["walks"] > 0 and report["mismatched_states_total"] == 0 and report["verified_states"] > 0


def assert_trains_as(model, expected, **tolerance):
    loss, gradients = trained(model)
    assert walked(model) or model.reversible_config.coupling == "none"
    torch.testing.assert_close(loss, expected[0], **tolerance)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], msg=name, **tolerance)


# --- operations that change nothing of the function ------------------------------------------------------------------


def patch_norms(model):
    """As kernels do that are put on instances."""

    def forward(self, hidden_states):
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        normed = hidden_states.float() * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * normed.to(hidden_states.dtype)

    norms = [model.model.norm, *(layer.input_layernorm for layer in model.model.layers)]
    for norm in norms:
        norm.forward = types.MethodType(forward, norm)


def own_forwards(model):
    """Each module's own forward, put on the instance."""
    for module in (model.model, model.model.norm, *model.model.layers, *(layer.mlp for layer in model.model.layers)):
        if not revffn.is_reversible(model):
            module.forward = types.MethodType(type(module).forward, module)


class Hook(accelerate.hooks.ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        Hook.calls += 1
        return args, kwargs


def hook(*parts):
    def add(model):
        for part in parts:
            accelerate.hooks.add_hook_to_module(model.get_submodule(part), Hook(), append=True)

    return add


OPERATIONS = {
    "linear cross-entropy": revffn.use_linear_cross_entropy,
    "activation checkpointing": lambda model: model.gradient_checkpointing_enable(),
    "to": lambda model: model.to("cpu").to(torch.float64).to(torch.float32),
    "train and eval": lambda model: model.eval().train(),
    "generate": lambda model: generated(model),
    "norms patched": patch_norms,
    "own forwards": own_forwards,
    "hooks inside": hook("model.layers.1.self_attn", "model.layers.0.mlp", "model.layers.2.self_attn.q_proj"),
    "hook on the model": hook(""),
}


def generated(model):
    training = model.training
    model.eval()
    inputs = tiny_batch()["input_ids"]
    found = [model.generate(inputs, max_new_tokens=3, use_cache=cache, do_sample=False) for cache in (True, False)]
    assert torch.equal(*found)
    model.train(training)


@couplings
@pytest.mark.parametrize("when", ["before", "after", "twice"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_leave_the_training_as_it_is(operation, when, coupling):
    expected = trained(converted(tiny_model(), coupling).train())
    model, apply = tiny_model().train(), OPERATIONS[operation]
    if when in ("before", "twice"):
        apply(model)
    converted(model, coupling).train()
    if when in ("after", "twice"):
        apply(model)
    assert_trains_as(model, expected, rtol=2e-5, atol=2e-6)
    assert_trains_as(model, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("part", ["model.norm", "model.layers.1", "model"])
def test_hooks_on_what_walks(part):
    """After the conversion they stand around it; before it, those on layers and the backbone are refused."""
    expected = trained(converted(tiny_model(), "innovation").train())
    model = converted(tiny_model(), "innovation").train()
    hook(part)(model)
    Hook.calls = 0
    assert_trains_as(model, expected)
    assert Hook.calls > 0
    model = tiny_model().train()
    hook(part)(model)
    if part == "model.norm":
        assert_trains_as(converted(model, "innovation").train(), expected)
    else:
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(ValueError, match=f"The forward of {part} was replaced.*remove_hook_from_module"):
            converted(model, "innovation")
        assert before == {name: type(module) for name, module in model.named_modules()}
        assert not revffn.is_reversible(model) and not hasattr(model.config, "revffn")


@couplings
def test_classes_that_were_replaced_stay_in_force(coupling, monkeypatch):
    calls = []

    def fast(family):
        def forward(self, *args, **kwargs):
            calls.append(family.__name__)
            return family.forward(self, *args, **kwargs)

        return type("Fast", (family,), {"forward": forward})

    replaced = (
        "Qwen2MoeRMSNorm",
        "Qwen2MoeExperts",
        "Qwen2MoeDecoderLayer",
        "Qwen2MoeTopKRouter",
        "Qwen2MoeAttention",
    )
    expected = trained(converted(tiny_model(), coupling).train())
    with monkeypatch.context() as patch:
        for name in replaced:
            patch.setattr(qwen2_moe, name, fast(getattr(qwen2_moe, name)))
        model = tiny_model().train()
    calls.clear()
    assert_trains_as(converted(model, coupling).train(), expected, rtol=1e-4, atol=1e-5)
    assert {"Qwen2MoeRMSNorm", "Qwen2MoeExperts", "Qwen2MoeAttention"} <= set(calls)
    if coupling == "innovation":
        assert type(revffn.export(model).model.norm) is qwen2_moe.Qwen2MoeRMSNorm


def test_what_is_no_layer_of_the_family_is_refused():
    model = tiny_model()
    model.model.layers[2] = nn.Sequential(model.model.layers[2])
    with pytest.raises(ValueError, match="model.layers.2 is a Sequential, no Qwen2MoeDecoderLayer"):
        revffn.convert(model)
    assert not revffn.is_reversible(model)


def test_a_forward_replaced_afterwards_is_said_at_the_first_step():
    """Whatever stands where a walk should go through: nothing is trained without a word."""
    model = converted(tiny_model(), "innovation").train()
    layer = model.model.layers[1]
    layer.forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(RuntimeError, match=r"1 of its 4 layers did not run so.*layers\.1"):
        trained(model)
    del layer.forward
    trained(model)
    assert walked(model)


def test_memory_that_is_wanting_leaves_the_model_as_it_was(monkeypatch):
    from revffn.couplings import innovation

    made = innovation.PredictorOfLayer

    def fails_at_the_third(hidden_size, layer, config):
        if layer == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(hidden_size, layer, config)

    model = tiny_model()
    before = {name: type(module) for name, module in model.named_modules()}
    monkeypatch.setattr(innovation, "PredictorOfLayer", fails_at_the_third)
    with pytest.raises(torch.OutOfMemoryError):
        revffn.convert(model)
    assert before == {name: type(module) for name, module in model.named_modules()}
    assert model.config.model_type == "qwen2_moe" and not hasattr(model.config, "revffn")


# --- torch.compile ---------------------------------------------------------------------------------------------------


@couplings
@pytest.mark.parametrize("what", ["model", "model in place", "layers in place", "attention in place"])
def test_compile(what, coupling):
    expected = trained(converted(tiny_model(), coupling).train())
    model = converted(tiny_model(), coupling).train()
    run = model
    if what == "model":
        run = torch.compile(model, backend="eager")
    elif what == "model in place":
        model.compile(backend="eager")
    else:
        for layer in model.model.layers:
            (layer if what == "layers in place" else layer.self_attn).compile(backend="eager")
    loss = run(**tiny_batch(padded=True)).loss
    loss.backward()
    assert walked(model) or coupling == "none"
    torch.testing.assert_close(loss.detach(), expected[0])
    for name, parameter in model.named_parameters():
        if name in expected[1]:
            torch.testing.assert_close(parameter.grad, expected[1][name], msg=name)


def test_a_compiled_model_is_not_converted():
    with pytest.raises(ValueError, match="got OptimizedModule"):
        revffn.convert(torch.compile(tiny_model(), backend="eager"))


# --- peft ------------------------------------------------------------------------------------------------------------


@couplings
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when, coupling):
    peft = pytest.importorskip("peft", reason="of the extra test; ends when it is installed")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    if when == "before":
        model = peft.get_peft_model(tiny_model(), settings)
        with pytest.raises(ValueError, match="got PeftModel"):
            revffn.convert(model)
        converted(model.get_base_model(), coupling)
    else:
        model = peft.get_peft_model(converted(tiny_model(), coupling), settings)
    model.train()
    _, gradients = trained(model)
    lora = {name: grad for name, grad in gradients.items() if "lora" in name}
    assert len(lora) == 16 and all(grad.abs().sum() > 0 for grad in lora.values())
    assert all(".coupling." in name for name in gradients.keys() - lora.keys())
    assert walked(model.get_base_model()) or coupling == "none"
