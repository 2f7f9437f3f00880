"""Optimizer in backward: a parameter steps as soon as its gradient is complete, and the gradient is freed.

    adafactor   v = b v + (1-b) g^2, kept as row and column means; u = g / sqrt(v), u /= max(1, RMS(u) / d)
    adamw       m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2; u = m^ / (sqrt(v^) + eps)
    adamw8bit   the same with m and v in 8 bits (block-wise dynamic quantisation)
    sgd         u = g, or the momentum buffer
    all         w -= lr (u + weight_decay w), then rounded to the weight's dtype

What differs from the papers: Adafactor (https://arxiv.org/abs/1804.04235) takes a plain learning rate (no relative
step, no parameter scale), decoupled weight decay and b = 1 - t^-0.8. An expert parameter (E, out, in) is E matrices:
rows, columns and the update's clipping are per expert, as if each were a parameter of its own. Clipped together, a
spike in one expert would shrink the update of all, and experts without tokens (u = 0) would dilute the RMS that
protects the others.

Nothing as large as a parameter is allocated: gradients are read and weights written in place by kernels, or in chunks
where there are none (`ops/update`). bf16 weights are rounded stochastically by noise that is a function of (seed,
parameter, step, element), so that neither the order of the walk, a resume, chunks, kernels nor shards change a bit of
it; stepping in backward and stepping after it are equal bit for bit.

Not supported: float16 (a gradient scaler would find no gradients), sparse gradients, several backward calls per step.
"""

from __future__ import annotations

import logging
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import _disable_current_modes

from ..ops import update
from ..ops.update import make_code_books
from . import rules
from .rules import RULES, InOrder, Job, local_part, make_state, mix, sharding, sum_over_shards

logger = logging.getLogger(__name__)

CPU_CHUNK_BYTES = 2**21


class NonFiniteGradientError(RuntimeError):
    """A gradient held NaN or infinity; `weights_changed`: earlier parameters of this step had already stepped."""

    def __init__(self, message: str, parameter: str, weights_changed: bool):
        super().__init__(message)
        self.parameter = parameter
        self.weights_changed = weights_changed


class OptimizerInBackward(torch.optim.Optimizer):
    """Steps every parameter inside `loss.backward()`; `step()` afterwards closes the step.

        optimizer = OptimizerInBackward(parameter_groups(model, 0.01), rule="adafactor", lr=1e-5)
        loss.backward()                  # weights move here, gradients are freed here
        optimizer.step()                 # checks the gradients, reports grad_norm, advances counters

    Learning-rate schedulers, `state_dict` and parameter groups work as usual; `zero_grad` gives up a step that was
    broken off. A parameter that is used several times in one graph, as tied embeddings are, gets one complete gradient
    from autograd and then steps. Where its gradient comes in parts (several graphs), put it in a group with
    `in_backward=False`: it keeps its gradient and steps in `step()`.

    One backward per step. A second gradient before `step()` raises: the first has already moved the weights, so two
    small batches would be two updates, not one of their sum. Give the model the whole batch and let it be walked in
    tiles (`ReversibleConfig.tile_tokens`); leave `gradient_accumulation_steps` at 1.

    **Clipping.** Classical clipping divides all gradients by the norm of all of them, which is known only when most
    parameters have stepped. Here `max_grad_norm` scales a parameter's gradient by
    `min(1, max_grad_norm / max(norm of past steps, norm of this gradient))`: past steps' norm (the last one, or a
    moving average) stands in for the present one, and a parameter whose own gradient is larger is brought down by its
    own norm. The scale is never below the classical one in a step whose norm is at least that of the past, the first
    step knows only the parameter's own norm, and the step after a spike is clipped although it need not be.
    Adafactor's update clipping bounds each update exactly, whatever the norm. `grad_norm` is the true global norm
    before clipping, as `clip_grad_norm_` returns it.

    **Non-finite gradients.** From the first one on, no weight and no state changes; this costs no synchronisation.
    `step()`, which synchronises once, then raises `NonFiniteGradientError`. With `in_backward=False` all gradients are
    looked at before the first weight moves. (A gradient whose sum of squares overflows float32 counts as non-finite.)

    **FSDP2.** Sharded parameters (DTensor) update their local shards. sgd and adamw accept any sharding; adafactor and
    adamw8bit need shards along dimension 0, which for experts needs no communication; for a matrix the column means
    and the update's RMS are summed over the shards. Each parameter's norm is one small all-reduce. After `accelerate`
    has replaced the parameters, call `attach()`.

    Args:
        params: Parameters, named parameters, or groups of either; see `parameter_groups`. A group may override any of
            `lr`, `betas`, `momentum`, `eps`, `weight_decay`, `clip_threshold`, `factored`, `in_backward`.
        rule: "adafactor", "adamw", "adamw8bit" or "sgd". adamw8bit takes its 8-bit
            format from torchao, not bitsandbytes: the PyTorch project keeps it, and it is plain PyTorch, so it runs on
            CPUs, fake tensors, shards and any accelerator.
        lr: Learning rate, read when a parameter steps.
        betas: adamw.
        momentum: sgd: of the float32 buffer. adafactor: of a bf16 average of updates; 0 keeps none.
        eps: Added to the root (adamw, default 1e-8) or to the squared gradient (adafactor, default 1e-30).
        weight_decay: Decoupled, times the learning rate, for every rule.
        clip_threshold: adafactor's d, the largest root mean square of a matrix's update; None does not clip.
        max_grad_norm: See Clipping; None does not clip.
        norm_decay: The past norm is a moving average with this decay; 0 takes the last step's.
        rounding: bf16 weights: "stochastic", "nearest" (small updates vanish), or "master" (float32 copies in
            the state).
        seed: Of stochastic rounding. Saved with the state.
        in_backward: False keeps the gradients and makes the very same update in `step()`.
        chunk_bytes: Where no kernels run, float32 bytes of one temporary; at most six of them exist at a time, and
            32 rows are never split. It does not change a bit.

    Raises:
        ValueError: Unknown rule or rounding, values out of range, float16 or non-float parameters.
        ImportError: adamw8bit without torchao.
    """

    last_checkpoint: str | None = None
    """Where the last checkpoint lies; whoever saves one sets it, and a failed step names it."""

    def __init__(
        self,
        params: Iterable[Any],
        rule: Literal["adafactor", "adamw", "adamw8bit", "sgd"] = "adafactor",
        *,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.0,
        eps: float | None = None,
        weight_decay: float = 0.0,
        clip_threshold: float | None = 1.0,
        max_grad_norm: float | None = None,
        norm_decay: float = 0.0,
        rounding: Literal["stochastic", "nearest", "master"] = "stochastic",
        seed: int = 0,
        in_backward: bool = True,
        chunk_bytes: int = 32 * 2**20,
    ):
        choices = ("rule", rule, RULES), ("rounding", rounding, ("stochastic", "nearest", "master"))
        for name, value, accepted in choices:
            if value not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}; got {value!r}.")
        fractions = {"betas[0]": betas[0], "betas[1]": betas[1], "momentum": momentum, "norm_decay": norm_decay}
        for name, value in fractions.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}.")
        for name, value in {"lr": lr, "weight_decay": weight_decay}.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}.")
        positive = {"clip_threshold": clip_threshold, "max_grad_norm": max_grad_norm, "chunk_bytes": chunk_bytes}
        for name, value in positive.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        if rule == "adamw8bit":
            make_code_books(torch.device("cpu"))  # fails here rather than in the first backward
        self.rounding, self.chunk_bytes = rounding, chunk_bytes
        self.max_grad_norm, self.norm_decay = max_grad_norm, norm_decay
        self._handles: dict[Tensor, tuple[Any, int]] = {}
        """By hooked parameter: what removes the hook, and whose it is; see `attach`."""
        # Place among all parameters, group, place in the group. Groups are looked up: loading a state replaces them.
        self._places: dict[Tensor, tuple[int, int, int]] = {}
        self._code_books: dict[torch.device, Tensor] = {}
        # The present step: what has stepped, in order, with the sum of squares of its gradient; 1 while all were
        # finite, 0 from the first on that was not.
        self._stepped: dict[Tensor, Tensor] = {}
        self._keep: Tensor | None = None
        self._order = InOrder()
        self._grad_norm: float | None = None
        defaults = dict(
            rule=rule,
            lr=lr,
            betas=betas,
            momentum=momentum,
            eps=(1e-30 if rule == "adafactor" else 1e-8) if eps is None else eps,
            weight_decay=weight_decay,
            clip_threshold=clip_threshold,
            factored=True,
            in_backward=in_backward,
            seed=seed,
            # Travels with the groups, so that every way of saving an optimizer saves it. 0: not known yet.
            past_norm=0.0,
        )
        super().__init__(params, defaults)
        self.attach()

    # --- parameters and hooks ----------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `torch.optim.Optimizer`; the new parameters also get their hooks."""
        super().add_param_group(param_group)
        if self._places:  # not while the constructor adds its groups
            self.attach()

    def attach(self) -> None:
        """Hook every trainable parameter of the groups with `in_backward`; again after parameters were replaced, or
        moved by `model.to()`, which takes the hooks of sharded ones away.

        Raises:
            ValueError: A parameter's dtype or sharding is not supported.
        """
        places = ((p, g, i) for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"]))
        self._places = {parameter: (number, g, i) for number, (parameter, g, i) in enumerate(places)}
        for parameter in self._places:
            rule = self._group_of(parameter)["rule"]
            if parameter.dtype not in (torch.bfloat16, torch.float32, torch.float64):
                raise ValueError(
                    f"Parameter {self.name_of(parameter)} is {parameter.dtype}; OptimizerInBackward updates bfloat16, "
                    "float32 and float64. Load the model with dtype=torch.bfloat16."
                )
            by_rows = all(type(p) is Shard and p.dim == 0 for p in sharding(parameter))
            if rule in ("adafactor", "adamw8bit") and not by_rows:
                raise ValueError(
                    f"Parameter {self.name_of(parameter)} is sharded as {parameter.placements}; {rule} needs "
                    "shards along dimension 0 (FSDP2's default). Shard it so, or use rule='adamw' or 'sgd'."
                )
        for parameter in list(self._handles):
            if parameter not in self._places:
                self._handles.pop(parameter)[0].remove()
        # Weak, so that parameter and optimizer do not keep each other alive.
        method = weakref.WeakMethod(self._step_in_backward)

        def hook(parameter: Tensor) -> None:
            if (step_in_backward := method()) is not None:
                step_in_backward(parameter)

        for parameter in self._places:
            handle, owner = self._handles.get(parameter, (None, None))
            wanted = self._group_of(parameter)["in_backward"] and parameter.requires_grad
            if not wanted or owner == parameter._cdata:
                continue
            if handle is None:
                handle = parameter.register_post_accumulate_grad_hook(hook)
            else:
                # What autograd looks at was swapped (torch.utils.swap_tensors); the hooks stayed with the old one.
                parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks
            self._handles[parameter] = handle, parameter._cdata

    def detach(self) -> None:
        """Remove all hooks; gradients then stay until `step()`, which makes the updates."""
        while self._handles:
            self._handles.popitem()[1][0].remove()
        for group in self.param_groups:
            group["in_backward"] = False

    def name_of(self, parameter: Tensor) -> str:
        """The parameter's name where the groups hold names, its place and shape otherwise."""
        number, group, place = self._places[parameter]
        if "param_names" in self.param_groups[group]:
            return self.param_groups[group]["param_names"][place]
        return f"number {number} of shape {tuple(parameter.shape)}"

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        return self.param_groups[self._places[parameter][1]]

    # --- stepping ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _step_in_backward(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            raise RuntimeError(
                f"The gradient of parameter {self.name_of(parameter)} is gone: another hook consumed it. Only one "
                "optimizer in backward can own a parameter; call detach() on the other."
            )
        if parameter in self._stepped:
            raise RuntimeError(
                f"Parameter {self.name_of(parameter)} got a second gradient before optimizer.step(), after it had "
                "stepped. Put the whole batch into one backward (gradient_accumulation_steps=1; tile_tokens bounds "
                "the memory), or give the parameter a group with in_backward=False. If the backward before this one "
                "was broken off, call optimizer.zero_grad()."
            )
        self.step_parameter(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Close the step: update what did not step in backward, check the gradients, report the norm.

        Args:
            closure: Evaluated first, with gradients enabled; it may call backward once.

        Returns:
            The closure's value, if there is one.

        Raises:
            NonFiniteGradientError: A gradient was not finite; no weight has changed since that gradient.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        waiting = [p for p in self._places if p.grad is not None]
        if self._stepped and (late := [p for p in waiting if p in self._handles]):
            warnings.warn(
                f"{len(late)} parameters ({self.name_of(late[0])}, ...) kept their gradients until step(): model.to() "
                "takes hooks from sharded ones. They are hooked again; call optimizer.attach() after model.to().",
                RuntimeWarning,
                stacklevel=2,
            )
        self.attach()
        if waiting and not self._stepped:
            # Every gradient is here: look at all of them before the first weight moves.
            self._check({p: self._square(p) for p in waiting}, stepped=False)
        for parameter in waiting:
            if parameter in self._stepped:
                raise RuntimeError(
                    f"Parameter {self.name_of(parameter)} has stepped and holds another gradient.{rules.of_copies()}"
                )
            self.step_parameter(parameter)
        squares, self._stepped, self._keep = self._stepped, {}, None
        norm = self._check(squares, stepped=True)
        if norm is not None:
            self._grad_norm = norm
            for group in self.param_groups:
                past = group["past_norm"]
                group["past_norm"] = norm if past == 0 else self.norm_decay * past + (1 - self.norm_decay) * norm
        return value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients. After a backward that was broken off (out of memory, interrupted) this gives up the step
        that it began, and says which parameters had stepped: they keep what they have learnt, and the optimizer is
        ready for another batch."""
        stepped, self._stepped, self._keep = list(self._stepped.items()), {}, None
        squares = _values(dict(stepped))
        if squares:
            finite = next((i for i, square in enumerate(squares) if not math.isfinite(square)), len(squares))
            for parameter, _ in stepped[finite:]:  # masked: these did not step
                self.state[parameter]["step"] -= 1
            names = [self.name_of(parameter) for parameter, _ in stepped[:finite]]
            said = ", ".join(names if len(names) < 6 else [*names[:3], "...", *names[-2:]])
            logger.warning(
                "zero_grad() before step(): a step was given up in which %d of %d parameters had stepped already "
                "(%s). They keep their update, the others do not get one.",
                len(names),
                len(self._places),
                said,
            )
        super().zero_grad(set_to_none)

    @property
    def grad_norm(self) -> float | None:
        """Norm of all gradients of the present step, or of the last one after `step()`, before clipping.

        Before `step()` reading it synchronises with the device. None before the first backward and on fake tensors.
        """
        return _norm(_values(self._stepped)) if self._stepped else self._grad_norm

    def _check(self, squares: dict[Tensor, Tensor], stepped: bool) -> float | None:
        """The global norm; raises if it is not finite. The only synchronisation with the device."""
        values = _values(squares)
        wrong = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        if wrong is None:
            return _norm(values)
        parameters = list(squares)
        if stepped:
            for parameter in parameters[wrong:]:  # masked: these did not step
                self.state[parameter]["step"] -= 1
        for parameter in parameters:
            parameter.grad = None
        name, changed = self.name_of(parameters[wrong]), wrong if stepped else 0
        if changed:
            checkpoint = self.last_checkpoint or "none is known to the optimizer"
            rest = (
                f"{changed} of {len(parameters)} parameters had already stepped in this backward, so the weights are "
                f"no longer those of any step. Restart from the last checkpoint: {checkpoint}."
            )
        else:
            rest = "No weight has changed in this step."
        raise NonFiniteGradientError(f"The gradient of parameter {name} is not finite. {rest}", name, bool(changed))

    def _grad_of(self, parameter: Tensor) -> Tensor:
        """The local part of the gradient."""
        grad = parameter.grad
        if isinstance(parameter, DTensor) and grad.placements != parameter.placements:
            grad = grad.redistribute(placements=parameter.placements)
        return local_part(grad)

    def _square(self, parameter: Tensor) -> Tensor:
        grad = self._grad_of(parameter)
        square, _, _ = update.grad_squares(grad, False, self._chunk_bytes(grad))
        return sum_over_shards(square, parameter)

    def step_parameter(self, parameter: Tensor) -> None:
        """Step one parameter by its gradient, which is freed: what the hook does in backward."""
        group, grad, weight = self._group_of(parameter), self._grad_of(parameter), local_part(parameter)
        self._order.wait(parameter)
        state = self.state_of(parameter)
        state["step"] += 1
        factored = "row" in state
        chunk_bytes = self._chunk_bytes(grad)
        square, rows, cols = update.grad_squares(grad, factored, chunk_bytes)
        square = sum_over_shards(square, parameter)
        keep = torch.ones((), device=weight.device) if self._keep is None else self._keep.to(weight.device)
        # From the first non-finite gradient on, `keep` is 0 and nothing below is written.
        self._keep, scale = update.judge(square, keep, self.max_grad_norm or 0.0, float(group["past_norm"]))
        self._stepped[parameter] = square
        lr, noise = float(group["lr"]), self._noise_of(parameter, group["seed"], state["step"])
        job = Job(
            parameter,
            group,
            {name: local_part(value) for name, value in state.items() if isinstance(value, Tensor)},
            weight,
            grad,
            state["step"],
            (self._keep, scale),
            lr,
            lr * group["weight_decay"],
            (self.rounding == "stochastic", *noise, chunk_bytes),
        )
        if group["rule"] == "adafactor":
            rules.adafactor(job, rows, cols)
        elif group["rule"] == "sgd":
            rules.sgd(job)
        else:
            rules.adamw(job, self._code_books.get(parameter.device))
        # Operations of ours do not tell autograd that they write.
        torch.autograd.graph.increment_version(parameter)
        parameter.grad = None
        self._order.note(parameter)

    def _chunk_bytes(self, tensor: Tensor) -> int:
        """A CPU is fastest on what its cache holds; a tensor whose memory is counted stands for one on a GPU."""
        on_cpu = tensor.device.type == "cpu" and not update.is_observed(tensor)
        return min(self.chunk_bytes, CPU_CHUNK_BYTES) if on_cpu else self.chunk_bytes

    def _noise_of(self, parameter: Tensor, seed: int, step: int) -> tuple[int, int]:
        """Key of the rounding's noise, and the number of the parameter's rows before this shard."""
        place, row = (), 0
        if isinstance(parameter, DTensor):
            shards = sharding(parameter)
            if all(type(p) is Shard and p.dim == 0 for p in shards):
                shape, (mesh, placements) = parameter.shape, (parameter.device_mesh, parameter.placements)
                with _disable_current_modes():  # it computes with tensors, which a fake one would be
                    start = compute_local_shape_and_global_offset(shape, mesh, placements)[1][:1]
                row = math.prod(shape[1:-1]) * start[0] if start else 0
            else:
                # Shards round independently, replicas alike.
                coordinates = zip(parameter.device_mesh.get_coordinate(), parameter.placements, strict=True)
                place = [coordinate for coordinate, placement in coordinates if not placement.is_replicate()]
        return mix(seed, self._places[parameter][0], step, *place), row

    # --- state -------------------------------------------------------------------------------------------------------

    def state_tensors(self) -> Iterator[Tensor]:
        """All that is kept from step to step; what a first step would make is made."""
        for group in self.param_groups:
            for parameter in group["params"]:
                yield from (value for value in self.state_of(parameter).values() if isinstance(value, Tensor))
        yield from self._code_books.values()

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """What is kept of one parameter, made if it is not there: `step` and, by rule, its moments."""
        group, state = self._group_of(parameter), self.state[parameter]
        state.setdefault("step", 0)
        if group["rule"] == "adamw8bit" and parameter.device not in self._code_books:
            self._code_books[parameter.device] = make_code_books(parameter.device)
        make_state(parameter, group, state, self.rounding == "master")
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in `torch.optim.Optimizer`, except that every state keeps the dtype it was saved in.

        Load-state-dict hooks see the groups only. The present `in_backward` settings stay.

        Raises:
            ValueError: The state was saved by another rule.
        """
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            if saved.get("rule", group["rule"]) != group["rule"]:
                raise ValueError(
                    f"The state was saved by rule={saved['rule']!r} and cannot be loaded into rule={group['rule']!r}. "
                    "Start with a fresh optimizer, or use the rule of the checkpoint."
                )
        in_backward = [group["in_backward"] for group in self.param_groups]
        # torch casts floating-point state to the parameter's dtype (bf16), so it gets none to cast.
        super().load_state_dict({**state_dict, "state": {}})
        for group, setting in zip(self.param_groups, in_backward, strict=True):
            group["in_backward"] = setting
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for key, parameter in zip(saved_ids, chain.from_iterable(g["params"] for g in self.param_groups), strict=True):
            if key in state_dict["state"]:
                self.state[parameter] = {
                    name: value.to(parameter.device) if isinstance(value, Tensor) and name != "step" else value
                    for name, value in state_dict["state"][key].items()
                }


# --- one parameter ---------------------------------------------------------------------------------------------------


def _values(squares: dict[Tensor, Tensor]) -> list[float]:
    """The numbers, in one transfer; none on fake tensors."""
    found = list(squares.values())
    if not found or any(isinstance(square, FakeTensor) for square in found):
        return []
    return torch.stack([square.to(found[0].device, torch.float64) for square in found]).tolist()


def _norm(squares: list[float]) -> float | None:
    # fsum is exact, so the order in which parameters stepped does not show.
    return math.sqrt(math.fsum(squares)) if squares else None
