"""`revffn report RUN [RUN ...]`."""

from __future__ import annotations

from pathlib import Path

from ..files import write_text
from ..options import ReportConfig
from ..recipe import InputError
from ..training.resume import MODEL
from .page import page
from .record import Record, read_runs
from .weight_changes import weight_changes

PAGE = "report.html"


def report_command(folders: list[str], config: ReportConfig) -> Path:
    """Write a page about runs.

    Raises:
        InputError: A folder is not a run's, or its record is damaged.
        StorageError: The page could not be written.
    """
    records = read_runs([Path(folder) for folder in folders])
    output = Path(config.output) if config.output else records[0].folder / PAGE if len(records) == 1 else Path(PAGE)
    changes = [changes_of(record) if config.weights else {} for record in records]
    try:
        text = page(records, changes)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        names = ", ".join(str(record.folder) for record in records)
        raise InputError(f"{names}: no report can be made of what is recorded there ({error!r}).") from None
    write_text(output, text)
    return output


def changes_of(record: Record) -> dict[str, dict[int, float]]:
    """Of a finished run; an unfinished one has no model yet."""
    folder = record.folder / MODEL
    if not folder.is_dir():
        return {}
    try:
        return weight_changes(record.summary["config"]["model"]["path"], folder)
    except Exception as error:  # files that are cut, another's tensors: the rest of the page does not need them
        print(f"{folder}: how far the weights moved is left out ({' '.join(str(error).split())}).", flush=True)
        return {}
