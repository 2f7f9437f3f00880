"""The rules' updates of one parameter, from its gradient and state, and what sharded parameters need for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import zeros as sharded_zeros

from ..ops import update
from ..ops.update import block_size, sum_segments

RULES = "adafactor", "adamw", "adamw8bit", "sgd"


class InOrder:
    """Updates one after the other on whichever streams they run: FSDP2 calls its hooks on one of its own, autograd the
    others on the current one, and what they share (the step's mask) is written by each."""

    def __init__(self):
        self.last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    def wait(self, parameter: Tensor) -> None:
        """The current stream goes on when the last update of a sharded parameter is done."""
        if isinstance(parameter, DTensor) and parameter.device.type == "cuda" and self.last is not None:
            stream, event = self.last
            current = torch.cuda.current_stream(parameter.device)
            if current != stream:
                current.wait_event(event)

    def note(self, parameter: Tensor) -> None:
        """An update has been given to the current stream."""
        if isinstance(parameter, DTensor) and parameter.device.type == "cuda":
            current = torch.cuda.current_stream(parameter.device)
            self.last = current, current.record_event()


@dataclass
class Job:
    """One parameter's update: local tensors, and what all rules' operations take alike."""

    parameter: Tensor
    group: dict[str, Any]
    state: dict[str, Tensor]
    weight: Tensor
    grad: Tensor
    step: int
    masks: tuple[Tensor, Tensor]
    lr: float
    decay: float
    rounding: tuple[bool, int, int, int]

    @property
    def targets(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.state.get("master")


def adafactor(job: Job, rows: Tensor, cols: Tensor) -> None:
    group, state, parameter = job.group, job.state, job.parameter
    new, eps, clip = 1 - (1 - job.step**-0.8), group["eps"], group["clip_threshold"]
    # A matrix or vector may lie on several shards; then its column means and its RMS are sums over them.
    split = bool(sharding(parameter)) and parameter.dim() < 3
    _, R, C = update.shape_of(job.grad)
    if split:
        R = parameter.shape[0] if parameter.dim() else 1
    row = mean = root = average = None
    norms, chunk_bytes = clip is not None, job.rounding[-1]
    if "row" in state:
        if split:
            cols = sum_over_shards(sum_segments(cols), parameter).unsqueeze(1)
        row = state["row"]
        mean, root, squares = update.factored_statistics(
            job.grad, rows, cols, row, state["col"], *job.masks, new, eps, R, norms, chunk_bytes
        )
    else:
        average = state["exp_avg_sq"]
        squares = update.unfactored_statistics(job.grad, average, *job.masks, new, eps, norms, chunk_bytes)
    if split and norms:
        squares = sum_over_shards(squares, parameter)
    largest = clip * math.sqrt(max(R * C, 1)) if norms else 0.0
    update.adafactor(
        *job.targets, state.get("exp_avg"), job.grad, row, mean, root, average, squares, *job.masks, job.lr,
        job.decay, largest, 1 - group["momentum"], eps, *job.rounding,
    )  # fmt: skip


def adamw(job: Job, books: Tensor | None) -> None:
    (beta1, beta2), state = job.group["betas"], job.state
    numbers = (
        job.lr / (1 - beta1**job.step),
        job.decay,
        1 - beta1,
        1 - beta2,
        1 / math.sqrt(1 - beta2**job.step),
        job.group["eps"],
    )
    if "exp_avg_root" in state:
        states = [state[n] for n in ("exp_avg", "exp_avg_scale", "exp_avg_root", "exp_avg_root_scale")]
        update.adamw8bit(*job.targets, *states, job.grad, books, *job.masks, *numbers, *job.rounding)
    else:
        states = state["exp_avg"], state["exp_avg_sq"]
        update.adamw(*job.targets, *states, job.grad, *job.masks, *numbers, *job.rounding)


def sgd(job: Job) -> None:
    momentum = job.group["momentum"]
    buffer = job.state.get("momentum")
    update.sgd(*job.targets, buffer, job.grad, *job.masks, job.lr, job.decay, momentum, *job.rounding)


def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharding(parameter: Tensor) -> list[Any]:
    return [p for p in getattr(parameter, "placements", ()) if not p.is_replicate()]


def sum_over_shards(value: Tensor, parameter: Tensor) -> Tensor:
    """The sum of `value`, which is overwritten, over the shards of a parameter."""
    for i, placement in enumerate(getattr(parameter, "placements", ())):
        if not placement.is_replicate():
            dist.all_reduce(value, group=parameter.device_mesh.get_group(i))
    return value


def zeros_for(parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype, sharded: bool) -> Tensor:
    if shape == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype)
    if isinstance(parameter, DTensor) and sharded:
        return sharded_zeros(*shape, dtype=dtype, device_mesh=parameter.device_mesh, placements=parameter.placements)
    return torch.zeros(shape, dtype=dtype, device=parameter.device)


def make_state(parameter: Tensor, group: dict[str, Any], state: dict[str, Any], master: bool) -> None:
    """What a rule keeps of a parameter, zeros at first, beside what `state` has already."""
    shape, rule, wide = parameter.shape, group["rule"], update.wide_dtype(parameter)

    def zeros(name: str, shape: tuple[int, ...] = shape, dtype: torch.dtype = wide, sharded: bool = True) -> None:
        if name not in state:
            state[name] = zeros_for(parameter, shape, dtype, sharded)

    if rule == "adafactor":
        if parameter.dim() > 1 and group["factored"]:
            zeros("row", shape[:-1])
            # The columns of a sharded matrix are the same on all shards, those of an expert belong to one.
            zeros("col", (*shape[:-2], shape[-1]), sharded=parameter.dim() > 2)
        else:
            zeros("exp_avg_sq")
        if group["momentum"]:
            zeros("exp_avg", dtype=torch.bfloat16)
    elif rule == "sgd" and group["momentum"]:
        zeros("momentum")
    elif rule == "adamw8bit" and (block := block_size(parameter)):
        for name in ("exp_avg", "exp_avg_root"):
            zeros(name, dtype=torch.uint8)
            # A scale of zero makes every code zero.
            zeros(f"{name}_scale", (*shape[:-1], shape[-1] // block))
    elif rule.startswith("adamw"):
        zeros("exp_avg")
        zeros("exp_avg_sq")
    if master and parameter.dtype != wide and "master" not in state:
        state["master"] = parameter.detach().to(wide)


def mix(*values: int) -> int:
    """A well-spread 63-bit seed from integers (SplitMix64)."""
    mask, state = (1 << 64) - 1, 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def of_copies() -> str:
    """What another gradient means where there are several processes."""
    if not dist.is_initialized() or dist.get_world_size() < 2:
        return ""
    return (
        " DistributedDataParallel averages gradients over processes once they are made, and by then each parameter "
        "has stepped in backward. Shard the model with FSDP2, or use OptimizerInBackward(in_backward=False)."
    )
