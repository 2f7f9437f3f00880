"""The group of processes that work on one run: who this one is, work that the first does for all, sums, output."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .launch import OF_ACCELERATE, is_launched
from .peers import Watch

T = TypeVar("T")
PATIENCE = timedelta(hours=2)
"""For processes that wait while the first one loads, measures and converts; a dead one is found otherwise."""


def rank() -> int:
    return dist.get_rank() if together() else 0


def size() -> int:
    return dist.get_world_size() if together() else 1


def together() -> bool:
    """Whether this is one of a group of processes, if only of one."""
    return dist.is_available() and dist.is_initialized()


def device() -> torch.device:
    """Of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextlib.contextmanager
def joined(strategy: str | None, way_on: Callable[[], str]) -> Iterator[None]:
    """While open, this is one of the processes that a launcher started, which work together; without a strategy or a
    launcher it is alone. Only the first one prints.

    If one of them is gone, the others end with exit status 1, and the first of them that is left says so in one line.

    Args:
        strategy: `parallel.strategy` of the run.
        way_on: What is safe, and how to go on, for that line.
    """
    if strategy is None or not is_launched():
        yield
        return
    for name in OF_ACCELERATE:
        os.environ.pop(name, None)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    watch = Watch(rank(), size(), way_on)
    try:
        with contextlib.ExitStack() as stack:
            if rank():
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield
    except BaseException as error:
        watch.conclude(error)
        raise
    dist.barrier()
    watch.stop()
    dist.destroy_process_group()


def once(work: Callable[[], T]) -> T:
    """What `work` returns in the first process, in all of them; its error too."""
    if size() == 1:
        return work()
    box: list[Any] = [None]
    if rank() == 0:
        try:
            box = [(work(), None)]
        except Exception as error:
            box = [(None, sendable(error))]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    value, error = box[0]
    if error is not None:
        error.everywhere = True  # each process says it, or none needs to
        raise error
    return value


def settled(work: Callable[[], T]) -> Callable[[], T]:
    """`work`, done now: what it returned or raised comes when the result is called, as often as that is."""
    try:
        value = work()
    except Exception as error:
        found = error

        def fail() -> T:
            raise found

        return fail
    return lambda: value


def sendable(error: Exception) -> Exception:
    """An error that the other processes can raise as well."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def totals(*values: float) -> list[float]:
    """Each value's sum over all processes."""
    if size() == 1:
        return list(values)
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found)
    return found.tolist()


def summed(values: torch.Tensor) -> torch.Tensor:
    """A tensor's sum over all processes; it is left as it was."""
    if size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def largest(value: float) -> float:
    """Over all processes."""
    if size() == 1:
        return value
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def from_all(value: T) -> list[T]:
    """Every process's value, in the order of ranks, in all of them."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found
