"""The update rules of the optimizer in backward: one parameter's update, chunk by chunk, from its complete gradient.

A rule is a generator of (chunk, update, factor): a slice of the parameter, the direction u in float32 and what it is
still to be multiplied by. It reads the gradient and moves its own state; the optimizer writes the weights. `optim.py`
says what the rules compute and where they differ from the papers.

Every rule is masked: once a gradient was not finite, `job.keep` is 0 and `job.bad` is True, and all states come out as
they went in. Nothing is read back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor

# S = matrices of a parameter (E for experts, 1 for a matrix or a vector), R = rows, C = columns

Chunk = tuple[slice, slice]
Updates = Iterator[tuple[Chunk, Tensor, Any]]
"""A chunk (slices of S and of R), its update, ours to overwrite, and a factor that is still to be multiplied in."""
QUANTISED_FROM = 4096
"""adamw8bit keeps parameters with fewer elements, and vectors, in float32."""


def stochastic_round(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """float32 to bf16, up or down with probabilities that make the mean exact. `x` is overwritten.

    16 random bits are added to the 16 that bf16 lacks, and what carries over stays. A value that bf16 holds exactly
    does not move.
    """
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return x.view(torch.int32).add_(noise).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def matrices(tensor: Tensor) -> Tensor:
    """The local part of a parameter as (S, R, C), a view."""
    tensor = local_part(tensor)
    if tensor.dim() < 2:
        return tensor.view(1, 1, tensor.numel())
    return tensor.unsqueeze(0) if tensor.dim() == 2 else tensor.flatten(0, -3) if tensor.dim() > 3 else tensor


def sharding(parameter: Tensor) -> list[Any]:
    return [p for p in getattr(parameter, "placements", ()) if not p.is_replicate()]


@dataclass
class Job:
    """A parameter whose gradient is complete, seen as matrices (S, R, C), read and written chunk by chunk."""

    parameter: Tensor
    grad: Tensor
    weight: Tensor
    group: dict[str, Any]
    chunk_bytes: int
    state: dict[str, Any] | None = None
    keep: Tensor | None = None
    bad: Tensor | None = None
    scale: Tensor | None = None
    generator: torch.Generator | None = None
    code_books: dict[str, tuple[Tensor, Tensor]] | None = None

    def __post_init__(self):
        self.dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.shard_groups = [
            self.parameter.device_mesh.get_group(i)
            for i, placement in enumerate(getattr(self.parameter, "placements", ()))
            if not placement.is_replicate()
        ]
        self.limit = max(self.chunk_bytes // 4, 1)
        # A matrix or vector may lie on several shards; then its column means and its RMS are sums over them.
        self.split = bool(self.shard_groups) and self.parameter.dim() < 3
        self.whole = self.weight[:1].numel() <= self.limit and not self.split

    def chunks(self) -> Iterator[Chunk]:
        """Slices (of S, of R) that cover the parameter: several whole matrices each, or some rows of one matrix."""
        S, R, C = self.weight.shape
        if not self.weight.numel():
            return
        if R * C <= self.limit:
            num = max(self.limit // (R * C), 1)
            yield from ((slice(s, s + num), slice(0, R)) for s in range(0, S, num))
        else:
            num = max(self.limit // C, 1)
            yield from ((slice(s, s + 1), slice(r, r + num)) for s in range(S) for r in range(0, R, num))

    def sum_over_shards(self, value: Tensor) -> Tensor:
        for group in self.shard_groups:
            dist.all_reduce(value, group=group)
        return value

    def read_grad(self, chunk: Chunk) -> Tensor:
        """A copy of the gradient in float32, clipped by the global norm, zero once a gradient was not finite."""
        grad = self.grad[chunk].to(self.dtype, copy=True).masked_fill_(self.bad, 0.0)
        return grad if self.scale is None else grad.mul_(self.scale)

    def round(self, value: Tensor) -> Tensor:
        """bf16, stochastically if the optimizer rounds so; may overwrite `value`."""
        return value if self.generator is None else stochastic_round(value, self.generator)


def sum_of_squares(job: Job) -> Tensor:
    total = torch.zeros((), dtype=job.dtype, device=job.grad.device)
    for chunk in job.chunks():
        total += torch.linalg.vector_norm(job.grad[chunk], dtype=job.dtype).square()
    return total


def row_and_column_sums(job: Job) -> tuple[Tensor, Tensor]:
    """Sums of squared gradients along the rows (S, R) and along the columns (S, C) of the local matrices."""
    S, R, C = job.grad.shape
    row_SR = torch.zeros(S, R, dtype=job.dtype, device=job.grad.device)
    col_SC = torch.zeros(S, C, dtype=job.dtype, device=job.grad.device)
    for chunk in job.chunks():
        square = job.grad[chunk].to(job.dtype, copy=True).square_()
        row_SR[chunk] = square.sum(-1)
        col_SC[chunk[0]] += square.sum(-2)
    return row_SR, col_SC


def _adafactor(job: Job, sums: tuple[Tensor, Tensor] | None) -> Updates:
    group, (S, R, C) = job.group, job.weight.shape
    new = 1 - (1 - job.state["step"] ** -0.8)
    # The floor matters only for a state that is still zero because its first gradient was not finite.
    floor, scale = max(group["eps"], 1e-38), 1.0 if job.scale is None else job.scale
    rows = R
    if job.split:
        rows = job.parameter.shape[0] if job.parameter.dim() == 2 else 1
    if sums is None:
        average = matrices(job.state["exp_avg_sq"])
        for chunk in job.chunks():
            average[chunk].lerp_(job.read_grad(chunk).square_().add_(group["eps"]), job.keep * new)

        def direction(chunk: Chunk) -> Tensor:
            return job.read_grad(chunk).mul_(average[chunk].clamp_min(floor).rsqrt_())
    else:
        if job.split:
            job.sum_over_shards(sums[1])
        row, col = local_part(job.state["row"]).view(S, R), local_part(job.state["col"]).view(S, C)
        for kept, total, num in ((row, sums[0], C), (col, sums[1], rows)):
            mean = total.mul_(scale).mul_(scale).div_(num).add_(group["eps"])
            kept.copy_(torch.where(job.bad, kept, torch.lerp(kept, mean, new)))
        # v_ij = row_i col_j / mean(row), and mean(row) = mean(col), which every shard knows.
        mean_S1 = col.mean(-1, keepdim=True).clamp_min_(floor)
        row_root = (row.clamp_min(floor) / mean_S1).rsqrt_().unsqueeze(-1)
        col_root = col.clamp_min(floor).rsqrt_().unsqueeze(-2)

        def direction(chunk: Chunk) -> Tensor:
            return job.read_grad(chunk).mul_(row_root[chunk]).mul_(col_root[chunk[0]])

    def norm(update: Tensor) -> Tensor:
        return torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)

    largest = None
    if group["clip_threshold"] is not None:
        count = job.parameter.numel() if job.split else R * C
        largest = group["clip_threshold"] * math.sqrt(max(count, 1))
        norm_S11 = torch.zeros(S, 1, 1, dtype=job.dtype, device=job.grad.device)
        if not job.whole:
            for chunk in job.chunks():
                norm_S11[chunk[0]] += norm(direction(chunk)).square()
            if job.split:
                job.sum_over_shards(norm_S11)
            norm_S11.sqrt_()
    for chunk in job.chunks():
        update, factor = direction(chunk), 1.0
        if largest is not None:
            factor = 1 / ((norm(update) if job.whole else norm_S11[chunk[0]]) / largest).clamp_min(1.0)
        if group["momentum"]:
            # Of updates without the learning rate, so that a schedule acts at once; rounded as the weights are.
            kept = matrices(job.state["exp_avg"])[chunk]
            average_update = kept.to(job.dtype).lerp_(update.mul_(factor), job.keep * (1 - group["momentum"]))
            kept.copy_(job.round(update.copy_(average_update)) if job.dtype == torch.float32 else average_update)
            update, factor = average_update, 1.0
        yield chunk, update, factor
        del update


def _adamw(job: Job, sums: None) -> Updates:
    group, state = job.group, job.state
    (beta1, beta2), step = group["betas"], state["step"]
    correction = math.sqrt(1 - beta2**step)
    names = [name for name in ("exp_avg", "exp_avg_sq", "exp_avg_root") if name in state]
    kept = {name: matrices(value) for name, value in state.items() if name.startswith("exp_avg")}
    in_8_bits = "exp_avg_root" in state
    for chunk in job.chunks():
        grad = job.read_grad(chunk)
        if in_8_bits:
            m, v = (_dequantise(job, name, kept, chunk) for name in names)
            v.square_()
        else:
            m, v = (kept[name][chunk] for name in names)
        m.lerp_(grad, job.keep * (1 - beta1))
        v.mul_(1 - job.keep * (1 - beta2)).addcmul_(grad, grad, value=1 - beta2)
        if in_8_bits:
            # The root, not the square, has the range that 8 bits can hold: v of an element 2000 times smaller than the
            # largest of its block would become 0 while its m does not, and m / eps is no update.
            root = v.sqrt_()
            _quantise(job, "exp_avg", kept, chunk, m)
            _quantise(job, "exp_avg_root", kept, chunk, root)
        else:
            root = torch.sqrt(v, out=grad)
        update = torch.div(m, root.div_(correction).add_(group["eps"]), out=root)
        # Here and below: nothing of a chunk outlives it.
        del grad, m, v, root
        yield chunk, update, 1 / (1 - beta1**step)
        del update


def _sgd(job: Job, sums: None) -> Updates:
    momentum = job.group["momentum"]
    for chunk in job.chunks():
        update = job.read_grad(chunk)
        if momentum:
            buffer = matrices(job.state["momentum"])[chunk]
            update.copy_(buffer.mul_(1 - job.keep * (1 - momentum)).add_(update))
        yield chunk, update, 1.0
        del update


UPDATES: dict[str, Callable[[Job, Any], Updates]] = {
    "adafactor": _adafactor,
    "adamw": _adamw,
    "adamw8bit": _adamw,
    "sgd": _sgd,
}


# --- 8 bits ----------------------------------------------------------------------------------------------------------


def make_code_books(device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """The 256 numbers that codes stand for (signed for m, unsigned for the root) and the 255 midpoints of them."""
    try:
        from torchao.optim.quant_utils import create_dynamic_map
    except ImportError as error:
        raise ImportError("rule='adamw8bit' needs torchao: pip install torchao, or use rule='adafactor'.") from error
    with unset_fake_temporarily():  # torchao reads numbers off a tensor, which a fake one has not
        books = {"exp_avg": create_dynamic_map(signed=True), "exp_avg_root": create_dynamic_map(signed=False)}
    midpoints = {name: [(a + b) / 2 for a, b in pairwise(book)] for name, book in books.items()}
    return {n: (torch.tensor(b, device=device), torch.tensor(midpoints[n], device=device)) for n, b in books.items()}


def block_size(parameter: Tensor) -> int:
    """Elements that share a scale: the largest power of two up to 256 that divides a row; 0 keeps float32."""
    block = math.gcd(parameter.shape[-1], 256) if parameter.dim() > 1 else 0
    return block if block >= 32 and parameter.numel() >= QUANTISED_FROM else 0


def _dequantise(job: Job, name: str, kept: dict[str, Tensor], chunk: Chunk) -> Tensor:
    scale = kept[f"{name}_scale"][chunk]
    values = job.code_books[name][0][kept[name][chunk].int()]
    values.view(*scale.shape, -1).mul_(scale.unsqueeze(-1))
    return values


def _quantise(job: Job, name: str, kept: dict[str, Tensor], chunk: Chunk, value: Tensor) -> None:
    codes, scale = kept[name][chunk], kept[f"{name}_scale"][chunk]
    blocks = value.view(*scale.shape, -1)
    largest = torch.linalg.vector_norm(blocks, math.inf, dim=-1).clamp_min_(1e-12)
    new = torch.bucketize(blocks / largest.unsqueeze(-1), job.code_books[name][1], out_int32=True, right=True)
    codes.copy_(torch.where(job.bad, codes, new.view(codes.shape).to(torch.uint8)))
    scale.copy_(torch.where(job.bad, scale, largest))
