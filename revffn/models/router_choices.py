"""What routers choose, told after each forward call: layer by layer, real tokens only, no extra pass.

Converted models say it by themselves (engine/routing.py); a plain model's routers get the same classes for a while.
Recomputation in backward replays choices and tells nothing.
"""

# B = batch, T = tokens, K = experts per token

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..engine.routing import choosing_classes, intercept, watching
from .architectures import ARCHITECTURES, plain_model_type
from .conversion import is_reversible

NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
"""How configs name the number of routed experts."""

See = Callable[[int, Tensor, Tensor | None], None]
"""Told a sparse layer's index, the experts chosen (B * T, K) in the smallest integer type, and which tokens count,
(B * T) bool, or None where all do."""


def sparse_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Index and feed-forward block of the layers that have experts; empty for dense models and unknown families."""
    row = ARCHITECTURES.get(plain_model_type(model.config.model_type))
    if row is None or row.router is None:
        return {}
    return {i: layer.mlp for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")}


def num_experts(model: PreTrainedModel) -> int:
    """Routed experts of a layer."""
    config = model.config.get_text_config()
    return next(getattr(config, name) for name in NUM_EXPERTS if getattr(config, name, None))


def counted_tokens(attention_mask: object, position_ids: object) -> Tensor | None:
    """(B, T) bool, the tokens that are some example's; None where all are.

    Args:
        attention_mask: (B, T), or anything else.
        position_ids: (B, T), of examples one behind another; one of a single token is none, and fills up.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask.bool()
    if isinstance(attention_mask, Tensor) or not isinstance(position_ids, Tensor) or position_ids.dim() != 2:
        return None
    following = torch.cat([position_ids[:, 1:], torch.zeros_like(position_ids[:, :1])], dim=1)
    return (position_ids != 0) | (following != 0)


@contextlib.contextmanager
def router_choices(model: PreTrainedModel, see: See) -> Iterator[None]:
    """While open, `see` is called for every sparse layer once each forward call of `model` has ended."""
    blocks = sparse_layers(model)
    if not blocks:
        yield
        return
    row = ARCHITECTURES[plain_model_type(model.config.model_type)]
    layer_of = {id(part): i for i, block in blocks.items() for part in (block, getattr(block, row.router))}
    chosen: dict[int, list[Tensor]] = {}
    mask: list[Tensor | None] = [None]

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        chosen.clear()
        mask[0] = counted_tokens(kwargs.get("attention_mask"), kwargs.get("position_ids"))

    def end(module: nn.Module, args: tuple, output: object) -> None:
        for layer in sorted(chosen):
            indices = torch.cat([part.flatten(0, -2) for part in chosen[layer]])
            see(layer, indices, None if mask[0] is None else mask[0].flatten())
        chosen.clear()

    def watcher(module: nn.Module, indices: Tensor) -> None:
        if id(module) in layer_of:
            chosen.setdefault(layer_of[id(module)], []).append(indices)

    plain = {} if is_reversible(model) else blocks
    with choosing(plain, row.router), watching(watcher):
        hooks = [model.model.register_forward_pre_hook(begin, with_kwargs=True)]
        hooks.append(model.model.register_forward_hook(end))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextlib.contextmanager
def choosing(blocks: dict[int, nn.Module], router: str) -> Iterator[None]:
    """The blocks' choices go through engine/routing.py, as in a converted model; afterwards they are what they were.
    """
    parts = [part for block in blocks.values() for part in (block, getattr(block, router))]
    before = [part.__class__ for part in parts]
    try:
        for block in blocks.values():
            family = sys.modules[type(block).__module__]
            intercept(block, getattr(block, router), choosing_classes(family))
        yield
    finally:
        for part, cls in zip(parts, before, strict=True):
            part.__class__ = cls
