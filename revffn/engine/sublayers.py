"""A decoder layer's own sublayers, called one by one.

The sublayers are the Hugging Face modules, untouched. Expert parameters can be used by several tiles in one pass:
their gradients are added up unrounded and rounded once (`expert_sums`).
"""

# B = batch, T = tokens, D = hidden size, E = experts

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..ops.experts import GradientSum
from ..upstream import experts_implementation
from .experts import IMPLEMENTATION, fused_gate

RNG_SETTINGS = ("attention_dropout", "hidden_dropout", "resid_dropout", "router_jitter_noise")


def first_tensor(output: Any) -> Tensor:
    """Sublayers return the hidden states alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


# --- a layer's residual updates --------------------------------------------------------------------------------------


def attention(layer: nn.Module, normed: Tensor, kwargs: dict[str, Any]) -> Tensor:
    return first_tensor(layer.self_attn(hidden_states=normed, **kwargs))


def feed_forward(layer: nn.Module, normed: Tensor, sums: dict[str, GradientSum] | None = None) -> Tensor:
    with summed(layer, sums):
        return first_tensor(layer.mlp(normed))


class SumOverTiles(Function):
    """Identity on a parameter, once per tile; backward adds the tiles' gradients up and passes the sum on with the
    last. For experts that run through other code than ours."""

    @staticmethod
    def forward(ctx, weight: Tensor, gradient_sum: GradientSum):
        ctx.gradient_sum, ctx.dtype = gradient_sum, weight.dtype
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.gradient_sum.num_uses == 1:
            return grad, None
        return ctx.gradient_sum.add(grad.contiguous(), ctx.dtype), None


class TiledExperts(nn.Module):
    """Mixed in front of a family's experts class, for the code that knows nothing of `gradient_sums`.

    Such code reads its parameters as attributes. While it runs, views of them that end in `SumOverTiles` stand in the
    instance's own dictionary, which Python asks first: the registered parameters stay where they are, for FSDP2 and
    for whoever lists them. Views are made in the order of registration, before the products; a tile's gradients of
    all matrices may be alive at once, where the fused experts have one.
    """

    gradient_sums: dict[str, GradientSum] | None = None
    """Set while the engine is in the layer: by parameter name, for those that train. With them, backward runs once on
    what forward saved."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sums = self.gradient_sums
        ours = experts_implementation(self.config) == IMPLEMENTATION
        if not sums or (ours and fused_gate(self, hidden_states) is not None):
            return super().forward(hidden_states, *args, **kwargs)
        try:
            for name, gradient_sum in sums.items():
                self.__dict__[name] = SumOverTiles.apply(self._parameters[name], gradient_sum)
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            for name in sums:
                self.__dict__.pop(name, None)


def expert_sums(layer: nn.Module, num_uses: int) -> dict[str, GradientSum] | None:
    """A `GradientSum` for every fused expert parameter that trains, for `num_uses` uses in one pass; None in a dense
    layer."""
    experts = getattr(layer.mlp, "experts", None)
    if experts is None:
        return None
    named = experts.named_parameters(recurse=False) if torch.is_grad_enabled() else ()
    return {name: GradientSum(num_uses) for name, parameter in named if parameter.requires_grad}


@contextlib.contextmanager
def summed(layer: nn.Module, sums: dict[str, GradientSum] | None) -> Iterator[None]:
    """While open, the engine uses the layer's experts."""
    if sums is None:
        yield
        return
    layer.mlp.experts.__dict__["gradient_sums"] = sums
    try:
        yield
    finally:
        del layer.mlp.experts.__dict__["gradient_sums"]


def uses_rng(layer: nn.Module) -> bool:
    config = layer.self_attn.config
    return any(getattr(config, name, 0) for name in RNG_SETTINGS) or any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in layer.modules()
    )
