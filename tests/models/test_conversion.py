"""Plain model -> reversible model -> plain model: weights, configuration, logits, files; refusals change nothing;
full size without weights."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
import time
import warnings

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from helpers import SETTINGS, coupled, run, snapshot, tiny_batch, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2MoeConfig, Qwen3MoeConfig

import revffn
from revffn.config import CrossBranchConfig, Grids, InnovationConfig, ReversibleConfig
from revffn.models.architectures import ARCHITECTURES, router_parameters

COUPLINGS = {
    "innovation": dict(coupling="innovation", side_bits=[0, 1, 3, 2], predictor_rank=5),
    "cross_left": dict(coupling="cross_branch"),
    "cross_right": dict(coupling="cross_branch", query_stream="right"),
    "none": dict(coupling="none"),
}
CALIBRATION = [tiny_batch(4, 13, seed=7), tiny_batch(4, 13, seed=8, padded=True)]


def assert_same_weights(model, other) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


def with_random_couplings(model):
    """Adapters and predictors that have trained a little, so that the file must really hold them."""
    with torch.no_grad():
        for _, parameter in revffn.coupling_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return model


# --- what convert changes, and what it does not ----------------------------------------------------------------------


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("model_type", SETTINGS)
def test_convert_keeps_weights_and_adds_couplings(model_type, coupling):
    original = tiny_model(model_type)
    model = tiny_model(model_type)
    parameters = dict(model.named_parameters())
    converted = revffn.convert(model, revffn.ReversibleConfig.from_dict(COUPLINGS[coupling]))
    assert converted is model and revffn.is_reversible(model) and not revffn.is_reversible(original)
    assert model.config.model_type == f"revffn_{model_type}" == model.config.to_dict()["model_type"]
    assert isinstance(model, type(original))
    added = {name for name, _ in revffn.coupling_parameters(model)}
    kept = {name: p for name, p in model.named_parameters() if name not in added}
    assert list(kept) == list(parameters) and all(kept[name] is parameters[name] for name in kept)
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert bool(added) == (coupling != "none")


@pytest.mark.parametrize("trained", [True, False])
def test_mode_and_frozen_parameters_stay(trained):
    model = tiny_model().train(trained)
    model.model.embed_tokens.requires_grad_(False)
    revffn.convert(model)
    assert all(module.training == trained for module in model.modules())
    assert not model.model.embed_tokens.weight.requires_grad and model.lm_head.weight.requires_grad
    assert not any(p.requires_grad for _, p in revffn.coupling_parameters(model))  # predictors stay as fitted


def test_predictors_train_if_asked():
    model = revffn.convert(tiny_model(), revffn.ReversibleConfig.from_dict(dict(train_predictor=True)))
    assert all(p.requires_grad for _, p in revffn.coupling_parameters(model)) and revffn.coupling_parameters(model)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_couplings_have_the_models_dtype(coupling, dtype):
    model = coupled("llama", dtype, **COUPLINGS[coupling])
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_conversion_leaves_other_models_of_the_class_alone():
    other = tiny_model().eval()
    inputs = tiny_batch()
    before = other(**inputs).logits
    revffn.convert(tiny_model())
    assert type(other).__name__ == "Qwen2MoeForCausalLM" and torch.equal(other(**inputs).logits, before)
    assert type(AutoModelForCausalLM.from_config(other.config)) is type(other)


@pytest.mark.parametrize("loaded", [False, True], ids=["converted", "loaded"])
def test_wrapping_policies_find_the_layers(loaded, tmp_path):
    model = coupled()
    if loaded:
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {type(model.model.layers[0])}


def test_a_training_forward_in_eval_mode_warns():
    model = revffn.convert(tiny_model()).eval()
    with pytest.warns(UserWarning, match=r"eval mode .*model\.train\(\)"):
        model(**tiny_batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            model(**tiny_batch())
        model.train()(**tiny_batch())
        revffn.convert(tiny_model(), revffn.ReversibleConfig(coupling="none")).eval()(**tiny_batch())


def test_router_parameters():
    for model_type, row in ARCHITECTURES.items():
        found = router_parameters(revffn.convert(tiny_model(model_type)))
        dense = {"qwen2_moe": 1, "deepseek_v2": 1, "deepseek_v3": 1, "glm4_moe": 1}.get(model_type, 0)
        if row.router is None:
            assert found == []
        else:
            routers = {p.shape for p in found if p.dim() == 2}
            assert len([p for p in found if p.dim() == 2]) == 4 - dense and len(routers) == 1, model_type


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, settings, message",
    [
        (
            lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=2, n_embd=16, n_head=2)),
            {},
            "gpt2.*qwen2_moe",
        ),
        (lambda: tiny_model(), dict(side_bits=[1, 2]), "side_bits has 2 entries.*4"),
        (lambda: tiny_model(), dict(plain_layers=4), "plain_layers=4"),
        (
            lambda: tiny_model("llama", hidden_size=33, num_attention_heads=3, num_key_value_heads=3, head_dim=8),
            dict(coupling="cross_branch"),
            "33",
        ),
        (lambda: tiny_model(), dict(grid_growth=2, wide_channels=[3, 32]), r"wide_channels \[32\].*32 channels"),
    ],
    ids=["unknown", "side bits", "plain layers", "odd", "wide channels"],
)  # fmt: skip
def test_refused_before_anything_changes(make, settings, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        revffn.convert(model, revffn.ReversibleConfig.from_dict(settings), calibration=CALIBRATION)
    assert snapshot(model) == before


def test_other_heads_are_refused():
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(tiny_model("llama").config)
    with pytest.raises(ValueError, match="LlamaForCausalLM.*LlamaForSequenceClassification"):
        revffn.convert(model)


def test_already_reversible_is_refused():
    model = coupled()
    before = snapshot(model)
    with pytest.raises(ValueError, match="reversible already"):
        revffn.convert(model)
    assert snapshot(model) == before


# --- files -----------------------------------------------------------------------------------------------------------


def aligned(model):
    """Loaded weights lie where the file has them; some CPUs' kernels round otherwise where that is no multiple of 64
    bytes."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("model_type", SETTINGS)
def test_save_and_load(model_type, coupling, tmp_path):
    """Weights, settings, eval logits bit for bit, and the training loss under the same seed."""
    model = with_random_couplings(coupled(model_type, **COUPLINGS[coupling]))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(loaded) is type(model) and revffn.is_reversible(loaded)
    assert loaded.config.revffn == model.config.revffn
    assert loaded.reversible_config == model.reversible_config
    assert_same_weights(loaded, model)
    inputs = tiny_batch(padded=True)
    loaded.set_attn_implementation(model.config._attn_implementation)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)
    aligned(loaded)
    (loss, grads), (loaded_loss, loaded_grads) = run(model.train(), inputs), run(loaded.train(), inputs)
    assert torch.equal(loss, loaded_loss)
    assert all(torch.equal(grads[name], loaded_grads[name]) for name in grads)
    assert revffn.reversible_report(loaded)["mismatched_states"] == 0
    if coupling in ("innovation", "none"):
        with torch.no_grad():
            assert torch.equal(revffn.export(loaded).eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_grids_are_saved_and_loaded(tmp_path):
    """Wide channels too; a folder from before there were any means one grid."""
    grids = dict(fraction_bits=8, grid_growth=7, wide_growth=3, wide_channels=[0, 17])
    model = with_random_couplings(coupled(calibrate=False, **grids))
    model.save_pretrained(tmp_path)
    loaded = aligned(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train())
    assert loaded.reversible_config.grids == Grids(**grids)
    inputs = tiny_batch()
    (loss, grads), (loaded_loss, loaded_grads) = run(model, inputs), run(loaded, inputs)
    assert torch.equal(loss, loaded_loss)
    assert all(torch.equal(grads[name], loaded_grads[name]) for name in grads)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("grid_growth", "wide_growth", "wide_channels"):
        del config["revffn"]["grids"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    older = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    assert [older.reversible_config.fraction_bits_of(k, 4) for k in (0, 4)] == [8, 8]
    assert not torch.equal(run(older, inputs)[0], loss)
    assert revffn.reversible_report(older)["mismatched_states"] == 0


@pytest.mark.parametrize("train_predictor", [False, True])
def test_frozen_predictors_stay_frozen_when_loaded(train_predictor, tmp_path):
    coupled(train_predictor=train_predictor).save_pretrained(tmp_path)
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)[0],
    ):
        assert {p.requires_grad for _, p in revffn.coupling_parameters(model)} == {train_predictor}


@pytest.mark.parametrize("coupling", ["innovation", "none"])
@pytest.mark.parametrize("model_type", SETTINGS)
def test_export_is_the_original(model_type, coupling, tmp_path):
    """Class, configuration, weights, logits; in memory and from its folder."""
    original = tiny_model(model_type).eval()
    model = coupled(model_type, **COUPLINGS[coupling]).eval()
    exported = revffn.export(model)
    assert type(exported) is type(original) and type(exported.config) is type(original.config)
    assert "revffn" not in exported.config.to_json_string()
    assert_same_weights(exported, original)
    inputs = tiny_batch(padded=True)
    with torch.no_grad():
        expected = original(**inputs).logits
        assert torch.equal(exported(**inputs).logits, expected)
        exported.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        loaded.set_attn_implementation(original.config._attn_implementation)
        loaded.config._experts_implementation = original.config._experts_implementation
        assert torch.equal(loaded.eval()(**inputs).logits, expected)
        assert torch.equal(model(**inputs).logits, expected), "the reversible model must go on working"
    assert_same_weights(loaded, original)
    assert loaded.config.to_diff_dict() == {**original.config.to_diff_dict(), **{
        name: loaded.config.to_diff_dict()[name] for name in ("architectures",) if name in loaded.config.to_diff_dict()
    }}  # fmt: skip
    assert torch.equal(
        exported.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False),
        original.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False),
    )


def test_export_after_training_shares_the_weights():
    model = coupled()
    run(model, tiny_batch())
    exported = revffn.export(model)
    assert exported.model.layers[1].mlp.experts.down_proj is model.model.layers[1].mlp.experts.down_proj
    assert exported.training == model.training
    again = revffn.convert(exported, revffn.ReversibleConfig(coupling="none"))
    assert again.config.revffn["coupling"] == "none"


def test_export_with_tied_embeddings(tmp_path):
    model = coupled("llama", overrides=dict(tie_word_embeddings=True))
    exported = revffn.export(model)
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    exported.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "reversible")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "reversible")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("coupling", ["cross_left", "cross_right"])
def test_cross_branch_cannot_be_exported(coupling):
    with pytest.raises(ValueError, match="cannot be exported"):
        revffn.export(coupled(**COUPLINGS[coupling]))
    with pytest.raises(ValueError, match="plain model already"):
        revffn.export(tiny_model())


def test_exported_folder_needs_no_revffn(tmp_path):
    """A Python that cannot import this library loads the folder and finds the same loss."""
    model = coupled().eval()
    revffn.export(model).save_pretrained(tmp_path)
    inputs = tiny_batch()
    torch.save(inputs, tmp_path / "inputs.pt")
    code = f"""
import sys
sys.modules["revffn"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()
print(type(model).__name__, model(**torch.load({str(tmp_path / "inputs.pt")!r})).loss.item())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    name, loss = found.stdout.split()[-2:]
    assert name == "Qwen2MoeForCausalLM"
    assert float(loss) == pytest.approx(model(**inputs).loss.item(), abs=1e-6)


def test_reversible_folder_is_not_mistaken_for_a_plain_one(tmp_path):
    """Without this library the model type is unknown: nobody trains or serves it as something else by accident."""
    coupled(coupling="cross_branch").save_pretrained(tmp_path)
    code = f"""
import sys
sys.modules["revffn"] = None
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
except ValueError as error:
    print("refused", "revffn_qwen2_moe" in str(error))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout.split()[-2:] == ["refused", "True"], found.stderr


# --- copies ----------------------------------------------------------------------------------------------------------


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_whole(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled, saved_whole], ids=["deepcopy", "pickle", "torch.save"])
def test_copies_train_alike(make_copy, coupling):
    """Also after a step, when the report holds measurements, and with router logits, which transformers records by
    module."""
    model, inputs = coupled(**COUPLINGS[coupling]), tiny_batch()
    run(model, inputs)
    other = make_copy(model)
    (loss, grads), (other_loss, other_grads) = run(model, inputs), run(other, inputs)
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}
    other.eval()
    assert len(other(**inputs, output_router_logits=True).router_logits) == 3
    assert len(other(**inputs, output_hidden_states=True).hidden_states) == 5


def test_stream_maps_follow_the_model(tmp_path):
    """Into a copy, through a file, and into another dtype."""
    model = with_random_couplings(coupled(coupling="cross_branch", query_stream="right", stream_maps=True))
    inputs = tiny_batch()
    names = [name for name, _ in revffn.coupling_parameters(model)]
    assert [name for name in names if "layers" not in name] == [
        "model.coupling.entry.weight",
        "model.coupling.exit.weight",
    ]
    model.save_pretrained(tmp_path)
    for other in (copy.deepcopy(model), AutoModelForCausalLM.from_pretrained(tmp_path).train()):
        maps = other.model.coupling
        assert maps is other.model.layers[0].stream_maps is other.model.norm.stream_maps is not model.model.coupling
        torch.manual_seed(5)
        expected = model(**inputs).loss
        torch.manual_seed(5)
        assert other(**inputs).loss == expected
    assert copy.deepcopy(model).bfloat16().model.norm.stream_maps.exit.weight.dtype == torch.bfloat16


# --- nearer to the plain model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [[dict(side_bits=m, grid_growth=0) for m in range(5)], [dict(side_bits=0, grid_growth=g) for g in (0, 4, 8, 12)]],
    ids=["side_bits", "grid_growth"],
)
def test_a_smaller_gain_is_nearer_to_the_plain_model(settings):
    """Also where no bit is kept for it."""
    inputs = tiny_batch()
    with torch.no_grad():
        plain = tiny_model().eval()(**inputs).logits
        distances = []
        for s in settings:
            model = coupled(**s)
            torch.manual_seed(5)
            distances.append((model(**inputs).logits - plain).norm().item())
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.3 * distances[0]


# --- without weights -------------------------------------------------------------------------------------------------


QWEN15 = dict()  # the defaults of Qwen2MoeConfig
QWEN3 = dict(
    num_hidden_layers=48, hidden_size=2048, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151_936, intermediate_size=6144,
)  # fmt: skip
BIG = {
    "Qwen1.5-MoE-A2.7B": (Qwen2MoeConfig, QWEN15, 14_315_784_192),
    "Qwen3-30B-A3B": (Qwen3MoeConfig, QWEN3, 30_532_122_624),
}


@pytest.mark.parametrize("coupling", ["innovation", "cross_left", "none"])
@pytest.mark.parametrize("place", ["meta", "fake"])
@pytest.mark.parametrize("name", BIG)
def test_full_size(name, place, coupling):
    config_class, values, num_parameters = BIG[name]
    settings = {"innovation": dict(), "cross_left": dict(coupling="cross_branch"), "none": dict(coupling="none")}[
        coupling
    ]
    started = time.monotonic()
    with torch.device("meta") if place == "meta" else FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config_class(**values), dtype=torch.bfloat16)
        assert sum(p.numel() for p in model.parameters()) == num_parameters
        # Conversion outside a torch.device block must find the place by itself.
    with FakeTensorMode(allow_non_fake_inputs=True) if place == "fake" else torch.device("cpu"):
        revffn.convert(model, revffn.ReversibleConfig.from_dict(settings))
    added = revffn.coupling_parameters(model)
    D, L = model.config.hidden_size, model.config.num_hidden_layers
    expected = {"innovation": (L - 1) * (D * D + D), "cross_left": L * 5 * D * D // 2, "none": 0}[coupling]
    assert sum(p.numel() for _, p in added) == expected
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    if place == "meta":
        assert {p.device.type for p in model.parameters()} == {"meta"}
    if coupling != "cross_left":
        assert sum(p.numel() for p in revffn.export(model).parameters()) == num_parameters
    assert time.monotonic() - started < 20


def test_meta_model_can_be_filled(tmp_path):
    """convert on meta, then load a state dict: the way large models are built."""
    model = coupled()
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_model().config, dtype=torch.float32)
    revffn.convert(empty, model.reversible_config)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert isinstance(empty.model.layers[1].coupling.predictor.up.weight, nn.Parameter)
    assert_same_weights(empty, model)


OF_BEFORE = dict(
    coupling="cross_branch", side_bits=[1, 2], random_sign=True, plain_layers=2, predictor_rank=5,
    train_predictor=True, query_stream="right", stream_maps=True, num_iterations=9, fraction_bits=11, grid_growth=3,
    wide_channels=[4], wide_growth=2, offload_inputs=True, tile_tokens=64, verify="report", eval_coupled=False,
    max_drift=0.05, anchor_layers=[1],
)  # fmt: skip
"""Every setting that a config.json has had, when none was in a group."""


def test_settings_of_before_are_read():
    """Into their groups; those that are gone are left out; an unknown one is refused wherever it stands."""
    config = ReversibleConfig.from_dict(OF_BEFORE)
    assert config == ReversibleConfig(
        coupling="cross_branch",
        side_bits=[1, 2],
        offload_inputs=True,
        tile_tokens=64,
        verify="report",
        cross_branch=CrossBranchConfig(query_stream="right", stream_maps=True, num_iterations=9),
        innovation=InnovationConfig(random_sign=True, plain_layers=2, predictor_rank=5, train_predictor=True),
        grids=Grids(fraction_bits=11, grid_growth=3, wide_channels=[4], wide_growth=2),
    )
    assert ReversibleConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="Unknown reversible settings \\['drift', 'grids.drift'\\]"):
        ReversibleConfig.from_dict(OF_BEFORE | {"drift": 1, "grids": {"drift": 1}})


def test_names_of_before_are_accepted_with_a_word():
    with pytest.warns(FutureWarning, match=r"Write cross_branch=CrossBranchConfig\(query_stream='right'\)"):
        config = ReversibleConfig(coupling="cross_branch", query_stream="right")
    assert config == ReversibleConfig(coupling="cross_branch", cross_branch=CrossBranchConfig(query_stream="right"))
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match="num_iterations must be at least 1"):
        ReversibleConfig(num_iterations=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'query'"):
        ReversibleConfig(query="right")


def test_a_model_of_before_computes_what_it_did(tmp_path):
    """Saved with settings that stood in no group."""
    model = with_random_couplings(coupled(calibrate=False, predictor_rank=5, fraction_bits=8, side_bits=1))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    groups = [config["revffn"].pop(name) for name in ("cross_branch", "innovation", "grids")]
    config["revffn"] |= {name: value for group in groups for name, value in group.items()} | {"eval_coupled": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    older = aligned(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train())
    assert older.reversible_config == model.reversible_config and older.config.revffn == model.config.revffn
    assert torch.equal(run(older, tiny_batch())[0], run(model, tiny_batch())[0])
