"""`experts_implementation="revffn"`: the fused experts (ops/experts) through transformers' experts interface.

Registered when revffn is imported, for any model whose experts class uses the interface; converted models use it
unless another implementation than transformers' default was asked for. Before the first use with a class, device and
dtype the family's own code is asked about a few random numbers; where it says something else, the family's code runs
and a warning says so.
"""

# E = experts, D = hidden size, I = expert's width

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from ..ops.experts import Gate, GradientSum, experts
from ..upstream import ALL_EXPERTS_FUNCTIONS, experts_implementation, family_forward, is_expert_parallel
from .exchange import Exchange

logger = logging.getLogger(__name__)

IMPLEMENTATION = "revffn"
DEFAULT = "grouped_mm"
"""What transformers chooses where nothing is asked for."""

_KINDS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}
"""By the names of transformers' activation classes."""

_AGREES: dict[tuple[Any, ...], bool] = {}
"""Whether the family's code agreed, by class, gate, device type and dtype."""


def gate_of(module: nn.Module) -> Gate | None:
    """How an experts module joins gate and up, as its attributes say; None where they say nothing known."""
    if not getattr(module, "has_gate", False) or getattr(module, "has_post_expert_norm", False):
        return None
    if is_expert_parallel(module):
        return None
    if any(getattr(module, name, None) is None for name in ("gate_up_proj", "down_proj")):
        return None
    interleaved = not getattr(module, "is_concatenated", True)
    alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
    if isinstance(alpha, (int, float)) and isinstance(limit, (int, float)):
        return Gate("clamped", float(alpha), float(limit), interleaved)
    kind = _KINDS.get(type(getattr(module, "act_fn", None)).__name__)
    return None if kind is None else Gate(kind, interleaved=interleaved)


def fused_gate(module: nn.Module, like: Tensor) -> Gate | None:
    """The gate to run an experts module with, or None where the family's own code is to run."""
    gate = gate_of(module)
    if gate is None:
        key = (type(module), "unknown")
        if key not in _AGREES:
            _AGREES[key] = False
            logger.warning("%s has no fused form here; transformers' %s runs.", type(module).__name__, DEFAULT)
        return None
    if isinstance(like, FakeTensor) or like.device.type == "meta":
        return gate
    dtype = module.gate_up_proj.dtype
    key = (type(module), gate, like.device.type, dtype)
    if key not in _AGREES:
        try:
            with _disable_current_modes():  # so that no counter of bytes or operations sees it
                error = disagreement(module, gate, like.device, dtype)
        except Exception as failure:  # code of other authors, in a version not seen yet
            error, reason = float("inf"), f"asking its own code failed with {failure!r}"
        else:
            reason = f"its own code differs by {error:.2g} of the largest value"
        _AGREES[key] = error <= (2.0**-5 if dtype.itemsize == 2 else 1e-4)
        if not _AGREES[key]:
            logger.warning("%s: %s; transformers' %s runs instead.", type(module).__name__, reason, DEFAULT)
    return gate if _AGREES[key] else None


@torch.no_grad()
def disagreement(module: nn.Module, gate: Gate, device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference between the fused experts and the family's own forward, on tiny experts of its class.

    Relative to the largest value. The gates reach past gpt-oss' limits on both sides.
    """
    E, D, I, T, K = 4, 16, 32, 24, 2  # noqa: E741
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    cls = type(module)
    tiny = cls.__new__(cls)
    nn.Module.__init__(tiny)
    for name, value in module.__dict__.items():
        if name not in tiny.__dict__ and not name.startswith("_forward"):
            tiny.__dict__[name] = value
    tiny.__dict__.pop("gradient_sums", None)
    tiny.__dict__.pop("exchange", None)
    tiny._modules.update(module._modules)
    sizes = {"num_experts": E, "hidden_dim": D, "hidden_size": D, "intermediate_dim": I}
    for name, value in {
        **sizes,
        "intermediate_size": I,
        "moe_intermediate_size": I,
        "expert_dim": I,
    }.items():
        if name in module.__dict__:
            tiny.__dict__[name] = value
    transposed = bool(getattr(module, "is_transposed", False))
    shapes = {"gate_up_proj": (E, 2 * I, D), "down_proj": (E, D, I)}
    for name, shape in shapes.items():
        shape = (shape[0], shape[2], shape[1]) if transposed else shape
        tiny._parameters[name] = nn.Parameter(draw(*shape), requires_grad=False)
    if getattr(module, "has_bias", False):
        tiny._parameters["gate_up_proj_bias"] = nn.Parameter(draw(E, 2 * I), requires_grad=False)
        tiny._parameters["down_proj_bias"] = nn.Parameter(draw(E, D), requires_grad=False)
    x = draw(T, D)
    # No token of the last expert.
    index = torch.rand(T, E - 1, generator=generator).argsort(-1)[:, :K].to(device)
    weight = draw(T, K).abs()
    with torch.autocast(device.type, enabled=False):
        ours = fused(tiny, gate, x, index, weight, None)
        theirs = family_forward(cls)(tiny, x, index, weight)
    scale = theirs.float().abs().max().clamp_min(1e-30)
    return float(((ours.float() - theirs.float()).abs().max() / scale).nan_to_num(float("inf")))


def fused(
    module: nn.Module,
    gate: Gate,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    sums: dict[str, GradientSum] | None,
) -> Tensor:
    exchange: Exchange | None = module.__dict__.get("exchange")
    if exchange is None:
        return apply(module, gate, dict(module.named_parameters(recurse=False)), x, index, weight, sums)
    mine = exchange.parameters(module)
    return exchange.run(x, index, weight, lambda *rows: apply(module, gate, mine, *rows, sums))


def apply(
    module: nn.Module,
    gate: Gate,
    parameters: dict[str, Tensor],
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    sums: dict[str, GradientSum] | None,
) -> Tensor:
    biased = bool(getattr(module, "has_bias", False))
    return experts(
        x,
        index,
        weight,
        parameters["gate_up_proj"],
        parameters["down_proj"],
        gate_up_bias=parameters["gate_up_proj_bias"] if biased else None,
        down_bias=parameters["down_proj_bias"] if biased else None,
        gate=gate,
        transposed=bool(getattr(module, "is_transposed", False)),
        sums=sums,
    )


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The interface's function: (T, D), (T, K), (T, K) -> (T, D). While the engine is in the module's layer,
    `self.gradient_sums` is where gradients go.

    In eval mode transformers' default runs: what is evaluated is what an exported model computes, bit for bit. (Not
    where experts are on several ranks: there the fused ones run, and differ by rounding.)
    """
    sums = self.__dict__.get("gradient_sums")
    ours = self.training or sums is not None or "exchange" in self.__dict__
    gate = fused_gate(self, hidden_states) if ours else None
    if gate is None:
        return ALL_EXPERTS_FUNCTIONS[DEFAULT](self, hidden_states, top_k_index, top_k_weights)
    return fused(self, gate, hidden_states, top_k_index, top_k_weights, sums)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def choose_implementation(model: PreTrainedModel) -> None:
    """For a converted model: the fused experts, unless another implementation than the default was asked for.

    transformers' default, asked for by name, cannot be told from the default; `set_experts_implementation` after the
    conversion chooses it.
    """
    if experts_implementation(model.config) in (None, DEFAULT):
        model.set_experts_implementation(IMPLEMENTATION)  # of a dense model without effect
