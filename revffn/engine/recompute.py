"""A sublayer as it ran in forward, able to run again in backward on the same code path.

What it saves for backward is dropped in forward and made again by the same code; random state, autocast state and
expert choices are replayed. Of layers that are kept (`ReversibleConfig.kept_layers`) it is not dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .captured import paused
from .dense import fused_parts
from .routing import RecordRouting, ReplayRouting, routing


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Call it when the backward that runs now has ended. (DDP and FSDP use the same hook of autograd's engine.)"""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def carrier_like(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of one element's storage, expanded to `shape`, whose value nobody reads."""
    return torch.empty(1, dtype=dtype, device=device).expand(shape)


def zeros_like_carrier(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same for tensors that code of others sees: zeros."""
    return torch.zeros(1, dtype=dtype, device=device).expand(shape)


class StateMismatchError(RuntimeError):
    """A rebuilt state differs from the one of forward, or a walk was entered in the wrong order."""


class Evaluation:
    """A sublayer as it ran in forward, able to run again in backward on the same code path.

    In forward what it saves for backward is dropped (parameters are only referenced); `again` records what the same
    code saves the second time and hands each tensor to autograd once. Random state, autocast state and expert choices
    are replayed.

    Args:
        function: Called as `function(*carriers, *streams)`; returns a tuple of tensors.
        device_type: For autocast.
        uses_rng: Whether random numbers are drawn (dropout, router jitter).
        keeps: Keep what is saved, and the outputs: the first `again` runs nothing. Streams are not kept, for they may
            be written over; those that are rebuilt take their places.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        device: torch.device,
        uses_rng: bool,
        keeps: bool = False,
    ):
        self.function, self.device, self.uses_rng, self.keeps = function, device, uses_rng, keeps
        kind = device.type
        self.autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        self.saved: list[tuple[torch.Size, torch.dtype]] = []
        self.recomputed: list[Tensor | int | None] | None = None
        self.outputs: tuple[Tensor, ...] | None = None
        self.streams: tuple[Tensor, ...] = ()
        self.routing: list[Tensor] = []
        self.rng: list[Tensor] = []
        self.differentiable: list[bool] = []
        self.num_routing = 0

    def first(self, carriers: tuple[Tensor, ...], streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run in forward, saving nothing but references to parameters, or what is kept."""
        self.differentiable = [carrier.requires_grad for carrier in carriers]
        if self.keeps:
            self.recomputed, self.streams = [], streams
        if self.uses_rng:
            self.rng = [torch.get_rng_state()]
            if self.device.type == "cuda":
                self.rng.append(torch.cuda.get_rng_state(self.device))
        with (
            self.autocast_state(),
            fused_parts(self.device.type),
            routing(RecordRouting(self.routing)),
            torch.autograd.graph.saved_tensors_hooks(self.keep if self.keeps else self.drop, self.serve),
        ):
            outputs = self.function(*carriers, *streams)
        if self.keeps:
            self.outputs, self.streams = tuple(out.detach() for out in outputs), ()
        return outputs

    def again(
        self, side: Sequence[Tensor], *streams: Tensor, carriers: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, ...]:
        """Run in backward on rebuilt streams; afterwards the nodes of forward find what they had saved.

        `side`: what `side_tensors` handed over.
        """
        if self.outputs is not None:
            outputs, self.outputs = self.outputs, None
            self.recomputed = [streams[x] if isinstance(x, int) else x for x in self.recomputed]
            return outputs
        choices, rng = list(side[: self.num_routing]), side[self.num_routing :]
        self.recomputed = []
        if carriers is None:
            # They only give the values that are read a graph, where they had one in forward.
            carriers = tuple(
                carrier_like(s.shape, s.device, torch.float32).requires_grad_(needed)
                for s, needed in zip(streams, self.differentiable, strict=True)
            )
        with (
            torch.enable_grad(),
            self.rng_state(rng),
            self.autocast_state(),
            fused_parts(self.device.type),
            routing(ReplayRouting(choices)),
            torch.autograd.graph.saved_tensors_hooks(self.record, never_asked),
        ):
            outputs = self.function(*carriers, *streams)
        if len(self.recomputed) != len(self.saved):
            raise StateMismatchError(
                f"A sublayer saved {len(self.saved)} tensors in forward and {len(self.recomputed)} in recomputation: "
                "its code path depends on something that changed in between (grad mode, global flags, a module's "
                "attributes)."
            )
        return tuple(out.detach() for out in outputs)

    def value(self, rng: Sequence[Tensor], *streams: Tensor) -> tuple[Tensor, ...]:
        """Run without a graph, for an iteration: in forward and in backward the same streams give the same bits.

        `rng`: the states of random numbers, of which `side_tensors` hands over the last.
        """
        carriers = tuple(carrier_like(s.shape, s.device, torch.float32) for s in streams)
        with torch.no_grad(), paused(), self.rng_state(rng), self.autocast_state(), fused_parts(self.device.type):
            return self.function(*carriers, *streams)

    def side_tensors(self) -> tuple[Tensor, ...]:
        """Hand over what `again` needs beside the streams, for save_for_backward."""
        tensors = (*self.routing, *self.rng)
        self.num_routing = len(self.routing)
        self.routing, self.rng = [], []
        return tensors

    def drop(self, tensor: Tensor) -> Tensor | int:
        if isinstance(tensor, nn.Parameter):
            return tensor
        self.saved.append((tensor.shape, tensor.dtype))
        return len(self.saved) - 1

    def keep(self, tensor: Tensor) -> Tensor | int:
        handle = self.drop(tensor)
        if not isinstance(handle, Tensor):
            self.recomputed.append(as_kept(tensor, self.streams))
        return handle

    def serve(self, handle: Tensor | int) -> Tensor:
        if isinstance(handle, Tensor):
            return handle
        if self.recomputed is None or self.recomputed[handle] is None:
            raise StateMismatchError(
                "Backward entered a reversible layer without passing through the model's last hidden state, or twice "
                "in one walk. Make the loss depend on the model's output; walk again only with retain_graph=True."
            )
        # Served once and forgotten: otherwise the whole layer's activations would live until its last node has run.
        tensor, self.recomputed[handle] = self.recomputed[handle], None
        return tensor

    def record(self, tensor: Tensor) -> int:
        if not isinstance(tensor, nn.Parameter):
            place = len(self.recomputed)
            if place < len(self.saved) and self.saved[place] != (tensor.shape, tensor.dtype):
                raise StateMismatchError(
                    f"Recomputation saved {tensor.dtype} {tuple(tensor.shape)} where forward saved "
                    f"{self.saved[place][1]} {tuple(self.saved[place][0])}."
                )
            self.recomputed.append(tensor)
        # The graph of this run is never walked and holds no tensor: its nodes get 0 for each. (Returning the tensor
        # would tie saved outputs into an uncollectable cycle.)
        return 0

    def autocast_state(self) -> contextlib.AbstractContextManager:
        enabled, dtype = self.autocast
        if not enabled and not torch.is_autocast_enabled(self.device.type):
            return contextlib.nullcontext()
        # Without the weight cache: it would keep a low-precision copy of every weight alive, and survive optimizer
        # steps.
        return torch.autocast(self.device.type, dtype=dtype, enabled=enabled, cache_enabled=False)

    @contextlib.contextmanager
    def rng_state(self, states: Sequence[Tensor]) -> Iterator[None]:
        if not states:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.set_rng_state(states[0])
            if devices:
                torch.cuda.set_rng_state(states[1], self.device)
            yield


def as_kept(tensor: Tensor, streams: Sequence[Tensor]) -> Tensor | int:
    """What stands for a saved tensor until backward, without the graph that is being made: of a stream its number, for
    backward has it again. Of a part of one a copy, because streams are written over."""
    for number, stream in enumerate(streams):
        if tensor.untyped_storage()._cdata == stream.untyped_storage()._cdata:
            of_both = [(x.dtype, x.shape, x.stride(), x.storage_offset()) for x in (tensor, stream)]
            return number if of_both[0] == of_both[1] else tensor.detach().clone()
    return tensor.detach()


def never_asked(handle: Any) -> Tensor:
    raise AssertionError("the graph of a recomputation is never walked")
