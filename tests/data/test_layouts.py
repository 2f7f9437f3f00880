"""The columns alone say what an example is; what TRL takes becomes the tokens and labels that TRL makes of it.

Run: pytest tests/data/test_layouts.py
"""

import copy
import json
import random
import re
import shutil
from pathlib import Path

import pytest
from conftest import CHAT_TEMPLATE
from datasets import Dataset
from helpers import tiny_model
from test_records import mutated
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from revffn.command_line import load_run_config
from revffn.data import IGNORED, Example, load_conversations, tokenize, tokenize_all, tokenize_and_count
from revffn.data.conversations import ACCEPTED, LAYOUTS, conversation
from revffn.recipe import DataConfig, InputError
from revffn.training.preflight import check

QUESTION, ANSWER = {"role": "user", "content": "Say red."}, {"role": "assistant", "content": "red"}
CALL = {"name": "add", "arguments": {"a": 1}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
MARKED = (
    "{% if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>\n{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Marks what the assistant generates, with what ends it."""

RECORDS = {
    "messages": {"messages": [QUESTION, ANSWER], "tools": [TOOL]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Say red."}, {"from": "gpt", "value": "red"}]},
    "prompt_completion": {"prompt": [QUESTION], "completion": [ANSWER], "tools": json.dumps([TOOL])},
    "dolly": {"instruction": "Say red.", "context": "", "response": "red", "category": "open_qa", "text": "a"},
    "alpaca": {"instruction": "Say red.", "input": "", "output": "red", "text": "Below is an instruction"},
    "question_answer": {"question": "Say red.", "answer": "red"},
    "text": {"text": "red red", "source": "a book"},
}


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS])
def test_the_columns_alone_say_what_a_record_is(layout):
    found = conversation(RECORDS[layout], "line 1")
    assert found.layout == layout
    if layout == "text":
        assert found == {"text": "red red"}
    else:
        tools = {"tools": [TOOL]} if "tools" in RECORDS[layout] else {}
        assert found == {"prompt": [QUESTION], "completion": [ANSWER]} | tools


def test_the_documents_list_the_layouts_in_their_order():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.MULTILINE)
    assert rows == [(layout.name, re.sub(r"\b(?!and\b)(\w+)", r"`\1`", str(layout))) for layout in LAYOUTS]


def test_sharegpt_has_calls_a_system_column_and_its_own_names():
    turns = [("human", "1+2?"), ("function_call", json.dumps(CALL)), ("observation", "3"), ("gpt", "3")]
    turns = [{"from": speaker, "value": text} for speaker, text in turns]
    record = {"conversations": turns, "system": "Add.", "tools": json.dumps([TOOL])}
    found = conversation(record, "line 1")
    assert [message["role"] for message in found["prompt"]] == ["system", "user", "assistant", "tool"]
    assert found["prompt"][2]["tool_calls"] == [{"type": "function", "function": CALL}] and found["tools"] == [TOOL]
    assert conversation({"conversations": [QUESTION, ANSWER]}, "line 1") == conversation(RECORDS["sharegpt"], "line 1")


REFUSED = {
    "no known columns": (
        {"chosen": "a", "rejected": "b"},
        f"missing columns. Found: chosen, rejected. Accepted: {ACCEPTED}",
    ),
    "an unknown speaker": (
        {"conversations": [{"from": "bing", "value": "a"}]},
        "conversations[0]: from must be one of system, human",
    ),
    "a call that is none": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "[1]"}]},
        "conversations[1]: value must be a call, {name, arguments}, got '[1]'",
    ),
    "a call in broken JSON": (
        {"conversations": [{"from": "function_call", "value": "{"}]},
        "conversations[0]: value is a text that is not JSON",
    ),
    "speakers without words": (
        {"conversations": [{"from": "human"}, {"from": "gpt", "value": "a"}]},
        "conversations[0]: content must be a text, got None",
    ),
    "the last word is not the assistant's": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
        "conversations must be a list of at least two",
    ),
    "a text and messages": ({"prompt": "a", "completion": [ANSWER]}, "must be two texts, or two lists of messages"),
    "no completion": ({"prompt": [QUESTION, ANSWER], "completion": []}, "must be two texts, or two lists"),
    "a completion by the user": ({"prompt": [QUESTION], "completion": [QUESTION]}, "the last by the assistant"),
    "an empty completion": ({"prompt": "a", "completion": " "}, "completion must be a text that is not empty"),
    "an empty text": ({"text": "\n"}, "text must be a text that is not empty"),
    "half a character": ({"text": "a\ud83d"}, "text holds '\\ud83d', half a character"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_records_are_refused_in_one_line(data_file, name):
    record, message = REFUSED[name]
    file = data_file([RECORDS["text"], record])
    with pytest.raises(InputError) as error:
        load_conversations(DataConfig(path=str(file), heldout=0))
    text = str(error.value)
    assert text.startswith(f"{file} line 2: ") and message in text and "\n" not in text


# --- against TRL -----------------------------------------------------------------------------------------------------


def trl_rows(records, tokenizer, folder, **settings):
    """What TRL's trainer makes of the records as they are."""
    table = SFTTrainer(
        tiny_model(vocab_size=len(tokenizer)),
        SFTConfig(output_dir=str(folder), bf16=False, report_to="none", **settings),
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
    ).train_dataset
    return [learnt(row) for row in table]


def learnt(row):
    """Tokens, and labels of all but the first: nothing predicts that."""
    return row["input_ids"], row["labels"][1:]


def with_marks(tokenizer):
    marked = copy.copy(tokenizer)
    marked.chat_template = MARKED
    return marked


def with_begin(tokenizer):
    """Puts a token in front of every text, as Llama's tokenizer does."""
    backend = type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", bos_token="<|im_start|>"
    )


TURNS = [QUESTION, ANSWER, {"role": "user", "content": "Say green."}, {"role": "assistant", "content": "green green"}]
AS_TRL = {
    "text": ([{"text": "red green"}, {"text": "blue " * 3}], {}),
    "texts of a prompt and a completion": (
        [{"prompt": "Say red:", "completion": " red"}, {"prompt": "one ", "completion": "two " * 160}], {}
    ),
    "a conversational prompt and completion": (
        [{"prompt": TURNS[:3], "completion": TURNS[3:]}, {"prompt": TURNS[:1], "completion": TURNS[1:2]}], {}
    ),
    "messages": ([{"messages": TURNS}, {"messages": TURNS[:2]}], {"assistant_only_loss": True}),
    "messages with tools": ([{"messages": TURNS, "tools": [TOOL]}], {"assistant_only_loss": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", AS_TRL)
def test_trl_makes_the_same_tokens_and_labels(tokenizer, tmp_path, name):
    records, settings = AS_TRL[name]
    marked = with_marks(tokenizer)
    theirs = trl_rows(records, marked, tmp_path, max_length=256, **settings)
    ours = tokenize_all([conversation(record, "line 1") for record in records], marked, 256)
    assert [learnt(row) for row in ours] == theirs and len(ours) == len(records)


def test_a_text_begins_as_the_tokenizer_begins_it(tokenizer, tmp_path):
    begins = with_begin(tokenizer)
    records = [{"text": "red green"}, {"prompt": "Say red:", "completion": " red"}]
    theirs = [row for record in records for row in trl_rows([record], begins, tmp_path, max_length=64)]
    ours = [tokenize(conversation(record, "line 1"), begins, 64) for record in records]
    assert [learnt(row) for row in ours] == theirs
    assert all(row["input_ids"].count(1) == 1 for row in ours)
    # Written as text before: it has its own beginning and end.
    row = tokenize(Example(text="<|im_start|>red<|im_end|>"), begins, 64)
    assert (row["input_ids"].count(1), row["input_ids"].count(2)) == (1, 1)


# --- what is learnt --------------------------------------------------------------------------------------------------


def words(row, tokenizer):
    return tokenizer.decode([token for token, label in zip(*row.values(), strict=True) if label != IGNORED])


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED], ids=["no marks", "marks"])
@pytest.mark.parametrize("learn", ["all_responses", "last_response"])
def test_of_a_completion_all_is_learnt_that_the_assistant_says_and_of_the_prompt_nothing(tokenizer, template, learn):
    with_template = copy.copy(tokenizer)
    with_template.chat_template = template
    more = [{"role": "user", "content": "Say blue."}, {"role": "assistant", "content": "blue"}]
    found = conversation({"prompt": TURNS[:3], "completion": [*TURNS[3:], *more]}, "line 1")
    said = words(tokenize(found, with_template, 1000, learn), with_template).replace("\n", "")
    assert said == ("" if learn == "last_response" else "green green<|im_end|>") + "blue<|im_end|>"
    # The same turns as messages.
    found = conversation({"messages": [*TURNS, *more]}, "line 1")
    said = words(tokenize(found, with_template, 1000), with_template).replace("\n", "")
    assert said == "red<|im_end|>green green<|im_end|>blue<|im_end|>"


def test_plain_text_goes_on_in_the_next_sequence(tokenizer):
    texts = [Example(text="red green blue " * 40), Example(text="one"), Example(prompt="a " * 90, completion="b")]
    rows, counts = tokenize_and_count(texts, tokenizer, 32)
    whole = [tokenize(text, tokenizer, 10**6)["input_ids"] for text in texts]
    assert sum((row["input_ids"] for row in rows), []) == whole[0] + whole[1]
    assert all(len(row["input_ids"]) <= 32 and row["labels"] == row["input_ids"] for row in rows)
    assert (counts.examples, counts.learnt, counts.left_out, counts.truncated) == (3, 2, 1, 0)
    assert counts.sequences == len(rows) > 2 and counts.lengths == list(map(len, whole))
    assert f"in {len(rows)} sequences" in counts.line("Data", 32)
    # Nothing predicts the first token of a sequence.
    assert counts.learnt_tokens == counts.tokens - len(rows)


def test_special_tokens_in_plain_text_are_such_and_counted(tokenizer):
    text = "<|im_start|>user\nred<|im_end|>\n"
    (row,), counts = tokenize_and_count([Example(text=text)], tokenizer, 64)
    assert row["input_ids"].count(1) == 1 and row["input_ids"].count(2) == 2  # its own, and the one that ends it
    assert counts.spelt_out_special == 1
    assert tokenize_and_count([Example(text="red")], tokenizer, 64)[1].spelt_out_special == 0


def test_plain_text_needs_no_chat_template(recipe_file, model_folder, data_file, tmp_path, refused):
    base = tmp_path / "base"
    shutil.copytree(model_folder(), base)
    (base / "chat_template.jinja").unlink()
    texts = data_file([{"text": "red " * n} for n in range(1, 60)], "texts.jsonl")
    words = ["--model.path", str(base), "--data.path", str(texts)]
    found = check(load_run_config(recipe_file(), words))
    assert len(found.heldout) >= 8 and found.training[0]["labels"] == found.training[0]["input_ids"]
    assert "no chat template to ask it with" in refused("train", recipe_file(), *words, "--evaluation.prompt", "red?")
    words[-1] = str(data_file())
    assert "no chat template, so conversations" in refused("train", recipe_file(), *words)


def test_no_record_of_any_layout_ends_in_a_traceback_or_is_lost(tokenizer):
    """Seeded: 600 records with something in them changed."""
    numbers, read, refused = random.Random(0), 0, 0
    more = {"sharegpt": {"conversations": [*RECORDS["sharegpt"]["conversations"] * 2], "system": "a"}}
    more |= {"texts": {"prompt": "a", "completion": "b"}}
    for _ in range(600):
        record = mutated(numbers, numbers.choice([*RECORDS.values(), *more.values()]))
        try:
            rows, counts = tokenize_and_count([conversation(record, "a line")], tokenizer, numbers.choice([8, 64]))
        except InputError as error:
            refused += 1
            assert str(error).startswith("a line: ") and "\n" not in str(error)
            str(error).encode()
        else:
            read += 1
            assert counts.learnt + counts.left_out == 1 and counts.sequences == len(rows) >= counts.learnt
    assert read > 100 and refused > 100
