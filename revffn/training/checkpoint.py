"""Checkpoints that are complete or not counted: a manifest names every file with its size and checksum.

The trainer writes a checkpoint beside its final name (`files.new_folder`), with the manifest as its last file, which
has the checkpoint's name and a checksum of itself too. A checkpoint that lacks the manifest, or differs from it, is
incomplete: resuming passes it over, and it does not count where old ones are deleted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import describe, read_json, remove_folder

MANIFEST = "manifest.json"
STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
"""What a checkpoint has besides the model and the trainer's state: without them another run results."""
KEPT = 2
"""Checkpoints of a stage that stay: the newest ones."""
STAGES = ("stage1", "stage2")


@dataclass(frozen=True)
class Found:
    """What a run's folder has to go on from."""

    checkpoint: Path | None
    """The newest complete checkpoint."""
    passed_over: list[str]
    """Newer ones, each with what is wrong with it."""


def write_manifest(folder: Path, **about: Any) -> None:
    """Close a checkpoint.

    Args:
        folder: Holds everything else by now.
        about: Values to keep beside the files: `num_tokens`, `seconds`; and `name`, the checkpoint's final one with
            that of the folder it is in, which it has to be found under.
    """
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {**about, "files": files}
    manifest["sha256"] = digest_of(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def digest_of(manifest: dict[str, Any]) -> str:
    """Of a manifest's contents, without the digest itself."""
    contents = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    manifest = read_json(folder / MANIFEST)
    try:
        if manifest["sha256"] == digest_of(manifest):
            return manifest
    except (TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{folder / MANIFEST} is damaged")


def wrong_with(folder: Path, *, contents: bool = True, without: Collection[str] = ()) -> str | None:
    """Why a checkpoint is not complete, in a few words; None if it is.

    Args:
        contents: Compare checksums too, which reads everything; otherwise names and sizes only.
        without: Files that may be missing.
    """
    try:
        manifest = read_manifest(folder)
        return wrong_name(folder, manifest) or wrong_files(folder, manifest["files"], contents, without)
    except ValueError as error:
        return str(error).removeprefix(f"{folder}/")
    except OSError as error:
        return describe(error).removeprefix(f"{folder}/").rstrip(".")


def wrong_name(folder: Path, manifest: dict[str, Any]) -> str | None:
    """A stage's checkpoint under another number, or in the other stage."""
    named, folder = Path(manifest.get("name", folder.name)), folder.absolute()
    same = named.name == folder.name and (named.parent.name == folder.parent.name or named.parent.name not in STAGES)
    return None if same else f"it was written as {named}"


def wrong_files(folder: Path, files: dict[str, Any], contents: bool, without: Collection[str]) -> str | None:
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            if name in without:
                continue
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes of {entry['bytes']:,}"
        if contents and sha256(path) != entry["sha256"]:
            return f"the checksum of {name} differs"
    # An index, an adapter or code that lies there now would be loaded with the rest, or in its place.
    more = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    more -= {MANIFEST, *(Path(name).parts[0] for name in files)}
    return f"{min(more)} is not of it" if more else None


def checkpoints(folder: Path) -> list[Path]:
    """All of a stage, oldest first, complete or not."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def newest(output_dir: Path, *, contents: bool = True, without: Collection[str] = ()) -> Found:
    """The checkpoint to go on from: the newest complete one of the later stage, else of the earlier.

    Args:
        output_dir: Of the run.
        contents: See `wrong_with`.
        without: See `wrong_with`.
    """
    passed_over = []
    for stage in reversed(STAGES):
        for checkpoint in reversed(checkpoints(output_dir / stage)):
            problem = wrong_with(checkpoint, contents=contents, without=without)
            if problem is None:
                return Found(checkpoint, passed_over)
            passed_over.append(f"{checkpoint} ({problem})")
    return Found(None, passed_over)


def last_good(output_dir: Path) -> str:
    """For messages, where what went wrong may be the disk itself: names and sizes are looked at only."""
    try:
        found = newest(output_dir, contents=False).checkpoint
    except OSError:
        found = None
    return f"the last complete checkpoint is {found}" if found else "there is no checkpoint yet"


def delete_old(folder: Path, limit: int | None, best: str | Path | None = None) -> None:
    """Keep the newest complete checkpoints of a stage, and the best one; only complete ones count, and what is
    incomplete goes once a newer one is complete.

    Args:
        folder: Of the stage.
        limit: How many stay; None or 0 keeps all.
        best: A checkpoint that stays in any case.
    """
    if not limit or limit < 0:
        return
    everything = checkpoints(folder)
    complete = [path for path in everything if wrong_with(path, contents=False) is None]
    if len(complete) < limit:
        return
    kept = {*complete[-limit:], *([Path(best)] if best else [])}
    for path in everything:
        if step_of(path) < step_of(complete[-1]) and path not in kept:
            remove_folder(path)


def readable_lines(file: Path) -> list[dict[str, Any]]:
    """metrics.jsonl as far as it can be read: a crash may have cut its last line, which is said."""
    lines, cut = [], 0
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and all(isinstance(line.get(key), int) for key in ("stage", "step")):
            lines.append(line)
        else:
            cut += 1
    if cut:
        print(f"{file}: {cut} cut or damaged line{'s' * (cut > 1)} left out.", flush=True)
    return lines


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
