"""What gpu_suite.py measures: arms (ours and the rivals), and rows, most telling first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True, frozen=True)
class Arm:
    """A way of training, as the tables name it."""

    method: str
    """Of `methods.METHODS`."""
    words: str
    experts: str | None = None
    """`experts_implementation`; "own" is revffn's where it is registered, else transformers'."""
    kernels: str = "auto"
    """`REVFFN_KERNELS`."""


ARMS = {
    "hf": Arm(
        method="hf_torch_adafactor",
        words="transformers + checkpointing, full logits; torch.optim.Adafactor in backward",
        experts="grouped_mm",
    ),
    "hf_linear_ce": Arm(
        method="hf_torch_adafactor_linear_ce",
        words="transformers + checkpointing + linear CE; torch.optim.Adafactor in backward",
        experts="grouped_mm",
    ),
    "hf_fused_optimizer": Arm(
        method="hf_checkpointing_linear_ce",
        words="transformers + checkpointing + linear CE; our fused optimizer",
        experts="grouped_mm",
    ),
    "hf_same_kernels": Arm(
        method="hf_same_kernels",
        words="transformers + checkpointing + linear CE; our optimizer and experts, Liger's rest",
        experts="revffn",
    ),
    "hf_sonicmoe": Arm(
        method="hf_same_kernels",
        words="transformers + checkpointing + linear CE; our optimizer, sonicmoe, Liger's rest",
        experts="sonicmoe",
    ),
    "hf_same_kernels_kept": Arm(
        method="hf_same_kernels",
        words="transformers, some layers checkpointed; linear CE, our optimizer and experts, Liger's rest",
        experts="revffn",
    ),
    "innovation_m2_kept": Arm(
        method="ours_innovation_tiles", words="ours, innovation, m = 2, some layers kept", experts="own"
    ),
    "none": Arm(method="ours_none_tiles", words="ours, layer inputs stored", experts="own"),
    "none_offload": Arm(
        method="ours_none_offload_tiles", words="ours, layer inputs in host memory", experts="own"
    ),
    "innovation_m2": Arm(
        method="ours_innovation_tiles", words="ours, innovation, m = 2", experts="own"
    ),
    "innovation_m1": Arm(
        method="ours_innovation_m1_tiles", words="ours, innovation, m = 1", experts="own"
    ),
    "cross_branch_right": Arm(
        method="ours_cross_branch_right_tiles",
        words="ours, cross_branch, queries from the right",
        experts="own",
    ),
    "cross_branch_left": Arm(
        method="ours_cross_branch_left_tiles",
        words="ours, cross_branch, queries from the left (the paper's)",
        experts="own",
    ),
    "cross_branch_left_kept": Arm(
        method="ours_cross_branch_left_tiles",
        words="ours, cross_branch, queries from the left (the paper's), some layers kept",
        experts="own",
    ),
    "innovation_m2_torch": Arm(
        method="ours_innovation_tiles",
        words="ours, innovation, m = 2; eager",
        experts="grouped_mm",
        kernels="torch",
    ),
    "innovation_m2_host": Arm(
        method="ours_innovation_tiles_host",
        words="ours, innovation, m = 2, weights in host memory",
        experts="own",
    ),
    "none_offload_host": Arm(
        method="ours_none_offload_tiles_host",
        words="ours, layer inputs and weights in host memory",
        experts="own",
    ),
}


@dataclass(kw_only=True, frozen=True)
class Row:
    """One measurement."""

    workload: str
    arm: str
    tile: int | None = None
    """`tile_tokens` of ours; None is the whole batch at once."""
    kept: int = 0
    """Last decoder layers that do not run again in backward. Of ours on the whole batch as many as `choose_kept` has
    fit an H100 of 79.1 GiB."""
    batch: int | None = None
    """Where it differs from the workload's."""
    steps: int = 3
    cap_gib: int | None = None
    """Most that the process may take of the device."""
    profile: bool = False
    """One more step under the profiler."""
    seconds: int = 15
    """Expected: a row starts only while so much is left of the budget."""

    @property
    def name(self) -> str:
        parts = [self.workload, self.arm]
        parts += [f"tile{self.tile}" if self.tile else "whole"] * (not self.arm.startswith("hf"))
        parts += [f"kept{self.kept}"] * bool(self.kept)
        parts += [f"batch{self.batch}"] * bool(self.batch) + [f"cap{self.cap_gib}"] * bool(
            self.cap_gib
        )
        return "-".join(parts)

    @property
    def limit_seconds(self) -> int:
        return 2 * self.seconds + 30


def _rows(workload: str, *arms: tuple[str, dict[str, Any]]) -> list[Row]:
    return [Row(workload=workload, arm=arm, **settings) for arm, settings in arms]


Q16, Q64, QWEN3, OLMOE = "qwen1.5_16x2048", "qwen1.5_64x2048", "qwen3_16x2048", "olmoe_16x2048"
LONG, LONGEST = "qwen1.5_1x32768", "qwen1.5_1x131072"

ROWS = [
    *_rows(
        Q16,
        ("innovation_m2", dict(profile=True, seconds=40)),  # kernels are compiled in it
        ("innovation_m2_kept", dict(kept=15)),
        ("innovation_m2", dict(tile=16384)),
        ("hf_same_kernels", dict(profile=True, seconds=18)),
        ("hf_same_kernels_kept", dict(kept=12)),
        ("none", dict(profile=True, seconds=15)),
        ("none_offload", dict(seconds=12)),
    ),
    *_rows(
        QWEN3,
        ("innovation_m2", dict(profile=True, seconds=35)),
        ("innovation_m2_kept", dict(kept=4, seconds=25)),
    ),
    *_rows(
        Q16,
        ("hf_linear_ce", dict(profile=True, seconds=28)),
        ("innovation_m2_torch", dict(tile=8192, seconds=28)),
        ("hf", dict(batch=8, seconds=14)),
        ("hf_fused_optimizer", dict(seconds=14)),
    ),
    *_rows(
        QWEN3,
        ("hf_same_kernels", dict(seconds=25)),
        ("none_offload", dict(tile=8192, seconds=25)),
        ("innovation_m2", dict(tile=8192, seconds=30)),
    ),
    *_rows(
        Q16,
        ("innovation_m2", dict(tile=8192)),
        ("innovation_m1", dict(seconds=12)),
        ("cross_branch_right", dict(tile=16384)),
        ("cross_branch_right", dict()),
        ("cross_branch_left", dict(tile=16384, profile=True, seconds=30)),
        ("cross_branch_left", dict(profile=True, seconds=25)),
        ("cross_branch_left_kept", dict(kept=12, seconds=25)),
    ),
    *_rows(
        Q64,
        ("innovation_m2", dict(tile=16384, seconds=40)),
        ("innovation_m2", dict(tile=65536, seconds=40)),
        ("hf_same_kernels", dict(seconds=35)),
        ("none_offload", dict(tile=16384, seconds=35)),
    ),
    *_rows(
        LONG,
        ("innovation_m2", dict(tile=8192, seconds=18)),
        ("hf_same_kernels", dict()),
        ("none_offload", dict(tile=8192)),
    ),
    *_rows(
        OLMOE,
        ("innovation_m2", dict(profile=True, seconds=18)),
        ("innovation_m2_kept", dict(kept=16)),
        ("hf_same_kernels", dict(profile=True)),
        ("none", dict(profile=True)),
        ("none_offload", dict()),
    ),
    *_rows(Q16, ("innovation_m2_host", dict(tile=8192, cap_gib=12, steps=2, seconds=60))),
    *_rows(Q64, ("innovation_m2_host", dict(tile=16384, cap_gib=16, steps=2, seconds=70))),
    *_rows(QWEN3, ("innovation_m2_host", dict(tile=8192, cap_gib=24, steps=2, seconds=90))),
    *_rows(Q64, ("none_offload_host", dict(tile=16384, cap_gib=16, steps=2, seconds=70))),
    *_rows(
        LONGEST,
        ("innovation_m2", dict(tile=8192, steps=2, seconds=85)),
        ("none_offload", dict(tile=8192, steps=2, seconds=80)),
        ("hf_same_kernels", dict(steps=2, seconds=80)),
    ),
    *_rows(QWEN3, ("hf_fused_optimizer", dict(seconds=30))),
    *_rows(OLMOE, ("hf_fused_optimizer", dict())),
    *_rows(Q16, ("hf_sonicmoe", dict(seconds=20))),
    *_rows(
        QWEN3,
        ("hf_linear_ce", dict(batch=8, seconds=35)),
        ("innovation_m2_torch", dict(tile=8192, seconds=45)),
    ),
    *_rows(
        OLMOE,
        ("hf_linear_ce", dict(seconds=20)),
        ("innovation_m2_torch", dict(tile=8192, seconds=25)),
    ),
]
BY_NAME = {row.name: row for row in ROWS}
assert len(BY_NAME) == len(ROWS)
