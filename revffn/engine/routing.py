"""Expert choices are recorded in forward and replayed in recomputation.

A router ends in `torch.topk`. Whatever the family computes around it (softmax or sigmoid, groups, correction bias,
renormalisation), the discrete choice is made there and nowhere else; so the choice is intercepted there, for every
architecture in the same way. transformers' experts interface comes too late for it: it is handed the indices with
their weights, and the weights of recorded indices are not to be had there. In replay the values are gathered from the
freshly computed scores with the recorded indices: the scores keep their gradient, and no token changes its expert
because a rebuilt state differs in its last bit.

The interception costs a Python call for every operation under it. So the engine only says what it is doing
(`routing`), and the interception opens where a family chooses (`intercept`): in the router's forward, in the block's
`route_tokens_to_experts`, or, where neither is known to, around the whole block.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ops.experts.reference import index_dtype

_TOPK = (torch.topk, torch.Tensor.topk)


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


# --- where it happens ------------------------------------------------------------------------------------------------

_ACTIVE: ContextVar[TorchFunctionMode | None] = ContextVar("revffn_routing", default=None)


@contextlib.contextmanager
def routing(mode: TorchFunctionMode | None) -> Iterator[None]:
    """While open, what routers choose is recorded or replayed by `mode`."""
    before = _ACTIVE.set(mode)
    try:
        yield
    finally:
        _ACTIVE.reset(before)


_WATCHER: ContextVar[Callable[[nn.Module, Tensor], None] | None] = ContextVar("revffn_watcher", default=None)


@contextlib.contextmanager
def watching(watcher: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """While open, `watcher` is told each choice: the module that chose (router or block), and the indices (tokens, K)
    in the type of `index_dtype`. In eval mode too; replays are not told."""
    before = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(before)


def _intercepted(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mode, watcher = _ACTIVE.get(), _WATCHER.get()
        if mode is None and watcher is not None:
            mode = RecordRouting([])
        if mode is None:
            return method(module, *args, **kwargs)
        with mode:
            result = method(module, *args, **kwargs)
        if watcher is not None and isinstance(mode, RecordRouting):
            watcher(module, mode.record[-1])  # groups of experts are chosen before experts
        return result

    return run


def choosing_method(cls: type) -> str | None:
    """The method of a class that calls top-k: a router's forward, or a block's `route_tokens_to_experts`."""
    for name in ("forward", "route_tokens_to_experts"):
        code = getattr(inspect.unwrap(getattr(cls, name, None) or id), "__code__", None)
        if code is not None and "topk" in code.co_names:
            return name
    return None


def intercepting(cls: type, method: str, name: str) -> type:
    """A subclass of a module's class whose `method` runs under the mode of `routing`."""
    return type(name, (cls,), {method: _intercepted(getattr(cls, method))})


def choosing_classes(modeling: ModuleType) -> dict[type, type]:
    """Every class of a family's modeling module that chooses experts, and its `intercepting` subclass."""
    found = {}
    for name, cls in vars(modeling).items():
        if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == modeling.__name__:
            method = choosing_method(cls)
            if method is not None:
                found[cls] = intercepting(cls, method, f"RevFFN{name}")
    return found


_MADE: dict[type, type] = {}
"""Intercepting classes of classes that are no family's."""


def intercept(block: nn.Module, router: nn.Module, classes: dict[type, type]) -> None:
    """Give a sparse block or its router the class that intercepts; if neither is known to choose, to the block: slower
    and as right.

    Args:
        classes: What `choosing_classes` found for the family. A class that was put in place of one of them, and is
            made from it, is intercepted in the same method.
    """
    found = False
    for part in (block, router):
        family = next((cls for cls in type(part).__mro__ if cls in classes), None)
        if family is not None:
            found, cls = True, type(part)
            part.__class__ = classes[cls] if cls is family else _made(cls, choosing_method(family))
    if not found:
        block.__class__ = _made(type(block), "forward")


def _made(cls: type, method: str) -> type:
    if cls in _MADE.values():
        return cls
    if cls not in _MADE:
        made = intercepting(cls, method, f"RevFFN{cls.__name__}")
        made.__module__ = __name__
        _MADE[cls] = globals()[made.__name__] = made  # found there when a model is pickled
    return _MADE[cls]
