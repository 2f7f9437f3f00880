"""Models whose files are not what their config says are refused in one line that names the tensor, before anything is
trained or written.

Run: pytest tests/models/test_loading.py
"""

import json

import pytest
import torch
from helpers import coupled, tiny_model
from safetensors.torch import load_file, save_file

import revffn
from revffn.models.loading import load_causal_lm
from revffn.recipe import InputError

QUERY, NORM, EXPERT = (
    "model.layers.1.self_attn.q_proj.weight",
    "model.norm.weight",
    "model.layers.0.mlp.experts.2.down_proj.weight",
)


def without(name):
    return lambda weights: weights.pop(name)


def with_value(name, place, value):
    def change(weights):
        weights[name].view(-1)[place] = value

    return change


BAD = {
    "missing": (without(QUERY), f"missing: {QUERY}"),
    "an expert is missing": (without(EXPERT), r"model\.layers\.0\.mlp\.experts\.down_proj"),
    "missing in number": (
        lambda weights: [weights.pop(name) for name in list(weights) if "q_proj" in name],
        r"missing: .*q_proj.* and \d+ more",
    ),
    "unexpected": (lambda weights: weights.update(extra=torch.zeros(3)), "not known to the model: extra"),
    "twice": (
        lambda weights: weights.update({NORM.removeprefix("model."): torch.zeros(32)}),
        "there twice, under two names or in two files: norm.weight",
    ),
    "another shape": (
        lambda weights: weights.update({NORM: torch.zeros(3)}),
        r"another shape .*: model\.norm\.weight \(\(3,\) in place of \(32,\)\)",
    ),
    "NaN": (with_value(NORM, 5, float("nan")), "not finite: model.norm.weight"),
    "infinite": (with_value(QUERY, 3, float("-inf")), f"not finite: {QUERY}"),
    "NaN in an expert": (
        with_value(EXPERT, 0, float("nan")),
        r"not finite: model\.layers\.0\.mlp\.experts\.down_proj",
    ),
}


@pytest.mark.parametrize("make", [tiny_model, coupled], ids=["plain", "reversible"])
@pytest.mark.parametrize("name", BAD)
def test_bad_weights_are_refused_by_name(name, make, tmp_path, capfd):
    change, message = BAD[name]
    make().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    capfd.readouterr()
    with pytest.raises(InputError, match=message) as error:
        load_causal_lm(tmp_path, torch.float32)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert "REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("what", ["cut", "text", "nothing"])
def test_broken_files_are_refused(what, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = {"cut": file.read_bytes()[:-100], "text": b"no weights", "nothing": b""}[what]
    file.write_bytes(content)
    with pytest.raises(InputError, match="the model cannot be loaded") as error:
        load_causal_lm(tmp_path, torch.float32)
    assert "\n" not in str(error.value)


def test_the_file_of_a_tensor_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    weights = load_file(tmp_path / index[NORM])
    weights[NORM][0] = float("nan")
    save_file(weights, tmp_path / index[NORM], metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"not finite: {NORM} in {index[NORM]}"):
        load_causal_lm(tmp_path, torch.float32)


@pytest.mark.parametrize("make", [tiny_model, coupled], ids=["plain", "reversible"])
def test_good_weights_are_loaded(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path, torch.float32)
    assert revffn.is_reversible(loaded) == revffn.is_reversible(model)
    for (name, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_with_bad_weights_or_code_writes_nothing(recipe_file, refused, model_folder, tmp_path):
    """`refused` looks at the exit status, the one line, and that there is no run."""
    import shutil

    folder = tmp_path / "bad"
    shutil.copytree(model_folder(), folder)
    weights = load_file(folder / "model.safetensors")
    weights[NORM][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"not finite: {NORM}" in refused("train", recipe_file(), "--model.path", folder)
    config = json.loads((folder / "config.json").read_text())
    odd = {
        "num_hidden_layers": (10**9, "config.json has num_hidden_layers=1000000000. Accepted: to 10000"),
        "num_attention_heads": (0, "no model can be made as config.json says (ZeroDivisionError"),
        "num_key_value_heads": (-1, "no model can be made as config.json says (RuntimeError: Trying to create tensor"),
    }
    for name, (value, message) in odd.items():
        (folder / "config.json").write_text(json.dumps(config | {name: value}))
        assert message in refused("train", recipe_file(), "--model.path", folder)
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    assert "tokens, the model's embedding 100" in refused("train", recipe_file(), "--model.path", folder)
    code = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(code))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\nclass Model: pass\n")
    assert "trust_remote_code" in refused("train", recipe_file(), "--model.path", folder)
    assert not (tmp_path / "ran").exists()
