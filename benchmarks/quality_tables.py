"""Results of quality.py -> the tables of loss, bytes and time in README.md and docs/. Written by report.py."""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
EXPERIMENTS = RESULTS.parents[1] / "experiments" / "results"
NO_RESULTS = "*No results yet.*"

T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Two-sided 95 % of Student's distribution, by the number of seeds."""


def interval(values: list[float]) -> str:
    """Mean and half of the 95 % interval over seeds."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:+.4f}"
    return f"{mean:+.4f} ± {T_QUANTILE[len(values)] * statistics.stdev(values) / len(values) ** 0.5:.4f}"


def runs_by_workload(results: str = "quality") -> dict[str, dict[str, dict[int, dict]]]:
    """All runs in a folder of results, failed ones too: by workload, method and seed."""
    found: dict[str, dict[str, dict[int, dict]]] = {}
    for file in sorted((RESULTS / results).glob("*/*_seed*.json")):
        result = json.loads(file.read_text())
        of_method = found.setdefault(file.parent.name, {}).setdefault(result["method"], {})
        of_method[result["settings"]["seed"]] = result
    return found


def quality(results: str = "quality") -> str:
    """One row for each workload and method: held-out loss, and what it is above plain SFT's with the same seeds."""
    heads = (
        "workload",
        "method",
        "seeds",
        "steps",
        "rate",
        "held-out loss",
        "above plain SFT",
        "as trained",
        "accuracy",
    )
    heads += ("divergence from the base", "kept bytes per token")
    lines = [f"| {' | '.join(heads)} |", "|---" * 2 + "|---:" * (len(heads) - 2) + "|"]
    for workload, by_method in runs_by_workload(results).items():
        if results != "quality":
            by_method = {"sft": runs_by_workload()[workload]["sft"], **by_method}
        plain = by_method.get("sft", {})
        for seeds in by_method.values():
            # A method that failed with every seed failed; else its other seeds count, and their number says so.
            runs_of_method = [r for r in seeds.values() if "failed" not in r] or list(seeds.values())
            first = runs_of_method[0]
            cells = [workload, first["description"], str(len(runs_of_method)), str(first["settings"]["steps"])]
            cells.append(f"{first['settings']['learning_rate']:g}")
            if "failed" in first:
                lines.append(f"| {' | '.join(cells)} | failed: {first['failed']} |" + " |" * (len(heads) - 6))
                continue
            last = [result["curve"][-1] for result in runs_of_method]
            gaps = gaps_of(seeds, plain)
            each = first["kept_bytes"] / first["kept_bytes_of_tokens"]
            cells += [
                f"{statistics.mean(point['exported'] for point in last):.4f}",
                interval(gaps) if gaps and seeds is not plain else "–",
                f"{statistics.mean(p['trained'] for p in last):.4f}" if "trained" in last[0] else "–",
                f"{statistics.mean(point['accuracy'] for point in last):.3f}",
                f"{statistics.mean(r['drift']['after']['divergence'] for r in runs_of_method):.4f}",
                f"{each:,.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else NO_RESULTS


def curves() -> str:
    """One row for each workload and method, its seeds' mean: held-out loss by share of the steps, and after how many
    tokens it was measured to be at most what the base model has untrained."""
    heads = ("workload", "method", "seeds", "before", "a third", "two thirds", "end", "tokens")
    heads += ("tokens to the base's loss",)
    lines = [f"| {' | '.join(heads)} |", "|---" * 2 + "|---:" * (len(heads) - 2) + "|"]
    for workload, by_method in runs_by_workload().items():
        if "sft" not in by_method:
            continue
        base = next(iter(by_method["sft"].values()))["curve"][0]["exported"]
        for seeds in by_method.values():
            results = [result for result in seeds.values() if "failed" not in result]
            if not results:
                continue
            if len({result["settings"]["steps"] for result in results}) > 1:
                raise SystemExit(f"{workload}: {results[0]['method']} has seeds of different numbers of steps.")
            points = list(zip(*(result["curve"] for result in results), strict=True))
            losses = [statistics.mean(point["exported"] for point in at_step) for at_step in points]
            steps, tokens = results[0]["settings"]["steps"], statistics.mean(result["tokens"] for result in results)
            # To the rounding of another kernel: most methods start there.
            reached = [i for i, loss in enumerate(losses) if loss <= base + 1e-3]
            needed = "not reached"
            if reached:
                # Older files do not say how many tokens a point had seen.
                at = [point.get("tokens", tokens * point["step"] / steps) for point in points[reached[0]]]
                needed = f"{statistics.mean(at):,.0f}"
            thirds = losses[:: (len(losses) - 1) // 3]
            lines.append(
                f"| {workload} | {results[0]['description']} | {len(results)} | "
                + " | ".join(f"{loss:.4f}" for loss in thirds)
                + f" | {tokens:,.0f} | {needed} |"
            )
    return "\n".join(lines) if len(lines) > 2 else NO_RESULTS


TIMED_AS = {
    "sft": "ours_none-vs-hf_checkpointing",
    "innovation_grown": "ours_innovation-vs-hf_checkpointing",
    "innovation_m1_grown": "ours_innovation_m1-vs-hf_checkpointing",
    "cross_branch": "ours_cross_branch_right-vs-hf_checkpointing",
    "cross_branch_fitted": "ours_cross_branch_right_maps-vs-hf_checkpointing",
    **{name: f"{name}-vs-hf_checkpointing" for name in ("lora", "dora", "ia3", "lomo", "galore", "galore_linear")},
}
"""Of quality.py's methods: the pair of run.py that says how long a step takes."""


def overview() -> str:
    """One row for each method of quality.py: loss on every workload, bytes, time. Innovation as calibration sets it
    up; with one grid or a schedule it is in the longer table, as are runs of other lengths."""
    names = list(runs_by_workload())
    found: dict[str, dict[str, dict[int, dict]]] = {}
    for workload, by_method in runs_by_workload().items():
        for method, seeds in by_method.items():
            first = next(iter(seeds.values()))
            settings = first["settings"]["reversible"] or {}
            tried = settings.get("grid_growth", 0) == 0 or first["settings"].get("schedule")
            if settings.get("coupling") != "innovation" or not tried:
                found.setdefault(method, {})[workload] = seeds
    if "sft" not in found:
        return NO_RESULTS
    heads = ["method", *(f"{name}: above plain SFT (seeds)" for name in names)]
    heads += ["kept bytes per token", "trained parameters", "step time, checkpointing = 1"]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for method, workloads in sorted(
        found.items(), key=lambda item: (item[0] != "sft", mean_gap(item[1], found["sft"]))
    ):
        runs = [(name, result) for name, seeds in workloads.items() for result in seeds.values()]
        workload, first = next((run for run in runs if "failed" not in run[1]), runs[0])
        if not is_as_long(first, found["sft"].get(workload, {})):
            continue
        cells = [first["description"]]
        for name in names:
            seeds = workloads.get(name, {})
            gaps = gaps_of(seeds, found["sft"].get(name, {}))
            if seeds and all("failed" in result for result in seeds.values()):
                cells.append("failed")
            elif method == "sft":
                loss = statistics.mean(result["curve"][-1]["exported"] for result in seeds.values())
                cells.append(f"its loss is {loss:.4f} ({len(seeds)})")
            else:
                cells.append(f"{interval(gaps)} ({len(gaps)})" if gaps else "–")
        if "failed" in first:
            cells += ["–", "–"]
        else:
            each = first["kept_bytes"] / first["kept_bytes_of_tokens"]
            number = first["trained_parameters"]
            cells += [f"{each:,.0f}", f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number / 1e3:,.0f} k"]
        pair = RESULTS / f"pair_cpu_cpu_float32_{TIMED_AS.get(method)}.json"
        timed = json.loads(pair.read_text()) if pair.exists() else {"status": "none"}
        if method == "sft_checkpointing":
            cells.append("1")
        else:
            cells.append(f"{timed['ratio']['median']:.3f}" if timed["status"] == "ok" else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gaps_of(seeds: dict[int, dict], plain: dict[int, dict]) -> list[float]:
    """Held-out loss above plain SFT's, by seed; none for a run of more or fewer steps."""
    both = [
        (result, plain[seed])
        for seed, result in sorted(seeds.items())
        if seed in plain and "failed" not in result and is_as_long(result, plain)
    ]
    return [ours["curve"][-1]["exported"] - theirs["curve"][-1]["exported"] for ours, theirs in both]


def is_as_long(result: dict, plain: dict[int, dict]) -> bool:
    return all(result["settings"]["steps"] == other["settings"]["steps"] for other in plain.values())


def mean_gap(workloads: dict[str, dict[int, dict]], plain: dict[str, dict[int, dict]]) -> float:
    """For the order of rows; without any, at the end."""
    means = [statistics.mean(gaps) for name in workloads if (gaps := gaps_of(workloads[name], plain.get(name, {})))]
    return statistics.mean(means) if means else float("inf")


TABLES = {"quality": quality, "quality_ridge": partial(quality, EXPERIMENTS / "quality_ridge_0.001")}
TABLES |= {"curves": curves, "overview": overview}
