"""Weights in host memory: two decoder layers at a time on the device, copied ahead.

A walk touches every layer once forward and once backward, whatever the batch. So the layers' weights, and the
optimizer's states of them, can live in pinned host memory: layer k computes out of one of two slots on the device
while layer k + 1 (backward: k - 1) is on its way into the other. In backward the optimizer has stepped when the walk
leaves the layer; weights and states are then copied back. Embedding, head and final norm stay on the device.

The copies run on streams of their own, one for each direction. Slots are allocated once. Only the place of a value
changes, never the value: training is bit for bit what it is with everything on the device.

A walk is needed for gradients (training mode of a converted model). Not supported: DDP, FSDP2.

What others do: DeepSpeed ZeRO-Infinity (https://arxiv.org/abs/2104.07857) streams layers for each micro-batch and
steps on the CPU; here the whole batch passes a layer at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from .recompute import at_end_of_backward

ALIGNMENT = 256
"""Bytes; what a caching allocator gives, and more than any kernel asks for."""
NUM_SLOTS = 2
BLOCK_BYTES = 4 * 2**30
"""Most that is pinned at once. PyTorch rounds pinned memory up to a power of two; one block for several tensors loses
less by that than each of them would."""


def num_bytes(tensors: list[Tensor]) -> int:
    """What a slot for these tensors takes."""
    return sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)


def carve(buffer: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Views into a uint8 buffer with the tensors' shapes and dtypes."""
    views, start = [], 0
    for tensor in tensors:
        views.append(buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return views


def pinned_bytes(size: int) -> int:
    """What PyTorch's allocator takes for so many bytes of pinned memory."""
    return 1 << max(0, size - 1).bit_length()


def blocks(tensors: list[Tensor], limit: int = BLOCK_BYTES) -> list[list[Tensor]]:
    """Tensors in their order, in groups that fit `limit` bytes (a larger one has a group of its own)."""
    groups: list[list[Tensor]] = []
    for tensor in tensors:
        if groups and num_bytes([*groups[-1], tensor]) <= limit:
            groups[-1].append(tensor)
        else:
            groups.append([tensor])
    return groups


@torch.no_grad()
def into_blocks(parameters: list[nn.Parameter], pin: bool) -> None:
    """Move parameters into few blocks of (pinned) host memory."""
    for group in blocks(parameters):
        block = torch.empty(num_bytes(group), dtype=torch.uint8, pin_memory=pin)
        for parameter, view in zip(group, carve(block, group), strict=True):
            parameter.data = view.copy_(parameter.data)


def layer_states(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> list[tuple[dict[str, Any], str]]:
    """Where an optimizer keeps the tensors it has of some parameters."""
    states = (optimizer.state[p] for p in parameters if p in optimizer.state)
    return [(s, name) for s in states for name, value in s.items() if isinstance(value, Tensor) and value.dim()]


class Slot:
    """Room for one layer on the device."""

    def __init__(self, size: int, device: torch.device):
        self.weights = torch.empty(size, dtype=torch.uint8, device=device)
        self.states = self.weights[:0]
        self.layer: int | None = None
        """Whose weights are in it, or on their way."""
        self.with_states = False
        self.filled: torch.cuda.Event | None = None
        """The copy into the slot has ended."""
        self.free: torch.cuda.Event | None = None
        """Nothing reads the slot any more."""


class HostWeights:
    """Keeps the weights of a model's decoder layers in host memory.

        store = HostWeights(model, device="cuda")          # a converted model, on the CPU
        optimizer = OptimizerInBackward(parameter_groups(model, 0.0), lr=1e-5)
        store.keep_states_of(optimizer)
        loss = model(**batch).loss; loss.backward(); optimizer.step()

    The rest of the model is moved to the device, and later `model.to(device)` leaves the layers where they are.
    Between steps parameters and states are ordinary CPU tensors: `state_dict`, `save_pretrained` and
    `load_state_dict` work as usual. A gradient that no optimizer took in backward is moved to the host and added up
    there, for any optimizer. Generating text copies all layers for every token.

    Args:
        model: Has its decoder layers in `model.model.layers`; changed in place.
        device: Where layers run; the model's own by default. With "cpu" the same copies are made within host memory.

    Raises:
        ValueError: The model keeps its weights in host memory already.
    """

    def __init__(self, model: PreTrainedModel, device: str | torch.device | None = None):
        self.model, self.device = model, torch.device(model.device if device is None else device)
        self.layers = list(model.model.layers)
        if any("_apply" in layer.__dict__ for layer in self.layers):
            raise ValueError("The model keeps its weights in host memory already. Call remove() of that HostWeights.")
        self.optimizer: Any = None
        is_cuda = self.device.type == "cuda"
        self.to_device = torch.cuda.Stream(self.device) if is_cuda else None
        self.to_host = torch.cuda.Stream(self.device) if is_cuda else None
        self.in_backward = False
        self.in_use: set[int] = set()
        self.slots: list[Slot] = []
        self.hooks: list[Any] = []
        for index, layer in enumerate(self.layers):
            layer._apply = partial(self.stay, layer)
            self.hooks += [
                layer.register_forward_pre_hook(partial(self.enter, index), with_kwargs=True),
                layer.register_forward_hook(partial(self.leave, index)),
            ]
        self.refresh()

    # --- where things are ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over parameters that were added to layers (by `convert`), and what was moved to the device since."""
        self.parameters = [list(layer.parameters()) for layer in self.layers]
        everything = [p for parameters in self.parameters for p in parameters]
        if self.device.type != "cuda":
            for parameter in everything:
                parameter.data = parameter.data.cpu()
        else:
            into_blocks([p for p in everything if not p.is_pinned()], pin=True)
        self.host = [[p.data for p in parameters] for parameters in self.parameters]
        for layer in self.layers:
            for module in layer.modules():
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else buffer.to(self.device)
        if self.model.device.type != self.device.type:  # fake tensors cannot be moved, even to where they are
            self.model.to(self.device)
        size = max(num_bytes(tensors) for tensors in self.host)
        if not self.slots or self.slots[0].weights.numel() != size:
            self.slots = [Slot(size, self.device) for _ in range(min(NUM_SLOTS, len(self.layers)))]
            for slot in self.slots:
                slot.free = self.mark()  # what the allocator hands out may still be read by kernels under way

    def on_host(self, tensor: Tensor) -> Tensor:
        """A state in pinned memory, if copies are to run beside computation; itself where it is there already."""
        if self.device.type != "cuda" or tensor.is_pinned():
            return tensor.cpu()
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)

    def stay(self, layer: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
        """Stands in for `layer._apply`: `model.to(device)` does not move a layer."""
        for parameter in layer.parameters():
            if function(torch.empty(0, dtype=parameter.dtype)).dtype != parameter.dtype:
                raise RuntimeError("The dtype of weights in host memory cannot change. Call remove() first.")
        return layer

    def keep_states_of(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's states of layer parameters move with the weights, from now on and what is there already."""
        self.optimizer = optimizer
        for state in (self.states_of(index) for index in range(len(self.layers))):
            for values, name in state:
                values[name] = self.on_host(values[name])

    def states_of(self, index: int) -> list[tuple[dict[str, Any], str]]:
        return [] if self.optimizer is None else layer_states(self.optimizer, self.parameters[index])

    def host_tensors(self) -> Iterator[Tensor]:
        """Everything that lies in host memory between steps."""
        for index, tensors in enumerate(self.host):
            yield from tensors
            yield from (values[name] for values, name in self.states_of(index))

    def remove(self) -> None:
        """Let go of the model. The layers' weights and their states stay in host memory, as ordinary CPU tensors."""
        self.settle()
        for hook in self.hooks:
            hook.remove()
        for layer in self.layers:
            del layer._apply
        self.hooks, self.slots, self.optimizer = [], [], None

    # --- copies ----------------------------------------------------------------------------------------------------

    def load(self, index: int, with_states: bool) -> None:
        """Begin to copy a layer into its slot."""
        slot = self.slots[index % len(self.slots)]
        states = self.states_of(index) if with_states else []
        is_there = slot.layer == index
        if is_there and (slot.with_states or not states):
            return
        for values, name in states:  # a loaded checkpoint's are not pinned
            values[name] = self.on_host(values[name])
        sources = [values[name] for values, name in states]
        if num_bytes(sources) > slot.states.numel():  # states are made in the first step
            self.make_room_for_states()
        with self.on(self.to_device, slot.free):
            if not is_there:
                for view, tensor in zip(carve(slot.weights, self.host[index]), self.host[index], strict=True):
                    view.copy_(tensor, non_blocking=True)
            for view, tensor in zip(carve(slot.states, sources), sources, strict=True):
                view.copy_(tensor, non_blocking=True)
            slot.filled = self.mark()
        slot.layer, slot.with_states = index, bool(states)

    def make_room_for_states(self) -> None:
        """Enlarge the slots' second buffer to the states of the largest layer."""
        self.synchronize()
        layers = range(len(self.layers))
        size = max(num_bytes([values[name] for values, name in self.states_of(index)]) for index in layers)
        for slot in self.slots:
            if slot.states.numel() < size:
                slot.states, slot.with_states = slot.weights.new_empty(size), False

    @torch.no_grad()
    def use(self, index: int, backward: bool) -> None:
        """Put a layer's parameters on the device, and begin to load the one that comes next."""
        self.load(index, backward)
        slot = self.slots[index % len(self.slots)]
        if slot.filled is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.filled)
        for parameter, view in zip(self.parameters[index], carve(slot.weights, self.host[index]), strict=True):
            parameter.data = view
        if backward:
            self.gradients = {p: p.grad for p in self.parameters[index] if p.grad is not None}
            for parameter in self.gradients:
                parameter.grad = None
            states = self.states_of(index)
            self.host_states = [values[name] for values, name in states]
            for (values, name), view in zip(states, carve(slot.states, self.host_states), strict=True):
                values[name] = view
        self.in_use.add(index)
        following = index - 1 if backward else index + 1
        if 0 <= following < len(self.layers):
            self.load(following, backward)

    @torch.no_grad()
    def release(self, index: int, backward: bool) -> None:
        """Put a layer's parameters back into host memory; after backward with their new values."""
        slot = self.slots[index % len(self.slots)]
        self.in_use.discard(index)
        slot.free = self.mark()
        if backward:
            with self.on(self.to_host, slot.free):
                for host, parameter in zip(self.host[index], self.parameters[index], strict=True):
                    if parameter.requires_grad:
                        host.copy_(parameter.data, non_blocking=True)
                self.put_states_back(index)
                slot.free = self.mark()
        for host, parameter in zip(self.host[index], self.parameters[index], strict=True):
            grad = parameter.grad
            if backward and grad is not None:
                parameter.grad = None  # a gradient has to lie where its parameter does
                grad = grad.to("cpu")
            parameter.data = host
            if backward:
                before = self.gradients.pop(parameter, None)
                parameter.grad = grad if before is None else before if grad is None else before.add_(grad)
        if backward:
            slot.layer = None  # the slot's values are the host's again, which may change before the next walk

    def put_states_back(self, index: int) -> None:
        states = self.states_of(index)
        known = iter(self.host_states) if len(self.host_states) == len(states) else None
        for values, name in states:
            host = (
                next(known)
                if known
                else torch.empty_like(values[name], device="cpu", pin_memory=self.device.type == "cuda")
            )
            host.copy_(values[name], non_blocking=True)
            if known is None and self.to_host is not None:
                values[name].record_stream(self.to_host)  # it is not a slot's, and is freed now
            values[name] = host

    @contextlib.contextmanager
    def on(self, stream: torch.cuda.Stream | None, after: torch.cuda.Event | None) -> Iterator[None]:
        """Copies made inside run on `stream`, behind an event."""
        if stream is None:
            yield
            return
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        return None if self.to_host is None else torch.cuda.current_stream(self.device).record_event()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def settle(self) -> None:
        """End of a pass: nothing is in use, and host memory holds what was computed."""
        for index in sorted(self.in_use):
            self.release(index, self.in_backward)
        self.in_backward = False
        if self.to_host is not None:
            self.to_host.synchronize()
        for slot in self.slots:
            slot.layer = None

    # --- along the layers ------------------------------------------------------------------------------------------

    def enter(self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Before a layer's forward."""
        if torch.is_grad_enabled() and kwargs.get("walk") is None:
            raise RuntimeError(
                "Weights in host memory take gradients only through a reversible walk: convert the model and call "
                "model.train(), or run under torch.no_grad()."
            )
        if index == 0:
            self.settle()  # also after a pass that failed half-way
        self.use(index, backward=False)
        if not torch.is_grad_enabled():
            return None
        end = partial(self.release, index, backward=True)
        if args:
            return (InBackward.apply(args[0], end), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": InBackward.apply(kwargs["hidden_states"], end)}

    def leave(self, index: int, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """After a layer's forward."""
        self.release(index, backward=False)
        return InBackward.apply(output, partial(self.begin_backward, index)) if torch.is_grad_enabled() else output

    def begin_backward(self, index: int) -> None:
        if not self.in_backward:
            self.in_backward = True
            at_end_of_backward(self.settle)
        for other in sorted(self.in_use):  # the layer above, where nothing below it asked for a gradient
            self.release(other, backward=True)
        self.use(index, backward=True)


class InBackward(Function):
    """Passes a tensor through, and calls `action` when its gradient comes by.

    On a layer's output this is the first of the layer's backward, on its input the last.
    """

    @staticmethod
    def forward(ctx, tensor: Tensor, action: Callable[[], None]):
        ctx.action = action
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        ctx.action()
        return grad, None
