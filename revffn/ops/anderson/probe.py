"""Small arguments for every operation of the iteration: what a kernel is asked, once, before it is trusted on a
device."""

from __future__ import annotations

from typing import Any

import torch

from . import reference

SHAPE = (2, 9, 48)


def arguments(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """By kernel, and the number of past iterations. Steps are small integers: their products have one sum, whatever
    its order."""
    numbers = torch.Generator().manual_seed(0)

    def stream(most: int) -> torch.Tensor:
        return torch.randint(-most, most, SHAPE, generator=numbers).to(device, torch.int32)

    scale = torch.full(SHAPE[-1:], 8.0, device=device)
    settled = (torch.rand(SHAPE[:-1], generator=numbers) < 0.2).to(device)
    given: dict[str, tuple[Any, ...]] = {}
    for m in range(reference.DEPTH + 1):
        update = torch.randn(SHAPE, generator=numbers).to(device, torch.bfloat16)
        x = stream(100)
        steps = [stream(60 >> i).float() for i in range(m)]
        moved = (update, x, x + stream(30), scale, steps)
        given[f"anderson_move {m}"] = moved
        following, _, _, products = reference.anderson_move(*moved)
        given[f"anderson_combine {m}"] = (following, products, settled, [stream(100) for _ in range(m)])
    return given
