"""What is trained on and what is held out: examples of all sources, drawn by weight and by seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from ..recipe import DataConfig, InputError, Source
from .conversations import ACCEPTED, Example, conversation
from .sources import find_file, read_source


@dataclass(frozen=True)
class SourceCounts:
    """What is taken of a source."""

    name: str
    records: int
    drawn: int
    """To train on or to hold out: `num_examples` and weights leave out others."""

    def __str__(self) -> str:
        return f"{self.name}: {self.records:,} records" + (f", {self.drawn:,} drawn" * (self.drawn < self.records))


@dataclass
class Split:
    """Examples of a recipe."""

    training: list[Example]
    heldout: list[Example]
    sources: list[SourceCounts]


def load_conversations(config: DataConfig, recipe: Path | None = None) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: see `load_split`."""
    split = load_split(config, recipe)
    return split.training, split.heldout


def load_split(config: DataConfig, recipe: Path | None = None) -> Split:
    """Read, check and split what a recipe names.

    Args:
        config: Where the data is and how many examples are used.
        recipe: The recipe's path, beside which a relative path is looked for as well.

    Raises:
        InputError: A source is missing, empty or broken, a record lacks a column, or there are too few records.
    """
    sources, apart = config.sources(), config.heldout_source()
    places = [place_of(source, recipe) for source in sources]
    if apart is not None and place_of(apart, recipe, "data.heldout") in places:
        raise InputError(
            f"data.heldout {title(apart)}: this is trained on. Name another file or split, or a number or share of "
            "what is in data.path."
        )
    parts = [read_examples(source, recipe) for source in sources]
    examples = [example for part in parts for example in part]
    order = draw([len(part) for part in parts], sources, config.seed)
    number = 0 if apart is not None else config.heldout
    if isinstance(number, float):
        number = max(1, round(number * len(order)))
    wanted = number + (config.num_examples or 1)
    if len(order) < wanted:
        raise InputError(
            f"{', '.join(source.path for source in sources)}: {len(order)} records, but {wanted} are needed: "
            f"{number} for data.heldout={shown(config.heldout)} and {config.num_examples or 'at least 1'} to train "
            "on. Lower data.heldout or data.num_examples."
        )
    drawn = order[: None if config.num_examples is None else wanted]
    heldout, training = [examples[i] for i in drawn[:number]], [examples[i] for i in drawn[number:]]
    counts, first = [], 0
    for source, part in zip(sources, parts, strict=True):
        counts.append(SourceCounts(title(source), len(part), sum(first <= i < first + len(part) for i in drawn)))
        first += len(part)
    return Split(training, heldout if apart is None else read_examples(apart, recipe, "data.heldout"), counts)


def place_of(source: Source, recipe: Path | None, setting: str = "data.path") -> tuple[Path | str | None, ...]:
    """Equal for sources that are the same, however they are written."""
    file = find_file(source.path, recipe, setting)
    place = file.resolve() if file else source.path
    return (place,) if file and file.is_file() else (place, source.name, source.split)


def read_examples(source: Source, recipe: Path | None, setting: str = "data.path") -> list[Example]:
    examples = [conversation(record, where) for record, where in read_source(source, recipe, setting)]
    if not examples:
        raise InputError(f"{title(source)}: no records. Give at least one record with the columns {ACCEPTED}.")
    return examples


def draw(sizes: list[int], sources: list[Source], seed: int) -> list[int]:
    """Numbers of examples, one source after the other, in the order in which they are used.

    With weights each source gives its share: as many as there are of the one that runs out first, which is given whole
    (`datasets.interleave_datasets` stops there too). Without, all of all.

    Raises:
        InputError: A source gives no example.
    """
    generator = random.Random(seed)
    taken = list(range(sum(sizes)))
    # As they are written: three times 0.1 is 0.3.
    weights = [Fraction(str(source.weight)) for source in sources if source.weight is not None]
    if weights:
        scale = min(size / weight for size, weight in zip(sizes, weights, strict=True))
        taken, first = [], 0
        for size, weight, source in zip(sizes, weights, sources, strict=True):
            share = int(scale * weight)
            if not share:
                raise InputError(f"{title(source)}: weight {source.weight:g} is too small: it gives no example.")
            taken += generator.sample(range(first, first + size), share)
            first += size
    generator.shuffle(taken)
    return taken


def title(source: Source) -> str:
    return " ".join(filter(None, (source.path, source.name, source.split if source.split != "train" else None)))


def shown(heldout: object) -> object:
    return heldout.path if isinstance(heldout, Source) else heldout
