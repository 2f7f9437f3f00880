"""One run in a folder at a time: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ..recipe import InputError

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder, which is made if it is not there, and goes again if nothing was written into it.

    The kernel lets go of the lock when the process ends: a file that a killed run left behind holds nobody up.

    Raises:
        InputError: Another process holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    number = take(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
        os.close(number)
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def take(folder: Path) -> int:
    """Open and lock the file, with this process's number in it."""
    while True:
        number = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(number, 32).decode(errors="replace").strip()
            os.close(number)
            raise InputError(held(folder, holder)) from None
        except BaseException:
            os.close(number)
            raise
        # Whoever held it may have deleted the file between the two calls.
        try:
            current = os.stat(folder / LOCK).st_ino == os.fstat(number).st_ino
        except FileNotFoundError:
            current = False
        if current:
            os.truncate(number, 0)
            os.write(number, f"{os.getpid()}\n".encode())
            return number
        os.close(number)


def check_free(folder: Path) -> None:
    """Refuse a folder that another run is writing to, without writing.

    Raises:
        InputError: Another process holds it.
    """
    try:
        number = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(held(folder, os.read(number, 32).decode(errors="replace").strip())) from None
    except OSError:
        pass
    finally:
        os.close(number)


def held(folder: Path, holder: str) -> str:
    return (
        f"training.output_dir {folder}: another run is writing there (process {holder or 'unknown'}). Wait for it, or "
        "name another folder."
    )
