"""Small arguments for every operation on dense parts: what a kernel is asked, once, before it is trusted on a
device."""

from __future__ import annotations

from typing import Any

import torch

from . import reference


def arguments(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """By kernel, in bf16."""
    numbers = torch.Generator().manual_seed(0)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=numbers).to(device, torch.bfloat16)

    q, table = floats(2, 5, 3, 24).transpose(1, 2), (floats(1, 5, 24), floats(1, 5, 24))
    x, weight = floats(2, 9, 24), floats(24)
    rstd = reference.norm(x, weight, 1e-6, True)[1]
    gate = torch.rand(19, generator=numbers).to(device)
    wide = reference.TILE_CHANNELS + 40
    rows, scale = floats(19, wide), floats(wide)
    return {
        "rope": (q, q[:, :2], *table, False),
        "add_gated": (*(floats(19, 24) for _ in range(3)), floats(1, 24)),
        "add_gated_backward": (*(floats(19, 24) for _ in range(2)), floats(1, 24), gate),
        "swiglu": (floats(3, 50), floats(3, 50)),
        "swiglu_backward": (floats(3, 50), floats(3, 50), floats(3, 50)),
        "norm": (x, weight, 1e-6, True),
        "norm wide": (rows, scale, 1e-6, True),
        "norm_backward": (floats(2, 9, 24), x, weight, rstd, True, True),
        "norm_backward wide": (
            floats(19, wide), rows, scale, reference.norm(rows, scale, 1e-6, True)[1], True, True,
        ),
    }  # fmt: skip
