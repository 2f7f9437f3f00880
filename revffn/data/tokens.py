"""Conversations as tokens with labels, a count of what is learnt of them, and batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..recipe import InputError
from .conversations import Conversation
from .responses import Chat, Span, reason

IGNORED = -100  # the label of a token that does not count in the loss
Token = tuple[int, int, int]
"""Its id, its first character, and the one after its last."""


@dataclass
class Counts:
    """What became of the examples of a data set."""

    examples: int = 0
    learnt: int = 0
    """Examples with a token that is learnt. All others are left out."""
    left_out: int = 0
    truncated: int = 0
    """Of those that are learnt: cut at the end."""
    spelt_out: int = 0
    """Of all: those with special tokens spelt out in their texts, which are read as plain text."""
    spelt_out_special: int = 0
    """The same, read as special tokens: the template changes those texts, or the tokenizer is a slow one."""
    without_reasoning: int = 0
    """Of all: those whose last response has reasoning that the template does not write."""
    tokens: int = 0
    learnt_tokens: int = 0
    cut_tokens: int = 0
    """Tokens of responses that were cut off, of examples left out too."""
    needed: list[int] = field(default_factory=list, repr=False)
    """For each example left out, the shortest sequence in which one of its tokens is learnt."""

    def line(self, name: str, max_length: int) -> str:
        """In one line, for a terminal."""
        parts = [f"{self.examples} examples", f"{self.learnt} learnt"]
        if self.left_out:
            parts.append(f"{self.left_out} left out (no response token within max_length={max_length})")
        if self.truncated:
            parts.append(f"{self.truncated} truncated")
        for number, how in ((self.spelt_out, "plain text"), (self.spelt_out_special, "special tokens")):
            if number:
                parts.append(f"{number} with special tokens spelt out (read as {how})")
        if self.without_reasoning:
            parts.append(f"{self.without_reasoning} with reasoning that the chat template leaves out")
        return f"{name}: {', '.join(parts)}"

    def summary(self) -> dict[str, int]:
        """For run.json."""
        return {name: value for name, value in vars(self).items() if name != "needed"}


def tokenize(
    example: Conversation, tokenizer: Any, max_length: int, learn: str = "all_responses"
) -> dict[str, list[int]]:
    """A conversation as the tokenizer's chat template writes it.

    Args:
        example: As `load_conversations` returns them.
        tokenizer: One with a chat template.
        max_length: Tokens that are kept.
        learn: `all_responses` of the assistant, or `last_response`.

    Returns:
        `input_ids`, at most `max_length` of them, and `labels`: the same where the responses stand (with what ends
        them), else -100.

    Raises:
        InputError: The template cannot write the conversation, or responses cannot be told apart from the rest.
    """
    return shortened(whole(Chat(example, tokenizer), learn)[0], max_length)


def tokenize_all(
    examples: list[Conversation], tokenizer: Any, max_length: int, learn: str = "all_responses"
) -> list[dict[str, list[int]]]:
    """`tokenize` for every example, without those of which nothing is learnt: their prompts fill `max_length`."""
    return tokenize_and_count(examples, tokenizer, max_length, learn)[0]


def tokenize_and_count(
    examples: list[Conversation], tokenizer: Any, max_length: int, learn: str = "all_responses"
) -> tuple[list[dict[str, list[int]]], Counts]:
    """`tokenize_all`, and what became of the examples."""
    rows, counts = [], Counts(examples=len(examples))
    for example in examples:
        chat = Chat(example, tokenizer)
        long, spelt_out = whole(chat, learn)
        counts.without_reasoning += chat.leaves_out_reasoning()
        counts.spelt_out += spelt_out == "text"
        counts.spelt_out_special += spelt_out == "special"
        row = shortened(long, max_length)
        learnt, possible = (sum(label != IGNORED for label in r["labels"][1:]) for r in (row, long))
        counts.cut_tokens += possible - learnt
        if learnt:
            rows.append(row)
            counts.truncated += len(row["input_ids"]) < len(long["input_ids"])
            counts.tokens += len(row["input_ids"])
            counts.learnt_tokens += learnt
        elif possible:
            counts.needed.append(2 + next(i for i, label in enumerate(long["labels"][1:]) if label != IGNORED))
    counts.learnt = len(rows)
    counts.left_out = len(examples) - len(rows)
    return rows, counts


def whole(chat: Chat, learn: str) -> tuple[dict[str, list[int]], str]:
    """All of a conversation, and how the special tokens that it spells out are read: as `text`, `special`, or none."""
    tokenizer = chat.tokenizer
    responses, spelt_out = chat.responses(learn), chat.spelt_out()
    how = "" if spelt_out == [] else "text" if spelt_out and tokenizer.is_fast else "special"
    try:
        if tokenizer.is_fast:
            tokens = encode(chat.text, tokenizer, spelt_out or [])
            input_ids = [token for token, _, _ in tokens]
            learnt = within(tokens, responses)
        else:
            input_ids = tokenizer(chat.text, add_special_tokens=False)["input_ids"]
            learnt = within_slow(chat.text, tokenizer, input_ids, responses)
    except (TypeError, UnicodeError) as error:
        raise chat.refuse(f"the tokenizer cannot read it ({reason(error)})") from None
    labels = [token if is_learnt else IGNORED for token, is_learnt in zip(input_ids, learnt, strict=True)]
    return {"input_ids": input_ids, "labels": labels}, how


def shortened(row: dict[str, list[int]], max_length: int) -> dict[str, list[int]]:
    return {name: values[:max_length] for name, values in row.items()}


def encode(text: str, tokenizer: Any, spelt_out: list[Span]) -> list[Token]:
    """The tokens of a text that the template wrote, special tokens included; those spelt out are plain text."""
    tokens, at = [], 0
    for start, end in spelt_out:
        tokens += piece(text, at, start, tokenizer) + piece(text, start, end, tokenizer, plain=True)
        at = end
    return tokens + piece(text, at, len(text), tokenizer)


def piece(text: str, start: int, end: int, tokenizer: Any, plain: bool = False) -> list[Token]:
    """The tokens of a part of `text`."""
    if start == end:
        return []
    settings = {"split_special_tokens": True} if plain else {}
    # A part in the middle is read after a line break, or some tokenizers put a space in front of it.
    for lead in ("\n", "") if start else ("",):
        read = tokenizer(
            lead + text[start:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False, **settings
        )
        ids, offsets = read["input_ids"], read["offset_mapping"]
        number = sum(last <= len(lead) for _, last in offsets) if lead else 0
        if not lead or (number and all(first >= len(lead) for first, _ in offsets[number:])):
            break
    tokens, before = [], start
    for token, (first, last) in zip(ids[number:], offsets[number:], strict=True):
        first, last = start + first - len(lead), start + last - len(lead)
        # Some tokenizers do not count spaces: a token of spaces alone then has no characters.
        first, last = (before, max(last, before)) if first >= last else (first, last)
        tokens.append((token, first, last))
        before = max(before, last)
    return tokens


def within(tokens: list[Token], spans: list[Span]) -> list[bool]:
    """Which tokens have a character in a span; both are in order."""
    found, rest = [], list(reversed(spans))
    for _, first, last in tokens:
        while rest and rest[-1][1] <= first and not first == last == rest[-1][1]:
            rest.pop()
        found.append(bool(rest) and last > rest[-1][0])
    return found


def within_slow(text: str, tokenizer: Any, input_ids: list[int], spans: list[Span]) -> list[bool]:
    """`within` for a tokenizer that does not say where its tokens stand: by the tokens of the text up to there."""

    def number(end: int) -> int:
        part = tokenizer(text[:end], add_special_tokens=False)["input_ids"]
        pairs = zip(part, input_ids, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(part), len(input_ids)))

    found = [False] * len(input_ids)
    for start, end in spans:
        first, last = number(start), number(end) if end < len(text) else len(input_ids)
        found[first:last] = [True] * (last - first)
    return found


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


def check_left_out(counts: Counts, max_dropped: float, max_length: int) -> None:
    """Refuse a data set of which too much is left out.

    Raises:
        InputError: More than `max_dropped`, or all of it. Says how long sequences would have to be.
    """
    if not counts.left_out:
        return
    if not counts.learnt:
        raise InputError(
            f"data.max_length={max_length} leaves no token of any response: {counts.left_out} of {counts.examples} "
            f"examples. Raise it above the prompts' length: at least {min(counts.needed, default=max_length)}."
        )
    share = counts.left_out / counts.examples
    if share > max_dropped:
        allowed = int(max_dropped * counts.examples)
        enough = sorted(counts.needed, reverse=True)[allowed]
        raise InputError(
            f"data.max_length={max_length} leaves no token of the response of {counts.left_out} of {counts.examples} "
            f"training examples, more than data.max_dropped={max_dropped:g} allows. Set data.max_length to at least "
            f"{enough}, or data.max_dropped to {-(-share * 100 // 1) / 100:g} to do without them."
        )
