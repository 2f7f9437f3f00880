"""A decoder layer's own sublayers, called one by one, and the small modules that a coupling adds to a layer.

The sublayers are the Hugging Face modules, untouched. Expert parameters can be used by several tiles in one pass:
their gradients are added up in float32 and rounded once (`expert_sums`).
"""

# B = batch, T = tokens, D = hidden size, H = D / 2, E = experts

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers import initialization

from ..config import ReversibleConfig
from ..ops.experts import GradientSum
from .experts import IMPLEMENTATION, fused_gate

RNG_SETTINGS = ("attention_dropout", "hidden_dropout", "resid_dropout", "router_jitter_noise")


def first_tensor(output: Any) -> Tensor:
    """Sublayers return the hidden states alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


# --- what a coupling adds to a layer ---------------------------------------------------------------------------------


class Predictor(nn.Module):
    """P_k of the innovation coupling: (B, T, D) -> (B, T, D), linear with bias, zero at first (R_k = identity).

    Args:
        hidden_size: D.
        rank: None for a full matrix, else the rank of its factors (at least 1).
    """

    def __init__(self, hidden_size: int, rank: int | None):
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False) if rank is not None else None
        self.up = nn.Linear(hidden_size if rank is None else rank, hidden_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """transformers' initialisers leave alone what a checkpoint has already filled."""
        initialization.zeros_(self.up.weight)
        initialization.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x if self.down is None else self.down(x))


class InnovationCoupling(nn.Module):
    """The predictor of one layer, or nothing where the layer runs plainly or predicts by identity."""

    def __init__(self, hidden_size: int, layer: int, config: ReversibleConfig):
        super().__init__()
        coupled = layer >= config.plain_layers
        self.side_bits: int | None = config.side_bits_of(layer) if coupled else None
        self.predictor = (
            Predictor(hidden_size, config.predictor_rank) if coupled and config.predictor_rank != 0 else None
        )


class CrossBranchCoupling(nn.Module):
    """Projection adapters of one layer (arXiv 2512.20920): up H -> D in front of a sublayer, down D -> H behind it.

    They start as the two halves of the identity: the left stream is the first half of the hidden state, the right one
    the second.
    """

    def __init__(self, hidden_size: int, layer: int, config: ReversibleConfig):
        super().__init__()
        half = hidden_size // 2
        if hidden_size % 2:
            raise ValueError(f"cross_branch splits the hidden state in two; hidden_size={hidden_size} is odd.")
        self.query_stream = config.query_stream
        self.query_up = nn.Linear(half, hidden_size, bias=False)
        self.key_value_up = nn.Linear(half, hidden_size, bias=False)
        self.attention_down = nn.Linear(hidden_size, half, bias=False)
        # Not `mlp_up`: transformers' checkpoint mapping for mixtral would rename it.
        self.feed_up = nn.Linear(half, hidden_size, bias=False)
        self.feed_down = nn.Linear(hidden_size, half, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        half = self.feed_down.out_features
        for module, offset in (
            (self.query_up, 0),
            (self.key_value_up, half),
            (self.attention_down, 0),
            (self.feed_up, 0),
            (self.feed_down, half),
        ):
            start = torch.zeros_like(module.weight)
            wide = start if module.out_features > module.in_features else start.T
            wide[offset : offset + half].fill_diagonal_(1.0)
            initialization.copy_(module.weight, start)


class StreamMaps(nn.Module):
    """cross_branch: what the two streams carry of the embedding, and what the final norm reads of them: both (B, T, D)
    -> (B, T, D), linear. They start as the identity: the streams are the halves of the hidden state.

    One of a model, in `model.model.coupling`.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.entry = nn.Linear(hidden_size, hidden_size, bias=False)
        self.exit = nn.Linear(hidden_size, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in (self.entry, self.exit):
            initialization.eye_(module.weight)


class NoCoupling(nn.Module):
    """`none`: nothing is added."""

    def __init__(self, hidden_size: int, layer: int, config: ReversibleConfig):
        super().__init__()


COUPLINGS = {"innovation": InnovationCoupling, "cross_branch": CrossBranchCoupling, "none": NoCoupling}


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
        ours = self.config._experts_implementation == IMPLEMENTATION
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


@contextlib.contextmanager
def queries_from(module: nn.Module, hidden: Tensor) -> Iterator[None]:
    """While open, the linear map `module` reads `hidden` instead of what it is called with.

    Queries are the only part of an attention module that reads the hidden states through this map, so cross-branch
    attention works for every attention kind (GQA, norms on queries and keys, MLA) without a forward of its own.
    """
    handle = module.register_forward_pre_hook(lambda _, args: (hidden, *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def cross_attention(layer: nn.Module, x_query: Tensor, x_key_value: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """P_down Attn(Q from N(P_up_q x_query), K and V from N(P_up_kv x_key_value)): (B, T, H) twice -> (B, T, H)."""
    return layer.coupling.attention_down(full_cross_attention(layer, x_query, x_key_value, kwargs))


def full_cross_attention(layer: nn.Module, x_query: Tensor, x_key_value: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The same without P_down: (B, T, D)."""
    adapters, norm = layer.coupling, layer.input_layernorm
    attn = layer.self_attn
    query = norm(adapters.query_up(x_query))
    key_value = norm(adapters.key_value_up(x_key_value))
    name = next(n for n in layer.query_modules if getattr(attn, n, None) is not None)
    with queries_from(getattr(attn, name), query):
        return first_tensor(attn(hidden_states=key_value, **kwargs))


def attention_of_queries(layer: nn.Module, x_query: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """`cross_attention` where keys and values come from elsewhere: (B, T, H) -> (B, T, H)."""
    query = layer.input_layernorm(layer.coupling.query_up(x_query))
    return layer.coupling.attention_down(first_tensor(layer.self_attn(hidden_states=query, **kwargs)))


def half_feed_forward(layer: nn.Module, y1: Tensor, sums: dict[str, GradientSum] | None = None) -> Tensor:
    """P_down MoE(N(P_up y1)): (B, T, H) -> (B, T, H)."""
    adapters = layer.coupling
    normed = layer.post_attention_layernorm(adapters.feed_up(y1))
    return adapters.feed_down(feed_forward(layer, normed, sums))


def uses_rng(layer: nn.Module) -> bool:
    config = layer.self_attn.config
    return any(getattr(config, name, 0) for name in RNG_SETTINGS) or any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in layer.modules()
    )
