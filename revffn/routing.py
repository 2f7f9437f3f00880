"""Expert choices are recorded in forward and replayed in recomputation.

A router ends in `torch.topk`. Whatever the family computes around it (softmax or sigmoid, groups, correction bias,
renormalisation), the discrete choice is made there and nowhere else; so the choice is intercepted there, for every
architecture in the same way. In replay the values are gathered from the freshly computed scores with the recorded
indices: the scores keep their gradient, and no token changes its expert because a rebuilt state differs in its last
    bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TOPK = (torch.topk, torch.Tensor.topk)


def index_dtype(num_choices: int) -> torch.dtype:
    """Smallest integer type that holds indices 0 to `num_choices - 1`."""
    return torch.uint8 if num_choices <= 256 else torch.int16 if num_choices <= 32768 else torch.int32


class RecordRouting(TorchFunctionMode):
    """Append the indices of every top-k to `record`, in the smallest integer type that fits."""

    def __init__(self, record: list[Tensor]):
        super().__init__()
        self.record = record

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in _TOPK or not _along_last(*args, **(kwargs or {})):
            return func(*args, **(kwargs or {}))
        scores = args[0] if args else kwargs["input"]
        with torch.no_grad():
            indices = func(*args, **(kwargs or {})).indices
        self.record.append(indices.to(index_dtype(scores.shape[-1])))
        return _pick(scores, indices)


class ReplayRouting(TorchFunctionMode):
    """Answer every top-k from `record`: recorded indices, values gathered from the scores at hand."""

    def __init__(self, record: list[Tensor]):
        super().__init__()
        self.remaining = iter(record)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in _TOPK or not _along_last(*args, **(kwargs or {})):
            return func(*args, **(kwargs or {}))
        return _pick(args[0] if args else kwargs["input"], next(self.remaining).long())


def _along_last(input: Tensor, k: int, dim: int = -1, *args: Any, **kwargs: Any) -> bool:
    """Routers choose along the last dimension; any other top-k is not theirs."""
    return dim in (-1, input.dim() - 1)


def _pick(scores: Tensor, indices: Tensor) -> torch.return_types.topk:
    """What `torch.topk` returns, its values gathered: forward and replay must save the same tensors for backward."""
    return torch.return_types.topk((scores.gather(-1, indices), indices))
