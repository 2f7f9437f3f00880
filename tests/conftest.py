"""For all tests: a fixed seed each, one thread, no network, a folder with a tiny model to train, refused commands."""

import json
import os

# Before anything imports the Hub's client.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
# Some virtual machines announce AMX and then refuse it: oneDNN's bf16 products die there with an illegal instruction.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
# What a test measures is measured, whatever an earlier one, or its user, has kept.
os.environ["REVFFN_CACHE"] = os.devnull

import pytest
import torch

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Question and answer hang together, so that a tiny model can learn something.
RECORDS = [
    {"instruction": f"Say {word} {n} times.", "context": "", "response": " ".join([word] * n), "category": "open_qa"}
    for word in ("red", "green", "blue", "one", "two", "tree", "house", "river")
    for n in range(1, 9)
]


def pytest_configure(config):
    # The models are tiny: more threads only wait for each other, most of all on a busy machine.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; runs wherever there is one"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    """A small byte-level BPE with a chat template, trained here on a few lines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([f"user {r['instruction']} assistant {r['response']}" for r in RECORDS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """`model_folder(model_type)`: a folder with a tiny random model and the tokenizer."""
    from helpers import tiny_model

    folders = {}

    def make(model_type: str = "qwen2_moe"):
        if model_type not in folders:
            folders[model_type] = folder = tmp_path_factory.mktemp(model_type)
            special = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=2)
            tiny_model(model_type, **special).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folders[model_type]

    return make


@pytest.fixture
def data_file(tmp_path):
    """`data_file(records, name)`: a file of JSON lines; strings are written as they are."""

    def write(records=RECORDS, name="data.jsonl"):
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        (tmp_path / name).write_text("\n".join(lines) + "\n" if lines else "")
        return tmp_path / name

    return write


@pytest.fixture
def recipe_file(tmp_path, model_folder, data_file):
    """`recipe_file(text)`: a recipe for a run of a few steps, with `text` after it."""

    def write(text: str = "", model_type: str = "qwen2_moe"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model:\n  path: {model_folder(model_type)}\n  dtype: float32\n"
            f"data:\n  path: {data_file()}\n  heldout: 8\n  max_length: 64\n"
            f"training:\n  output_dir: {tmp_path / 'run'}\n  num_steps: 3\n  batch_size: 4\n{text}"
        )
        return recipe

    return write


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """`refused(words)`: the line that `revffn` refuses `words` with."""

    from revffn.__main__ import main

    def check(*words):
        monkeypatch.chdir(tmp_path)
        before = tree(tmp_path)
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        captured = capsys.readouterr()
        assert tree(tmp_path) == before
        assert captured.err.count("\n") == 1 and captured.err.startswith("revffn")
        assert "Traceback" not in captured.err
        return captured.err

    return check
