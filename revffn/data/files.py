"""Records of one file, each with the place it stands at.

JSON and CSV are read here: `datasets` cannot say in which line a file is broken, puts `null` where a key is missing,
and reads half a character as another one. It reads Parquet and Arrow. A file that cannot be read as it says is refused
with its name and the line: broken JSON, JSON that is nested too deeply, rows of a CSV with more or fewer cells than
its header.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import logging
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ..recipe import InputError

TEXTS, TABLES, COMPRESSED = (".jsonl", ".json", ".csv"), (".parquet", ".arrow"), (".gz", ".zst")
SUFFIXES = (*(text + end for text in TEXTS for end in ("", *COMPRESSED)), *TABLES)


def read_file(file: Path) -> Iterator[tuple[Any, str]]:
    """Every record of a file with the place it stands at.

    Raises:
        InputError: Another kind of file, or one that is broken; with the line.
    """
    if not file.name.endswith(SUFFIXES):
        raise InputError(f"{file}: cannot read this kind of file. Accepted: {', '.join(SUFFIXES)}.")
    if file.suffix in TABLES:
        yield from read_table(file)
        return
    kind = Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix
    with opened(file, newline="" if kind == ".csv" else "\n") as lines:
        if kind == ".csv":
            yield from read_csv(lines, file)
        elif kind == ".json":
            text = lines.read()
            records = parse_json(text, str(file), 1) if text.strip() else []
            if not isinstance(records, list):
                raise InputError(f"{file}: a .json file holds one list of records, got {type(records).__name__}.")
            for i, record in enumerate(records, 1):
                yield record, f"{file} record {i}"
        else:
            for i, line in enumerate(lines, 1):
                if line.strip():
                    yield parse_json(line.removesuffix("\n"), str(file), i), f"{file} line {i}"


@contextmanager
def opened(file: Path, newline: str) -> Iterator[TextIO]:
    """A text file, decompressed as its name says.

    Raises:
        InputError: What is read is not that.
    """
    try:
        with decompressed(file) as data, io.TextIOWrapper(data, "utf-8-sig", newline=newline) as lines:
            yield lines
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        how = f", compressed as {file.suffix}" if file.suffix in COMPRESSED else ""
        raise InputError(f"{file}: cannot be read ({error}). Give UTF-8 text{how}.") from None


def decompressed(file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return gzip.open(file)
    if file.suffix == ".zst":
        import pyarrow  # brought by datasets

        return pyarrow.input_stream(str(file), compression="zstd")
    return file.open("rb")


def read_table(file: Path) -> Iterator[tuple[Any, str]]:
    """The rows of a Parquet or Arrow file, a batch at a time."""
    import datasets

    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it logs the error that it raises
    try:
        rows = datasets.load_dataset(file.suffix[1:], data_files=glob.escape(str(file)), split="train", streaming=True)
        for i, row in enumerate(rows, 1):
            yield without_nulls(row), f"{file} row {i}"
    except Exception as error:  # of pyarrow, of many kinds
        raise InputError(f"{file}: cannot be read as {file.suffix} ({reason(error)}).") from None
    finally:
        logger.setLevel(level)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def without_nulls(value: Any) -> Any:
    """A value of a table, in which every object has the keys of all others: those that are null are not there."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def read_csv(lines: Iterable[str], file: Path) -> list[tuple[dict[str, str], str]]:
    """The rows of a CSV, each with as many cells as the header has."""
    rows = csv.reader(lines, strict=True)
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
