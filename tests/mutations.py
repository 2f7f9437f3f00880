"""Seeded changes of files and folders: what broken disks, interrupted copies and editors leave behind, and worse.

`REVFFN_MUTATIONS=10000 pytest -k mutated` makes 10,000 of them in place of 2,000, over data files, recipes,
checkpoints and folders of models.
"""

import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

SHARES = {"data": 0.2, "recipes": 0.4, "checkpoints": 0.25, "models": 0.15}
NUMBER = int(os.environ.get("REVFFN_MUTATIONS", "2000"))


def number_of(kind: str) -> int:
    """How many mutations a kind of input gets."""
    return round(NUMBER * SHARES[kind])


def deep(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def odd_value(numbers: random.Random) -> Any:
    """A JSON value that is seldom what is meant."""
    return numbers.choice(
        [None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 10**30, -(10**30), 0.5, 1e-30, float("nan"), float("inf"),
         "", " ", "x", "0", "\ud800", "\0", "../..", "/", "é🙂", "x" * 5000, [], {}, [[]], {"a": 1}, [1, 2], deep(200)]
    )  # fmt: skip


def paths_in(value: Any, path: tuple = (), most: int = 400) -> list[tuple]:
    """The places of all values in a JSON value."""
    found = [path]
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            if len(found) < most:
                found += paths_in(value[key], (*path, key), most)
    return found


def changed_json(numbers: random.Random, value: Any) -> Any:
    """A JSON value with one value changed, one key renamed, missing or added."""
    path = numbers.choice(paths_in(value)[1:] or [()])
    if not path:
        return odd_value(numbers)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    how, key = numbers.choice(["value", "value", "value", "less", "renamed", "more", "near"]), path[-1]
    if how == "less" or (how == "renamed" and isinstance(inner, list)):
        del inner[key]
    elif how == "renamed":
        inner[f"{key}_"] = inner.pop(key)
    elif how == "more" and isinstance(inner, dict):
        inner[numbers.choice(["x", "", "é", "files", "quantization_config", "auto_map"])] = odd_value(numbers)
    elif how == "near" and isinstance(inner[key], (int, float)):
        inner[key] = inner[key] * numbers.choice([-1, 2, 1000]) + numbers.choice([0, 1])
    else:
        inner[key] = odd_value(numbers)
    return value


def changed_bytes(numbers: random.Random, data: bytes) -> bytes:
    """Flipped, cut, grown, with a hole, or doubled."""
    changed, place = bytearray(data), numbers.randrange(len(data) or 1)
    how = numbers.choice(["flip", "flip", "cut", "grow", "hole", "twice", "swap"])
    if how == "flip" and data:
        changed[place] ^= 1 << numbers.randrange(8)
    elif how == "cut":
        del changed[place:]
    elif how == "hole":
        changed[place : place + 512] = bytes(len(changed[place : place + 512]))
    elif how == "twice":
        changed += data
    elif how == "swap":
        changed[place : place + 8] = changed[place : place + 8][::-1] + b"\xff"
    else:
        changed[place:place] = numbers.randbytes(numbers.randrange(1, 64))
    return bytes(changed)


def changed_header(numbers: random.Random, data: bytes) -> bytes:
    """A safetensors file with something in its header changed; its length is that of the new one, mostly."""
    length = struct.unpack("<Q", data[:8])[0]
    header = changed_json(numbers, json.loads(data[8 : 8 + length]))
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    size = len(text) if numbers.random() < 0.8 else numbers.choice([0, 2**40, 2**63, length + 1])
    return struct.pack("<Q", size) + text + data[8 + length :]


def changed_file(numbers: random.Random, file: Path) -> None:
    """Change the contents of a file."""
    data = file.read_bytes()
    if file.suffix == ".json" and numbers.random() < 0.8:
        # As Python writes them: NaN and half characters too.
        file.write_text(json.dumps(changed_json(numbers, json.loads(data)), indent=2))
    elif file.suffix == ".safetensors" and numbers.random() < 0.4:
        file.write_bytes(changed_header(numbers, data))
    else:
        file.write_bytes(changed_bytes(numbers, data))


def changed_folder(numbers: random.Random, folder: Path, others: tuple[Path, ...] = ()) -> str:
    """Change one thing in a folder.

    Args:
        others: Folders to swap files with.

    Returns:
        What was done.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = numbers.choice(files)
    name = str(file.relative_to(folder))
    how = numbers.choice(["change"] * 8 + ["remove", "empty", "rename", "swap", "folder", "link", "new"])
    if how == "change":
        changed_file(numbers, file)
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "rename":
        file.rename(file.with_name(numbers.choice([f"{file.name}.bak", f"{file.name[:-1]}", "x"])))
    elif how == "new":
        text = numbers.choice(["", "{}", "[", "{}\n{}", '{"a": 1e999}'])
        kinds = ["adapter_config.json", "model.safetensors.index.json", "pytorch_model.bin", "special_tokens_map.json"]
        name = numbers.choice(kinds)
        (folder / name).write_text(text)
    elif how == "swap" and others:
        other = numbers.choice(others) / name
        if other.is_file():
            data = other.read_bytes()
            other.write_bytes(file.read_bytes())
            file.write_bytes(data)
    else:
        file.unlink()
        if how == "folder":
            file.mkdir()
        elif how == "link":
            file.symlink_to("nowhere")
    return f"{how} {name}"


def same_tree(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    names = [{str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} for folder in (one, other)]
    return names[0] == names[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0])


def fresh(pristine: Path, folder: Path) -> Path:
    """`folder` anew, as `pristine` is."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pristine, folder, symlinks=True)
    return folder
