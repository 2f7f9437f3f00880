"""How a run ends that does not come to its end: one line that says what is safe and how to go on; and where a trained
model goes for which there is no room."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ..files import StorageError, describe, new_folder
from ..interrupts import Interrupted
from .checkpoint import last_good, newest
from .resume import MODEL, SUMMARY


class SavedElsewhere(StorageError):
    """The model of a finished run is not where it was to be, in one line that says where it is."""


@contextlib.contextmanager
def in_one_line(output_dir: Path) -> Iterator[None]:
    """Say of every interruption and every fault of the machine what is safe, and how to go on.

    Raises:
        Interrupted: A signal came.
        StorageError: Something could not be written or read.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        raise Interrupted(number, f"stopped by {signal.Signals(number).name}; {way_on(output_dir)}") from None
    except SavedElsewhere:
        raise
    except OSError as error:
        raise StorageError(f"{describe(error).rstrip('.')}; {way_on(output_dir)}") from error


def way_on(output_dir: Path) -> str:
    try:
        begun, trained = (output_dir / SUMMARY).exists(), (output_dir / MODEL).is_dir()
    except OSError:
        begun = trained = False
    if not begun:
        return "nothing of the run was written yet."
    # A run that goes on beyond its model has a checkpoint to go on from.
    if trained and not has_checkpoint(output_dir):
        return f"the trained model is complete in {output_dir / MODEL}, only {SUMMARY} lacks what came after."
    return f"{last_good(output_dir)}. Go on with training.resume: true."


def has_checkpoint(output_dir: Path) -> bool:
    """As far as names and sizes say."""
    try:
        return newest(output_dir, contents=False).checkpoint is not None
    except OSError:
        return False


def save(output_dir: Path, write_model: Callable[[Path], None], write_record: Callable[[Path], None]) -> None:
    """Save the model of a run that has been trained to its end.

    Where there is no room for it, and no checkpoint that has it, it is saved elsewhere: in a folder that a terminal is
    asked for, else in the temporary folder (TMPDIR), else in the home folder.

    Args:
        output_dir: Of the run. The model goes into `model/` there.
        write_model: Fills a folder.
        write_record: Adds the run's record to a folder that has the model in `model/`; elsewhere only.

    Raises:
        SavedElsewhere: The line says where.
        StorageError: It is nowhere; or a checkpoint has it.
    """
    try:
        with new_folder(output_dir / MODEL) as folder:
            write_model(folder)
    except StorageError as error:
        if has_checkpoint(output_dir):
            raise
        problems = [str(error).rstrip(".")]
    else:
        return
    for place in places(output_dir.resolve().name, problems):
        try:
            with new_folder(place) as folder:
                (folder / MODEL).mkdir()
                write_model(folder / MODEL)
                write_record(folder)
        except (OSError, ValueError) as error:
            problems.append(str(error).rstrip("."))
        else:
            raise SavedElsewhere(
                f"{problems[0]}; the trained model is in {place} instead, with {SUMMARY}. Move that folder to where "
                "it is to stay."
            )
    raise StorageError(f"{'; '.join(problems)}; the trained model is nowhere.")


def places(name: str, problems: list[str]) -> Iterator[Path]:
    """New folders to try: those that a terminal names, until it names none; then the two that docs/resume.md names.

    Args:
        name: Of the run.
        problems: What has been in the way; the last one is shown with the question.
    """
    unique = f"revffn-{name}-{os.getpid()}"
    with contextlib.suppress(EOFError):
        while sys.stdin.isatty() and sys.stderr.isatty():
            print(f"{problems[-1]}. Another folder for the trained model (or none):", file=sys.stderr, flush=True)
            answer = input().strip()
            if not answer:
                break
            yield Path(answer).expanduser() / unique
    for find in (tempfile.gettempdir, Path.home):
        with contextlib.suppress(OSError, RuntimeError):
            yield Path(find()) / unique
