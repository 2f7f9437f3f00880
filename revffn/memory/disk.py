"""What has been measured, kept on disk between processes: in the folder `REVFFN_CACHE`, else `~/.cache/revffn`.

An entry is a small JSON file, found by the digest of its key, in a folder named by the digest of everything else that
a measurement depends on: this package's files, the versions and files of the packages below it, Python, and the
environment variables that choose kernels. Whatever is wrong with an entry or a folder, the result is worked out anew.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from ..files import partial_name

PACKAGES = ("torch", "transformers", "torchao", "triton")
VARIABLES = ("REVFFN_KERNELS", "TRITON_INTERPRET")
NUM_FOLDERS = 4
"""Kept, the newest ones: of other checkouts, and of other versions."""

_in_use = False


@contextlib.contextmanager
def in_use() -> Iterator[None]:
    """While open, `recall` and `remember` work. A caller's own program may have changed what the key cannot name."""
    global _in_use
    before, _in_use = _in_use, True
    try:
        yield
    finally:
        _in_use = before


def recall(key: Any) -> Any:
    """What was remembered under a key of JSON values; None if there is nothing, or nothing to be trusted."""
    file = file_of(key)
    if file is None:
        return None
    try:
        entry = json.loads(file.read_text(encoding="utf-8"))
        return entry["value"] if entry["key"] == key and entry["sha256"] == digest(entry["value"]) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def remember(key: Any, value: Any) -> None:
    """Keep a JSON value; where that cannot be done, it is not."""
    file = file_of(key)
    if file is None:
        return
    partial = partial_name(file)
    try:
        if not file.parent.is_dir():
            file.parent.mkdir(parents=True)
            forget_oldest(file.parent.parent)
        partial.write_text(json.dumps({"key": key, "value": value, "sha256": digest(value)}), encoding="utf-8")
        os.replace(partial, file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def forget_oldest(folder: Path) -> None:
    newest_first = sorted(folder.iterdir(), key=lambda path: -path.stat().st_mtime)
    for path in newest_first[NUM_FOLDERS:]:
        shutil.rmtree(path, ignore_errors=True)


def file_of(key: Any) -> Path | None:
    if not _in_use or (name := surroundings()) is None:
        return None
    try:
        home = os.environ.get("REVFFN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "revffn")
        return Path(home).expanduser() / "plan" / name / f"{digest(key)}.json"
    except RuntimeError:  # nobody's home
        return None


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


@functools.cache
def surroundings() -> str | None:
    """Digest of the code that measures; None where files may change without anything showing it."""
    found = hashlib.sha256()
    try:
        root = Path(__file__).parents[1]
        for file in sorted([*root.rglob("*.py"), *root.rglob("*.json")]):
            found.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
        for name in PACKAGES:
            try:
                package = distribution(name)
            except PackageNotFoundError:
                continue
            # The digests of all installed files. A package that is worked on has none of them.
            record = package.read_text("RECORD")
            if record is None or '"editable": true' in (package.read_text("direct_url.json") or ""):
                return None
            found.update(f"{name} {package.version}\0{record}\0".encode())
    except OSError:
        return None
    about = [sys.version, platform.platform(), *(f"{name}={os.environ.get(name)}" for name in VARIABLES)]
    found.update("\0".join(about).encode())
    return found.hexdigest()[:32]
