"""Expert choices are recorded in the smallest type, replayed exactly, and a changed choice does not stay unnoticed."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers import captured_states, coupled, run, run_reference, tiny_batch

import revffn
from revffn.engine.routing import RecordRouting, ReplayRouting
from revffn.models.architectures import routers
from revffn.ops.experts.reference import index_dtype

MOE = ["qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss"]
COUPLINGS = {
    "innovation": dict(coupling="innovation"),
    "cross_right": dict(coupling="cross_branch", query_stream="right"),
    "none": dict(coupling="none"),
}


@pytest.mark.parametrize(
    "num_experts, dtype",
    [
        (1, torch.uint8), (60, torch.uint8), (256, torch.uint8),
        (257, torch.int16), (32768, torch.int16), (32769, torch.int32),
    ],
)  # fmt: skip
def test_smallest_type(num_experts, dtype):
    assert index_dtype(num_experts) == dtype
    assert torch.tensor(num_experts - 1, dtype=dtype).item() == num_experts - 1
    scores = torch.arange(float(num_experts)).expand(2, -1)
    record = []
    with RecordRouting(record):
        top = torch.topk(scores, 1, dim=-1)
    assert record[0].dtype == dtype and (record[0] == num_experts - 1).all()
    assert top.indices.dtype == torch.long and (top.indices == num_experts - 1).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda s: torch.topk(s, 3, dim=-1),
        lambda s: s.topk(3, sorted=False),
        lambda s: torch.topk(input=s, k=3),
        lambda s: s.T.topk(k=3, dim=0),
    ],
    ids=["function", "method", "keywords", "other dimension"],
)
def test_recorded_call_returns_what_topk_returns(call):
    scores = torch.randn(5, 9, requires_grad=True)
    plain = call(scores)
    record = []
    with RecordRouting(record):
        ours = call(scores)
    assert torch.equal(ours.values, plain.values) and torch.equal(ours.indices, plain.indices)
    ours_grad, plain_grad = (torch.autograd.grad(top.values.square().sum(), scores)[0] for top in (ours, plain))
    assert torch.equal(ours_grad, plain_grad)


def test_replay_uses_recorded_choices_and_fresh_scores():
    scores = torch.randn(5, 9)
    record = []
    with RecordRouting(record):
        first = scores.topk(2)
    other = torch.randn(5, 9, requires_grad=True)
    with ReplayRouting(record):
        second = other.topk(2)
    assert torch.equal(second.indices, first.indices)
    assert torch.equal(second.values, other.gather(-1, first.indices))
    second.values.sum().backward()
    assert torch.equal(other.grad, torch.zeros(5, 9).scatter(-1, first.indices, 1.0))


def test_replay_of_a_call_that_was_not_recorded_raises():
    with pytest.raises((StopIteration, RuntimeError, ValueError)), ReplayRouting([]):
        torch.randn(3, 4).topk(1)


# --- in the engine ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def router_outputs(model):
    """What every router handed to its experts: (layer, indices), forward and recomputation."""
    seen, handles = [], []
    for number, router in enumerate(routers(model)):
        experts = next(layer.mlp for layer in model.model.layers if router in set(layer.mlp.modules())).experts
        hook = experts.register_forward_pre_hook(lambda _, args, n=number: seen.append((n, args[1].detach().clone())))
        handles.append(hook)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", MOE)
def test_forward_and_recomputation_choose_alike(model_type, dtype, coupling):
    """Expert indices equal, layer by layer; each router runs exactly twice."""
    model, inputs = coupled(model_type, dtype, **COUPLINGS[coupling]), tiny_batch()
    with router_outputs(model) as seen:
        run(model, inputs)
    for number in range(len(routers(model))):
        forward, again = (indices for n, indices in seen if n == number)
        assert torch.equal(forward.long(), again.long()), number


@pytest.mark.parametrize("coupling", ["innovation", "cross_right"])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_exact_ties(model_type, coupling):
    """Pairs of experts with the same router weights tie for every token; forward's choice is taken again."""
    model, inputs = coupled(model_type, **COUPLINGS[coupling]), tiny_batch()
    with torch.no_grad():
        for router in routers(model):
            router.weight[1::2] = router.weight[::2]
            if getattr(router, "bias", None) is not None:
                router.bias[1::2] = router.bias[::2]
    logits = []
    hook = routers(model)[0].register_forward_hook(lambda _, args, out: logits.append(out[0].detach()))
    with captured_states() as states:
        loss, ours = run(model, inputs)
    hook.remove()
    scores = logits[0].reshape(-1, logits[0].shape[-1])
    assert torch.equal(scores[:, ::2], scores[:, 1::2]), "nothing ties"
    plain_loss, plain = run_reference(model, inputs)
    states.assert_exact()
    assert torch.equal(loss, plain_loss)
    for name in ours:
        scale = plain[name].abs().max().clamp_min(1e-6)
        assert (ours[name] - plain[name]).abs().max() <= 2e-5 * scale, name


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_choice_is_replayed_even_if_the_router_would_choose_otherwise(coupling):
    """The router's weights change between forward and backward: the experts of forward are used all the same."""
    model, inputs = coupled(**{**COUPLINGS[coupling], "verify": "report"}), tiny_batch()
    with router_outputs(model) as seen:
        loss = model(**inputs).loss
        with torch.no_grad():
            for router in routers(model):
                router.weight.neg_()
        loss.backward()
    for number in range(len(routers(model))):
        forward, again = (indices for n, indices in seen if n == number)
        assert torch.equal(forward.long(), again.long())


def flip_one_expert(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[4, 0] = (tensor[4, 0] + 1 + (tensor[4, 1] == tensor[4, 0] + 1)) % 6
    return tensor


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_flipped_expert_is_noticed(coupling):
    """One token's recorded expert is changed: the exact couplings raise; where nothing is rebuilt the gradients show
    it."""
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    _, expected = run(model, inputs)
    flipped = []

    def unpack(tensor):
        if tensor.dtype == torch.uint8 and tensor.shape == (33, 2):
            flipped.append(tensor)
            if tensor is flipped[0]:
                return flip_one_expert(tensor)
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        loss = model(**inputs).loss
    if coupling == "none":
        loss.backward()
        worst = max((p.grad - expected[n]).abs().max() / expected[n].abs().max() for n, p in model.named_parameters())
        assert worst > 1e-3
    else:
        with pytest.raises(revffn.StateMismatchError):
            loss.backward()
    assert flipped


def test_counters_do_not_move_twice():
    """A buffer that counts tokens by expert, as load balancing without a loss keeps it, is moved by forward alone."""
    model, inputs = coupled("deepseek_v3"), tiny_batch()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    run(model, inputs)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
