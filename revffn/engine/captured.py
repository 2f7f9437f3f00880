"""Outputs that transformers captures from calls of modules: router logits, attentions.

The family's layer calls each of its modules once. A tiled layer calls it for every tile, and an iteration for every
step; what is captured is made that of the untiled layer again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..upstream import active_collector


@contextlib.contextmanager
def as_one_layer(tiles: Callable[[], int]) -> Iterator[None]:
    """What the tiles of a layer give, one after the other, becomes one entry.

    Args:
        tiles: Their number, asked for afterwards.
    """
    collected = active_collector.get() or {}
    before = {name: len(found) for name, found in collected.items() if isinstance(found, list)}
    yield
    for name, start in before.items():
        found = collected[name][start:]
        if len(found) > 1 and all(isinstance(entry, Tensor) for entry in found):
            collected[name][start:] = [joined(found, tiles())]


def joined(found: list[Tensor], num_tiles: int) -> Tensor:
    """Entries of all tiles, each of one chunk or more of its tokens: (tokens, E), (b, tokens, E), (b, heads, T, T)."""
    per_tile = len(found) // num_tiles
    along = 1 if found[0].dim() == 3 else 0
    tiles = [torch.cat(found[i : i + per_tile], dim=along) for i in range(0, len(found), per_tile)]
    return torch.cat(tiles)


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Nothing is captured meanwhile."""
    token = active_collector.set(None)
    try:
        yield
    finally:
        active_collector.reset(token)
