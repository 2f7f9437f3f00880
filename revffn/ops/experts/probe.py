"""Small arguments for the experts' products: what a kernel is asked, once, before it is trusted on a device."""

from __future__ import annotations

from typing import Any

import torch


def arguments(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """By kernel; whole numbers, whose sums are the same in every order. One expert has no rows."""
    numbers = torch.Generator().manual_seed(0)

    def whole(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=numbers).to(device, dtype)

    offs = torch.tensor([70, 70, 73, 200], dtype=torch.int32, device=device)
    high, low = whole(4, 136, 264), whole(4, 136, 264).view(torch.int16).to(torch.uint8)
    given = whole(200, 136), whole(200, 264), offs, high, low, False
    return {"add_product_to_sum": (*given, False), "add_product_to_sum last": (*given, True)}
