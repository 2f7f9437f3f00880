"""How a run ends that does not come to its end: one line that says what is safe and how to go on."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

from ..files import StorageError, describe
from ..interrupts import Interrupted
from .checkpoint import last_good
from .resume import SUMMARY


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
    except OSError as error:
        raise StorageError(f"{describe(error).rstrip('.')}; {way_on(output_dir)}") from error


def way_on(output_dir: Path) -> str:
    try:
        begun = (output_dir / SUMMARY).exists()
    except OSError:
        begun = False
    if not begun:
        return "nothing of the run was written yet."
    return f"{last_good(output_dir)}. Go on with training.resume: true."
