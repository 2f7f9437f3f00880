"""Checkpoints of shards: every process writes its own (torch.distributed.checkpoint), and any number of processes
reads them, one too.

What has no tensors (the optimizer's step counters and groups) is in a JSON file beside them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ..files import StorageError, read_json
from ..optim import OptimizerInBackward
from .processes import together

SHARDS, COUNTERS = "shards", "optimizer.json"
WEIGHTS = "model."
"""In front of a weight's name."""


def has_shards(checkpoint: Path) -> bool:
    """Whether a checkpoint is one of shards."""
    return (checkpoint / SHARDS).is_dir()


def dtypes_of(checkpoint: Path) -> dict[str, torch.dtype]:
    """Of the weights in a checkpoint of shards, by name."""
    found = dcp.FileSystemReader(checkpoint / SHARDS).read_metadata().state_dict_metadata
    return {name.removeprefix(WEIGHTS): of.properties.dtype for name, of in found.items() if name.startswith(WEIGHTS)}


def save_shards(folder: Path, model: PreTrainedModel, optimizer: OptimizerInBackward | None) -> None:
    """Write the weights, and what the optimizer keeps of them, into `folder`; all processes take part.

    Raises:
        StorageError: A process could not write.
    """
    tensors = weights_of(model)
    if optimizer is not None:
        tensors |= states_of(optimizer)
    try:
        dcp.save(tensors, checkpoint_id=folder / SHARDS, no_dist=not together())
    except CheckpointException as error:
        raise StorageError(f"{folder / SHARDS} could not be written: {first_reason(error)}.") from None


def write_counters(folder: Path, optimizer: OptimizerInBackward) -> None:
    """The optimizer's groups, and the steps that each parameter has made; one process does it."""
    steps = {optimizer.name_of(p): state["step"] for p, state in optimizer.state.items()}
    left_out = "params", "in_backward"
    groups = [{k: v for k, v in group.items() if k not in left_out} for group in optimizer.param_groups]
    (folder / COUNTERS).write_text(json.dumps({"steps": steps, "groups": groups}) + "\n", encoding="utf-8")


def load_weights(checkpoint: Path, model: PreTrainedModel) -> None:
    """Read the weights into the model's own tensors, sharded or not; all processes take part.

    Raises:
        StorageError: They cannot be read.
    """
    load(checkpoint, weights_of(model))


def load_optimizer(checkpoint: Path, optimizer: OptimizerInBackward) -> None:
    """Read the optimizer's state, of shards or of a whole model; all processes take part.

    Raises:
        StorageError: It cannot be read.
    """
    if not has_shards(checkpoint):
        whole = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for place, parameter in enumerate(parameters):
            saved = whole["state"].get(place)
            if saved is not None:
                own = optimizer.state_of(parameter)
                for name, value in saved.items():
                    own[name] = divided(value, own[name]) if isinstance(value, Tensor) else value
        groups = whole["param_groups"]
    else:
        counters = read_json(checkpoint / COUNTERS)
        named = {optimizer.name_of(p): p for group in optimizer.param_groups for p in group["params"]}
        for name in counters["steps"]:
            optimizer.state_of(named[name])
        load(checkpoint, states_of(optimizer))
        for name, steps in counters["steps"].items():
            optimizer.state[named[name]]["step"] = steps
        groups = counters["groups"]
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update({k: v for k, v in saved.items() if k not in ("params", "in_backward", "param_names")})


@torch.no_grad()
def divided(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as the shards that `like` is."""
    if isinstance(like, DTensor):
        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)
    return whole.to(like.device)


def weights_of(model: PreTrainedModel) -> dict[str, Any]:
    return {f"{WEIGHTS}{name}": tensor for name, tensor in model.state_dict().items()}


def states_of(optimizer: OptimizerInBackward) -> dict[str, Any]:
    """Of every parameter that has some."""
    return {
        f"optimizer.{optimizer.name_of(p)}.{name}": value
        for p, state in optimizer.state.items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def load(checkpoint: Path, tensors: dict[str, Any]) -> None:
    try:
        dcp.load(tensors, checkpoint_id=checkpoint / SHARDS, no_dist=not together())
    except CheckpointException as error:
        raise StorageError(f"{checkpoint / SHARDS} cannot be read: {first_reason(error)}.") from None


def first_reason(error: CheckpointException) -> str:
    failures = error.failures
    rank = min(failures)
    failure = failures[rank]
    words = failure[0] if isinstance(failure, tuple) else failure
    return f"rank {rank}: {' '.join(str(words).split())[:200]}"
