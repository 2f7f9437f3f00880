"""Conversations for supervised fine-tuning: what TRL and datasets do not have.

Reads dolly, alpaca, question-answer and messages columns, checks every record and names the line of a bad one, splits
off held-out examples by seed, and turns a conversation into tokens with labels on the last response only.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..recipe import DataConfig, InputError

# columns of instruction, context, response; the context may be missing or empty
LAYOUTS = {
    "dolly": ("instruction", "context", "response"),
    "alpaca": ("instruction", "input", "output"),
    "gsm8k": ("question", "context", "answer"),
}
ACCEPTED = (
    "instruction and response (and context); or instruction and output (and input); or question and answer (and "
    "context); or messages"
)
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv")
IGNORED = -100  # the label of a token that does not count in the loss

Conversation = dict[str, list[dict[str, str]]]


def load_conversations(
    config: DataConfig, recipe: Path | None = None
) -> tuple[list[Conversation], list[Conversation]]:
    """Read, check and split a data set.

    Args:
        config: Where the data is and how many examples are used.
        recipe: The recipe's path, beside which a relative data path is looked for as well.

    Returns:
        (training, held-out), each a list of `{"prompt": messages, "completion": [message]}`.

    Raises:
        InputError: The file is missing, empty or broken, a record lacks a column, or there are too few records.
    """
    file = find_file(config.path, recipe)
    records = read_file(file) if file else read_hub(config)
    conversations = [conversation(record, where) for record, where in records]
    name = str(file or config.path)
    if not conversations:
        raise InputError(f"{name}: no records. Give a file with at least one record with columns {ACCEPTED}.")
    wanted = config.num_heldout + (config.num_examples or 1)
    if len(conversations) < wanted:
        raise InputError(
            f"{name}: {len(conversations)} records, but {wanted} are needed: data.num_heldout={config.num_heldout} "
            f"and {config.num_examples or 'at least 1'} to train on. Lower data.num_heldout or data.num_examples."
        )
    order = list(range(len(conversations)))
    random.Random(config.seed).shuffle(order)
    end = None if config.num_examples is None else wanted
    held_out, training = order[: config.num_heldout], order[config.num_heldout : end]
    return [conversations[i] for i in training], [conversations[i] for i in held_out]


def find_file(path: str, recipe: Path | None = None) -> Path | None:
    """The data file meant by `path`; None if it can only be a data set on the Hub.

    Raises:
        InputError: It looks like a file, and there is none.
    """
    places = [Path()]
    if recipe is not None:
        places.append(recipe.resolve().parent)
    # The checkout this package is imported from, which has the data the shipped recipes name.
    places.append(Path(__file__).resolve().parents[2])
    for place in places:
        if (place / path).is_file():
            return place / path
    if path.endswith(SUFFIXES) or Path(path).suffix in (".gz", ".txt", ".tsv", ".parquet") or path.count("/") > 1:
        looked = ", ".join(str(place.resolve()) for place in dict.fromkeys(places))
        raise InputError(f"data.path {path!r}: no such file in {looked}. Correct data.path.")
    return None


def read_file(file: Path) -> Iterator[tuple[Any, str]]:
    """Every record of a file with the place it stands at."""
    if not file.name.endswith(SUFFIXES):
        raise InputError(f"{file}: cannot read this kind of file. Accepted: {', '.join(SUFFIXES)}.")
    try:
        text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = text.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}). Give UTF-8 text, with gzip for .gz.") from None
    if file.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for row in rows:
                yield row, f"{file} line {rows.line_num}"
        except csv.Error as error:
            raise InputError(
                f"{file} line {rows.line_num}: broken CSV ({error}). Correct the quoting there."
            ) from None
    elif file.suffix == ".json":
        records = parse_json(text, str(file), 1) if text.strip() else []
        if not isinstance(records, list):
            raise InputError(f"{file}: a .json file holds one list of records, got {type(records).__name__}.")
        for i, record in enumerate(records, 1):
            yield record, f"{file} record {i}"
    else:
        for i, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield parse_json(line, str(file), i), f"{file} line {i}"


def parse_json(text: str, name: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise InputError(
            f"{name} line {line}: broken JSON ({error.msg} at column {error.colno}). Correct or delete the line."
        ) from None


def read_hub(config: DataConfig) -> Iterator[tuple[Any, str]]:
    """Every record of a data set on the Hub."""
    import datasets

    try:
        table = datasets.load_dataset(config.path, split=config.split)
    except Exception as error:  # the many ways a download fails all mean the same to the user
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"data.path {config.path!r}, split {config.split!r}: neither a file here nor a data set that can be had "
            f"from the Hub ({type(error).__name__}: {reason}). Correct data.path or data.split."
        ) from None
    for i, record in enumerate(table):
        yield record, f"{config.path} record {i + 1}"


def conversation(record: Any, where: str) -> Conversation:
    """One record as a prompt and a completion.

    Raises:
        InputError: It has none of the known columns, or a column does not hold what it should.
    """
    columns = set(record) if isinstance(record, dict) else set()
    if "messages" in columns:
        return split_messages(record["messages"], where)
    for instruction, context, response in LAYOUTS.values():
        if {instruction, response} <= columns:
            texts = [record[instruction], record.get(context) or "", record[response]]
            for column, text in zip((instruction, context, response), texts, strict=True):
                if not isinstance(text, str) or (not text.strip() and column != context):
                    raise InputError(
                        f"{where}: {column} must be a text that is not empty, got {text!r}. Correct the record."
                    )
            prompt = "\n\n".join(text for text in texts[:2] if text.strip())
            return {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": texts[2]}],
            }
    found = ", ".join(sorted(map(str, columns))) or f"none (a {type(record).__name__})"
    raise InputError(f"{where}: missing columns. Found: {found}. Accepted: {ACCEPTED}. Rename the columns.")


def split_messages(messages: Any, where: str) -> Conversation:
    ok = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not ok or len(messages) < 2 or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise InputError(
            f"{where}: messages must be a list of at least two {{role, content}}, the last by the assistant and not "
            "empty. Correct the record."
        )
    messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def tokenize(example: Conversation, tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """A conversation as the tokenizer's chat template writes it.

    Returns:
        `input_ids`, at most `max_length` of them, and `labels`: the same where the response stands (with what ends
        it), else -100.
    """
    prompt = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(example["prompt"] + example["completion"], tokenize=False)
    # The template writes special tokens itself. Prompt and whole are tokenized apart because tokens can merge at the
    # seam.
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    input_ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    start = 0
    while start < min(len(prompt_ids), len(input_ids)) and prompt_ids[start] == input_ids[start]:
        start += 1
    labels = [IGNORED] * start + input_ids[start:]
    return {"input_ids": input_ids[:max_length], "labels": labels[:max_length]}


def tokenize_all(examples: list[Conversation], tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    """`tokenize` for every example, without those whose prompt alone fills `max_length`."""
    rows = (tokenize(example, tokenizer, max_length) for example in examples)
    return [row for row in rows if any(label != IGNORED for label in row["labels"][1:])]


def batches(
    rows: list[dict[str, list[int]]], batch_size: int, pad_token_id: int, device: torch.device | str = "cpu"
) -> Iterator[dict[str, Tensor]]:
    """Rows in their order, padded at the end.

    Yields:
        `input_ids`, `labels` and `attention_mask`, (B, T) int64 each.
    """
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        longest = max(len(row["input_ids"]) for row in chunk)
        fill = {"input_ids": pad_token_id, "labels": IGNORED, "attention_mask": 0}
        batch = {name: [row.get(name, [1] * len(row["input_ids"])) for row in chunk] for name in fill}
        yield {
            name: torch.tensor([values + [fill[name]] * (longest - len(values)) for values in lists], device=device)
            for name, lists in batch.items()
        }
