"""Small arguments for every operation on streams: what a kernel is asked, once, before it is trusted on a device."""

from __future__ import annotations

from typing import Any

import torch

from . import reference

SHAPE = (2, 9, 48)


def arguments(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """By kernel; bf16, three digits between the grids of some channels."""
    numbers, D = torch.Generator().manual_seed(0), SHAPE[-1]

    def stream(bits: int = 20) -> torch.Tensor:
        return torch.randint(-(2**bits), 2**bits, SHAPE, generator=numbers).to(device, torch.int32)

    def floats(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape or SHAPE, generator=numbers).to(device, dtype)

    scale, next_scale = (2.0 ** torch.randint(10, 14, (D,), generator=numbers).float().to(device) for _ in range(2))
    finer = torch.randint(0, 4, (D,), generator=numbers).to(device, torch.int32)
    flags, weight = torch.zeros(2, dtype=torch.int32, device=device), floats(D)
    moved = (stream(28), stream(), stream(), floats(), floats(), None, scale, next_scale, finer, 2, 3)
    bits, _ = reference.innovation_move(moved[0].clone(), *moved[1:], flags.clone())
    undone = (stream(), stream(), stream(), stream(), *moved[3:6], bits, *moved[6:])
    x, wide = stream(24), torch.float32
    value, normed, rstd = reference.read_norm(x, 1 / scale, weight, 1e-6, torch.bfloat16, True, True)
    backward = (normed, value, floats(dtype=wide), floats(dtype=wide), x, 1 / scale, weight, rstd, True, True)
    return {
        "stream_check": (x, flags),
        "add_update": (floats(), x, scale, finer, flags),
        "innovation_move": (*moved, flags),
        "innovation_undo": undone,
        "innovation_gradients": (floats(dtype=wide), floats(dtype=wide), 1 / scale, torch.bfloat16, True),
        "read_norm": (x, 1 / scale, weight, 1e-6, torch.bfloat16, True, True),
        "read_norm_backward": backward,
    }
