"""What a rank sends to the others in a step, by strategy, from the model's sizes alone.

Of W ranks each holds 1/W of everything, so of what all ranks get, (W - 1) / W is sent and received:

    gathers     parameters, in forward and again in backward
    reductions  their gradients, in float32
    rows        ep: every choice's row six times, there and back in forward, in recomputation, and for gradients; and
                its routing weight half as often

Choices are taken to be spread evenly over the ranks; the sum over all ranks is right however they are spread. Counts
of rows, norms of gradients and adafactor's sums over shards are left out: together less than a thousandth.
"""

# B = batch, T = tokens, W = ranks, N = tokens of a rank, K = experts per token, D = hidden size

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..parallel.shard import check_strategy, expert_modules
from .answers import Wire
from .simulation import Method, build

TRIPS, WEIGHT_TRIPS = 6, 3
"""Of a row, and of its routing weight: forward, recomputation, gradients."""
FLOPS_PER_WEIGHT = 8
"""And token: 2 in forward, 2 again in recomputation, 4 for gradients."""


@dataclass(frozen=True)
class Sizes:
    """Of a model that W ranks share."""

    all: tuple[int, int]
    """Bytes of gathers and of reductions where every parameter is gathered."""
    experts: tuple[int, int]
    """Of them, those of experts."""
    bytes_per_token: int
    """That ep moves in all layers, those that stay included."""
    active: float
    """Weights of the layers that a token meets."""
    in_parts: bool
    """Whether experts can stay on their ranks."""


def experts_per_token(hf_config: PreTrainedConfig) -> int:
    """K; 1 of a dense model, whose one expert all tokens meet."""
    config = hf_config.get_text_config()
    return getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None) or 1


def active_weights(hf_config: PreTrainedConfig, parameters: list[Tensor]) -> float:
    """Of parameters: of experts the share that a token chooses."""
    top_k = experts_per_token(hf_config)
    return sum(p.numel() * min(1.0, top_k / p.shape[0]) if p.dim() == 3 else p.numel() for p in parameters)


def sizes(hf_config: PreTrainedConfig, method: Method) -> Sizes:
    with torch.device("meta"):
        model = build(hf_config, method)
    found = expert_modules(model)
    experts = [p for module in found for p in module.parameters(recurse=False)]

    def moved(parameters: Iterable[Tensor]) -> tuple[int, int]:
        """Their first dimension is filled up to a multiple of the ranks, as FSDP2 does."""
        gathers = reductions = 0
        for p in parameters:
            elements = p.numel() // p.shape[0] * math.ceil(p.shape[0] / method.gpus) * method.gpus
            gathers += 2 * elements * p.itemsize
            reductions += 4 * elements * p.requires_grad
        return gathers, reductions

    row = (TRIPS * hf_config.get_text_config().hidden_size + WEIGHT_TRIPS) * method.dtype.itemsize
    try:
        check_strategy(model, "ep", method.gpus)
        in_parts = True
    except ValueError:
        in_parts = False
    return Sizes(
        moved(model.parameters()),
        moved(experts),
        len(found) * experts_per_token(hf_config) * row,
        active_weights(hf_config, list(model.model.layers.parameters())),
        in_parts,
    )


def wire(
    hf_config: PreTrainedConfig,
    batch: int,
    tokens: int,
    method: Method,
    link_bytes_per_s: float | None = None,
    flops_per_s: float = 0.0,
) -> list[Wire]:
    """Of both strategies where both are possible; the method's is the first.

    Args:
        batch, tokens: B sequences of T tokens, of all ranks together.
        link_bytes_per_s: What a rank sends at most while it receives as much; None leaves time out.
        flops_per_s: Matrix rate of a rank.

    Raises:
        ValueError: The batch cannot be divided.
    """
    of_rank = method.share(batch) * tokens
    found, others = sizes(hf_config, method), (method.gpus - 1) / method.gpus
    # ep moves rows in place of the experts' parameters and gradients.
    break_even = sum(found.experts) // found.bytes_per_token if found.in_parts else None

    def of(strategy: str) -> Wire:
        less = found.experts if strategy == "ep" else (0, 0)
        gathers, reductions = (others * (a - b) for a, b in zip(found.all, less, strict=True))
        per_token = others * found.bytes_per_token if strategy == "ep" else 0.0
        seconds = hidden = None
        if link_bytes_per_s is not None:
            seconds = (gathers + reductions + per_token * of_rank) / link_bytes_per_s
            spare = FLOPS_PER_WEIGHT * found.active / flops_per_s - per_token / link_bytes_per_s
            hidden = math.ceil((gathers + reductions) / link_bytes_per_s / spare) if spare > 0 else None
        return Wire(
            strategy=strategy,
            gathers=round(gathers),
            reductions=round(reductions),
            rows=round(per_token * of_rank),
            tokens=of_rank,
            break_even_tokens=break_even,
            seconds=seconds,
            hidden_tokens=hidden,
        )

    other = "ep" if method.parallel == "fsdp" else "fsdp"
    return [of(method.parallel), *([of(other)] if found.in_parts else [])]
