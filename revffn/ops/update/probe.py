"""Small arguments for every operation of the optimizer: what a kernel is asked, once, before it is trusted on a
device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference

SHAPE = (2, 37, 64)


def arguments(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """By kernel: bf16 weights and gradients, stochastic rounding, clipping and weight decay."""
    numbers, (S, R, C) = torch.Generator().manual_seed(0), SHAPE

    def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=numbers).to(device, dtype)

    def positive(*shape: int) -> Tensor:
        return floats(*shape).square() + 1e-3

    grad, weight = (floats(*SHAPE, dtype=torch.bfloat16) for _ in range(2))
    keep, scale = torch.ones((), device=device), torch.full((), 0.75, device=device)
    chunk = 1 << 20
    square, rows, cols = reference.grad_squares(grad, True, chunk)
    row, col = positive(S, R), positive(S, C)
    statistics = keep, scale, 0.5, 1e-30
    mean, root, squares = reference.factored_statistics(
        grad, rows, cols, row.clone(), col.clone(), *statistics, R, True, chunk
    )
    rounding = True, 0x123456789ABCDEF, 5, chunk
    adam = keep, scale, 1e-2, 1e-3, 0.1, 0.01, 1.5, 1e-8, *rounding
    # Ascending numbers and their midpoints are as good as the real code books here.
    signed, unsigned = torch.linspace(-1, 1, 256), torch.linspace(0, 1, 256)
    lines = [x for book in (signed, unsigned) for x in (book, torch.cat([(book[1:] + book[:-1]) / 2, book[-1:]]))]
    books = torch.stack(lines).to(device)
    codes = [torch.randint(0, 256, SHAPE, generator=numbers).to(device, torch.uint8) for _ in range(2)]
    scales = [positive(S, R, 1) for _ in range(2)]
    return {
        "grad_squares": (grad, True, chunk),
        "judge": (square, keep, 1.0, 0.5),
        "factored_statistics": (grad, rows, cols, row, col, *statistics, R, True, chunk),
        "unfactored_statistics": (grad, positive(*SHAPE), *statistics, True, chunk),
        "adafactor": (
            weight, None, floats(*SHAPE, dtype=torch.bfloat16), grad, row, mean, root, None, squares, keep, scale,
            1e-2, 1e-3, 40.0, 0.1, 1e-30, *rounding,
        ),
        "adamw": (weight, None, floats(*SHAPE), positive(*SHAPE), grad, *adam),
        "adamw8bit": (weight, None, codes[0], scales[0], codes[1], scales[1], grad, books, *adam),
        "sgd": (weight, None, floats(*SHAPE), grad, keep, scale, 1e-2, 1e-3, 0.9, *rounding),
    }  # fmt: skip
