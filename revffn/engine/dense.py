"""A layer's own dense parts as fused operations (ops/dense) while a walk runs them on a device with kernels.

Norms, gated feed-forwards, a shared expert's gate and the rotary embedding are a family's own code. Each is asked
once, on a few random numbers, whether it is the function that the fused operation computes; where it is not, where a
module has a `forward` of its own, and outside walks, the family's code runs. Forward and recomputation decide alike.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from ..ops import dispatch
from ..ops.dense import MOST_CHANNELS, add_gated, gated_mlp, rms_norm, rotate
from ..ops.dense.reference import rope

_FUSED: ContextVar[bool] = ContextVar("revffn_fused_dense", default=False)
_STANDS_FOR: ContextVar[str | None] = ContextVar("revffn_stands_for", default=None)


@contextlib.contextmanager
def standing_for(device_type: str) -> Iterator[None]:
    """While open, walks on any device take the dense parts that they would take on `device_type`: for planning."""
    before = _STANDS_FOR.set(device_type)
    try:
        yield
    finally:
        _STANDS_FOR.reset(before)


@contextlib.contextmanager
def fused_parts(device_type: str) -> Iterator[None]:
    """While open, dense parts run as fused operations, if those have kernels on this kind of device."""
    before = _FUSED.set(dispatch.implementation(_STANDS_FOR.get() or device_type) == "triton")
    try:
        yield
    finally:
        _FUSED.reset(before)


# --- what a family's code computes -----------------------------------------------------------------------------------


def _asked(question: Callable[..., Any]) -> Callable[..., Any]:
    """Answers once per argument; None where the family's code does not take the question."""

    @functools.cache
    def ask(*args: Any) -> Any:
        with unset_fake_temporarily(), torch.no_grad(), _disable_current_modes():
            try:
                return question(*args, torch.Generator("cpu").manual_seed(0))
            except Exception:
                return None

    return ask


@_asked
def rounds_before_weight(forward: Callable[..., Tensor], numbers: torch.Generator) -> bool | None:
    """Whether `forward` is Llama's RMSNorm (True), that of gpt-oss (False), or neither (None)."""
    x = torch.randn(64, 32, generator=numbers, device="cpu").to(torch.bfloat16)
    weight = torch.rand(32, generator=numbers, device="cpu").add(0.5).to(torch.bfloat16)
    found = forward(SimpleNamespace(weight=weight, variance_epsilon=1e-3, eps=1e-3), x)
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-3)
    first, last = normed.to(x.dtype) * weight, (normed * weight).to(x.dtype)
    same = [(found == expected).double().mean().item() for expected in (first, last)]
    return None if found.shape != x.shape or max(same) < 0.99 else same[0] >= same[1]


@_asked
def is_gated(forward: Callable[..., Tensor], numbers: torch.Generator) -> bool:
    """Whether `forward` is down_proj(act_fn(gate_proj(x)) * up_proj(x))."""
    x = torch.randn(8, 6, generator=numbers, device="cpu")
    parts = SimpleNamespace(gate_proj=lambda x: x[:, :3], up_proj=lambda x: x[:, 3:], down_proj=torch.neg)
    parts.act_fn, parts.config = F.silu, SimpleNamespace(pretraining_tp=1)
    return torch.allclose(forward(parts, x), -F.silu(x[:, :3]) * x[:, 3:])


@_asked
def turns_halves(function: Callable[..., Any], numbers: torch.Generator) -> bool:
    """Whether `function` is Llama's `apply_rotary_pos_emb`."""
    q, k = (torch.randn(2, heads, 5, 8, generator=numbers, device="cpu") for heads in (4, 2))
    cos, sin = (torch.randn(1, 5, 8, generator=numbers, device="cpu") for _ in range(2))
    found = function(q, k, cos, sin)
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, rope(q, k, cos, sin, False), strict=True))


@_asked
def joins_by_gate(forward: Callable[..., Tensor], numbers: torch.Generator) -> bool:
    """Whether `forward` is experts(x, chosen, weights) + sigmoid(shared_expert_gate(x)) * shared_expert(x), of rows,
    with what `gate` returns as (logits, weights, chosen)."""
    x, routed, shared = (torch.randn(10, 6, generator=numbers, device="cpu") for _ in range(3))
    logit, given = torch.randn(10, 1, generator=numbers, device="cpu"), []
    weights, chosen = object(), object()
    makes = {"experts": routed, "shared_expert": shared, "shared_expert_gate": logit, "gate": (None, weights, chosen)}

    def part(name: str) -> Callable[..., Any]:
        def call(rows: Tensor, *more: object) -> Any:
            given.append((name, torch.equal(rows, x), *(value is chosen for value in more)))
            return makes[name]

        return call

    found = forward(SimpleNamespace(**{name: part(name) for name in makes}), x.view(2, 5, 6))
    called = {("gate", True), ("shared_expert", True), ("shared_expert_gate", True), ("experts", True, True, False)}
    expected = (routed + torch.sigmoid(logit) * shared).view(2, 5, 6)
    return set(given) == called and len(given) == 4 and torch.allclose(found, expected, atol=1e-5)


class RunsInWalk:
    """Marks classes of this library that stand in front of a family's class."""


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that the family wrote."""
    return next(c for c in type(module).__mro__ if not issubclass(c, RunsInWalk)).forward


def norm_kind(norm: nn.Module) -> tuple[float, bool] | None:
    """(eps, whether it rounds before it multiplies by the weight) of a module that is an RMSNorm; None for any
    other."""
    weight = getattr(norm, "weight", None)
    if weight is None or isinstance(weight, DTensor) or "forward" in norm.__dict__:
        return None
    rounds_first = rounds_before_weight(own_forward(norm))
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return None if rounds_first is None or eps is None else (float(eps), rounds_first)


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module is calling its forward."""
    return not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def plain_weight(linear: nn.Module, x: Tensor) -> Tensor | None:
    """The weight of a linear map without a bias, where calling it on `x` is that product and nothing else."""
    if type(linear) is not nn.Linear or not is_plain(linear) or "forward" in linear.__dict__:
        return None
    weight = linear.weight
    usual = linear.bias is None and not isinstance(weight, DTensor) and weight.dtype == x.dtype
    return weight if usual and not torch.is_autocast_enabled(x.device.type) else None


# --- in their place --------------------------------------------------------------------------------------------------


class FusedNorm(RunsInWalk, nn.Module):
    """Mixed in front of a family's RMSNorm."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        fits = hidden_states.shape[-1] <= MOST_CHANNELS and not args and not kwargs
        kind = norm_kind(self) if _FUSED.get() and fits else None
        if kind is None:
            return super().forward(hidden_states, *args, **kwargs)
        return rms_norm(hidden_states.contiguous(), self.weight, *kind)


class FusedMLP(RunsInWalk, nn.Module):
    """Mixed in front of a family's gated feed-forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        silu = type(getattr(self, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
        if not (_FUSED.get() and silu and is_gated(own_forward(self))) or args or kwargs:
            return super().forward(x, *args, **kwargs)
        weights = [plain_weight(part, x) for part in (self.gate_proj, self.up_proj, self.down_proj)]
        if any(weight is None for weight in weights):
            return super().forward(x)
        return gated_mlp(x, *weights)


class FusedSharedExpert(RunsInWalk, nn.Module):
    """Mixed in front of a family's sparse block that has a shared expert with a gate."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        D = hidden_states.shape[-1]
        fits = _FUSED.get() and D <= MOST_CHANNELS and not args and not kwargs and joins_by_gate(own_forward(self))
        weight = plain_weight(self.shared_expert_gate, hidden_states) if fits else None
        if weight is None:
            return super().forward(hidden_states, *args, **kwargs)
        x = hidden_states.reshape(-1, D)
        _, weights, chosen = self.gate(x)
        routed = self.experts(x, chosen, weights)
        # Last, so that in backward what it keeps is gone before the experts', who need most, begin.
        shared = self.shared_expert(x)
        return add_gated(routed, shared, x, weight).view(hidden_states.shape)


def fused_classes(modeling: ModuleType) -> dict[type, type]:
    """Every class of a family's modeling module that may be an RMSNorm, a gated feed-forward or a sparse block with a
    gated shared expert, and its subclass."""
    found = {}
    for name, cls in vars(modeling).items():
        if not (isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == modeling.__name__):
            continue
        code = getattr(inspect.unwrap(cls.forward), "__code__", None)
        if name.endswith("RMSNorm"):
            found[cls] = type(f"RevFFN{name}", (FusedNorm, cls), {})
        elif code is not None and {"gate_proj", "up_proj", "down_proj", "act_fn"} <= set(code.co_names):
            found[cls] = type(f"RevFFN{name}", (FusedMLP, cls), {})
        elif code is not None and {"experts", "shared_expert", "shared_expert_gate"} <= set(code.co_names):
            found[cls] = type(f"RevFFN{name}", (FusedSharedExpert, cls), {})
    return found


def fuse_parts(layer: nn.Module, modeling: ModuleType, classes: dict[type, type]) -> None:
    """Give a layer's dense parts their fused classes, and its family's rotary embedding a wrapper that turns by the
    fused operation within walks."""
    for module in layer.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
    function = getattr(modeling, "apply_rotary_pos_emb", None)
    if function is not None and not hasattr(function, "in_walks"):
        modeling.apply_rotary_pos_emb = turning(function)


def turning(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        fits = (
            _FUSED.get()
            and not args
            and not kwargs
            and q.dim() == 4
            and cos.dim() == 3
            and cos.shape[-1] == q.shape[-1]
            and q.dtype == k.dtype == cos.dtype
            and not cos.requires_grad
            and turns_halves(function)
        )
        return rotate(q, k, cos, sin) if fits else function(q, k, cos, sin, *args, **kwargs)

    apply_rotary_pos_emb.in_walks = True
    return apply_rotary_pos_emb
