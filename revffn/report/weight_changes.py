"""How far the weights of each module have moved: |after - before| / |before|, by layer and kind of module.

Tensors are read one at a time from both models' files, so that a model of any size takes the memory of one tensor.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

_LAYER = re.compile(r"layers\.(\d+)\.(.+?)(?:\.weight|\.bias)?$")
_EXPERT = re.compile(r"experts\.\d+\.")


def weight_changes(before: str, after: Path) -> dict[str, dict[int, float]]:
    """Kind of module (`self_attn.q_proj`, `mlp.experts.up_proj`, ...) -> layer -> change, relative to its norm before.

    Args:
        before: Folder of the base model, or its name on the Hub, which is looked for in the local cache only.
        after: Folder of the trained model.

    Returns:
        Empty where the base model's files are not on this machine. What only one of the two has is left out; all
        experts of a layer count together. Modules outside the layers have layer -1.
    """
    old, new = (tensors(folder) for folder in (local(before), after))
    squares: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    files = {path: safe_open(path, "pt") for path in {*old.values(), *new.values()}}
    for name in sorted(old.keys() & new.keys()):
        first, last = (files[where[name]].get_tensor(name) for where in (old, new))
        if first.shape != last.shape or not first.is_floating_point():
            continue
        sums = squares[place(name)]
        sums[0] += (last.float() - first.float()).square().sum(dtype=torch.float64).item()
        sums[1] += first.float().square().sum(dtype=torch.float64).item()
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for (kind, layer), (change, norm) in squares.items():
        found[kind][layer] = (change / norm) ** 0.5 if norm else 0.0
    return dict(found)


def place(name: str) -> tuple[str, int]:
    """A tensor's kind of module, and its layer; -1 outside the layers."""
    inside = _LAYER.search(name)
    if inside is None:
        return name.removeprefix("model.").removesuffix(".weight"), -1
    return _EXPERT.sub("experts.", inside[2]), int(inside[1])


def tensors(folder: Path | None) -> dict[str, Path]:
    """Name of every tensor -> the file that holds it."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")) if folder else []:
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def local(model: str) -> Path | None:
    """A model's folder on this machine."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, local_files_only=True))
    except Exception:  # no such name, or not in the cache: to a report both are the same
        return None
