"""Bytes of live tensors while a step runs on fake tensors, or on real ones: by part, at every phase's peak."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

FORWARD = ("embedding", "forward", "loss")
"""Phases before backward: up to the first decoder layer (masks are made there), the layers, head and loss."""


PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "streams",
    "stream_gradients",
    "side_bits_and_routing",
    "stored_activations",
    "loss",
    "gathered",
    "exchange",
    "working_set",
)
"""What a live tensor can be for. In order of precedence:

weights: parameters and buffers. optimizer: the optimizer's state. gradients: tensors that became a parameter's
`.grad`, and tensors of a fused expert parameter's shape made in backward, in its dtype, float32 or uint8 (a tile's
share before it is added up, and the sum over tiles). loss: everything else with a vocabulary dimension, a head's
gradient that the loss makes in forward too. streams: int32 tensors (b, T, D) or (b, T, D / 2), the streams and the
fixed-point values on their way into them. stream_gradients: the same in float32, made in backward of a reversible
model. side_bits_and_routing: uint8 and int16. stored_activations: made in forward and alive when backward begins.
gathered: parameters put together from the shards of all ranks (FSDP2), and what arrives of them. exchange: rows that
travel to the ranks of their experts, and those that come. working_set: the rest."""


class Storage:
    """One storage's life."""

    __slots__ = ("born", "dtype", "layer", "num_bytes", "operation", "part", "phase", "shape", "stored", "watcher")

    def __init__(self, num_bytes: int, operation: Any, shape: tuple[int, ...], dtype: torch.dtype):
        self.num_bytes, self.operation, self.shape, self.dtype = num_bytes, operation, shape, dtype
        self.part: str | None = None
        self.stored = False


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """A shard's is that of its local part."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            tensor = tensor.to_local()
    return tensor.untyped_storage()


def to_others(num_bytes: int) -> int:
    """Of bytes that go to all ranks in equal parts: those that do not stay."""
    return num_bytes - num_bytes // torch.distributed.get_world_size()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations return, from their birth until their death.

    A step has phases (`embedding`, `forward`, `loss`, ...), each with a peak of its own. What a storage was for may
    show only later (a tensor turns out to be a gradient), so the counter keeps the storages that were alive at each
    phase's peak and sorts them at the end.

    Args:
        sort: (storage) -> name of its part.
    """

    def __init__(self, sort: Callable[[Storage], str] = lambda storage: "working_set"):
        super().__init__()
        self.sort = sort
        self.live_bytes = 0
        self.clock = 0
        self.storages: dict[int, Storage] = {}
        self.phase = "before"
        self.layer = -1
        self.at_peak: dict[str, list[Storage]] = {}
        self.sent: Counter[str] = Counter()
        """Bytes that this rank sends to others, by operation: of gathers the others' parts, of sums as well (those to
        all ranks count twice), of rows those that do not stay."""
        self.begin("before")

    # --- phases ------------------------------------------------------------------------------------------------------

    def begin(self, phase: str) -> None:
        """Close the present phase and begin another. A phase that comes again keeps the larger of its peaks."""
        if hasattr(self, "peak_bytes_of_phase"):
            self.close()
        self.phase = phase
        self.peak_bytes_of_phase, self.peak_clock = self.live_bytes, self.clock
        self.dead_since_peak: list[Storage] = []

    def close(self) -> None:
        alive = [s for s in self.storages.values() if s.born <= self.peak_clock] + self.dead_since_peak
        assert sum(s.num_bytes for s in alive) == self.peak_bytes_of_phase
        known = self.at_peak.get(self.phase)
        if known is None or sum(s.num_bytes for s in known) < self.peak_bytes_of_phase:
            self.at_peak[self.phase] = alive

    def mark_stored(self) -> None:
        """Everything alive now was kept by forward for backward."""
        self.kept = list(self.storages.values())
        for storage in self.kept:
            storage.stored = True

    # --- counting ----------------------------------------------------------------------------------------------------

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """There is nothing compiled in a step, and keeping it out takes as long as counting."""
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:  # asked of fake tensors more often than all else together
            return args[0].fake_device
        if DTensor in types:
            return NotImplemented  # it asks for the same of its local part
        out = function(*args, **(kwargs or {}))
        if function.namespace in ("c10d", "fsdp"):
            self.follow(function, args, kwargs or {})
        for leaf in (out,) if isinstance(out, Tensor) else tree_iter(out):
            if isinstance(leaf, Tensor):
                self.add(leaf, function)
        return out

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            out = resize(storage, size)
            self.resize(storage)
            return out

        # FSDP2 keeps a gathered parameter's storage, and takes and gives its memory by resizing it.
        self.resizing = patch.object(torch.UntypedStorage, "resize_", resized)
        self.resizing.start()
        return super().__enter__()

    def __exit__(self, *raised: Any):
        self.resizing.stop()
        return super().__exit__(*raised)

    def follow(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what FSDP2 and an exchange of rows allocate for, and what they send."""
        name = function.__name__.split(".")[0]
        if name == "all_gather_copy_in":
            self.tag(args[1], "gathered")
        elif name == "split_with_sizes_copy":
            for tensor in kwargs["out"]:
                self.tag(tensor, "gathered")
        elif name == "chunk_cat":
            for tensor in (*args[0], kwargs["out"]):
                self.tag(tensor, "gradients")
        elif name == "_allgather_base_":
            self.sent["gathers"] += args[0].nbytes - args[1].nbytes
        elif name == "_reduce_scatter_base_":
            self.tag(args[0], "gradients")
            self.sent["reductions"] += args[1].nbytes - args[0].nbytes
        elif name == "allreduce_":
            self.sent["sums"] += sum(2 * to_others(tensor.nbytes) for tensor in args[0])
        elif name == "alltoall_base_":
            for tensor in args[:2]:
                self.tag(tensor, "exchange")
            self.sent["rows"] += to_others(args[1].nbytes)

    def add(self, tensor: Tensor, operation: Any = "given", elsewhere: bool = False) -> None:
        """Count a tensor's storage, if it is not counted yet; with `elsewhere`, as none: it stands for host memory."""
        storage = storage_of(tensor)
        if storage._cdata not in self.storages:
            size = 0 if elsewhere else storage.nbytes()
            self.begin_life(storage, Storage(size, operation, tuple(tensor.shape), tensor.dtype))

    def resize(self, storage: torch.UntypedStorage) -> None:
        """A counted storage has another size now: what it held has died, what it holds is born."""
        old = self.storages.get(storage._cdata)
        if old is not None:
            self.remove(storage._cdata)
            new = Storage(storage.nbytes(), old.operation, old.shape, old.dtype)
            new.part = old.part
            self.begin_life(storage, new)

    def begin_life(self, storage: torch.UntypedStorage, record: Storage) -> None:
        self.clock += 1
        record.born, record.phase, record.layer = self.clock, self.phase, self.layer
        key = storage._cdata
        self.storages[key] = record
        record.watcher = weakref.ref(storage, lambda _: self.remove(key))
        self.live_bytes += record.num_bytes
        if self.live_bytes > self.peak_bytes_of_phase:
            self.peak_bytes_of_phase, self.peak_clock = self.live_bytes, self.clock
            self.dead_since_peak = []

    def remove(self, key: int) -> None:
        record = self.storages.pop(key, None)
        if record is None:
            return
        self.live_bytes -= record.num_bytes
        if record.born <= self.peak_clock:
            self.dead_since_peak.append(record)

    def tag(self, tensor: Tensor, part: str) -> None:
        """Say what a counted tensor is for; the first word counts."""
        record = self.storages.get(storage_of(tensor)._cdata)
        if record is not None and record.part is None:
            record.part = part

    # --- results -----------------------------------------------------------------------------------------------------

    @property
    def peak_bytes(self) -> int:
        """The largest peak of the phases closed so far."""
        return max(sum(s.num_bytes for s in alive) for alive in self.at_peak.values())

    def stored_parts(self, layer: int) -> dict[str, int]:
        """Bytes per part of what a decoder layer's forward made and kept for backward."""
        total: Counter[str] = Counter()
        for storage in self.kept:
            if storage.layer == layer and storage.phase == "forward":
                total[self.part_of(storage)] += storage.num_bytes
        return dict(total)

    def part_of(self, storage: Storage) -> str:
        return storage.part or self.sort(storage)

    def parts(self, phase: str) -> dict[str, int]:
        """Bytes per part at the peak of a phase; they add up to it."""
        total: Counter[str] = Counter()
        for storage in self.at_peak[phase]:
            total[self.part_of(storage)] += storage.num_bytes
        return {part: total.pop(part, 0) for part in PARTS} | dict(total)

    def largest(self, phase: str, count: int = 12) -> list[dict[str, Any]]:
        """The largest groups of equal tensors alive at the peak of a phase."""
        total: Counter[tuple] = Counter()
        number: Counter[tuple] = Counter()
        for s in self.at_peak[phase]:
            operation, dtype = str(s.operation).removesuffix(".default"), str(s.dtype).removeprefix("torch.")
            key = (self.part_of(s), operation, s.shape, dtype)
            total[key] += s.num_bytes
            number[key] += 1
        return [
            {
                "bytes": size,
                "count": number[key],
                "part": key[0],
                "operation": key[1],
                "shape": key[2],
                "dtype": key[3],
            }
            for key, size in total.most_common(count)
        ]


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Reference cycles then stay, and a peak depends neither on when Python collects them nor hides that there are
    some."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def describe(storages: Iterable[Storage]) -> list[str]:
    return [f"{s.num_bytes} bytes, {s.dtype} {s.shape}, {s.operation}, {s.phase}" for s in storages]
