"""What cross_branch adds to a model, and its layer's two sublayers with it: attention between the streams, and the
feed-forward of one.
"""

# B = batch, T = tokens, D = hidden size, H = D / 2

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...config import ReversibleConfig
from ...engine.sublayers import feed_forward, first_tensor
from ...ops.experts import GradientSum
from ...upstream import initialization
from ..base import Added


class Adapters(Added):
    """Projection adapters of one layer (arXiv 2512.20920): up H -> D in front of a sublayer, down D -> H behind it.

    They start as the two halves of the identity: the left stream is the first half of the hidden state, the right one
    the second.
    """

    def __init__(self, hidden_size: int, layer: int, config: ReversibleConfig):
        super().__init__()
        half = hidden_size // 2
        self.query_stream = config.cross_branch.query_stream
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


class StreamMaps(Added):
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


@contextlib.contextmanager
def same_keys_and_values(layer: nn.Module) -> Iterator[None]:
    """While open, the attention is asked about other queries with the same right stream: the maps that make keys and
    values of it run once, and give what they gave."""
    maps = [getattr(layer.self_attn, name, None) for name in layer.key_value_modules]
    maps = [module for module in maps if module is not None]

    def once(module: nn.Module) -> Callable[[Tensor], Tensor]:
        given: list[Tensor] = []

        def forward(x: Tensor) -> Tensor:
            if not given:
                given.append(original(x))
            return given[0]

        original = module.forward
        return forward

    before = [module.__dict__.get("forward") for module in maps]
    for module in maps:
        module.forward = once(module)
    try:
        yield
    finally:
        for module, forward in zip(maps, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def normed_query(layer: nn.Module, x: Tensor) -> Tensor:
    """N(P_up_q x), of which queries are made: (B, T, H) -> (B, T, D)."""
    return layer.input_layernorm(layer.coupling.query_up(x))


def normed_key_value(layer: nn.Module, x: Tensor) -> Tensor:
    """N(P_up_kv x), of which keys and values are made: (B, T, H) -> (B, T, D)."""
    return layer.input_layernorm(layer.coupling.key_value_up(x))


def cross_attention(layer: nn.Module, query: Tensor, key_value: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """P_down Attn(Q from query, K and V from key_value): (B, T, D) twice -> (B, T, H)."""
    return layer.coupling.attention_down(full_cross_attention(layer, query, key_value, kwargs))


def full_cross_attention(layer: nn.Module, query: Tensor, key_value: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The same without P_down: (B, T, D)."""
    attn = uncompiled(layer.self_attn)
    name = next(n for n in layer.query_modules if getattr(attn, n, None) is not None)
    with queries_from(getattr(attn, name), query):
        return first_tensor(attn._call_impl(hidden_states=key_value, **kwargs))


def uncompiled(attn: nn.Module) -> nn.Module:
    """The attention to call by `_call_impl`, past `compile()`: a compiler takes hooks for what they were when it first
    saw them, and the queries come by one."""
    return getattr(attn, "_orig_mod", attn)


def half_feed_forward(layer: nn.Module, y1: Tensor, sums: dict[str, GradientSum] | None = None) -> Tensor:
    """P_down MoE(N(P_up y1)): (B, T, H) -> (B, T, H)."""
    adapters = layer.coupling
    normed = layer.post_attention_layernorm(adapters.feed_up(y1))
    return adapters.feed_down(feed_forward(layer, normed, sums))


def forward_halves(layer: nn.Module, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The layer with ordinary tensors: the two streams are the halves of `hidden_states`, (B, T, D) -> (B, T, D)."""
    if layer.stream_maps is not None:
        hidden_states = layer.stream_maps.entry(hidden_states)
    x1, x2 = hidden_states.chunk(2, dim=-1)
    query = normed_query(layer, x1 if layer.coupling.query_stream == "left" else x2)
    y1 = x1 + cross_attention(layer, query, normed_key_value(layer, x2), kwargs)
    return torch.cat([y1, x2 + half_feed_forward(layer, y1)], dim=-1)
