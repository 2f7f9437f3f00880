"""Plain model -> reversible model -> plain model: weights, configuration, logits, files; refusals change nothing;
full size without weights."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import subprocess
import sys
import time

import pytest
import torch
from helpers import SETTINGS, coupled, run, tiny_batch, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2MoeConfig, Qwen3MoeConfig

import revffn
from revffn import ReversibleConfig
from revffn.architectures import ARCHITECTURES, router_parameters
from revffn.calibration import EXIT_RIDGE, RIDGE, choose_grids
from revffn.config import GRID_SETTINGS
from revffn.recipe import RunReversibleConfig

COUPLINGS = {
    "innovation": dict(coupling="innovation", side_bits=[0, 1, 3, 2], predictor_rank=5),
    "cross_left": dict(coupling="cross_branch", anchor_layers=[0, 1, 2, 3]),
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
    converted = revffn.convert(model, revffn.ReversibleConfig(**COUPLINGS[coupling]))
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
    model = revffn.convert(tiny_model(), revffn.ReversibleConfig(train_predictor=True))
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


def snapshot(model):
    return (
        type(model),
        type(model.config),
        model.config.to_json_string(),
        [type(module) for module in model.modules()],
        [(name, id(p)) for name, p in model.named_parameters()],
        list(model.state_dict()),
        model.training,
    )


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
        (lambda: tiny_model(), dict(coupling="cross_branch", anchor_layers=[7]), "anchor_layers"),
        (lambda: tiny_model(), dict(grid_growth=2, wide_channels=[3, 32]), r"wide_channels \[32\].*32 channels"),
    ],
    ids=["unknown", "side bits", "plain layers", "odd", "anchor", "wide channels"],
)  # fmt: skip
def test_refused_before_anything_changes(make, settings, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        revffn.convert(model, revffn.ReversibleConfig(**settings), calibration=CALIBRATION)
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


@pytest.mark.parametrize(
    "batches, message",
    [
        ([], "no token"),
        ([dict.fromkeys(("input_ids", "attention_mask"), torch.zeros(1, 4, dtype=torch.long))], "no token"),
    ],
    ids=["empty", "all padding"],
)  # fmt: skip
@pytest.mark.parametrize("coupling", ["innovation", "cross_branch"])
def test_useless_calibration_is_refused(batches, message, coupling):
    model = tiny_model().train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        revffn.convert(model, ReversibleConfig(coupling=coupling, stream_maps=True), calibration=batches)
    assert snapshot(model) == before


@pytest.mark.parametrize("coupling", ["innovation", "cross_branch"])
def test_calibration_that_is_not_finite_is_refused(coupling):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.shared_expert.down_proj.weight[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match="not finite"):
        revffn.convert(model, ReversibleConfig(coupling=coupling, stream_maps=True), calibration=CALIBRATION)
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
    assert {name: getattr(loaded.reversible_config, name) for name in GRID_SETTINGS} == grids
    inputs = tiny_batch()
    (loss, grads), (loaded_loss, loaded_grads) = run(model, inputs), run(loaded, inputs)
    assert torch.equal(loss, loaded_loss)
    assert all(torch.equal(grads[name], loaded_grads[name]) for name in grads)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("grid_growth", "wide_growth", "wide_channels"):
        del config["revffn"][name]
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


# --- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "gpt_oss", "llama"])
def test_calibration_measures_the_plain_model(model_type):
    original = tiny_model(model_type).eval()
    with torch.no_grad():
        states = [
            s
            for b in CALIBRATION
            for s in original.model(b["input_ids"], b.get("attention_mask"), output_hidden_states=True).hidden_states[
                :-1
            ]
        ]
    largest = max(s.abs().max().item() for s in states)
    model = revffn.convert(tiny_model(model_type), calibration=CALIBRATION)
    found = model.config.revffn_calibration
    assert found["num_tokens"] == sum(int(b.get("attention_mask", b["input_ids"] * 0 + 1).sum()) for b in CALIBRATION)
    assert found["largest_hidden_state"] >= largest * 0.999
    assert sorted(found["explained"], key=int) == ["1", "2", "3"]
    assert all(0 <= share <= 1 for share in found["explained"].values())
    # The first grid rounds by about one per cent of what is typical of the smallest state, over tokens that count.
    padded = [b.get("attention_mask", b["input_ids"] * 0 + 1).bool().reshape(-1) for b in CALIBRATION]
    with torch.no_grad():
        runs = [
            original.model(b["input_ids"], b.get("attention_mask"), output_hidden_states=True).hidden_states[:-1]
            for b in CALIBRATION
        ]
    smallest = min(
        torch.cat([s.flatten(0, 1)[mask] for s, mask in zip(state, padded, strict=True)]).square().mean(0).median()
        for state in zip(*runs, strict=True)
    )
    settings = model.reversible_config
    assert settings.fraction_bits == 5 + math.ceil(-math.log2(math.sqrt(smallest)))
    assert settings.fraction_bits + settings.grid_growth == 24  # the values are small: as fine as float32


def test_calibration_chooses_the_grids():
    """Eight times the largest value fits, in wide channels four times; the digits to spare are all taken."""
    largest = torch.tensor([60.0] * 90 + [250.0] * 6 + [26_000.0] * 4, dtype=torch.float64)
    found = ReversibleConfig(**choose_grids(ReversibleConfig(), largest, typical=0.1))
    assert found.wide_channels == list(range(90, 100)) and found.fraction_bits == 9
    assert found.fraction_bits + found.grid_growth == 31 - 3 - 6
    assert found.fraction_bits + found.wide_growth == 31 - 2 - 15
    assert [found.fraction_bits_of(k, 26) for k in (0, 1, 2, 13, 26)] == [9, 9, 10, 15, 22]
    few = ReversibleConfig(**choose_grids(ReversibleConfig(grid_growth=6), largest, typical=0.1))
    assert (few.grid_growth, few.wide_channels, few.wide_growth) == (6, [96, 97, 98, 99], 31 - 2 - 15 - 9)
    large = ReversibleConfig(**choose_grids(ReversibleConfig(), torch.full((4,), 2.0**13), typical=100.0))
    assert (large.fraction_bits, large.grid_growth, large.wide_channels) == (0, 31 - 3 - 13, [])
    for config in (ReversibleConfig(grid_growth=0), ReversibleConfig(coupling="cross_branch")):
        none = ReversibleConfig(**choose_grids(config, largest, typical=0.1))
        assert (none.fraction_bits, none.grid_growth, none.wide_channels) == (31 - 2 - 15, 0, [])


@pytest.mark.parametrize(
    "settings", [dict(grid_growth=-1), dict(grid_growth=17), dict(wide_growth=1), dict(grid_growth=2, wide_growth=3)]
)
def test_grids_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError, match="grid_growth"):
        ReversibleConfig(**settings)


def test_without_calibration_the_grid_stays_as_it_is():
    model = revffn.convert(tiny_model())
    assert (model.reversible_config.fraction_bits, model.reversible_config.grid_growth) == (14, 0)


def test_calibration_leaves_mode_hooks_and_gradients_alone():
    model = tiny_model().train()
    revffn.convert(model, calibration=CALIBRATION)
    assert model.training
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("settings", [dict(), dict(coupling="cross_branch", stream_maps=True)], ids=str)
def test_padding_does_not_enter_the_fit(settings):
    padded = tiny_batch(4, 13, seed=8, padded=True)
    other = {**padded, "input_ids": padded["input_ids"].clone()}
    other["input_ids"][padded["attention_mask"] == 0] = 77
    config = ReversibleConfig(**settings)
    one, two = (revffn.convert(tiny_model(), config, calibration=[batch]) for batch in (padded, other))
    for (name, a), (_, b) in zip(revffn.coupling_parameters(one), revffn.coupling_parameters(two), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def explained(rank: int | None) -> list[float]:
    config = revffn.ReversibleConfig(predictor_rank=rank)
    calibration = [tiny_batch(8, 40, seed=seed) for seed in range(3)]
    model = revffn.convert(tiny_model(), config, calibration=calibration)
    return list(model.config.revffn_calibration["explained"].values())


def test_higher_rank_explains_more():
    shares = [explained(rank) for rank in (1, 4, 12, 32, None)]
    for lower, higher in zip(shares, shares[1:], strict=False):
        assert all(a <= b + 1e-3 for a, b in zip(lower, higher, strict=True))
    assert all(a < b - 0.05 for a, b in zip(shares[0], shares[-1], strict=True))
    assert shares[-2] == pytest.approx(shares[-1], abs=1e-3)


def test_fit_is_the_ridge_regression():
    """Against `lstsq` on the same states, with a row for the ridge of each standardised channel."""
    batches = [tiny_batch(8, 40, seed=seed) for seed in range(3)]
    model = tiny_model().double().eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        per_batch = [model.model(b["input_ids"], output_hidden_states=True).hidden_states for b in batches]
    x, past = (torch.cat([states[k].reshape(-1, 32) for states in per_batch]) for k in (2, 1))
    update = past - x
    centred = x - x.mean(0)
    penalty = torch.diag(centred.std(0, correction=0)) * (RIDGE * len(x)) ** 0.5
    rows = torch.cat([centred, penalty])
    solution = torch.linalg.lstsq(rows, torch.cat([update - update.mean(0), torch.zeros_like(penalty)])).solution
    expected = centred @ solution + update.mean(0)
    revffn.convert(model, calibration=batches)
    predictor = model.model.layers[2].coupling.predictor
    with torch.no_grad():
        assert torch.allclose(predictor(x), expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    explained = 1 - (update - expected).square().sum() / update.square().sum()
    assert model.config.revffn_calibration["explained"]["2"] == pytest.approx(explained.item(), abs=1e-3)


def test_fitted_predictors_bring_the_coupled_model_nearer_to_the_plain_one():
    inputs = tiny_batch(8, 40, seed=11)
    calibration = [tiny_batch(8, 40, seed=seed) for seed in range(6)]
    with torch.no_grad():
        plain = tiny_model().eval()(**inputs).logits
        distances = []
        for settings, batches in ((dict(), calibration), (dict(predictor_rank=0), None)):
            model = revffn.convert(tiny_model(), revffn.ReversibleConfig(**settings), calibration=batches).train()
            torch.manual_seed(5)
            distances.append((model(**inputs).logits - plain).norm().item())
    assert distances[0] < 0.8 * distances[1]


# --- cross_branch's adapters and maps --------------------------------------------------------------------------------

FITTED = {stream: dict(coupling="cross_branch", query_stream=stream, stream_maps=True) for stream in ("left", "right")}


@pytest.mark.parametrize("query_stream", FITTED)
def test_fitted_adapters_bring_cross_branch_nearer_to_the_plain_model(query_stream):
    inputs = tiny_batch(8, 40, seed=11)
    batches = [tiny_batch(8, 40, seed=seed) for seed in range(6)]
    with torch.no_grad():
        plain = tiny_model().eval()(**inputs).logits.log_softmax(-1)
        divergences = []
        for stream_maps in (True, False):
            config = ReversibleConfig(**{**FITTED[query_stream], "stream_maps": stream_maps})
            model = revffn.convert(tiny_model(), config, calibration=batches).eval()
            found = model(**inputs).logits.log_softmax(-1)
            divergences.append(nn.functional.kl_div(found, plain, log_target=True, reduction="sum").item())
    assert divergences[0] < 0.8 * divergences[1], divergences


def weighted_ridge(x, y, state, ridge: float):
    """Against `lstsq`: rows weighted by 1 / the root mean square of the state, and a row for the ridge of each channel
    of x."""
    weight = state.square().mean(1, keepdim=True).rsqrt()
    penalty = torch.diag((weight * x).square().sum(0).sqrt()) * ridge**0.5
    rows, target = torch.cat([weight * x, penalty]), torch.cat([weight * y, x.new_zeros(x.shape[1], y.shape[1])])
    return torch.linalg.lstsq(rows, target).solution.T


@pytest.mark.parametrize("query_stream", FITTED)
def test_adapters_are_the_ridge_regressions_on_the_models_own_streams(query_stream):
    """In front of, behind and after every sublayer, from what hooks see in the model that came out."""
    batches = [tiny_batch(8, 40, seed=seed) for seed in range(3)]

    def seen(model) -> dict[str, torch.Tensor]:
        found: dict[str, list] = {}
        hooks = [
            module.register_forward_hook(
                lambda _, args, output, name=name: found.setdefault(name, []).append((args[0], output))
            )
            for name, module in model.model.named_modules()
            if name.endswith(("layernorm", "embed_tokens", "_up", "_down", "entry", "exit")) or name == "norm"
        ]
        with torch.no_grad():
            for batch in batches:
                model(batch["input_ids"])
        for hook in hooks:
            hook.remove()
        return {
            f"{name} {side}": torch.cat([pair[i].reshape(-1, pair[i].shape[-1]) for pair in pairs])
            for name, pairs in found.items()
            for i, side in enumerate(("in", "out"))
            if pairs[0][i].is_floating_point()
        }

    model = tiny_model().double().eval()
    model.set_experts_implementation("eager")
    plain = seen(model)
    revffn.convert(model, ReversibleConfig(**FITTED[query_stream]), calibration=batches)
    ours, layers = seen(model), model.model.layers
    code = model.model.coupling.entry.weight[:16]
    assert torch.equal(code, model.model.coupling.entry.weight[16:])

    def check(module, x, y, state, ridge=RIDGE):
        expected = weighted_ridge(x, y, state, ridge)
        torch.testing.assert_close(module.weight.detach(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())

    for k, layer in enumerate(layers):
        adapters, name = layer.coupling, f"layers.{k}."
        before, middle = plain[name + "input_layernorm in"], plain[name + "post_attention_layernorm in"]
        after = plain[f"layers.{k + 1}.input_layernorm in" if k + 1 < len(layers) else "norm in"]
        read = {part: ours[f"{name}coupling.{part} in"] for part in ("query_up", "key_value_up", "feed_up")}
        for part in ("query_up", "key_value_up"):
            check(getattr(adapters, part), read[part], before, before)
        left = read["feed_up"] - ours[name + "coupling.attention_down out"]
        if query_stream == "left":
            torch.testing.assert_close(left, read["query_up"])
        check(adapters.attention_down, ours[name + "coupling.attention_down in"], middle @ code.T - left, before)
        check(adapters.feed_up, read["feed_up"], middle, middle)
        lacking = after @ code.T - read["key_value_up"]
        check(adapters.feed_down, ours[name + "coupling.feed_down in"], lacking, middle)
    check(model.model.coupling.exit, ours["coupling.exit in"], after, after, EXIT_RIDGE)


def test_the_streams_carry_the_principal_components_of_what_is_read():
    """The code's rows span the directions with the most energy behind norm and norm weights."""
    batches = [tiny_batch(8, 40, seed=seed) for seed in range(3)]
    model = tiny_model().double().eval()
    model.set_experts_implementation("eager")
    norms = [norm for layer in model.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    scale = torch.stack([norm.weight for norm in norms]).square().mean(0).sqrt().detach()
    with torch.no_grad():
        states = [model.model(b["input_ids"], output_hidden_states=True).hidden_states for b in batches]
        last = []
        hook = model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
        for batch in batches:
            model.model(batch["input_ids"])
        hook.remove()
    rows = torch.cat([s.reshape(-1, 32) for found in states for s in found[1:-1]] + [s.reshape(-1, 32) for s in last])
    rows = nn.functional.normalize(rows * scale, dim=1)
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    revffn.convert(model, ReversibleConfig(**FITTED["right"]), calibration=batches)
    code = model.model.coupling.entry.weight[:16].detach() / scale
    basis = torch.linalg.qr(code.T).Q
    torch.testing.assert_close(basis @ basis.T, directions[:16].T @ directions[:16], rtol=0, atol=1e-6)
    rows *= 32**0.5  # a mean square of 1
    torch.testing.assert_close((rows @ code.T).square().mean(0), torch.ones(16, dtype=torch.float64))


def test_stream_maps_come_with_calibration_and_queries_from_the_right():
    for stream, calibration, expected in (
        ("right", CALIBRATION, True),
        ("right", None, False),
        ("left", CALIBRATION, False),
    ):
        config = ReversibleConfig(coupling="cross_branch", query_stream=stream)
        model = revffn.convert(tiny_model(), config, calibration=calibration)
        assert model.reversible_config.stream_maps is expected is hasattr(model.model, "coupling")
        run_config = RunReversibleConfig(coupling="cross_branch", query_stream=stream)
        assert run_config.resolve(calibration is not None).stream_maps is expected


def test_stream_maps_without_calibration_are_the_identity():
    inputs = tiny_batch()
    losses = [
        revffn.convert(tiny_model(), ReversibleConfig(coupling="cross_branch", stream_maps=maps)).eval()(**inputs).loss
        for maps in (None, True)
    ]
    assert losses[0] == losses[1]


def test_stream_maps_follow_the_model(tmp_path):
    """Into a copy, through a file, and into another dtype."""
    model = with_random_couplings(coupled(**FITTED["right"]))
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
        revffn.convert(model, revffn.ReversibleConfig(**settings))
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
