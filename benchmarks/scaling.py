"""How a step's time and memory grow with tokens, depth and experts -> one JSON.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json     # wants a quiet machine

Memory: live tensors at the peak of a step at true width (Qwen1.5-MoE-A2.7B in bf16), planned from the config. Time: a
small model of the same proportions in float32 on this machine. In every round each size takes one step, in turns; what
is kept is the ratio of a size's step time to the first size's in the same round. Beside ours (innovation, m = 2, tiles
of 2,048 tokens) stands transformers with activation checkpointing; both have adafactor in backward and linear
cross-entropy, so that only what is compared differs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from methods import start
from run import device_facts, now, spread
from simulate import provenance
from workloads import Workload

from revffn.config import ReversibleConfig
from revffn.memory.amounts import gib
from revffn.memory.plan import plan
from revffn.memory.simulation import Method
from revffn.models.known import load_config

ROOT = Path(__file__).resolve().parent.parent
MODEL = "qwen1.5-moe-a2.7b"
SIZES = {
    "tokens": (1024, 4096, 16384, 65536, 131072),
    "depth": (6, 12, 24, 48),
    "experts": (8, 16, 32, 64, 128),
}
BASE = {"tokens": 4096, "depth": 24, "experts": 60}
"""At true width; an axis changes one of them."""
SMALL_BASE = {"tokens": 4096, "depth": 6, "experts": 16}
LENGTH = 1024
"""Tokens of a sequence; more tokens are more sequences."""
SMALL = dict(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=16, vocab_size=1024, intermediate_size=48,
    moe_intermediate_size=32, shared_expert_intermediate_size=128, num_experts_per_tok=4,
)  # fmt: skip
METHODS = {
    "ours_innovation_tiles": Method(reversible=ReversibleConfig(side_bits=2, tile_tokens=2048)),
    "hf_checkpointing_linear_ce": Method(name="checkpointing"),
}


def overrides(sizes: dict[str, int]) -> dict[str, int]:
    return {"num_hidden_layers": sizes["depth"], "num_experts": sizes["experts"]}


def memory(axis: str) -> dict[str, list[dict[str, Any]]]:
    """Planned bytes at every size, by method."""
    out: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for size in SIZES[axis]:
        sizes = BASE | {axis: size}
        for name, method in METHODS.items():
            config = load_config(MODEL, **overrides(sizes))
            answer = plan(config, sizes["tokens"] // LENGTH, LENGTH, method, with_alternatives=False)
            out[name].append({"size": size, "peak_bytes": answer.peak_bytes, "parts": answer.parts})
            print(f"{axis} {size}, {name}: {gib(answer.peak_bytes)}", flush=True)
    return out


def times(axis: str, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Ratios of step times to the first size's, by method."""
    out = {}
    for name in METHODS:
        trainings, batches = [], []
        for size in SIZES[axis]:
            sizes = SMALL_BASE | {axis: size}
            workload = Workload(
                model=MODEL,
                batch=sizes["tokens"] // LENGTH,
                tokens=LENGTH,
                device="cpu",
                dtype=torch.float32,
                overrides=SMALL | overrides(sizes),
            )
            training = start(name, workload.hf_config(), "cpu", torch.float32, None, workload.tile_tokens)
            trainings.append(training)
            batches.append(workload.batches(1)[0])
            training.step(batches[-1])
        measured: list[list[float]] = [[] for _ in trainings]
        for _ in range(rounds):
            for seconds, training, batch in zip(measured, trainings, batches, strict=True):
                began = time.perf_counter()
                training.step(batch)
                seconds.append(time.perf_counter() - began)
        first = measured[0]
        out[name] = [
            {"size": size, "ratio": spread([a / b for a, b in zip(seconds, first, strict=True)])}
            for size, seconds in zip(SIZES[axis], measured, strict=True)
        ]
        print(axis, name, [f"{point['ratio']['median']:.2f}" for point in out[name]], flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="write the JSON to this file")
    parser.add_argument("--axes", nargs="*", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    result: dict[str, Any] = {"settings": {"model": MODEL, "base": BASE, "small_base": SMALL_BASE, "small": SMALL}}
    result |= {"rounds": args.rounds, "date": now(), "device": device_facts("cpu"), **provenance()}
    for axis in args.axes:
        result[axis] = {"time": times(axis, args.rounds), "memory": memory(axis)}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
