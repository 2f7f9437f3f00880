"""What is trained in a benchmark: model, batch, length, dtype, device. Weights are random, tokens too.

Random routers spread tokens more evenly over experts than trained ones do, so expert products see nearly equal
groups; that favours no method over another. Adding a workload is adding a row.
"""

# B = batch, T = tokens

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from revffn.models.known import load_config


@dataclass(kw_only=True, frozen=True)
class Workload:
    """One training step's input, and how often it is timed."""

    model: str
    """A name that `revffn plan` knows."""
    batch: int
    tokens: int
    """Per sequence."""
    device: Literal["cuda", "cpu"] = "cuda"
    dtype: torch.dtype = torch.bfloat16
    """Of weights and computation."""
    tile_tokens: int = 2048
    """For the methods that walk in tiles."""
    warmup_steps: int = 2
    timed_steps: int = 8
    overrides: dict[str, Any] = field(default_factory=dict)
    """Of the model's config."""

    def hf_config(self) -> PreTrainedConfig:
        return load_config(self.model, **self.overrides)

    def batches(self, number: int, seed: int = 0) -> list[dict[str, Tensor]]:
        """`number` batches of random tokens on the device, the same for every method; every position is a label."""
        vocab_size = self.hf_config().vocab_size
        made = []
        for index in range(number):
            generator = torch.Generator().manual_seed(1000 * seed + index)
            ids = torch.randint(0, vocab_size, (self.batch, self.tokens), generator=generator)
            made.append({"input_ids": ids.to(self.device)})
        for batch in made:
            batch["labels"] = batch["input_ids"]
        return made

    def tiny(self) -> Workload:
        """The same architecture and the same code paths at a size that a CPU runs in a second."""
        return replace(
            self,
            batch=min(self.batch, 2),
            tokens=16,
            device="cpu",
            dtype=torch.float32,
            tile_tokens=16,
            warmup_steps=1,
            timed_steps=2,
            overrides=TINY,
        )


TINY = dict(
    hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, head_dim=16, vocab_size=256,
    intermediate_size=48, moe_intermediate_size=32, shared_expert_intermediate_size=64, num_experts=8,
    num_experts_per_tok=2,
)  # fmt: skip
# Qwen1.5-MoE's proportions: shared experts as wide as the active routed ones together, a head of a tenth of the
# active weights.
SMALL = dict(
    hidden_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8, vocab_size=8192,
    num_experts=16, num_experts_per_tok=4, moe_intermediate_size=352, shared_expert_intermediate_size=1408,
)  # fmt: skip

WORKLOADS: dict[str, Workload] = {
    "qwen1.5_16x2048": Workload(model="qwen1.5-moe-a2.7b", batch=16, tokens=2048),
    "qwen1.5_64x2048": Workload(model="qwen1.5-moe-a2.7b", batch=64, tokens=2048, warmup_steps=1, timed_steps=3),
    "qwen1.5_128x2048": Workload(model="qwen1.5-moe-a2.7b", batch=128, tokens=2048, warmup_steps=1, timed_steps=3),
    "qwen1.5_4x512": Workload(model="qwen1.5-moe-a2.7b", batch=4, tokens=512),
    "qwen1.5_1x32768": Workload(model="qwen1.5-moe-a2.7b", batch=1, tokens=32768),
    "qwen1.5_1x131072": Workload(model="qwen1.5-moe-a2.7b", batch=1, tokens=131072, warmup_steps=1, timed_steps=2),
    "olmoe_16x2048": Workload(model="olmoe-1b-7b", batch=16, tokens=2048),
    "qwen3_16x2048": Workload(model="qwen3-30b-a3b", batch=16, tokens=2048, timed_steps=5),
    "cpu_float32": Workload(
        model="qwen1.5-moe-a2.7b", batch=4, tokens=256, device="cpu", dtype=torch.float32, tile_tokens=256,
        warmup_steps=1, overrides=SMALL,
    ),
    "cpu_bfloat16": Workload(
        model="qwen1.5-moe-a2.7b", batch=4, tokens=256, device="cpu", tile_tokens=256, warmup_steps=1,
        overrides=SMALL,
    ),
}  # fmt: skip
