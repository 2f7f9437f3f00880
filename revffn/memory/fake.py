"""Fake tensors, sooner: an operation that has been seen with tensors of the same metadata is answered from a table.

A step repeats a few hundred operations thousands of times. `FakeTensorMode` works out, and looks up in its own cache,
at most of a millisecond each; here the key is what decides the result's metadata and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Arguments that stand for themselves in a key."""


class Unknown(Exception):
    """An argument or a result that the table has no words for."""


class RememberingFakeTensorMode(FakeTensorMode):
    """`FakeTensorMode` that remembers results: which argument each is, or a view of, or else its metadata.

    The table lasts as long as the process, like that of `FakeTensorMode`, which still gives the first answer and those
    that the table cannot hold.
    """

    table: dict[tuple, Any] = {}

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given: list[FakeTensor] = []
        try:
            key = (func, torch.get_default_dtype(), describe(args, given), describe(kwargs or {}, given))
        except Unknown:
            return super().dispatch(func, types, args, kwargs or {})
        known = self.table.get(key)
        if known is not None:
            return self.make(known, given)
        out = super().dispatch(func, types, args, kwargs or {})
        again: list[FakeTensor] = []
        try:
            # What changes its arguments' metadata (resize_, set_) is not known by them.
            if (func, key[1], describe(args, again), describe(kwargs or {}, again)) == key:
                self.table[key] = recipe(out, given)
        except Unknown:
            pass
        return out

    def make(self, known: Any, given: list[FakeTensor]) -> Any:
        """What `recipe` described."""
        kind = known[0]
        if kind == "fresh":
            _, shape, stride, dtype, device = known
            return FakeTensor(self, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)
        if kind == "view":
            _, index, offset, shape, stride, dtype, device = known
            view = torch.empty(0, dtype=dtype, device="meta")
            view.set_(given[index].untyped_storage(), offset, shape, stride)
            return FakeTensor(self, view, device)
        if kind == "argument":
            return given[known[1]]
        if kind == "plain":
            return known[1]
        return known[1](self.make(each, given) for each in known[2])


def describe(value: Any, given: list[FakeTensor]) -> Any:
    """A value as a part of a key; its tensors are added to `given`.

    Raises:
        Unknown: It has no words.
    """
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.layout is not torch.strided or value.dtype.is_complex:
            raise Unknown
        given.append(value)
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device
    if kind in PLAIN:
        return kind, value
    if kind in (tuple, list):
        return kind, tuple([describe(each, given) for each in value])
    if kind is dict or isinstance(value, dict):
        return tuple([(name, describe(each, given)) for name, each in value.items()])
    raise Unknown


def recipe(out: Any, given: list[FakeTensor]) -> Any:
    """How a result is made again from arguments with the same metadata.

    Raises:
        Unknown: It has no words.
    """
    kind = type(out)
    if kind in (tuple, list):
        made = [recipe(each, given) for each in out]
        fresh = [each.untyped_storage()._cdata for each, how in zip(out, made, strict=True) if how[0] == "fresh"]
        if len(set(fresh)) < len(fresh):
            raise Unknown
        return "several", kind, made
    if kind in PLAIN:
        return "plain", out
    if kind is not FakeTensor or out.constant is not None or out.layout is not torch.strided or out.dtype.is_complex:
        raise Unknown
    for index, tensor in enumerate(given):
        if out is tensor:
            return "argument", index
    metadata = tuple(out.shape), out.stride(), out.dtype, out.fake_device
    storage = out.untyped_storage()
    of_it = [i for i, tensor in enumerate(given) if tensor.untyped_storage()._cdata == storage._cdata]
    if len(of_it) == 1:
        return "view", of_it[0], out.storage_offset(), *metadata
    again = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="meta")
    if of_it or out.storage_offset() or storage.nbytes() != again.untyped_storage().nbytes():
        raise Unknown
    return "fresh", *metadata
