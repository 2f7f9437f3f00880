"""One rank of several, without the others: PyTorch's fake process group, whose exchanges move nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import _redistribute, debug

from ..parallel.shard import all_ranks


@contextlib.contextmanager
def one_of(size: int) -> Iterator[DeviceMesh | None]:
    """While open, this process is the first of so many ranks; of one rank, nothing is done and there is no mesh.

    The first rank has the largest shards where a dimension cannot be divided evenly.

    Raises:
        RuntimeError: A process group is there already. Plan before it is made.
    """
    if size == 1:
        yield None
        return
    if dist.is_initialized():
        raise RuntimeError("A rank is planned with a process group of its own, and there is one already. Plan first.")
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield all_ranks("cpu")
    finally:
        dist.destroy_process_group()
        forget_meshes()


def forget_meshes() -> None:
    """Clear what DTensor remembers by mesh. A group of as many ranks that comes later has an equal one, and this
    process may be another of its ranks, with shards of another size."""
    for name in ("_clear_python_sharding_prop_cache", "_clear_fast_path_sharding_prop_cache"):
        if hasattr(debug, name):  # the second came with the fast path
            getattr(debug, name)()
    _redistribute._gen_transform_infos.cache_clear()
