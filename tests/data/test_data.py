"""Reading, checking, splitting and tokenizing conversations; every bad record is named with its line.

Run: pytest tests/data/test_data.py
"""

import csv
import gzip
import json

import pytest
import torch

from revffn.data import IGNORED, batches, find_file, load_conversations, tokenize, tokenize_all
from revffn.recipe import DataConfig, InputError

RECORD = {"instruction": "Add.", "context": "1 and 2", "response": "3"}
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
GSM8K = {"question": "Add.", "context": "1 and 2", "answer": "3"}
MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
    ]
}
EXPECTED = {
    "prompt": [{"role": "user", "content": "Add.\n\n1 and 2"}],
    "completion": [{"role": "assistant", "content": "3"}],
}


def load(path, **settings):
    return load_conversations(DataConfig(path=str(path), **{"heldout": 0, **settings}))


def test_the_shipped_data_set_is_the_default_and_complete():
    training, heldout = load_conversations(DataConfig())
    assert len(training) + len(heldout) == 15011 and len(heldout) == DataConfig().heldout


@pytest.mark.parametrize("record", [RECORD, ALPACA, GSM8K], ids=["dolly", "alpaca", "gsm8k"])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv"])
def test_every_layout_in_every_kind_of_file(tmp_path, kind, record):
    file = tmp_path / f"data.{kind}"
    if kind == "csv":
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, record)
            writer.writeheader()
            writer.writerow(record)
    elif kind == "json":
        file.write_text(json.dumps([record], indent=1))
    else:
        text = json.dumps(record).encode() + b"\n"
        file.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    assert load(file)[0] == [EXPECTED]


def test_messages_are_split_before_the_last_answer(data_file):
    (example,), _ = load(data_file([MESSAGES]))
    assert [m["role"] for m in example["prompt"]] == ["system", "user"]
    assert example["completion"] == [{"role": "assistant", "content": "Hi"}]


def test_the_split_is_seeded_disjoint_and_the_same_for_every_subset(data_file):
    file = data_file()
    training, heldout = load(file, heldout=8)
    assert len(training) == 56 and not [example for example in heldout if example in training]
    smaller, same = load(file, heldout=8, num_examples=10)
    assert same == heldout and smaller == training[:10]
    assert load(file, heldout=8, seed=1)[1] != heldout


BAD = {
    "missing columns": (
        [RECORD, {"question": "a", "reply": "b"}],
        "line 2: missing columns. Found: question, reply",
    ),
    "empty": ([], "no records"),
    "broken JSON": ([RECORD, '{"instruction": "a", "resp'], "line 2: broken JSON"),
    "not an object": ([RECORD, "[1, 2]"], "line 2: missing columns"),
    "empty response": ([RECORD, RECORD | {"response": " "}], "line 2: response must be a text"),
    "not a text": ([RECORD | {"response": 3}], "line 1: response must be a text"),
    "no last answer": ([{"messages": MESSAGES["messages"][:2]}], "line 1: messages must be"),
    "messages of another shape": ([{"messages": [{"from": "human", "value": "x"}]}], "line 1: messages must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_named_with_file_and_line(data_file, name):
    records, message = BAD[name]
    file = data_file(records)
    with pytest.raises(InputError) as error:
        load(file)
    assert message in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def test_other_bad_files(tmp_path, data_file):
    for name, content, message in [
        ("data.txt", b"hello", "Accepted: .jsonl"),
        ("data.jsonl.gz", b"not gzip", "cannot be read"),
        ("data.jsonl", b"\xff\xfe\x00", "cannot be read"),
        ("data.json", b'{"instruction": "a"}', "one list of records"),
        ("data.json", b'[{"a": 1},\n {"b" 2}]', "line 2: broken JSON"),
        ("data.csv", b'instruction,response\na,"b', "broken CSV"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            load(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "nothing.jsonl")
    with pytest.raises(InputError, match="1 records, but 5 are needed"):
        load(data_file([RECORD]), heldout=4)


def test_a_hub_name_without_network_is_one_clear_line():
    with pytest.raises(InputError, match="neither a file here nor a data set") as error:
        load("someone/something")
    assert "\n" not in str(error.value)


def test_data_beside_the_recipe_is_found(data_file, tmp_path):
    file = data_file()
    assert find_file(file.name, tmp_path / "recipe.yaml") == file.resolve()


def test_labels_cover_the_response_and_its_end_only(tokenizer):
    example = {
        "prompt": [{"role": "user", "content": "Say red 2 times."}],
        "completion": [{"role": "assistant", "content": "red red"}],
    }
    row = tokenize(example, tokenizer, 100)
    answer = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert tokenizer.decode(answer) == "red red<|im_end|>\n"
    assert tokenizer.decode(row["input_ids"]).startswith(
        "<|im_start|>user\nSay red 2 times.<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt_length = row["labels"].count(IGNORED)
    assert len(tokenize(example, tokenizer, prompt_length + 1)["input_ids"]) == prompt_length + 1
    assert tokenize_all([example], tokenizer, prompt_length) == []


def test_trl_would_make_the_same_labels(tokenizer, tmp_path, data_file):
    from datasets import Dataset
    from helpers import tiny_model
    from trl import SFTConfig, SFTTrainer

    examples, _ = load(data_file(), num_examples=8)
    args = SFTConfig(output_dir=str(tmp_path), bf16=False, max_length=24, report_to="none")
    theirs = SFTTrainer(
        tiny_model(vocab_size=len(tokenizer)),
        args,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
    ).train_dataset
    ours = tokenize_all(examples, tokenizer, 24)
    assert [(row["input_ids"], row["labels"]) for row in theirs] == [(row["input_ids"], row["labels"]) for row in ours]


def test_batches_pad_at_the_end():
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    (batch,) = batches(rows, 4, 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert all(t.dtype == torch.int64 for t in batch.values())
    assert [b["input_ids"].shape[0] for b in batches(rows * 3, 4, 0)] == [4, 2]
