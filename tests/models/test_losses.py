"""Linear cross-entropy: value and every gradient against float64 and plain cross-entropy on full logits; never more
than a chunk of logits alive; all ten model types give the unpatched model's loss and gradients.

Run: pytest tests/models/test_losses.py
"""

import copy
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, LiveBytes, assert_no_worse, gradients, tiny_batch, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from revffn.models import losses
from revffn.models.architectures import ARCHITECTURES
from revffn.models.losses import chunk_size, linear_cross_entropy, router_z_loss, use_linear_cross_entropy

V, D = 131, 24


def make(tokens, dtype=torch.float32, masked=0.3, bias=False, shape=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, D, generator=generator).to(dtype)
    weight = (torch.randn(V, D, generator=generator) / 2).to(dtype)
    labels = torch.randint(0, V, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < masked] = -100
    bias = torch.randn(V, generator=generator).to(dtype) if bias else None
    return hidden, weight, labels, bias


def in_float64(tensors):
    return [x.double() if x is not None and x.is_floating_point() else x for x in tensors]


def full_logits(hidden, weight, labels, bias=None, reduction="mean", num_items_in_batch=None, z_loss=0.0, **_):
    """What a model does: logits in its dtype, loss in float32 (float64 if that is its dtype)."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    per_token = F.cross_entropy(logits, labels, reduction="none") + z_loss * logits.logsumexp(-1).square()
    total = per_token[labels != -100].sum()
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    return total / (labels != -100).sum() if reduction == "mean" else total


def loss_and_gradients(function, tensors, **options):
    hidden, weight, labels, bias = tensors
    leaves = [None if x is None else x.clone().requires_grad_() for x in (hidden, weight, bias)]
    loss = function(leaves[0], leaves[1], labels, bias=leaves[2], **options)
    (1.5 * loss).backward()
    return [loss.detach()] + [x.grad for x in leaves if x is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 127], ids="N={}".format)
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum"}, {"num_items_in_batch": 50}, {"num_items_in_batch": torch.tensor(50)}, {"z_loss": 1e-2}],
    ids=["mean", "sum", "num_items", "num_items_tensor", "z_loss"],
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_three_way(dtype, tokens, options, bias):
    tensors = make(tokens, dtype, masked=0.3 if tokens > 1 else 0.0, bias=bias)
    truth = loss_and_gradients(full_logits, in_float64(tensors), **options)
    plain = loss_and_gradients(full_logits, tensors, **options)
    ours = loss_and_gradients(linear_cross_entropy, tensors, chunk_tokens=16, **options)
    for name, o, p, t in zip(["loss", "hidden", "weight", "bias"], ours, plain, truth, strict=False):
        assert o.dtype == p.dtype and o.shape == p.shape
        # Observed: float32 3e-7, bfloat16 3e-3 (the head's products are rounded per chunk before they are summed).
        assert_no_worse(o, p, t, dtype, name)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_float64_equals_autograd(z_loss):
    tensors = make(29, torch.float64, bias=True)
    plain = loss_and_gradients(full_logits, tensors, z_loss=z_loss)
    ours = loss_and_gradients(linear_cross_entropy, tensors, z_loss=z_loss, chunk_tokens=4)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_comparison_notices_a_wrong_gradient():
    tensors = make(63)
    truth = loss_and_gradients(full_logits, in_float64(tensors))
    plain = loss_and_gradients(full_logits, tensors)
    ours = loss_and_gradients(linear_cross_entropy, tensors)
    ours[2][3, 4] += 10 * TOLERANCE[torch.float32] * truth[2].abs().max().float()
    with pytest.raises(AssertionError, match="worst excess"):
        assert_no_worse(ours[2], plain[2], truth[2], torch.float32)


def test_chunks_do_not_change_the_result():
    tensors = make(127, torch.float64)
    reference = loss_and_gradients(linear_cross_entropy, tensors, chunk_tokens=127)
    for chunk in (1, 10, 64, 1000):
        for a, b in zip(reference, loss_and_gradients(linear_cross_entropy, tensors, chunk_tokens=chunk), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_label_counts(reduction):
    """As F.cross_entropy: NaN for the mean, zero for the sum, zero gradients for both."""
    tensors = make(17, masked=2.0)
    ours = loss_and_gradients(linear_cross_entropy, tensors, reduction=reduction, chunk_tokens=5)
    logits = F.linear(tensors[0], tensors[1]).requires_grad_()
    theirs = F.cross_entropy(logits, tensors[2], reduction=reduction)
    theirs.backward()
    torch.testing.assert_close(ours[0], theirs.detach(), equal_nan=True)
    assert ours[0].isnan() if reduction == "mean" else ours[0] == 0
    assert not logits.grad.any() and not ours[1].any() and not ours[2].any()
    counted = loss_and_gradients(linear_cross_entropy, tensors, num_items_in_batch=3)
    assert not any(x.any() for x in counted)


def test_shift_is_that_of_transformers():
    hidden, weight, labels, _ = make(5 * 13)
    hidden, labels = hidden.view(5, 13, D), labels.view(5, 13)
    plain = F.cross_entropy((hidden[:, :-1] @ weight.T).flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, shift=True), plain)


@pytest.mark.parametrize("trained", [0, 1], ids=["frozen_head", "frozen_hidden_states"])
def test_frozen(trained, monkeypatch):
    hidden, weight, labels, _ = make(31)
    expected = loss_and_gradients(full_logits, (hidden, weight, labels, None))
    pair = [hidden.clone(), weight.clone()]
    pair[trained].requires_grad_()
    summed, accumulate = [], losses._accumulate
    monkeypatch.setattr(losses, "_accumulate", lambda *a: (summed.append(a), accumulate(*a)))
    (1.5 * linear_cross_entropy(*pair, labels, chunk_tokens=8)).backward()
    torch.testing.assert_close(pair[trained].grad, expected[1 + trained])
    assert pair[1 - trained].grad is None
    assert len(summed) == (4 if trained == 1 else 0)  # a frozen head costs no product


def test_second_backward_is_refused():
    hidden, weight, labels, _ = make(9)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class LargestOutput(TorchDispatchMode):
    """Element counts and shapes of everything an operation returns."""

    def __init__(self):
        super().__init__()
        self.numel, self.shapes = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
                self.shapes.add(tuple(leaf.shape))
        return out


def test_full_logits_never_exist():
    tokens, chunk = 1000, 8
    hidden, weight, labels, _ = make(tokens)
    hidden.requires_grad_(), weight.requires_grad_()
    with LargestOutput() as ours:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk).backward()
    assert ours.numel == tokens * D  # the gradient of the hidden states; logits would be tokens * V
    with LargestOutput() as evaluation, torch.no_grad():
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk)
    assert evaluation.numel == tokens * D
    with LargestOutput() as plain:
        full_logits(hidden, weight, labels).backward()
    assert plain.numel == tokens * V  # the counter sees full logits where there are some


def test_bytes_alive():
    """One float32 head gradient, the gradient of the hidden states and one chunk; nothing after both are consumed."""
    tokens, vocab, width, chunk = 4096, 50_000, 64, 64
    with FakeTensorMode():
        hidden = torch.randn(tokens, width, dtype=torch.bfloat16).requires_grad_()
        weight = torch.randn(vocab, width, dtype=torch.bfloat16).requires_grad_()
        labels = torch.randint(0, vocab, (tokens,))
        with LiveBytes() as memory:
            loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk)
            after_forward = memory.live
            loss.backward()
        # Views count their storage, so the inputs are in the count; the head's gradient is a float32 storage.
        inputs = 2 * vocab * width + 2 * tokens * width + 8 * tokens
        head, states, logits = 4 * vocab * width, 2 * tokens * width, 4 * chunk * vocab
        assert weight.grad.dtype == torch.bfloat16 and weight.grad.shape == weight.shape
    assert after_forward <= inputs + head + states + 16 * tokens
    block = min(losses.HEAD_BLOCK_BYTES, head)
    assert memory.peak <= inputs + head + states + max(1.5 * logits, 0.5 * logits + 0.5 * block) + 32 * tokens
    assert memory.peak < 4 * tokens * vocab / 4


@pytest.mark.parametrize("vocab, tokens", [(151_936, 512), (32_000, 2048), (1_000_000_000, 16)])
def test_automatic_chunk(vocab, tokens):
    assert chunk_size(10**6, vocab) == tokens
    assert chunk_size(7, vocab) == 7
    assert chunk_size(0, vocab) == 1


def test_autocast_equals_casting():
    tensors = make(63)
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_gradients(linear_cross_entropy, tensors)
        plain = loss_and_gradients(full_logits, tensors)
    for o, p in zip(ours, plain, strict=True):
        assert o.dtype == torch.float32
        torch.testing.assert_close(o, p, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reduction": "none"}, "reduction must be"),
        ({"chunk_tokens": 0}, "chunk_tokens must be"),
        ({"impl": "triton"}, "impl must be"),
        ({"impl": "cce", "z_loss": 0.1}, "has no z_loss"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "Shapes do not fit"),
        ({"weight": torch.zeros(V, D, dtype=torch.bfloat16)}, "Cast one of them"),
    ],
)
def test_refusals(change, message):
    hidden, weight, labels, _ = make(9)
    arguments = {"hidden_states": hidden, "weight": weight, "labels": labels, **change}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(losses, "_installed", lambda package: False)
    hidden, weight, labels, _ = make(9)
    with pytest.raises(ImportError, match="liger-kernel"):
        linear_cross_entropy(hidden, weight, labels, impl="liger")


def test_choice_of_kernel(monkeypatch):
    installed = {"liger_kernel", "cut_cross_entropy"}
    monkeypatch.setattr(losses, "_installed", lambda package: package in installed)
    assert losses._choose("auto", False, None, 0.0) == "torch"
    assert losses._choose("auto", True, None, 0.0) == "liger"
    installed.remove("liger_kernel")
    assert losses._choose("auto", True, None, 0.0) == "cce"
    assert losses._choose("auto", True, None, 0.1) == "torch"
    assert losses._choose("auto", True, torch.zeros(V), 0.0) == "torch"


@pytest.mark.parametrize("impl", ["liger", "cce"])
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 7}, {"reduction": "sum"}], ids=str)
def test_kernel_adapters(monkeypatch, impl, options):
    """The packages' sums, stood in for by plain cross-entropy, are scaled as ours (they need a GPU to run)."""

    def total(hidden, weight, labels, *, ignore_index, reduction, **_):
        return F.cross_entropy(hidden @ weight.T, labels, ignore_index=ignore_index, reduction=reduction)

    functional = ModuleType("liger_kernel.transformers.functional")
    functional.liger_fused_linear_cross_entropy = total
    cce = ModuleType("cut_cross_entropy")
    cce.linear_cross_entropy = total
    monkeypatch.setattr(losses, "_installed", lambda package: True)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", ModuleType("liger_kernel.transformers"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", cce)
    tensors = make(31)
    ours = loss_and_gradients(linear_cross_entropy, tensors, **options)
    run = lambda *a, bias=None, **k: linear_cross_entropy(*a, impl=impl, **k)  # noqa: E731
    for a, b in zip(ours, loss_and_gradients(run, tensors, **options), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU kernels; runs wherever there is one")
@pytest.mark.parametrize("impl", ["torch", "liger", "cce"])
def test_gpu_kernels(impl):
    package = {"torch": "torch", "liger": "liger_kernel", "cce": "cut_cross_entropy"}[impl]
    pytest.importorskip(package, reason=f"optional package {package}; ends when it is installed")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 128, generator=generator).to("cuda", torch.bfloat16)
    weight = (torch.randn(4096, 128, generator=generator) / 8).to("cuda", torch.bfloat16)
    labels = torch.randint(0, 4096, (512,), generator=generator).cuda()
    labels[::3] = -100
    truth = loss_and_gradients(full_logits, (hidden.double(), weight.double(), labels, None))
    plain = loss_and_gradients(full_logits, (hidden, weight, labels, None))
    ours = loss_and_gradients(linear_cross_entropy, (hidden, weight, labels, None), impl=impl)
    for name, o, p, t in zip(["loss", "hidden", "weight"], ours, plain, truth, strict=True):
        assert_no_worse(o, p, t, torch.bfloat16, name)


# --- under a model ---------------------------------------------------------------------------------------------------


def loss_and_model_gradients(model, **inputs):
    output = model(**inputs)
    output.loss.backward()
    return output, gradients(model)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_models(model_type):
    model = tiny_model(model_type).train()
    inputs = tiny_batch(padded=True)
    if hasattr(model, "router_aux_loss_coef"):
        inputs["output_router_logits"] = True
    plain, plain_gradients = loss_and_model_gradients(model, **inputs)
    ours, our_gradients = loss_and_model_gradients(use_linear_cross_entropy(model, chunk_tokens=4), **inputs)
    assert plain.logits is not None and ours.logits is None and type(ours) is type(plain)
    torch.testing.assert_close(ours.loss, plain.loss)
    if "output_router_logits" in inputs:
        assert ours.aux_loss is not None and ours.aux_loss.requires_grad
    assert our_gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_trainer_arguments():
    """num_items_in_batch, shift_labels and return_dict mean what they mean to the unpatched model."""
    model = tiny_model("qwen3_moe").train()
    inputs = tiny_batch(padded=True)
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    calls = [dict(num_items_in_batch=torch.tensor(5)), dict(shift_labels=shifted), dict(num_items_in_batch=9)]
    plain = [model(**inputs, **call).loss for call in calls]
    use_linear_cross_entropy(model)
    for call, expected in zip(calls, plain, strict=True):
        torch.testing.assert_close(model(**inputs, **call).loss, expected)
    returned = model(**inputs, return_dict=False)
    assert isinstance(returned, tuple) and returned[0].dim() == 0
    torch.testing.assert_close(returned[0], model(**inputs).loss)


def test_tied_head():
    config = AutoConfig.for_model(
        "llama", vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    inputs = tiny_batch()
    _, plain = loss_and_model_gradients(model, **inputs)
    _, ours = loss_and_model_gradients(use_linear_cross_entropy(model), **inputs)
    torch.testing.assert_close(ours["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])


def test_logits_where_they_are_wanted():
    model = use_linear_cross_entropy(tiny_model("olmoe").train())
    inputs = tiny_batch()
    assert model(input_ids=inputs["input_ids"]).logits.shape == (3, 11, 97)
    evaluated = model.eval()(**inputs)
    assert evaluated.logits is not None and evaluated.loss is not None
    with torch.no_grad():
        assert model.generate(inputs["input_ids"][:1], max_new_tokens=2, do_sample=False).shape == (1, 13)
    held_out = use_linear_cross_entropy(tiny_model("olmoe").eval(), in_eval=True)(**inputs)
    assert held_out.logits is None
    torch.testing.assert_close(held_out.loss, evaluated.loss)


def test_an_error_leaves_the_model_usable():
    model = use_linear_cross_entropy(tiny_model("llama").train())
    inputs = tiny_batch()
    with pytest.raises(ValueError, match="Shapes do not fit"):
        model(input_ids=inputs["input_ids"], labels=inputs["labels"][:, :-1])
    assert model(input_ids=inputs["input_ids"]).logits.shape[-1] == 97
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(**inputs).loss, model(**inputs).loss)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert copied(**inputs).loss != model(**inputs).loss


@pytest.mark.parametrize("first", ["convert", "patch"])
def test_converted_models(first):
    import revffn

    inputs = tiny_batch(padded=True)

    def build(patch):
        model = tiny_model("qwen2_moe")
        if patch and first == "patch":
            use_linear_cross_entropy(model)
        model = revffn.convert(model, revffn.ReversibleConfig(tile_tokens=11), calibration=[tiny_batch(4, 13, seed=7)])
        if patch and first == "convert":
            use_linear_cross_entropy(model)
        return model.train()

    results = []
    for patch in (False, True):
        model = build(patch)
        torch.manual_seed(3)
        results.append(loss_and_model_gradients(model, **inputs))
    (plain, plain_gradients), (ours, our_gradients) = results
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, plain.loss)
    assert our_gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_refused_models():
    model = tiny_model("llama")
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    with pytest.raises(ValueError, match="loss_function of its own"):
        use_linear_cross_entropy(model)
    stranger = SimpleNamespace(config=SimpleNamespace(model_type="gemma2"))
    with pytest.raises(ValueError, match="Known: qwen2_moe"):
        use_linear_cross_entropy(stranger)


def test_fake_tensors_at_full_vocabulary():
    config = AutoConfig.for_model(
        "qwen2_moe", num_hidden_layers=1, vocab_size=151_936, num_experts=4, hidden_size=64, moe_intermediate_size=32,
        num_attention_heads=4, num_key_value_heads=4, shared_expert_intermediate_size=32,
    )  # fmt: skip
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
        use_linear_cross_entropy(model)
        ids = torch.randint(0, 1000, (8, 1024))
        with LargestOutput() as seen:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
    assert seen.numel <= max(512 * 151_936, 2 * 64 * 151_936) < ids.numel() * 151_936 / 8


def test_router_z_loss_is_the_formula():
    """In float64 term by term, tokens of padding left out; its gradient by finite differences; bf16 in float32."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    terms = [math.log(sum(math.exp(x) for x in row)) ** 2 for layer in layers for row in layer.tolist()]
    assert router_z_loss(layers).item() == pytest.approx(sum(terms) / 18, rel=1e-12)
    kept = [term for i, term in enumerate(terms) if i % 6 < 4]
    assert router_z_loss(layers, mask).item() == pytest.approx(sum(kept) / 12, rel=1e-12)
    assert torch.autograd.gradcheck(lambda *given: router_z_loss(given, mask), layers)
    assert router_z_loss([layer.bfloat16() for layer in layers]).dtype == torch.float32
    half = [layer.detach().bfloat16().requires_grad_() for layer in layers]
    found = torch.autograd.grad(router_z_loss(half, mask), half)
    wide = [layer.detach().double().requires_grad_() for layer in half]
    exact = torch.autograd.grad(router_z_loss(wide, mask), wide)
    for ours, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2**-8, atol=1e-6)
