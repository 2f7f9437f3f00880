"""Expert parallelism: each process holds some of a layer's experts, and tokens travel to them and back.

A rank's rows, sorted by expert, are exchanged with all ranks (two all-to-all of rows and two of numbers in forward,
the same again in recomputation, and the reverse for gradients). Recomputation replays the recorded choices, so the
same rows go to the same ranks in the same order, and every rebuilt state is bit for bit.

All ranks take part in every exchange, so they must run the same number of tiles: batches of one shape.
"""

# W = ranks, E = experts, T = tokens, K = experts per token, S = T * K rows sorted by expert, R = rows received,
# D = hidden size

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from ..ops.experts import expert_combine, expert_gather, expert_sort


class Gather(Function):
    """(T, D) -> (S, D), a row for every choice, sorted by expert."""

    @staticmethod
    def forward(ctx, x: Tensor, place: Tensor):
        ctx.save_for_backward(place)
        return expert_gather(x, place)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (place,) = ctx.saved_tensors
        return expert_combine(grad.contiguous(), place, None, None, None), None


class Combine(Function):
    """(S, D) -> (T, D), the sum of a token's rows in the order of its choices."""

    @staticmethod
    def forward(ctx, rows: Tensor, place: Tensor):
        ctx.save_for_backward(place)
        return expert_combine(rows, place, None, None, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (place,) = ctx.saved_tensors
        return expert_gather(grad.contiguous(), place), None


class Sort(Function):
    """(T, K) -> (S, 1), the routing weights in the order of the rows."""

    @staticmethod
    def forward(ctx, weight: Tensor, order: Tensor, place: Tensor):
        ctx.save_for_backward(place)
        return weight.flatten()[order.long()].unsqueeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (place,) = ctx.saved_tensors
        return grad.flatten()[place.long()], None, None


class Travel(Function):
    """Rows to the ranks that `sent` counts, and from them as `received` does."""

    @staticmethod
    def forward(ctx, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup):
        ctx.way, ctx.group = (sent, received), group
        return travel(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        sent, received = ctx.way
        return travel(grad, received, sent, ctx.group), None, None, None


def travel(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


class LocalPart(Function):
    """A sharded parameter's part of this rank. Its gradient is of all ranks' tokens, whose losses are averaged: as
    FSDP2 divides the others', this divides by the number of ranks."""

    @staticmethod
    def forward(ctx, parameter: DTensor):
        ctx.set_materialize_grads(False)
        ctx.mesh, ctx.placements = parameter.device_mesh, parameter.placements
        ctx.shape, ctx.stride = parameter.shape, parameter.stride()
        return parameter.to_local()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None):
        if grad is None:
            return None
        grad.div_(ctx.mesh.size())  # made for this node alone
        return DTensor.from_local(grad, ctx.mesh, ctx.placements, run_check=False, shape=ctx.shape, stride=ctx.stride)


class Exchange:
    """The ranks among which a layer's experts are divided, in equal parts in their order.

    Args:
        group: The ranks.
        num_experts: Of the layer, a multiple of the number of ranks.
    """

    share = 1.0
    """Of fake tensors, which know no numbers: rows that this rank receives, as a part of what it sends."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int):
        self.group, self.num_experts = group, num_experts

    def parameters(self, experts: nn.Module) -> dict[str, Tensor]:
        """This rank's part of them."""
        return {name: LocalPart.apply(p) for name, p in experts.named_parameters(recurse=False)}

    def sizes(self, counts: Tensor, theirs: Tensor, num_rows: int) -> tuple[list[int], list[int]]:
        """Rows that go to each rank, and that come from it: (W, E / W) of both -> two lists of W.

        Fake tensors stand for choices that are spread evenly, or for `share` times as many that come here.
        """
        if isinstance(counts, FakeTensor):
            size = counts.shape[0]
            even = [num_rows * (rank + 1) // size - num_rows * rank // size for rank in range(size)]
            return even, [round(self.share * number) for number in even]
        sent, received = torch.stack([counts.sum(1), theirs.sum(1)]).tolist()
        return sent, received

    def run(
        self, x: Tensor, index: Tensor, weight: Tensor, local: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """(T, D), (T, K), (T, K) -> (T, D); `local` is what this rank's experts make of rows: (R, D), (R, 1), (R, 1)
        -> (R, D)."""
        size = dist.get_world_size(self.group)
        order, place, offs, _ = expert_sort(index.contiguous(), self.num_experts)
        counts = torch.diff(offs, prepend=offs.new_zeros(1)).view(size, -1)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self.group)
        sent, received = self.sizes(counts, theirs, place.numel())
        mine = torch.arange(theirs.shape[1], device=theirs.device).repeat(size)
        rows = Travel.apply(Gather.apply(x.contiguous(), place), sent, received, self.group)
        weights = Travel.apply(Sort.apply(weight, order, place), sent, received, self.group)
        experts = mine.repeat_interleave(theirs.flatten(), output_size=sum(received)).unsqueeze(1)
        if not sum(received):
            # Parameters get their gradient, zero, on every rank: what they do with it, all ranks do together.
            pad = nn.functional.pad
            made = local(pad(rows, (0, 0, 0, 1)), pad(experts, (0, 0, 0, 1)), pad(weights, (0, 0, 0, 1)))[:0]
        else:
            made = local(rows, experts, weights)
        return Combine.apply(Travel.apply(made, received, sent, self.group), place)
