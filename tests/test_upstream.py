"""What the package needs of transformers beyond what that promises: each name there, and doing what it is needed for.

Run: pytest tests/test_upstream.py
"""

import copy
import gc
import inspect
import weakref

import pytest
import torch
import transformers
from accelerate import FullyShardedDataParallelPlugin
from helpers import tiny_batch, tiny_model
from packaging.version import Version
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from revffn import upstream
from revffn.models.architectures import ARCHITECTURES
from revffn.models.conversion import ReversibleBackbone, ReversibleForCausalLM
from revffn.training.trainer import RevFFNTrainer

VERSION = Version(transformers.__version__).release
families = pytest.mark.parametrize("model_type", ARCHITECTURES)
sparse = pytest.mark.parametrize("model_type", [name for name, row in ARCHITECTURES.items() if row.router])


def made_like(model) -> type[PreTrainedModel]:
    """A class made at run time, which has no source that transformers could read."""
    cls = type(model)
    return type("Made", (cls,), upstream.implementation_flags(cls))


# --- outputs that are captured ---------------------------------------------------------------------------------------


def test_the_active_collector_holds_what_is_asked_for():
    model, seen = tiny_model(), []
    last = model.model.layers[-1]
    last.register_forward_hook(lambda *_: seen.append(dict(upstream.active_collector.get())))
    model(**tiny_batch(), output_router_logits=True)
    (collected,) = seen
    assert len(collected["router_logits"]) == 3 and torch.is_tensor(collected["router_logits"][0])
    assert upstream.active_collector.get() is None


def test_nothing_is_captured_while_the_collector_is_set_aside():
    model = tiny_model()
    first = model.model.layers[0]
    tokens = []
    first.register_forward_pre_hook(lambda *_: tokens.append(upstream.active_collector.set(None)))
    first.register_forward_hook(lambda *_: upstream.active_collector.reset(tokens.pop()))
    asked = model(**tiny_batch(), output_router_logits=True)
    assert len(asked.router_logits) == 2


def test_a_class_that_is_recorded_is_captured_from():
    model = tiny_model()
    expected = model.model(**without_labels(), output_router_logits=True).router_logits
    model.model.__class__ = type("Unheard", (type(model.model),), {})
    assert not model.model(**without_labels(), output_router_logits=True).router_logits
    upstream.note_classes(model.model, model.model.layers)
    found = model.model(**without_labels(), output_router_logits=True).router_logits
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_recording_keeps_no_model_alive():
    model = tiny_model()
    model.__class__ = made_like(model)
    upstream.note_classes(model, model.model.layers)
    held = weakref.ref(model)
    del model
    gc.collect()
    assert held() is None


@families
def test_the_layer_class_is_that_of_the_layers(model_type):
    model, row = tiny_model(model_type), ARCHITECTURES[model_type]
    assert upstream.layer_class(row.load(model_type, "PreTrainedModel")) is type(model.model.layers[0])


def without_labels():
    return {"input_ids": tiny_batch()["input_ids"]}


# --- classes made at run time, and what their configs choose ---------------------------------------------------------


@families
def test_a_class_made_at_run_time_answers_as_its_parent(model_type):
    model = tiny_model(model_type)
    model.__class__ = made_like(model)
    model.set_attn_implementation("eager")
    assert upstream.attention_implementation(model.config) == "eager"
    if ARCHITECTURES[model_type].router:
        model.set_experts_implementation("batched_mm")
        assert upstream.experts_implementation(model.config) == "batched_mm"


def test_layers_are_left_whole_by_the_names_of_their_new_classes():
    model = tiny_model()
    remade = type("Remade", (type(model.model.layers[0]),), {})
    for layer in model.model.layers:
        layer.__class__ = remade
    upstream.note_classes(model, model.model.layers)
    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)  # it raises where a name is nowhere
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {type(model.model.layers[0])}


def test_implementations_are_those_asked_for():
    config = tiny_model().config
    assert upstream.experts_implementation(AutoConfig.for_model("qwen2_moe")) is None
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="batched_mm")
    fresh = type(config).from_dict(model.config.to_dict())
    assert upstream.experts_implementation(fresh) is None
    upstream.copy_implementations(model.config, fresh)
    made = type(model)(fresh)
    assert upstream.attention_implementation(made.config) == "eager"
    assert upstream.experts_implementation(made.config) == "batched_mm"


# --- experts ---------------------------------------------------------------------------------------------------------


@sparse
def test_experts_ask_the_interface(model_type, monkeypatch):
    model, asked = tiny_model(model_type), []

    def forward(module, hidden_states, index, weights):
        asked.append((module, hidden_states.shape, index.shape, weights.shape))
        return upstream.family_forward(type(module))(module, hidden_states, index, weights)

    plain = model(**tiny_batch()).loss
    monkeypatch.setitem(upstream.ALL_EXPERTS_FUNCTIONS, "asked", forward)
    model.set_experts_implementation("asked")
    torch.testing.assert_close(model(**tiny_batch()).loss, plain)
    module, hidden_states, index, weights = asked[0]
    assert hidden_states == (33, 32) and index == weights == (33, 2)
    assert not upstream.is_expert_parallel(module)


def test_a_part_of_the_experts_is_known():
    experts = tiny_model().model.layers[0].mlp.experts
    experts._is_expert_parallel = True
    assert upstream.is_expert_parallel(experts)


@pytest.mark.skipif(VERSION < (5, 18), reason="5.17 does not say; to go with it")
def test_transformers_says_whether_it_is_a_part():
    assert "_is_expert_parallel" in tiny_model().model.layers[0].mlp.experts.__dict__


# --- the loss --------------------------------------------------------------------------------------------------------


def test_a_loss_of_its_own_can_be_removed():
    model = tiny_model()
    expected = model(**tiny_batch()).loss
    assert not upstream.has_own_loss(model)
    model.loss_function = lambda *_, **__: torch.tensor(7.0)
    assert upstream.has_own_loss(model) and model(**tiny_batch()).loss == 7
    upstream.remove_own_loss(model)
    assert not upstream.has_own_loss(model) and torch.equal(model(**tiny_batch()).loss, expected)


# --- masks and fake tensors ------------------------------------------------------------------------------------------


def test_a_causal_mask_by_position():
    config, embeddings = tiny_model().config, torch.zeros(1, 6, 1)
    assert upstream.create_causal_mask(config, embeddings, None, None, torch.arange(6)[None]) is None
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    mask = upstream.create_causal_mask(config, embeddings, None, None, packed)
    assert mask.shape == (1, 1, 6, 6) and not mask[..., 3:, :3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors_go_the_way_of_real_ones(dtype):
    config, positions = copy.deepcopy(tiny_model().config), torch.arange(11).expand(3, 11)
    with FakeTensorMode() as mode:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="grouped_mm")
        ids, positions = torch.zeros(3, 11, dtype=torch.int64), mode.from_tensor(positions)
        embeddings = torch.zeros(3, 11, 1, dtype=dtype)
        assert upstream.create_causal_mask(config, embeddings, None, None, positions) is not None
        with upstream.fake_tensors_as_real():
            assert upstream.create_causal_mask(config, embeddings, None, None, positions) is None
            loss = model(input_ids=ids, labels=ids).loss
            if dtype == torch.bfloat16 or VERSION >= (5, 23):
                loss.backward()
                assert all(p.grad is not None for name, p in model.named_parameters() if "experts" in name)


# --- files and templates ---------------------------------------------------------------------------------------------


def test_a_mapping_of_weights_can_be_lent_to_another_type():
    mapping = upstream.get_checkpoint_conversion_mapping("qwen2_moe")
    assert mapping
    upstream.register_checkpoint_conversion_mapping("revffn_test", mapping, overwrite=True)
    lent = upstream.get_checkpoint_conversion_mapping("revffn_test")
    assert [type(entry) for entry in lent] == [type(entry) for entry in mapping]


def test_initialisers_leave_alone_what_was_loaded():
    loaded, missing = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    loaded._is_hf_initialized = True
    with torch.no_grad():
        for parameter in (loaded, missing):
            upstream.initialization.zeros_(parameter)
        assert loaded.eq(1).all() and missing.eq(0).all()
        upstream.initialization.eye_(missing)
        assert torch.equal(missing, torch.eye(2))
        upstream.initialization.copy_(missing, torch.full((2, 2), 3.0))
    assert missing.eq(3).all()


def test_a_template_marks_what_the_assistant_says():
    template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}]
    (text,), (spans,) = upstream.render_jinja_template(
        conversations=[messages], tools=None, chat_template=template, return_assistant_tokens_mask=True
    )
    assert text == "[user]Hm?[assistant]Yes."
    assert [text[start:end] for start, end in spans] == ["Yes."]


# --- the trainer -----------------------------------------------------------------------------------------------------


def test_who_can_be_reported_to_is_known():
    assert upstream.reports_to("tensorboard")  # of the test extra
    with pytest.raises(ValueError, match="tensorboard"):
        upstream.reports_to("a notice board")


# --- methods in place of transformers' -------------------------------------------------------------------------------

OURS = (ReversibleBackbone, ReversibleForCausalLM, RevFFNTrainer)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("base", upstream.OVERRIDDEN)
def test_methods_that_are_overridden_are_there(base):
    theirs = getattr(transformers, base)
    for name in upstream.OVERRIDDEN[base]:
        assert hasattr(theirs, name), f"{base}.{name} is gone: what we put in its place is never called"
        wanted = inspect.signature(getattr(theirs, name))
        for cls in OURS:
            if name in vars(cls):
                given = inspect.signature(vars(cls)[name])
                assert list(given.parameters) == list(wanted.parameters), f"{cls.__name__}.{name}"


def test_no_other_private_method_is_overridden():
    known = {name for names in upstream.OVERRIDDEN.values() for name in names}
    for cls in OURS:
        bases = [c for c in cls.__mro__[1:] if c.__module__.partition(".")[0] in ("transformers", "trl")]
        found = {name for name in vars(cls) if is_private(name) and any(name in vars(base) for base in bases)}
        # Python's and abc's own, in every class of a family with abstract methods.
        assert {name for name in found if not name.startswith("_abc_")} <= known
