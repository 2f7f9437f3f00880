"""What a rank takes of a step on several GPUs: the plan against the full simulated step of one rank.

    python benchmarks/several_gpus.py             # all cases, a few minutes each; what the file has is kept
    python benchmarks/several_gpus.py --predict   # predictions anew, simulations from the file
    python benchmarks/several_gpus.py --only "8 ep"

Every case runs the whole step of one rank of N at full depth, batch and length on fake tensors in a fake process
group (`simulate_step`), with the real engine, `parallel.shard` and optimizer, and asks the planner, which does so with
a few layers and tiles. Beside the bytes at the peak it counts what the rank sends. The file is written after every
case. Exit status 1 if a peak is off by more than 3 %, or what is sent by more than 0.1 %.
"""

import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from planner import results_of
from simulate import provenance

from revffn import ReversibleConfig
from revffn.memory.amounts import gib
from revffn.memory.answers import ACCEPTED_ERROR
from revffn.memory.plan import plan
from revffn.memory.simulation import Method, simulate_step
from revffn.memory.wire import wire
from revffn.models.known import load_config

FILE = Path(__file__).resolve().parent / "results" / "several_gpus.json"
ACCEPTED_WIRE = 0.001
CASES = [
    (model, 16, 2048, gpus, parallel, 2048) for model in ("qwen3-30b-a3b",) for gpus in (2, 8)
    for parallel in ("fsdp", "ep")
]  # fmt: skip
"""Model, sequences of all ranks, tokens of each, ranks, strategy, tokens of a tile."""
NODE = [("qwen3-30b-a3b", 8 * 16, 4096, 8, parallel, None) for parallel in ("fsdp", "ep")]
"""One node of eight, predicted alone: nothing is simulated at full depth, and nothing measured."""
LINK_BYTES_PER_S, FLOPS_PER_S = 450e9, 400e12
"""Assumed: NVLink 4 one way, as NVIDIA states it for an H100, and a matrix rate that training reaches."""
PEER = {
    "name": "NeMo AutoModel",
    "tokens_per_second_per_gpu": 12040,
    "source": "https://docs.nvidia.com/nemo/automodel/latest/performance-summary.html",
}
"""What another library states for pre-training this model on eight H100 with sequences of 4,096 tokens."""


def name_of(case: tuple) -> str:
    model, batch, tokens, gpus, parallel, tile = case
    return f"{model} {batch}x{tokens} on {gpus} {parallel}" + ("" if tile else " in one tile")


def method_of(case: tuple) -> Method:
    *_, gpus, parallel, tile = case
    return Method(reversible=ReversibleConfig(tile_tokens=tile), gpus=gpus, parallel=parallel)


def predict(case: tuple) -> dict:
    model, batch, tokens, *_ = case
    method = method_of(case)
    start = time.perf_counter()
    answer = plan(load_config(model), batch, tokens, method, with_alternatives=False)
    seconds = time.perf_counter() - start
    first = asdict(wire(load_config(model), batch, tokens, method, LINK_BYTES_PER_S, FLOPS_PER_S)[0])
    return {
        "peak_bytes": answer.peak_bytes,
        "total_bytes": answer.total_bytes,
        "parts": answer.parts,
        "phase": answer.phase,
        "second_part_bytes": answer.second_part_bytes,
        "wire": first | {"link_bytes_per_s": LINK_BYTES_PER_S, "flops_per_s": FLOPS_PER_S},
        "seconds": seconds,
    }


def simulate(case: tuple) -> dict:
    model, batch, tokens, *_ = case
    result = simulate_step(load_config(model), batch, tokens, method_of(case))
    kept = ("peak_bytes", "parts", "phase", "leaked_bytes", "weight_bytes", "optimizer_bytes", "sent", "seconds")
    return {name: result[name] for name in kept}


def errors(predicted: dict, simulated: dict) -> dict[str, float]:
    """Relative errors of the peak, of what lies above weights and optimizer state, and of what is sent."""
    difference = predicted["peak_bytes"] - simulated["peak_bytes"]
    above = simulated["peak_bytes"] - simulated["weight_bytes"] - simulated["optimizer_bytes"]
    sent = sum(simulated["sent"].values())
    told = sum(predicted["wire"][name] for name in ("gathers", "reductions", "rows"))
    return {
        "relative_error": difference / simulated["peak_bytes"],
        "relative_error_above_fixed": difference / above,
        "relative_error_sent": told / sent - 1,
    }


def run_case(case: tuple, known: dict | None = None, predict_only: bool = False) -> dict:
    """One entry of the file; what `known` says need not be found out again."""
    known = dict(known or {})
    if predict_only or "predicted" not in known:
        known |= {"predicted": predict(case), "predicted_with": provenance()}
    if case in CASES and "simulated" not in known:
        known |= {"simulated": simulate(case), "simulated_with": provenance()}
    names = ("model", "batch", "tokens", "gpus", "parallel", "tile_tokens")
    found = dict(zip(names, case, strict=True)) | ({"peer": PEER} if case in NODE else {}) | known
    return found | (errors(known["predicted"], known["simulated"]) if case in CASES else {})


def line(name: str, case: dict) -> str:
    cells = [gib(case[kind]["peak_bytes"]) if kind in case else "" for kind in ("predicted", "simulated")]
    wrong = [case[name] for name in ("relative_error", "relative_error_sent") if name in case]
    return f"{name:<48}" + "".join(f"{c:>12}" for c in cells) + "".join(f"{error:>+10.3%}" for error in wrong)


def main() -> int:
    cases = {name_of(case): case for case in (*CASES, *NODE)}
    results = results_of(__doc__, FILE, cases, run_case, line)
    wrong = [
        name
        for name, case in results.items()
        if abs(case.get("relative_error", 0)) > ACCEPTED_ERROR
        or abs(case.get("relative_error_sent", 0)) > ACCEPTED_WIRE
    ]
    print(f"{len(results)} cases. Wrong: {', '.join(wrong) or 'none'}.")
    return int(bool(wrong))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
