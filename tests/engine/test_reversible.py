"""The engine seen from outside: it is ordinary autograd, and keeps nothing alive. What it notices: test_detection.py.

Gradients are compared with plain autograd of the same function (`helpers.run_reference`); test_gradients.py has the
three-way comparison.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    COUPLINGS,
    TOLERANCE,
    assert_close,
    assert_equal,
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
    tiny_model,
)
from torch.utils._python_dispatch import TorchDispatchMode

from revffn.engine.walk import Walk
from revffn.optim import OptimizerInBackward, parameter_groups


def plain_loss_backward(model, inputs, make_loss, seed=5):
    """Gradients by plain autograd of a loss made from the model's output."""
    torch.manual_seed(seed)
    rows = inputs.get("input_ids", inputs.get("inputs_embeds")).shape[0]
    signs = draw_signs(model, rows)
    with plain_layers(model, signs) as plain:
        make_loss(plain(**inputs)).backward()
    return gradients(model)


# --- ordinary autograd -----------------------------------------------------------------------------------------------


@couplings
def test_autograd_grad_for_all_parameters(coupling):
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    _, expected = run(model, inputs)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss_of(model, inputs), parameters)
    assert_equal(dict(zip(names, found, strict=True)), expected)
    assert all(p.grad is None for p in parameters)


@couplings
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.experts.down_proj",
        "model.layers.2.self_attn.k_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_autograd_grad_for_one_parameter(coupling, name):
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    _, expected = run(model, inputs)
    (found,) = torch.autograd.grad(loss_of(model, inputs), [model.get_parameter(name)])
    assert torch.equal(found, expected[name])
    assert_equal(run(model, inputs)[1], expected)


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("part", ["up.weight", "up.bias"])
def test_autograd_grad_for_one_predictor(layer, part):
    model, inputs = coupled(), tiny_batch()
    _, expected = run(model, inputs)
    name = f"model.layers.{layer}.coupling.predictor.{part}"
    (found,) = torch.autograd.grad(loss_of(model, inputs), [model.get_parameter(name)])
    assert torch.equal(found, expected[name])


@pytest.mark.parametrize("tile_tokens", [None, 11, 4])
@couplings
def test_post_accumulate_hooks_fire_once(coupling, tile_tokens):
    model, inputs = coupled(tile_tokens=tile_tokens, **COUPLINGS[coupling]), tiny_batch()
    fired: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    _, grads = run(model, inputs)
    assert sorted(fired) == sorted(grads) == sorted(name for name, _ in model.named_parameters())
    # The layers' hooks fire from the last to the first, so that an optimizer step may run in them.
    order = [int(name.split(".")[2]) for name in fired if ".layers." in name]
    assert order == sorted(order, reverse=True)


@couplings
def test_optimizer_step_in_hooks(coupling):
    """SGD inside the hooks equals SGD after backward, bit for bit."""
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    other = copy.deepcopy(model)
    run_and_step = torch.optim.SGD(other.parameters(), lr=0.1)
    loss_of(other, inputs).backward()
    run_and_step.step()

    def step(parameter):
        with torch.no_grad():
            parameter.add_(parameter.grad, alpha=-0.1)
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    loss_of(model, inputs).backward()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert_verified(model)


@couplings
def test_gradient_of_inputs_embeds(coupling):
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()

    def once(backward):
        embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        grads = backward({"inputs_embeds": embeddings, "labels": inputs["labels"]})
        return {**grads, "inputs_embeds": embeddings.grad}

    def ours(inputs):
        loss_of(model, inputs).backward()
        return gradients(model)

    assert_close(once(ours), once(lambda inputs: plain_loss_backward(model, inputs, lambda out: out.loss)))


@couplings
def test_two_forwards_before_one_backward(coupling):
    """As in DPO: one model, two batches, one loss."""
    model = coupled(**COUPLINGS[coupling])
    first, second = tiny_batch(seed=1), tiny_batch(2, 9, seed=2)
    _, one = run(model, first, seed=5)
    _, two = run(model, second, seed=6)
    (loss_of(model, first, 5) - 0.3 * loss_of(model, second, 6)).backward()
    both = gradients(model)
    assert_close(both, {name: one[name] - 0.3 * two[name] for name in one})
    assert_verified(model)


@couplings
def test_backward_of_the_first_forward_after_the_second(coupling):
    model = coupled(**COUPLINGS[coupling])
    first, second = tiny_batch(seed=1), tiny_batch(2, 9, seed=2)
    _, one = run(model, first, seed=5)
    _, two = run(model, second, seed=6)
    loss_one, loss_two = loss_of(model, first, 5), loss_of(model, second, 6)
    loss_one.backward()
    assert_equal(gradients(model), one)
    loss_two.backward()
    assert_equal(gradients(model), two)


@couplings
def test_forwards_without_grad_in_between(coupling):
    """Training and eval mode, between forward and backward."""
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    expected_loss, expected = run(model, inputs)
    loss = loss_of(model, inputs)
    with torch.no_grad():
        torch.manual_seed(5)
        assert torch.equal(model(**inputs).loss, expected_loss)
        model(**tiny_batch(1, 4, seed=3))
        model.eval()
        model(**tiny_batch(1, 4, seed=3))
        model.generate(inputs["input_ids"][:, :4], max_new_tokens=2, do_sample=False)
    model.train()
    loss.backward()
    assert_equal(gradients(model), expected)
    assert_verified(model)


class Waits(TorchDispatchMode):
    """Operations whose result, or its size, the host needs before it can go on."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.removeprefix("aten::")
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if name in self.NAMES or by_mask or operation is torch.ops.aten.repeat_interleave.Tensor:
            self.found.append(name)
        return operation(*args, **(kwargs or {}))


@couplings
def test_nothing_in_a_step_needs_a_value_of_the_device(coupling):
    """What the test below sees on a GPU, as far as a CPU shows it; `report` because `raise` looks at once on a CPU."""
    if coupling == "cross_left":
        pytest.skip("the paper's form looks at every iteration of its fixed point")
    settings = {"verify": "report"} if coupling != "none" else {}
    model = coupled(dtype=torch.bfloat16, **COUPLINGS[coupling], **settings)
    optimizer = OptimizerInBackward(parameter_groups(model, 0.0), lr=1e-5)
    inputs = {name: value for name, value in tiny_batch().items() if name != "attention_mask"}
    for _ in range(2):
        with Waits() as waits:
            model(**inputs).loss.backward()
        assert waits.found == []
        optimizer.step()


@pytest.mark.gpu
@couplings
def test_a_step_does_not_wait_for_the_device(coupling, monkeypatch):
    """Between the start of forward and the end of backward, optimizer included, the host waits for nothing; the
    walk's verdicts are read when it has ended, right before the optimizer's own check."""
    if coupling == "cross_left":
        pytest.skip("the paper's form looks at every iteration of its fixed point")
    model = coupled(dtype=torch.bfloat16, **COUPLINGS[coupling]).cuda()
    optimizer = OptimizerInBackward(parameter_groups(model, 0.0), lr=1e-5)
    inputs = {name: value.cuda() for name, value in tiny_batch().items() if name != "attention_mask"}
    end = Walk.close

    def close(walk, *args, **kwargs):
        torch.cuda.set_sync_debug_mode("default")
        end(walk, *args, **kwargs)

    monkeypatch.setattr(Walk, "close", close)
    try:
        for mode in ("default", "error"):  # the first step compiles kernels and makes states
            torch.cuda.set_sync_debug_mode(mode)
            model(**inputs).loss.backward()
            torch.cuda.set_sync_debug_mode("default")
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@couplings
def test_retain_graph(coupling):
    """Twice the same walk; a third backward, without the graph, raises."""
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    _, expected = run(model, inputs)
    loss = loss_of(model, inputs)
    loss.backward(retain_graph=True)
    assert_equal(gradients(model), expected)
    loss.backward()
    assert_equal(gradients(model), expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@couplings
def test_partial_backwards_of_one_forward(coupling):
    """Two losses of one output, one after the other, equal their sum."""
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    half = inputs["input_ids"].shape[1] // 2

    def losses(logits):
        return logits[:, :half].square().mean(), logits[:, half:].square().mean()

    torch.manual_seed(5)
    one, two = losses(model(input_ids=inputs["input_ids"]).logits)
    one.backward(retain_graph=True)
    two.backward()
    ours = gradients(model)
    plain = plain_loss_backward(model, {"input_ids": inputs["input_ids"]}, lambda out: sum(losses(out.logits)))
    assert_close(ours, plain)


@couplings
def test_accumulation(coupling):
    model = coupled(**COUPLINGS[coupling])
    parts = [tiny_batch(2, 9, seed=seed) for seed in (1, 2, 3)]
    separate = [run(model, part, seed)[1] for seed, part in enumerate(parts)]
    for seed, part in enumerate(parts):
        loss_of(model, part, seed).backward()
    assert_close(gradients(model), {name: sum(grads[name] for grads in separate) for name in separate[0]})


@couplings
def test_forward_that_is_never_walked_back(coupling):
    """A forward whose graph is dropped leaves nothing behind."""
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    _, expected = run(model, inputs)
    loss_of(model, tiny_batch(2, 9, seed=2), seed=1)
    assert_equal(run(model, inputs)[1], expected)


@exact_couplings
@pytest.mark.parametrize("tile_tokens", [11, 22])
def test_tiles_give_the_gradients_of_the_whole_batch(coupling, tile_tokens):
    whole = coupled(**COUPLINGS[coupling])
    tiled = coupled(tile_tokens=tile_tokens, **COUPLINGS[coupling])
    inputs = tiny_batch(5, 11, padded=True)
    loss, expected = run(whole, inputs)
    tiled_loss, ours = run(tiled, inputs)
    torch.testing.assert_close(tiled_loss, loss)
    assert_close(ours, expected, 1e-4)
    assert_verified(tiled)


def test_tiles_of_a_packed_batch():
    """Position ids (B, T) and the packed mask are cut into the tiles' rows."""
    inputs = tiny_batch(2, 12)
    inputs["position_ids"] = torch.tensor([[*range(5), *range(7)], [*range(8), *range(4)]])
    loss, expected = run(coupled(), inputs)
    tiled_loss, ours = run(coupled(tile_tokens=12), inputs)
    torch.testing.assert_close(tiled_loss, loss)
    assert_close(ours, expected, 1e-4)


# --- frozen parameters -----------------------------------------------------------------------------------------------


FROZEN = {
    "embedding": lambda name: "embed_tokens" in name,
    "embedding and layers 0, 1": lambda name: "embed_tokens" in name or ".layers.0." in name or ".layers.1." in name,
    "layers 0, 1": lambda name: ".layers.0." in name or ".layers.1." in name,
    "middle layer": lambda name: ".layers.2." in name,
    "last layer": lambda name: ".layers.3." in name,
    "routers": lambda name: ".mlp.gate." in name,
    "all but couplings": lambda name: ".coupling." not in name,
    "all but attention": lambda name: ".self_attn." not in name,
    "all but experts": lambda name: ".experts." not in name,
    "all but one norm": lambda name: name != "model.layers.2.post_attention_layernorm.weight",
    "all but the last router": lambda name: name != "model.layers.3.mlp.gate.weight",
    "all but the final norm": lambda name: name != "model.norm.weight",
    "embedding and attention": lambda name: "embed_tokens" in name or ".self_attn." in name,
    "embedding and norms": lambda name: "embed_tokens" in name or "norm" in name,
}


@couplings
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters(frozen, coupling):
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not FROZEN[frozen](name))
    if not any(p.requires_grad for p in model.parameters()):
        return  # "none" has no couplings: nothing would train
    with captured_states() as states:
        _, ours = run(model, inputs)
    _, plain = run_reference(model, inputs)
    assert set(ours) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert_close(ours, plain)
    assert all(states.rebuilt.values())
    if "model.norm.weight" not in ours or len(ours) > 1:  # the final norm alone needs nothing rebuilt
        assert_verified(model)


@couplings
def test_frozen_embedding_in_bf16_with_input_gradient(coupling):
    """What PEFT's `enable_input_require_grads` does: a hook makes the embedding's output require grad."""
    model, inputs = coupled(dtype=torch.bfloat16, **COUPLINGS[coupling]), tiny_batch()
    model.get_input_embeddings().requires_grad_(False)
    model.enable_input_require_grads()
    _, ours = run(model, inputs)
    _, plain = run_reference(model, inputs)
    assert_close(ours, plain, TOLERANCE[torch.bfloat16])


# --- odd inputs ------------------------------------------------------------------------------------------------------


@couplings
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v2", "gpt_oss"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 7)], ids=str)
def test_one_token_and_one_sequence(model_type, shape, coupling):
    """A single token has no next one: the loss is made from its logits."""
    model = coupled(model_type, **COUPLINGS[coupling])
    inputs = {"input_ids": tiny_batch(*shape)["input_ids"]}
    torch.manual_seed(5)
    with captured_states() as states:
        model(**inputs).logits.square().mean().backward()
    ours = gradients(model)
    plain = plain_loss_backward(model, inputs, lambda out: out.logits.square().mean())
    ours = {name: grad for name, grad in ours.items() if plain[name].abs().max() > 1e-6 or grad.abs().max() > 1e-6}
    assert_close(ours, {name: plain[name] for name in ours})
    assert all(states.rebuilt.values())
    assert_verified(model)


@couplings
def test_a_single_layer(coupling):
    overrides = dict(num_hidden_layers=1, mlp_only_layers=[])
    model, inputs = coupled(overrides=overrides, **COUPLINGS[coupling]), tiny_batch()
    loss, ours = run(model, inputs)
    plain_loss, plain = run_reference(model, inputs)
    assert torch.equal(loss, plain_loss)
    assert_close(ours, plain)
    assert_verified(model)


@couplings
def test_module_backward_hooks_fire_once(coupling):
    """Full backward hooks on the decoder layers, which FSDP and profilers use."""
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    _, expected = run(model, inputs)
    fired = []
    for k, layer in enumerate(model.model.layers):
        layer.register_full_backward_hook(lambda module, grad_in, grad_out, k=k: fired.append(k))
    _, ours = run(model, inputs)
    assert fired == [3, 2, 1, 0]
    assert_equal(ours, expected)


# --- eval mode -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("coupling", ["innovation", "none"])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "gpt_oss", "llama"])
def test_eval_is_the_original_model_bit_for_bit(model_type, coupling, dtype):
    original = tiny_model(model_type, dtype).eval()
    model = coupled(model_type, dtype, **COUPLINGS[coupling]).eval()
    inputs = tiny_batch(padded=True)
    with torch.no_grad():
        expected, found = original(**inputs), model(**inputs)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert found.past_key_values is not None


@couplings
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v2", "gpt_oss"])
def test_generate_with_cache(model_type, coupling):
    model = coupled(model_type, **COUPLINGS[coupling]).eval()
    prompt = tiny_batch(2, 6)["input_ids"]
    options = dict(
        max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    cached = model.generate(prompt, use_cache=True, **options)
    plain = model.generate(prompt, use_cache=False, **options)
    assert cached.past_key_values is not None
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
    if coupling in ("innovation", "none"):
        original = tiny_model(model_type).eval().generate(prompt, use_cache=True, **options)
        assert torch.equal(torch.stack(cached.logits), torch.stack(original.logits))


@pytest.mark.parametrize("query_stream", ["left", "right"])
def test_cross_branch_eval_is_the_coupled_function(query_stream):
    """Eval computes with ordinary floats what training computes on the grid."""
    model = coupled(coupling="cross_branch", query_stream=query_stream)
    inputs = tiny_batch(padded=True)
    loss = loss_of(model, inputs).detach()
    with torch.no_grad():
        eval_loss = model.eval()(**inputs).loss
    torch.testing.assert_close(eval_loss, loss, rtol=1e-4, atol=1e-4)
    original = tiny_model().eval()(**inputs).loss
    assert abs(original - eval_loss) > 1e-3


def test_eval_mode_may_walk():
    """It is then the training loss, not the plain one, also without grad."""
    model = coupled(random_sign=False)
    model.model.walks_in_eval = True
    inputs = tiny_batch()
    train_loss = loss_of(model, inputs).detach()
    model.eval()
    with torch.no_grad():
        assert torch.equal(loss_of(model, inputs), train_loss)
        assert model.generate(inputs["input_ids"], max_new_tokens=3).shape[1] > 11
    assert tiny_model().eval()(**inputs).loss != train_loss


@couplings
def test_gradients_in_eval_mode(coupling):
    """eval() with grad enabled is ordinary autograd of the eval function."""
    model, inputs = coupled(**COUPLINGS[coupling]).eval(), tiny_batch()
    model(**inputs).loss.backward()
    ours = gradients(model)
    if coupling in ("innovation", "none"):
        original = tiny_model().eval()
        original(**inputs).loss.backward()
        assert_equal(ours, gradients(original))
    else:
        assert all(grad.isfinite().all() for grad in ours.values()) and len(ours) == len(list(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_none_with_inputs_on_the_host(dtype):
    inputs = tiny_batch(padded=True)
    loss, expected = run(coupled(dtype=dtype, coupling="none"), inputs)
    host_loss, ours = run(coupled(dtype=dtype, coupling="none", offload_inputs=True), inputs)
    assert torch.equal(loss, host_loss)
    assert_equal(ours, expected)
