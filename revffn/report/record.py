"""A run's folder as a report needs it. Runs that are going on or were interrupted have a record too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import read_json
from ..recipe import InputError
from ..training.checkpoint import readable_lines
from ..training.resume import METRICS, ROUTERS, SUMMARY


@dataclass(frozen=True)
class Record:
    """What a run has left so far."""

    folder: Path
    name: str
    """Tells it from the others on the page."""
    summary: dict[str, Any]
    """run.json."""
    metrics: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    routers: list[dict[str, Any]]
    """Lines of router.jsonl."""

    def x(self, line: dict[str, Any]) -> int:
        """A line's step, counted through both stages."""
        return line["step"] + (self.stage1_steps if line["stage"] == 2 else 0)

    @property
    def stage1_steps(self) -> int:
        return max((line["step"] for line in self.metrics if line["stage"] == 1), default=0)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of what is in some lines of the metrics."""
        lines = [line for line in self.metrics if isinstance(line.get(name), (int, float))]
        return [self.x(line) for line in lines], [line[name] for line in lines]


def read_runs(folders: list[Path]) -> list[Record]:
    """The records of several runs, named by what tells their folders apart.

    Raises:
        InputError: A folder has no run, the same one is given twice, or its files are not a run's.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise InputError("the same run is given twice. Give each folder once.")
    depth = 1
    while len({folder.parts[-depth:] for folder in resolved}) < len(resolved):
        depth += 1
    return [
        read_run(folder, "/".join(whole.parts[-depth:])) for folder, whole in zip(folders, resolved, strict=True)
    ]


def read_run(folder: Path, name: str) -> Record:
    file = folder / SUMMARY
    if not file.is_file():
        raise InputError(f"{folder}: no run here ({SUMMARY} is missing). Give the folder of a run of revffn train.")
    try:
        summary = read_json(file)
    except ValueError as error:
        raise InputError(f"{error}. The run's record is damaged; without it there is no report.") from None
    if not isinstance(summary, dict) or not isinstance(summary.get("config"), dict):
        raise InputError(f"{file} is not a run's record. Give the folder of a run of revffn train.")
    lines = [readable_lines(folder / name) if (folder / name).is_file() else [] for name in (METRICS, ROUTERS)]
    return Record(folder, name, summary, *lines)
