"""Files and folders that are whole or not there: written beside, synced, renamed.

What is being written has a name that begins with a point and ends in `.partial-<process>`; after a crash it may stay
behind, and `remove_partials` clears it away. A name without that is a file or folder that was completed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STORAGE_WORDS = (
    "os error", "StreamWriter", "inline_container", "iostream", "file write failed", "No space left", "I/O error",
)  # fmt: skip
"""How libraries that write by themselves (torch.save, safetensors) speak of a write that failed."""


class StorageError(OSError):
    """Something could not be written, in one line: what, why, and how much room there is."""


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `folder` once the body is through and everything is on the disk.

    A folder of that name is replaced. If the body fails nothing is left behind, parents that were made for it neither,
    and what was there stays.

    Raises:
        StorageError: It could not be written.
    """
    made = [parent for parent in folder.parents if not os.path.exists(parent)]
    partial = partial_name(folder)
    with storage(folder):
        try:
            partial.mkdir(parents=True)
            yield partial
            sync_folder(partial)
            replace_folder(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty by now: another's
                for parent in made:
                    parent.rmdir()
            raise


def replace_folder(partial: Path, folder: Path) -> None:
    """Give a folder another's name; that one's is gone only if this one has it."""
    old = move_aside(folder)
    try:
        os.rename(partial, folder)
    except BaseException:
        if old is not None:
            os.rename(old, folder)
        raise
    sync(folder.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def write_text(file: Path, text: str) -> None:
    """The whole file or none of it.

    Raises:
        StorageError: It could not be written; what was there stays.
    """
    with new_file(file) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """A file to write, which takes the name `file` once the body is through. Its suffix is that of `file`.

    Raises:
        StorageError: It could not be written; what was there stays.
    """
    partial = partial_name(file)
    partial = partial.with_name(partial.name + file.suffix)
    with storage(file):
        try:
            yield partial
            sync(partial)
            os.replace(partial, file)
            sync(file.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def append_line(file: Path, line: str) -> None:
    """Add a line at the end of a text file; a crash can cut it, and nothing else.

    Raises:
        StorageError: It could not be written.
    """
    with storage(file), file.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def remove_folder(folder: Path) -> None:
    """Delete a folder: it loses its name first, so that no half of it is ever seen under it."""
    old = move_aside(folder)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def remove_partials(folder: Path) -> None:
    """Clear away what writes that did not come to their end left in a folder."""
    for path in folder.glob(".*.partial-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def partial_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def move_aside(folder: Path) -> Path | None:
    """Take a folder's name away, if it is there."""
    if not folder.exists():
        return None
    old = folder.with_name(f".{folder.name}.old.partial-{os.getpid()}")
    os.rename(folder, old)
    return old


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sync_folder(folder: Path) -> None:
    """`sync` for everything in a folder, and for the folder."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


# --- what went wrong -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def storage(path: Path) -> Iterator[None]:
    """Make a StorageError of every way in which writing `path` fails."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not any(word in str(error) for word in STORAGE_WORDS):
            raise
        raise StorageError(f"{path} could not be written: {reason(error)}{room(path)}.") from error


def reason(error: BaseException) -> str:
    """An error in a few words on one line."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(words).split()).rstrip(".")[:300]


def describe(error: OSError) -> str:
    """An OSError as a sentence: the file that it names, and what is wrong with it."""
    if isinstance(error, StorageError):
        return str(error)
    named = f"{error.filename}: " if error.filename else ""
    return f"{named}{reason(error)}."


def room(path: Path) -> str:
    """How many bytes are free where `path` is."""
    try:
        return f" ({shutil.disk_usage(existing_parent(path)).free:,} bytes are free there)"
    except OSError:
        return ""


def existing_parent(path: Path) -> Path:
    """The nearest folder on the way to `path` that is there."""
    path = path.absolute()
    while not os.path.isdir(path) and path != path.parent:
        path = path.parent
    return path


# --- what was written ------------------------------------------------------------------------------------------------


def read_json(file: Path) -> Any:
    """A JSON file's value.

    Raises:
        ValueError: In one line, why there is none: missing, or cut, or not to be read.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} is missing") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{file} is cut or damaged, not valid JSON") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({reason(error)})") from None
