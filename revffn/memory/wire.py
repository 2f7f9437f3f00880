"""What a rank sends to the others in a step, by strategy, from the model's sizes alone.

Of W ranks each holds 1/W of everything, so of what all ranks get, (W - 1) / W is sent and received:

    gathers     a layer's parameters in forward and again in backward; what lies outside the layers (embedding, final
                norm, head) once, as it stays gathered in between
    reductions  gradients of what was gathered, in float32
    rows        ep: every choice's row six times, there and back in forward, in recomputation, and for gradients; and
                its routing weight half as often

Choices are taken to be spread evenly over the ranks; the sum over all ranks is right however they are spread. Counts
of rows, norms of gradients and adafactor's sums over shards are left out: together less than a thousandth.
"""

# B = batch, T = tokens, W = ranks, N = tokens of a rank, K = experts per token, D = hidden size

from __future__ import annotations

import math
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

    gathered: dict[str, int]
    """Bytes of the parameters, by `layers`, `experts` (of them), `outside`."""
    reduced: dict[str, int]
    """The same of gradients in float32."""
    bytes_per_token: int
    """That ep moves in all layers, those that stay included."""
    active: float
    """Weights of the layers that a token meets."""
    in_parts: bool
    """Whether experts can stay on their ranks."""


def active_weights(hf_config: PreTrainedConfig, parameters: list[Tensor]) -> float:
    """Of parameters: of experts the share that a token chooses."""
    config = hf_config.get_text_config()
    top_k = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None) or 1
    return sum(p.numel() * min(1.0, top_k / p.shape[0]) if p.dim() == 3 else p.numel() for p in parameters)


def sizes(hf_config: PreTrainedConfig, method: Method) -> Sizes:
    with torch.device("meta"):
        model = build(hf_config, method)
    layers, found = list(model.model.layers.parameters()), expert_modules(model)
    experts = {p for module in found for p in module.parameters(recurse=False)}
    inside = set(layers)
    groups = {
        "layers": layers,
        "experts": list(experts),
        "outside": [p for p in model.parameters() if p not in inside],
    }

    def padded(parameter: Tensor) -> int:
        """Elements, with the first dimension filled up to a multiple of the ranks, as FSDP2 does."""
        rows = parameter.shape[0]
        return parameter.numel() // rows * math.ceil(rows / method.gpus) * method.gpus

    config = hf_config.get_text_config()
    top_k = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None) or 0
    row = (TRIPS * config.hidden_size + WEIGHT_TRIPS) * method.dtype.itemsize
    try:
        check_strategy(model, "ep", method.gpus)
        in_parts = True
    except ValueError:
        in_parts = False
    return Sizes(
        {name: sum(padded(p) * p.itemsize for p in group) for name, group in groups.items()},
        {name: sum(padded(p) * 4 for p in group if p.requires_grad) for name, group in groups.items()},
        len(found) * top_k * row,
        active_weights(hf_config, layers),
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
    everywhere = found.gathered["layers"], found.reduced["layers"]
    experts = found.gathered["experts"], found.reduced["experts"]
    saved = 2 * experts[0] + experts[1]
    # ep moves what grows with the tokens, and not what the experts' parameters take.
    break_even = saved // found.bytes_per_token if found.in_parts else None

    def of(strategy: str) -> Wire:
        less = experts if strategy == "ep" else (0, 0)
        gathers = others * (2 * (everywhere[0] - less[0]) + found.gathered["outside"])
        reductions = others * (everywhere[1] - less[1] + found.reduced["outside"])
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
