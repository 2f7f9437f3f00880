"""Records of files and data sets, each with the place it stands at.

A file that cannot be read as it says is refused with its name and the line: broken JSON, JSON that is nested too
deeply, rows of a CSV with more or fewer cells than its header.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..recipe import DataConfig, InputError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv")


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
    try:
        for place in places:
            if (place / path).is_file():
                return place / path
    except OSError as error:
        raise InputError(f"data.path {path[:80]!r}: cannot be looked for ({error.strerror}). Correct it.") from None
    if path.endswith(SUFFIXES) or Path(path).suffix in (".gz", ".txt", ".tsv", ".parquet") or path.count("/") > 1:
        looked = ", ".join(str(place.resolve()) for place in dict.fromkeys(places))
        raise InputError(f"data.path {path!r}: no such file in {looked}. Correct data.path.")
    return None


def read_file(file: Path) -> Iterator[tuple[Any, str]]:
    """Every record of a file with the place it stands at.

    Raises:
        InputError: Another kind of file, or one that is broken; with the line.
    """
    if not file.name.endswith(SUFFIXES):
        raise InputError(f"{file}: cannot read this kind of file. Accepted: {', '.join(SUFFIXES)}.")
    try:
        text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = text.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}). Give UTF-8 text, with gzip for .gz.") from None
    if file.suffix == ".csv":
        yield from read_csv(text, file)
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


def read_csv(text: str, file: Path) -> list[tuple[dict[str, str], str]]:
    """The rows of a CSV, each with as many cells as the header has."""
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    records, header = [], None
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        for cells in rows:
            where = f"{file} line {rows.line_num}"
            if not any(cell.strip() for cell in cells) and len(cells) < 2:
                continue  # a blank line
            if header is None:
                header = cells
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    raise InputError(f"{where}: the header names {twice[0]!r} twice. Rename one of the columns.")
                continue
            if len(cells) != len(header):
                raise InputError(
                    f"{where}: {len(cells)} cells, but the header has {len(header)}. Put quotation marks around "
                    "texts with commas or line breaks."
                )
            records.append((dict(zip(header, cells, strict=True)), where))
    except csv.Error as error:
        raise InputError(f"{file} line {rows.line_num}: broken CSV ({error}). Correct the quoting there.") from None
    finally:
        csv.field_size_limit(before)
    return records


def parse_json(text: str, name: str, line: int) -> Any:
    """A JSON text that begins at `line` of the file `name`."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        reason = f"{error.msg} at column {error.colno}"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:  # a key twice, a number of more digits than Python reads
        reason = str(error).partition(";")[0]
    raise InputError(f"{name} line {line}: broken JSON ({reason}). Correct or delete the line.")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} twice in one object")
    return found


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
