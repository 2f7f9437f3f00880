"""A step of one rank on a GPU that is there, its exchanges by NCCL with itself: time, bytes and losses beside the same
step without a group, and the bytes that the simulation says.

    python benchmarks/one_rank.py --commit HASH    # on a GPU; a minute
    python benchmarks/one_rank.py --simulate       # anywhere: the simulated peaks of the cases that the file has
    python benchmarks/one_rank.py --tiny --out F   # the same code on a CPU, by gloo

One rank says nothing of links. It shows on the device that FSDP2 and the experts' exchange train as one process does,
what they cost beside the links, and whether the bytes that are planned for ranks are those of the device.
"""

import argparse
import gc
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from simulate import provenance
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from workloads import Workload

from revffn import ReversibleConfig, reversible_report
from revffn.memory.amounts import gib
from revffn.memory.simulation import Method, RealOptimizer, build, run_step
from revffn.parallel.shard import all_ranks

FILE = Path(__file__).resolve().parent / "results" / "gpu" / "one_rank.json"
STRATEGIES = (None, "fsdp", "ep")
ALONE = "alone"
WORKLOAD = Workload(model="qwen1.5-moe-a2.7b", batch=16, tokens=2048)
STEPS = 4
"""Timed, after one more."""


def method_of(strategy: str | None) -> Method:
    return Method(reversible=ReversibleConfig(tile_tokens=None), parallel=strategy or "fsdp")


def measure(workload: Workload, strategy: str | None) -> dict:
    """Steps of a model with random weights, the same for every strategy; the group is there."""
    device, on_gpu = torch.device(workload.device), workload.device == "cuda"
    method = method_of(strategy)
    torch.manual_seed(0)
    with device:
        model = build(workload.hf_config(), method, all_ranks(workload.device) if strategy else None)
    optimizer = RealOptimizer(model, method)
    losses, times = [], []
    for index, batch in enumerate(workload.batches(1 + STEPS)):
        if on_gpu:
            torch.cuda.synchronize()
            if index == 1:
                torch.cuda.reset_peak_memory_stats()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if on_gpu:
            last.record()
            torch.cuda.synchronize()
            times.append(first.elapsed_time(last))
    report = reversible_report(model)
    found = {
        "losses": losses,
        "states": {name: report[name] for name in ("verified_states", "mismatched_states_total")},
    }
    if on_gpu:
        timed = times[1:]
        found |= {
            "step_time_ms": {"median": statistics.median(timed), "all": timed},
            "tokens_per_second": 1000 * workload.batch * workload.tokens / statistics.median(timed),
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        }
    return found


def simulate(workload: Workload, strategy: str | None) -> dict:
    """The bytes alive at the peak of such a step, on fake tensors."""
    if strategy:
        dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        method, mesh = method_of(strategy), all_ranks("cpu") if strategy else None
        with FakeTensorMode():
            model = build(workload.hf_config(), method, mesh)
            result = run_step(model, workload.batch, workload.tokens, method)
    finally:
        if strategy:
            dist.destroy_process_group()
    return {name: result[name] for name in ("peak_bytes", "parts", "phase", "sent")}


def line(name: str, case: dict) -> str:
    cells = []
    if "tokens_per_second" in case:
        cells += [f"{case['tokens_per_second']:,.0f} tokens/s", f"peak {gib(case['peak_allocated_bytes'])}"]
    if "simulated" in case:
        cells.append(f"simulated {gib(case['simulated']['peak_bytes'])}")
    cells.append("losses " + ", ".join(f"{loss:.5f}" for loss in case.get("losses", ())))
    return f"{name:<8}" + "; ".join(cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--commit", help="what is run, where there is no git to ask")
    parser.add_argument("--only", choices=[strategy or ALONE for strategy in STRATEGIES])
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tokens", type=int, default=WORKLOAD.tokens, help="of a sequence")
    parser.add_argument("--layers", type=int, help="of the model; all unless told")
    parser.add_argument("--vocabulary", type=int, help="of the model; its own unless told")
    args = parser.parse_args()
    given = {"num_hidden_layers": args.layers, "vocab_size": args.vocabulary}
    workload = replace(WORKLOAD, tokens=args.tokens, overrides={k: v for k, v in given.items() if v})
    workload = workload.tiny() if args.tiny else workload
    results = json.loads(args.out.read_text()) if args.out.exists() else {"cases": {}}
    results |= {"model": workload.model, "batch": workload.batch, "tokens": workload.tokens}
    results["overrides"] = workload.overrides
    if not args.simulate:
        on_gpu = workload.device == "cuda"
        results["measured_with"] = provenance() | ({"commit": args.commit} if args.commit else {})
        results["device"] = torch.cuda.get_device_name() if on_gpu else "cpu"
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    for strategy in STRATEGIES:
        name = strategy or ALONE
        if args.only not in (None, name):
            continue
        case = results["cases"].setdefault(name, {})
        if args.simulate:
            case |= {"simulated": simulate(workload, strategy), "simulated_with": provenance()}
        else:
            case |= measure(workload, strategy)
            gc.collect()
            if workload.device == "cuda":
                torch.cuda.empty_cache()
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(line(name, case), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
