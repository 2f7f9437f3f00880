"""The planner against full simulated steps: 30 cases, (model x tokens x coupling x optimizer).

    python benchmarks/planner.py                # all cases, about half an hour on one core; what the file has is kept
    python benchmarks/planner.py --predict      # predictions anew, simulations from the file
    python benchmarks/planner.py --only mixtral # cases whose name holds this word

Every case runs the whole step at full depth, batch and length on fake tensors (`simulate_step`), and asks the planner,
which measures a few layers and a few tiles. The file is written after every case. Exit status 1 if a peak is off by
more than 3 %.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from simulate import provenance

from revffn import ReversibleConfig
from revffn.memory.amounts import gib
from revffn.memory.answers import ACCEPTED_ERROR
from revffn.memory.plan import plan
from revffn.memory.simulation import Method, simulate_step
from revffn.models.known import load_config

FILE = Path(__file__).resolve().parent / "results" / "planner_grid.json"
QWEN, QWEN3, OLMOE = "qwen1.5-moe-a2.7b", "qwen3-30b-a3b", "olmoe-1b-7b"
MIXTRAL, DEEPSEEK, GPT = "mixtral-8x7b", "deepseek-v2-lite", "gpt-oss-20b"
# Three evaluations instead of ten: they follow one another, so their number is time, not memory.
LEFT = dict(coupling="cross_branch", query_stream="left", num_iterations=3)
RIGHT, NONE = dict(coupling="cross_branch", query_stream="right"), dict(coupling="none")


def innovation(side_bits: int, **settings) -> dict:
    return dict(coupling="innovation", side_bits=side_bits, **settings)


# Batches of many tiles, of one, and with a last tile that is not full; sequences shorter and longer than a tile, and
# of a length that tiles do not divide, scores of T x T among them; every model with every coupling.
GRID = [
    (QWEN, 16, 2048, innovation(2), "adafactor", "stochastic"),
    (QWEN, 1, 20000, innovation(1), "adamw", "stochastic"),
    (QWEN, 16, 512, RIGHT, "adamw8bit", "stochastic"),
    (QWEN, 4, 2048, NONE, "sgd", "stochastic"),
    (QWEN, 8, 2048, LEFT, "adafactor", "stochastic"),
    (QWEN3, 8, 2048, innovation(2), "adafactor", "stochastic"),
    (QWEN3, 1, 8192, innovation(3), "sgd", "nearest"),
    (QWEN3, 4, 2048, NONE, "adamw8bit", "stochastic"),
    (QWEN3, 16, 512, RIGHT, "adafactor", "stochastic"),
    (QWEN3, 2, 4096, LEFT, "adafactor", "stochastic"),
    (OLMOE, 32, 1024, innovation(2), "adamw", "stochastic"),
    (OLMOE, 1, 32768, innovation(2), "adafactor", "stochastic"),
    (OLMOE, 16, 2048, LEFT, "adafactor", "stochastic"),
    (OLMOE, 64, 256, NONE, "adamw", "master"),
    (OLMOE, 4, 2048, innovation(4, tile_tokens=None), "adafactor", "stochastic"),
    (MIXTRAL, 1, 4096, innovation(2), "adafactor", "stochastic"),
    (MIXTRAL, 8, 2048, innovation(1), "adamw8bit", "stochastic"),
    (MIXTRAL, 16, 2048, NONE, "adafactor", "stochastic"),
    (MIXTRAL, 4, 2048, RIGHT, "sgd", "stochastic"),
    (MIXTRAL, 16, 512, innovation(3), "adafactor", "master"),
    (DEEPSEEK, 16, 2048, innovation(2), "adafactor", "stochastic"),
    (DEEPSEEK, 1, 8192, innovation(1), "adamw", "stochastic"),
    (DEEPSEEK, 4, 4096, LEFT, "adafactor", "stochastic"),
    (DEEPSEEK, 8, 1024, NONE, "sgd", "stochastic"),
    (DEEPSEEK, 6, 2048, RIGHT, "adamw8bit", "stochastic"),
    (GPT, 8, 2048, innovation(2), "adafactor", "stochastic"),
    (GPT, 1, 16384, innovation(1), "sgd", "stochastic"),
    (GPT, 4, 2048, RIGHT, "adamw", "stochastic"),
    (GPT, 21, 700, NONE, "adafactor", "stochastic"),
    (GPT, 3, 3000, LEFT, "adamw8bit", "stochastic"),
]


def name_of(case: tuple) -> str:
    model, batch, tokens, settings, optimizer, rounding = case
    details = {"innovation": f" m={settings.get('side_bits')}", "cross_branch": f" {settings.get('query_stream')}"}
    coupling = settings["coupling"] + details.get(settings["coupling"], "")
    tiles = "" if settings.get("tile_tokens", 2048) else " untiled"
    return f"{model} {batch}x{tokens} {coupling}{tiles} {optimizer} {rounding}"


def method_of(case: tuple) -> Method:
    *_, settings, optimizer, rounding = case
    reversible = ReversibleConfig.from_dict({"tile_tokens": 2048, **settings})
    return Method(reversible=reversible, optimizer=optimizer, rounding=rounding)


def predict(case: tuple) -> dict:
    model, batch, tokens, *_ = case
    start = time.perf_counter()
    answer = plan(load_config(model), batch, tokens, method_of(case), with_alternatives=False)
    seconds = time.perf_counter() - start
    return {"peak_bytes": answer.peak_bytes, "parts": answer.parts, "phase": answer.phase, "seconds": seconds}


def simulate(case: tuple) -> dict:
    model, batch, tokens, *_ = case
    result = simulate_step(load_config(model), batch, tokens, method_of(case))
    kept = ("peak_bytes", "parts", "phase", "leaked_bytes", "num_parameters", "seconds")
    return {name: result[name] for name in kept}


def errors(predicted: dict, simulated: dict) -> dict[str, float]:
    """Relative errors of the peak, and of what lies above weights and optimizer state (which are counted)."""
    fixed = simulated["parts"]["weights"] + simulated["parts"]["optimizer"]
    difference = predicted["peak_bytes"] - simulated["peak_bytes"]
    above = simulated["peak_bytes"] - fixed
    return {"relative_error": difference / simulated["peak_bytes"], "relative_error_above_fixed": difference / above}


def run_case(case: tuple, known: dict | None = None, predict_only: bool = False) -> dict:
    """One entry of the file; what `known` says need not be found out again."""
    known = dict(known or {})
    if predict_only or "predicted" not in known:
        known |= {"predicted": predict(case), "predicted_with": provenance()}
    if "simulated" not in known:
        known |= {"simulated": simulate(case), "simulated_with": provenance()}
    model, batch, tokens, settings, optimizer, rounding = case
    what = dict(model=model, batch=batch, tokens=tokens, reversible=settings, optimizer=optimizer, rounding=rounding)
    return what | known | errors(known["predicted"], known["simulated"])


def line(name: str, case: dict) -> str:
    predicted, simulated = (gib(case[kind]["peak_bytes"]) for kind in ("predicted", "simulated"))
    return f"{name:<72}{predicted:>12}{simulated:>12}{case['relative_error']:>+9.2%}"


def results_of(
    description: str,
    file: Path,
    cases: dict[str, tuple],
    run_case: Callable[[tuple, dict | None, bool], dict],
    line: Callable[[str, dict], str],
) -> dict[str, dict]:
    """What the file has of the cases, after those that the command line asks for; written after every one of them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predict", action="store_true", help="make the predictions again")
    parser.add_argument("--only", default="", help="only cases whose name holds this")
    parser.add_argument("--file", type=Path, default=file)
    args = parser.parse_args()
    results = json.loads(args.file.read_text()) if args.file.exists() else {}
    results = {name: results[name] for name in cases if name in results}
    for name, case in cases.items():
        if args.only not in name:
            continue
        if name not in results or args.predict:
            results[name] = run_case(case, results.get(name), args.predict)
            ordered = {known: results[known] for known in cases if known in results}
            args.file.write_text(json.dumps(ordered, indent=1) + "\n")
        print(line(name, results[name]), flush=True)
    return results


def main() -> int:
    results = results_of(__doc__, FILE, {name_of(case): case for case in GRID}, run_case, line)
    worst = max(results, key=lambda name: abs(results[name]["relative_error"]))
    print(f"\n{len(results)} cases. The worst:\n{line(worst, results[worst])}")
    return int(abs(results[worst]["relative_error"]) > ACCEPTED_ERROR)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
