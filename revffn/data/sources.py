"""Sources of a recipe -> records: a file, the files of a folder that are of a split, or a data set on the Hub."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..recipe import InputError, Source
from .files import SUFFIXES, read_file, reason, without_nulls

OTHER_SUFFIXES = (".gz", ".zst", ".txt", ".tsv")
"""Of what is meant as a file, too, and not as a name on the Hub."""


def read_source(
    source: Source, recipe: Path | None = None, setting: str = "data.path"
) -> Iterator[tuple[Any, str]]:
    """Every record of a source with the place it stands at.

    Args:
        source: With its split.
        recipe: The recipe's path, beside which a relative path is looked for as well.
        setting: Where the source is named, for error messages.

    Raises:
        InputError: It is missing or broken; with file and line where there are any.
    """
    place = find_file(source.path, recipe, setting)
    if place is None:
        yield from read_hub(source, setting)
        return
    for file in [place] if place.is_file() else files_of(place, source.split or "train"):
        yield from read_file(file)


def find_file(path: str, recipe: Path | None = None, setting: str = "data.path") -> Path | None:
    """The file or folder meant by `path`; None if it can only be a data set on the Hub.

    Raises:
        InputError: It looks like a file, and there is none.
    """
    places = [Path()]
    if recipe is not None:
        places.append(recipe.resolve().parent)
    # The checkout this package is imported from, which has the data the shipped recipes name.
    places.append(Path(__file__).resolve().parents[2])
    try:
        for place in places:
            if path and (place / path).exists():
                return place / path
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{setting} {path[:80]!r}: cannot be looked for ({why}). Correct it.") from None
    if path.endswith((*SUFFIXES, *OTHER_SUFFIXES)) or path.count("/") > 1:
        looked = ", ".join(str(place.resolve()) for place in dict.fromkeys(places))
        raise InputError(f"{setting} {path!r}: no such file in {looked}. Correct {setting}.")
    return None


def files_of(folder: Path, split: str) -> list[Path]:
    """The data files of a folder that belong to a split, as `datasets` tells by their names and folders; all of them
    are of `train` if no name says otherwise.

    Raises:
        InputError: There are none.
    """
    from datasets import config
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    try:
        base = glob.escape(str(folder))
        found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    except (EmptyDatasetError, FileNotFoundError):
        found = {}
    # What `save_to_disk` writes beside the data.
    about = (config.DATASET_STATE_JSON_FILENAME, config.DATASET_INFO_FILENAME, config.DATASETDICT_JSON_FILENAME)
    splits = {}
    for name, files in found.items():
        files = sorted(file for file in map(Path, files) if file.name.endswith(SUFFIXES) and file.name not in about)
        splits |= {str(name): files} if files else {}
    if split not in splits:
        there = f"splits: {', '.join(splits)}" if splits else f"no file of {', '.join(SUFFIXES)}"
        raise InputError(f"{folder}: no files of the split {split!r}. Found {there}. Correct the path or the split.")
    return splits[split]


def read_hub(source: Source, setting: str) -> Iterator[tuple[Any, str]]:
    """Every record of a data set on the Hub."""
    import datasets

    try:
        table = datasets.load_dataset(source.path, source.name, split=source.split)
    except Exception as error:  # the many ways a download fails all mean the same to the user
        raise InputError(
            f"{setting} {source.path!r}, split {source.split!r}: neither a file here nor a data set that can be had "
            f"from the Hub ({reason(error)}). Correct {setting} or the split."
        ) from None
    for i, record in enumerate(table, 1):
        yield without_nulls(record), f"{source.path} record {i}"
