"""The command `revffn data`: what a run would learn from, by the functions with which it would read it."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.text import Text

from ..recipe import RunConfig
from .split import load_split
from .tokenizer import load_tokenizer
from .tokens import IGNORED, Counts, Row, check_left_out, tokenize_and_count

NUM_SHOWN = 5
LONGEST_SHOWN = 600
"""Characters of a part of an example; of a longer one its beginning and its end."""
BAR = 40
"""Characters of the longest bar."""


def data_command(config: RunConfig, recipe: Path) -> None:
    """Print it all.

    Raises:
        InputError: The data cannot be read, or `revffn train` would refuse to leave out so much of it.
    """
    data, console = config.data, Console(highlight=False, soft_wrap=True)
    split = load_split(data, recipe)
    tokenizer = load_tokenizer(config.model, [*split.training, *split.heldout])
    layouts = Counter(example.layout for example in [*split.training, *split.heldout])
    columns = ", ".join(f"{name} ({number:,})" for name, number in layouts.most_common())
    console.print(*map(str, split.sources), f"Columns: {columns}", sep="\n", markup=False)
    read = {}
    for name, examples in (("Data", split.training), ("Held-out data", split.heldout)):
        progress = Console(stderr=True)
        followed = track(
            examples, "Tokenizing", console=progress, transient=True, disable=not progress.is_terminal
        )
        rows, counts = read[name] = tokenize_and_count(followed, tokenizer, data.max_length, data.learn)
        if examples:
            console.print(counts.line(name, data.max_length), amount(counts), sep="\n", markup=False)
    rows, counts = read["Data"]
    if data.packing and rows:
        console.print(packed(rows, data.max_length), markup=False)
    console.print("\nTokens per example, before anything is cut:")
    console.print(*histogram(counts.lengths, data.max_length), sep="\n")
    for number, example in enumerate(split.training[:NUM_SHOWN], 1):
        own, counts_of_it = tokenize_and_count([example], tokenizer, data.max_length, data.learn)
        console.print(f"\nExample {number}, {example.where}: {fate(own, counts_of_it, data.max_length)}", markup=False)
        if own:
            console.print(rendered(own[0], tokenizer, console.is_terminal and not console.no_color))
    check_left_out(counts, data.max_dropped, data.max_length)


def amount(counts: Counts) -> str:
    """Tokens, and how many of them are learnt."""
    share = counts.learnt_tokens / max(counts.tokens, 1)
    text = f"  {counts.tokens:,} tokens, {counts.learnt_tokens:,} of them learnt ({share:.0%})"
    return text + (f"; {counts.cut_tokens:,} response tokens cut off" if counts.cut_tokens else "")


def packed(rows: list[Row], max_length: int) -> str:
    """What TRL's packing makes of the sequences, as the trainer has it done."""
    from datasets import Dataset
    from trl import pack_dataset

    sequences = pack_dataset(Dataset.from_list(rows), max_length, "bfd", {"desc": None})
    tokens = sum(len(row["input_ids"]) for row in rows)
    return f"Packed: {len(sequences):,} sequences, {tokens / len(sequences) / max_length:.0%} full"


def histogram(lengths: list[int], max_length: int) -> list[str]:
    """A line for each power of two: examples of at most so many tokens, and their share up to there."""
    first, last = ((length - 1).bit_length() for length in (min(lengths), max(lengths)))
    ends = [2**i for i in range(first, last + 1)]
    ends = sorted({*ends, max_length} if max_length < ends[-1] else ends)
    counted = Counter(next(end for end in ends if length <= end) for length in lengths)
    most, before, lines = max(counted.values()), 0, []
    for end in ends:
        before += counted[end]
        bar = "█" * -(-counted[end] * BAR // most)
        mark = "  = max_length" if end == max_length else ""
        lines.append(f"{f'≤ {end:,}':>11}  {bar:<{BAR}} {counted[end]:>9,}  {before / len(lengths):>6.1%}{mark}")
    return lines


def fate(rows: list[Row], counts: Counts, max_length: int) -> str:
    """What becomes of one example."""
    if not rows:
        return f"left out, none of its {counts.lengths[0]:,} tokens is learnt"
    text = f"{counts.lengths[0]:,} tokens, {counts.learnt_tokens:,} learnt"
    if len(rows) > 1:
        return f"{text}, in {len(rows)} sequences, of which this is the first"
    return f"{text}, cut at {max_length:,}" if counts.truncated else text


def rendered(row: Row, tokenizer: Any, styled: bool) -> Text:
    """A sequence as text: what is not learnt is grey, or what is learnt stands in [[ ]]."""
    # Nothing predicts the first token.
    is_learnt = [False, *(label != IGNORED for label in row["labels"][1:])]
    found, before, end = Text(), "", 0
    for learnt, run in groupby(is_learnt):
        end += len([*run])
        # A token alone is not always written as it is behind others.
        until = tokenizer.decode(row["input_ids"][:end])
        part, before = printable(until[len(before) :]), until
        if styled:
            found.append(part, style=None if learnt else "bright_black")
        else:
            found.append(f"[[{part}]]" if learnt else part)
    return found


def printable(text: str) -> str:
    """A text as a terminal can be shown it: shortened in the middle, without control characters."""
    if len(text) > LONGEST_SHOWN:
        half = LONGEST_SHOWN // 2
        text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
