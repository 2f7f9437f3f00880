"""Examples as tokens with labels, a count of what is learnt of them, and batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..recipe import InputError
from .conversations import Example
from .files import reason
from .responses import Chat, PlainText, Span, written

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORED = -100  # the label of a token that does not count in the loss
Row = dict[str, list[int]]
"""`input_ids` and `labels` of a sequence."""
Token = tuple[int, int, int]
"""Its id, its first character, and the one after its last."""


@dataclass
class Counts:
    """What became of the examples of a data set."""

    examples: int = 0
    learnt: int = 0
    """Examples with a token that is learnt. All others are left out."""
    left_out: int = 0
    sequences: int = 0
    """That are trained on, before packing: plain text may take several."""
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
    lengths: list[int] = field(default_factory=list, repr=False)
    """Of all examples, in tokens, before anything is cut."""

    def line(self, name: str, max_length: int) -> str:
        """In one line, for a terminal."""
        parts = [f"{self.examples} examples", f"{self.learnt} learnt"]
        if self.left_out:
            parts.append(f"{self.left_out} left out (no response token within max_length={max_length})")
        if self.truncated:
            parts.append(f"{self.truncated} truncated")
        if self.sequences != self.learnt:
            parts.append(f"in {self.sequences} sequences")
        for number, how in ((self.spelt_out, "plain text"), (self.spelt_out_special, "special tokens")):
            if number:
                parts.append(f"{number} with special tokens spelt out (read as {how})")
        if self.without_reasoning:
            parts.append(f"{self.without_reasoning} with reasoning that the chat template leaves out")
        return f"{name}: {', '.join(parts)}"

    def summary(self) -> dict[str, int]:
        """For run.json."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}


def tokenize(example: Example, tokenizer: Any, max_length: int, learn: str = "all_responses") -> Row:
    """An example as the tokenizer's chat template writes it; or as it is, if it is plain text.

    Args:
        example: As `load_conversations` returns them.
        tokenizer: One with a chat template, unless the example is plain text.
        max_length: Tokens that are kept.
        learn: `all_responses` of the assistant, or `last_response`.

    Returns:
        `input_ids`, at most `max_length` of them, and `labels`: the same where the responses stand (with what ends
        them), else -100.

    Raises:
        InputError: The template cannot write the conversation, or responses cannot be told apart from the rest.
    """
    return cut(whole(written(example, tokenizer), learn)[0], 0, max_length)


def tokenize_all(
    examples: list[Example], tokenizer: Any, max_length: int, learn: str = "all_responses"
) -> list[Row]:
    """`tokenize` for every example, without those of which nothing is learnt: their prompts fill `max_length`. What is
    longer of plain text goes on in the next sequence."""
    return tokenize_and_count(examples, tokenizer, max_length, learn)[0]


def tokenize_and_count(
    examples: Iterable[Example], tokenizer: Any, max_length: int, learn: str = "all_responses"
) -> tuple[list[Row], Counts]:
    """`tokenize_all`, and what became of the examples."""
    rows, counts = [], Counts()
    for example in examples:
        counts.examples += 1
        text = written(example, tokenizer)
        long, spelt_out = whole(text, learn)
        length = len(long["input_ids"])
        counts.lengths.append(length)
        counts.without_reasoning += text.leaves_out_reasoning()
        counts.spelt_out += spelt_out == "text"
        counts.spelt_out_special += spelt_out == "special"
        starts = range(0, length, max_length) if text.goes_on else (0,)
        kept = [row for row in (cut(long, start, max_length) for start in starts) if num_learnt(row)]
        learnt, possible = sum(map(num_learnt, kept)), num_learnt(long)
        if not text.goes_on:
            counts.cut_tokens += possible - learnt
            counts.truncated += bool(kept) and length > max_length
        if kept:
            rows += kept
            counts.learnt += 1
            counts.tokens += sum(len(row["input_ids"]) for row in kept)
            counts.learnt_tokens += learnt
        elif possible:
            counts.needed.append(2 + next(i for i, label in enumerate(long["labels"][1:]) if label != IGNORED))
    counts.sequences = len(rows)
    counts.left_out = counts.examples - counts.learnt
    return rows, counts


def num_learnt(row: Row) -> int:
    """Tokens that count in the loss: nothing predicts the first one."""
    return sum(label != IGNORED for label in row["labels"][1:])


def whole(chat: Chat | PlainText, learn: str) -> tuple[Row, str]:
    """All of an example, and how the special tokens that it spells out are read: as `text`, `special`, or none."""
    tokenizer, adds = chat.tokenizer, chat.adds_special_tokens
    responses, spelt_out = chat.responses(learn), chat.spelt_out()
    how = "" if spelt_out == [] else "text" if spelt_out and tokenizer.is_fast else "special"
    try:
        if tokenizer.is_fast:
            tokens = encode(chat.text, tokenizer, spelt_out or [], adds)
            input_ids = [token for token, _, _ in tokens]
            learnt = within(tokens, responses)
        else:
            input_ids = tokenizer(chat.text, add_special_tokens=adds)["input_ids"]
            learnt = within_slow(chat.text, tokenizer, input_ids, responses, adds)
    except (TypeError, UnicodeError) as error:
        raise chat.refuse(f"the tokenizer cannot read it ({reason(error)})") from None
    labels = [token if is_learnt else IGNORED for token, is_learnt in zip(input_ids, learnt, strict=True)]
    return {"input_ids": input_ids, "labels": labels}, how


def cut(row: Row, start: int, max_length: int) -> Row:
    return {name: values[start : start + max_length] for name, values in row.items()}


def encode(text: str, tokenizer: Any, spelt_out: list[Span], adds_special_tokens: bool) -> list[Token]:
    """The tokens of a text that the template wrote, special tokens included; those spelt out are plain text."""
    if adds_special_tokens:
        return piece(text, 0, len(text), tokenizer, add_special_tokens=True)
    tokens, at = [], 0
    for start, end in spelt_out:
        tokens += piece(text, at, start, tokenizer) + piece(text, start, end, tokenizer, split_special_tokens=True)
        at = end
    return tokens + piece(text, at, len(text), tokenizer)


def piece(text: str, start: int, end: int, tokenizer: Any, **settings: bool) -> list[Token]:
    """The tokens of a part of `text`; `settings` are the tokenizer's."""
    if start == end:
        return []
    settings = {"add_special_tokens": False} | settings
    # A part in the middle is read after a line break, or some tokenizers put a space in front of it.
    for lead in ("\n", "") if start else ("",):
        read = tokenizer(lead + text[start:end], return_offsets_mapping=True, verbose=False, **settings)
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


def within_slow(text: str, tokenizer: Any, input_ids: list[int], spans: list[Span], adds: bool) -> list[bool]:
    """`within` for a tokenizer that does not say where its tokens stand: by the tokens of the text up to there."""

    def number(end: int) -> int:
        part = tokenizer(text[:end], add_special_tokens=adds)["input_ids"]
        pairs = zip(part, input_ids, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(part), len(input_ids)))

    found = [False] * len(input_ids)
    for start, end in spans:
        first, last = number(start), number(end) if end < len(text) else len(input_ids)
        found[first:last] = [True] * (last - first)
    return found


def batches(
    rows: list[Row], batch_size: int, pad_token_id: int, device: torch.device | str = "cpu"
) -> Iterator[dict[str, Tensor]]:
    """Rows in their order, padded at the end.

    Yields:
        `input_ids`, `labels` and `attention_mask`, (B, T) int64 each.
    """
    import torch

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
        # Some have nothing to learn however long sequences are.
        needed = sorted(counts.needed, reverse=True)
        at = int(max_dropped * counts.examples) - (counts.left_out - len(needed))
        longer = f"data.max_length to at least {needed[at]}, or " if 0 <= at < len(needed) else ""
        raise InputError(
            f"data.max_length={max_length} leaves no token of the response of {counts.left_out} of {counts.examples} "
            f"training examples, more than data.max_dropped={max_dropped:g} allows. Set {longer}data.max_dropped to "
            f"{-(-share * 100 // 1) / 100:g} to do without them."
        )
