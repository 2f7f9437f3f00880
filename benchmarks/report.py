"""Result files -> the tables of README.md and docs/.

python benchmarks/report.py            # rewrites the text between `<!-- table: NAME -->` and `<!-- end -->`
python benchmarks/report.py --check    # changes nothing; exit status 1 if a document differs from the files
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "docs/benchmarks.md", "docs/experiments.md", "docs/memory.md", "docs/serving.md")
NO_RESULTS = "*No results yet.*"
TERMS_OF = "qwen1.5-moe-a2.7b 16x2048 innovation m=2 adafactor stochastic"
PARTS = (
    ("weights",),
    ("gradients",),
    ("optimizer",),
    ("streams", "stream_gradients"),
    ("side_bits_and_routing",),
    ("stored_activations", "working_set"),
    ("loss",),
)


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f}"


def label(result: dict) -> str:
    settings = result["settings"]
    method = settings["method"]
    if method == "reversible":
        method = settings["coupling"]
        method += f", m = {settings['side_bits']}" if method == "innovation" else " (layer inputs stored)"
        method += ", weights in host memory" if settings.get("weights") == "host" else ""
    else:
        method = {"checkpointing": "transformers + activation checkpointing", "plain": "transformers"}[method]
        method += "" if settings["full_logits"] else " + our linear cross-entropy"
        method += f" ({settings['optimizer']} {'after' if settings['step_after_backward'] else 'in'} backward)"
    return method


def memory() -> str:
    heads = [" + ".join(part).replace("_", " ") for part in PARTS]
    lines = [
        "| model | tokens | method | peak | " + " | ".join(heads) + " |",
        "|---" * 3 + "|---:" * (len(PARTS) + 1) + "|",
    ]
    results = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("simulate_*.json"))]
    results.sort(
        key=lambda r: (r["settings"]["model"], r["settings"]["batch"] * r["settings"]["tokens"], r["peak_bytes"])
    )
    for result in results:
        settings, parts = result["settings"], result["parts"]
        numbers = [gib(sum(parts.get(name, 0) for name in names)) for names in PARTS]
        where = f"| {settings['model']} | {settings['batch']}×{settings['tokens']} | {label(result)} "
        lines.append(where + f"| **{gib(result['peak_bytes'])}** | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def first_steps() -> str:
    """Held-out loss by step of the first, short comparison of couplings."""
    methods = json.loads((RESULTS / "quality_smollm2-moe_dolly.json").read_text())["methods"]
    steps = [point["step"] for point in next(iter(methods.values()))["curve"]]
    lines = [
        "| method | held-out loss of | " + " | ".join(f"step {s}" for s in steps) + " |",
        "|---" * (len(steps) + 2) + "|",
    ]
    for name, result in methods.items():
        for key in ("exported", "trained"):
            if key in result["curve"][0]:
                values = " | ".join(f"{point[key]:.3f}" for point in result["curve"])
                own = key == "exported" and result["config"]["coupling"] == "cross_branch"
                lines.append(f"| {name} | {'its own function' if own else key} | {values} |")
    return "\n".join(lines)


def planner() -> str:
    """The grid: predicted and simulated peaks, and the error of what lies above weights and optimizer state."""
    heads = ("model", "tokens", "coupling", "optimizer", "predicted", "simulated", "error", "of what is not counted")
    lines = ["| " + " | ".join(heads) + " |", "|---" * 4 + "|---:" * 4 + "|"]
    results = json.loads((RESULTS / "planner_grid.json").read_text()).values()
    for r in results:
        settings = r["reversible"]
        details = {"innovation": f", m = {settings.get('side_bits')}", "none": ""}
        coupling = settings["coupling"] + details.get(settings["coupling"], f", {settings.get('query_stream')}")
        coupling += "" if settings.get("tile_tokens", 1) else ", one tile"
        rule = r["optimizer"] + ("" if r["rounding"] == "stochastic" else f", {r['rounding']}")
        peaks = [gib(r[kind]["peak_bytes"]) for kind in ("predicted", "simulated")]
        errors = [f"{r[name]:+.3%}" for name in ("relative_error", "relative_error_above_fixed")]
        cells = (r["model"], f"{r['batch']}×{r['tokens']}", coupling, rule, *peaks, *errors)
        lines.append("| " + " | ".join(cells) + " |")
    worst = max(abs(r["relative_error"]) for r in results)
    above = max(abs(r["relative_error_above_fixed"]) for r in results)
    lines += [
        "",
        f"{len(results)} cases; the largest error is {worst:.3%} of the peak, {above:.3%} of what is not counted.",
    ]
    return "\n".join(lines)


def terms() -> str:
    """One case of the grid, part by part."""
    result = json.loads((RESULTS / "planner_grid.json").read_text())[TERMS_OF]
    predicted, simulated = (result[kind]["parts"] for kind in ("predicted", "simulated"))
    lines = ["| part | predicted, MiB | simulated, MiB |", "|---|---:|---:|"]
    for name in simulated:
        numbers = (f"{parts[name] / 2**20:,.2f}" for parts in (predicted, simulated))
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(numbers) + " |")
    peaks = (f"**{result[kind]['peak_bytes'] / 2**20:,.2f}**" for kind in ("predicted", "simulated"))
    return "\n".join([*lines, "| **peak** | " + " | ".join(peaks) + " |"])


# --- results of quality.py -------------------------------------------------------------------------------------------

T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Two-sided 95 % of Student's distribution, by the number of seeds."""


def interval(values: list[float]) -> str:
    """Mean and half of the 95 % interval over seeds."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:+.4f}"
    return f"{mean:+.4f} ± {T_QUANTILE[len(values)] * statistics.stdev(values) / len(values) ** 0.5:.4f}"


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
    for folder in sorted(path for path in (RESULTS / results).glob("*") if path.is_dir()):
        by_method: dict[str, dict[int, dict]] = {}
        shared_plain = (RESULTS / "quality" / folder.name).glob("sft_seed*.json") if results != "quality" else ()
        for file in sorted({*folder.glob("*_seed*.json"), *shared_plain}):
            result = json.loads(file.read_text())
            by_method.setdefault(result["method"], {})[result["settings"]["seed"]] = result
        plain = by_method.get("sft", {})
        for seeds in by_method.values():
            # A method that failed with every seed failed; else its other seeds count, and their number says so.
            runs_of_method = [r for r in seeds.values() if "failed" not in r] or list(seeds.values())
            first = runs_of_method[0]
            cells = [folder.name, first["description"], str(len(runs_of_method)), str(first["settings"]["steps"])]
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
    for folder in sorted(path for path in (RESULTS / "quality").glob("*") if path.is_dir()):
        by_method: dict[str, list[dict]] = {}
        for file in sorted(folder.glob("*_seed*.json")):
            result = json.loads(file.read_text())
            if "failed" not in result:
                by_method.setdefault(result["method"], []).append(result)
        if "sft" not in by_method:
            continue
        base = by_method["sft"][0]["curve"][0]["exported"]
        for results in by_method.values():
            if len({result["settings"]["steps"] for result in results}) > 1:
                raise SystemExit(f"{folder}: {results[0]['method']} has seeds of different numbers of steps.")
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
                f"| {folder.name} | {results[0]['description']} | {len(results)} | "
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
    folders = sorted(path for path in (RESULTS / "quality").glob("*") if path.is_dir())
    found: dict[str, dict[str, dict[int, dict]]] = {}
    for folder in folders:
        for file in sorted(folder.glob("*_seed*.json")):
            result = json.loads(file.read_text())
            settings = result["settings"]["reversible"] or {}
            tried = settings.get("grid_growth", 0) == 0 or result["settings"].get("schedule")
            if settings.get("coupling") == "innovation" and tried:
                continue
            seeds = found.setdefault(result["method"], {}).setdefault(folder.name, {})
            seeds[result["settings"]["seed"]] = result
    if "sft" not in found:
        return NO_RESULTS
    heads = ["method", *(f"{folder.name}: above plain SFT (seeds)" for folder in folders)]
    heads += ["kept bytes per token", "trained parameters", "step time, checkpointing = 1"]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for method, workloads in sorted(
        found.items(), key=lambda item: (item[0] != "sft", mean_gap(item[1], found["sft"]))
    ):
        workload, first = next((name, result) for name, seeds in workloads.items() for result in seeds.values())
        if not is_as_long(first, found["sft"].get(workload, {})):
            continue
        cells = [first["description"]]
        for folder in folders:
            seeds = workloads.get(folder.name, {})
            gaps = gaps_of(seeds, found["sft"].get(folder.name, {}))
            if any("failed" in result for result in seeds.values()):
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


# --- results of run.py -----------------------------------------------------------------------------------------------

SAME_FUNCTION = (
    "hf_plain",
    "hf_checkpointing",
    "hf_checkpointing_n",
    "hf_checkpointing_offload",
    "hf_checkpointing_linear_ce",
    "ours_none",
    "ours_none_tiles",
)
"""Methods that compute one function with one optimizer: their losses agree up to rounding. The first that is there is
what the others are compared with."""


def runs(kind: str) -> dict[str, list[dict]]:
    """Results of one kind by device and workload, in words; tiny ones are trials of the script."""
    groups: dict[str, list[dict]] = {}
    for file in sorted(RESULTS.glob(f"{kind}_*.json")):
        result = json.loads(file.read_text())
        if not result["settings"]["tiny"]:
            workload = result["workload"]
            where = f"{workload['name']} ({workload['dtype']}), {result['device']['name']}"
            threads = f", {result['device']['num_threads']} threads" if workload["device"] == "cpu" else ""
            groups.setdefault(where + threads, []).append(result)
    return groups


def seen(result: dict) -> str:
    """What a reader should know of how a result came about."""
    notes = [] if result["settings"]["in_backward"] else ["update after backward"]
    if result["batches_out_of_memory"]:
        notes.append(f"out of memory with {', '.join(map(str, result['batches_out_of_memory']))} sequences")
    notes += ["uncommitted changes"] * bool(result["git"]["dirty"]) + ["untested"] * (result["tests"] is None)
    return f" ({'; '.join(notes)})" if notes else ""


def speed() -> str:
    """One table for each device and workload, fastest first; what gave no number stands at the end with its reason."""
    heads = ("method", "batch", "tokens/s", "step, ms (quartiles)", "model FLOP/s", "of matrix rate")
    heads += ("operations / model's", "peak allocated, GiB", "reserved, GiB", "live tensors, GiB", "host, GiB")
    tables = []
    for where, results in runs("run").items():
        lines = [f"**{where}**", "", f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
        measured = [r for r in results if r["status"] == "ok"]
        for r in sorted(measured, key=lambda r: -r["tokens_per_second"]):
            time, model, hardware = r["step_time_ms"], r["model_flops_per_step"], r["hardware_flops_per_step"]
            cells = [
                r["descriptions"][0] + seen(r),
                f"{r['workload']['batch']}×{r['workload']['tokens']}",
                f"{r['tokens_per_second']:,.0f}",
                f"{time['median']:,.0f} ({time['quartiles'][0]:,.0f}–{time['quartiles'][1]:,.0f})",
                "–" if model is None else f"{r['model_flops_per_second'] / 1e12:,.2f} T",
                "–" if model is None else f"{r['model_flops_share']:.1%}",
                "–" if model is None or hardware is None else f"{hardware / model:.2f}",
            ]
            peaks = ("peak_allocated_bytes", "peak_reserved_bytes")
            sizes = [*(r[name] for name in peaks), r["live"]["peak_bytes"], r["host_peak_bytes"]]
            cells += ["–" if size is None else gib(size) for size in sizes]
            lines.append(f"| {' | '.join(cells)} |")
        for r in results:
            if r["status"] != "ok":
                reason = f"{r['status'].replace('_', ' ')}: {r['reason']}".replace("|", "\\|")
                lines.append(
                    f"| {r['descriptions'][0]}{seen(r)} | {r['workload']['batch']}×{r['workload']['tokens']} "
                    f"| {reason} |" + " |" * (len(heads) - 3)
                )
        tables.append("\n".join(lines))
    return "\n\n".join(tables) or NO_RESULTS


def losses() -> str:
    """How far the losses of methods that compute the same function are apart, over the steps both have taken."""
    lines = ["| workload | method | compared with | steps | largest difference of the loss, relative |"]
    lines += ["|---|---|---|---:|---:|"]
    for where, results in runs("run").items():
        same = {}
        for r in results:
            if r["status"] == "ok" and r["method"] in SAME_FUNCTION and r["settings"]["in_backward"]:
                workload = r["workload"]
                key = (
                    workload["batch"],
                    json.dumps(workload["overrides"]),
                    r["settings"]["rule"],
                    r["settings"]["lr"],
                )
                same.setdefault(key, {})[r["method"]] = r
        for (batch, *_), by_name in same.items():
            first, *others = (by_name[name] for name in SAME_FUNCTION if name in by_name)
            for r in others:
                pairs = list(zip(first["losses"], r["losses"], strict=False))
                worst = max(abs(a - b) / abs(a) for a, b in pairs)
                cells = (f"{where}, batch {batch}", *(x["descriptions"][0] for x in (r, first)), str(len(pairs)))
                lines.append(f"| {' | '.join(cells)} | {worst:.1e} |")
    return "\n".join(lines) if len(lines) > 2 else NO_RESULTS


def pairs() -> str:
    """Two methods in turns: medians of the ratio of their times, with quartiles."""
    heads = ("workload", "method", "against", "rounds", "step time", "quartiles", "CPU time", "operations")
    lines = [f"| {' | '.join(heads)} |", "|---" * 3 + "|---:" * 5 + "|"]
    for where, results in runs("pair").items():
        for r in results:
            cells = [where, *r["descriptions"]]
            cells[-1] += seen(r)
            if r["status"] != "ok":
                lines.append(f"| {' | '.join(cells)} | | {r['status']}: {r['reason']} | | | |")
                continue
            low, high = r["ratio"]["quartiles"]
            cells += [str(len(r["ratio"]["all"])), f"**{r['ratio']['median']:.3f}**", f"{low:.3f}–{high:.3f}"]
            cells += [
                f"{r['cpu_ratio']['median']:.3f}",
                "–" if r["flops_ratio"] is None else f"{r['flops_ratio']:.3f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else NO_RESULTS


def scaling() -> str:
    """Time and memory by size, ours and transformers' side by side."""
    file = RESULTS / "scaling.json"
    if not file.exists():
        return NO_RESULTS
    result = json.loads(file.read_text())
    lines = []
    for axis in ("tokens", "depth", "experts"):
        lines += [
            f"| {axis} | method | step time, first = 1 | quartiles | peak, GiB | without weights and optimizer |"
        ]
        lines += ["|---:|---|---:|---:|---:|---:|"]
        for name, words in SCALED.items():
            for time, memory in zip(result[axis]["time"][name], result[axis]["memory"][name], strict=True):
                rest = memory["peak_bytes"] - memory["parts"]["weights"] - memory["parts"]["optimizer"]
                low, high = time["ratio"]["quartiles"]
                cells = (f"{time['size']:,}", words, f"{time['ratio']['median']:.2f}", f"{low:.2f}–{high:.2f}")
                lines.append(f"| {' | '.join([*cells, gib(memory['peak_bytes']), gib(rest)])} |")
        lines.append("")
    return "\n".join(lines).rstrip()


SCALED = {
    "ours_innovation_tiles": "ours, innovation, m = 2, in tiles",
    "hf_checkpointing_linear_ce": "transformers + checkpointing + linear cross-entropy",
}


def coupling_loss() -> str:
    """What the coupling adds to the loss of the untrained model, by how its predictors were fitted."""
    file = RESULTS / "coupling_loss.json"
    if not file.exists():
        return NO_RESULTS
    result = json.loads(file.read_text())
    columns = [(m, random) for m in (1, 2) for random in (False, True)]
    names = [f"m = {m}, {'random' if random else 'fixed'} sign" for m, random in columns]
    lines = [f"| calibration rows | ridge | {' | '.join(names)} |", "|---:|---:" + "|---:" * len(names) + "|"]
    rows = {(r["rows"], r["ridge"]): {} for r in result["settings"]}
    for r in result["settings"]:
        rows[r["rows"], r["ridge"]][r["m"], r["random_sign"]] = r["loss"] - result["plain"]
    for (count, ridge), losses in rows.items():
        lines.append(f"| {count} | {ridge:g} | {' | '.join(f'{losses[column]:+.3f}' for column in columns)} |")
    lines += ["", "| the predictor sees | " + " | ".join(f"layer {k}" for k in explained_layers(result)) + " |"]
    lines.append("|---" + "|---:" * len(explained_layers(result)) + "|")
    for name in dict.fromkeys(r["inputs"] for r in result["features"]):
        shares = [f"{r['explained']:.3f}" for r in result["features"] if r["inputs"] == name]
        lines.append(f"| {name} | {' | '.join(shares)} |")
    lines += ["", "| one sign for | m = 1 | m = 2 |", "|---|---:|---:|"]
    for group in dict.fromkeys(r["group"] for r in result["chosen_signs"]):
        words = {None: "all: +1", 1: "each channel of each token, chosen"}.get(group, f"{group} channels, chosen")
        cells = [f"{r['loss'] - result['plain']:+.3f}" for r in result["chosen_signs"] if r["group"] == group]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def grids() -> str:
    """What the coupling adds to the loss of the untrained model, by how the grids grow."""
    file = RESULTS / "coupling_loss_grids.json"
    if not file.exists():
        return NO_RESULTS
    result = json.loads(file.read_text())
    lines = ["| digits of the first state | of the last | in wide channels | m = 0 | m = 1 | m = 2 | m = 3 | m = 4 |"]
    lines.append("|---:" * 8 + "|")
    rows: dict[tuple, dict[int, float]] = {}
    for r in result["grids"]:
        last = r["fraction_bits"] + r["grid_growth"]
        wide = f"{r['fraction_bits'] + r['wide_growth']} ({r['wide_channels']})" if r["wide_channels"] else "–"
        rows.setdefault((r["fraction_bits"], last, wide), {})[r["m"]] = r["loss"] - result["plain"]
    for key, losses in rows.items():
        cells = [f"{losses[m]:+.3f}" if m in losses else "–" for m in range(5)]
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cross_branch_start() -> str:
    """The untrained cross_branch by what its adapters were fitted on, and its fixed points in one step."""
    file = RESULTS / "cross_branch_start.json"
    if not file.exists():
        return NO_RESULTS
    lines = [
        "| queries from the | adapters fitted on tokens | held-out loss | accuracy | loss of what all fits saw | "
    ]
    lines[0] += "layers whose fixed point is not found |"
    lines.append("|---|---:|---:|---:|---:|---:|")
    for row in json.loads(file.read_text())["cross_branch"]:
        stream = row["query_stream"] or "plain model"
        tokens = f"{row['calibration']['num_tokens']:,}" if row.get("rows") else "not fitted" if "rows" in row else "–"
        anchors = f"{len(row['anchor_layers'])} of {len(row['unconverged'])}" if "unconverged" in row else "–"
        cells = f"{row['loss']:.3f} | {row['accuracy']:.3f} | {row['seen_loss']:.3f} | {anchors}"
        lines.append(f"| {stream} | {tokens} | {cells} |")
    return "\n".join(lines)


def ranks() -> str:
    """The same by rank of the predictors, and the operations of a layer's predictor by rank, full = 1."""
    file = RESULTS / "coupling_loss_ranks.json"
    if not file.exists():
        return NO_RESULTS
    result = json.loads(file.read_text())
    full = result["hidden_size"]
    lines = ["| rank | share of s_{k-1} - s_k predicted | m = 1 | m = 2 | operations, full = 1 |", "|---:" * 5 + "|"]
    for rank, of_rank in by_value(result["ranks"], "predictor_rank").items():
        cells = [f"{r['loss'] - result['plain']:+.3f}" for r in of_rank]
        operations = 1 if rank is None else 2 * rank / full
        words = f"{full} (full)" if rank is None else rank
        lines.append(f"| {words} | {of_rank[0]['explained']:.2f} | {' | '.join(cells)} | {operations:.2f} |")
    return "\n".join(lines)


def plain_layers() -> str:
    """The same by the number of leading layers that run plainly."""
    file = RESULTS / "coupling_loss_plain_layers.json"
    if not file.exists():
        return NO_RESULTS
    result = json.loads(file.read_text())
    lines = ["| plain layers | share of s_{k-1} - s_k predicted | m = 1 | m = 2 |", "|---:" * 4 + "|"]
    for number, of_number in by_value(result["plain_layers"], "plain_layers").items():
        cells = [f"{r['loss'] - result['plain']:+.3f}" for r in of_number]
        lines.append(f"| {number} | {of_number[0]['explained']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def token_groups() -> str:
    """The predicted share by layer, with a map for each of some groups of tokens."""
    file = RESULTS / "coupling_loss_finer.json"
    if not file.exists():
        return NO_RESULTS
    rows = json.loads(file.read_text())["token_groups"]
    layers = list(dict.fromkeys(r["layer"] for r in rows))
    lines = ["| groups | " + " | ".join(f"layer {k}" for k in layers) + " |", "|---:" * (len(layers) + 1) + "|"]
    for number in dict.fromkeys(r["groups"] for r in rows):
        shares = [f"{r['explained']:.3f}" for r in rows if r["groups"] == number]
        lines.append(f"| {number} | {' | '.join(shares)} |")
    return "\n".join(lines)


def sublayers() -> str:
    """What the coupling adds to the loss with a step for each layer, and for each sublayer."""
    file = RESULTS / "coupling_loss_finer.json"
    if not file.exists():
        return NO_RESULTS
    result = json.loads(file.read_text())
    lines = [
        "| a step for each | m = 1 | m = 2 | m = 4 | bits kept per layer and channel |",
        "|---|---:|---:|---:|---|",
    ]
    for per, rows in by_value(result["sublayers"], "per").items():
        cells = [f"{r['loss'] - result['plain']:+.3f}" for r in rows]
        cells.append(", ".join(str(r["bits_per_layer"]) for r in rows))
        lines.append(f"| {per} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_value(rows: list[dict], name: str) -> dict:
    """Rows grouped by a setting, m rising."""
    groups: dict = {}
    for row in sorted(rows, key=lambda row: row["m"]):
        groups.setdefault(row[name], []).append(row)
    return groups


def explained_layers(result: dict) -> list[int]:
    return list(dict.fromkeys(r["layer"] for r in result["features"]))


def serving() -> str:
    """What servers generate with an exported model, against transformers."""
    lines = [
        "| model | engine | versions | tokens equal | largest difference of a log-probability |",
        "|---|---|---|---:|---:|",
    ]
    for file in sorted(RESULTS.glob("serving_*.json")):
        result = json.loads(file.read_text())
        for name, found in result["engines"].items():
            if name == "transformers":
                continue
            versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
            against = found["against_transformers"]
            worst = against["largest_logprob_difference"]
            difference = "no number" if worst is None else f"{worst:.1e}"
            cells = (result["model"], name, versions, f"{against['equal_tokens']} of {against['tokens']}", difference)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else NO_RESULTS


TABLES = {"memory": memory, "first_steps": first_steps, "quality": quality, "planner": planner, "terms": terms}
TABLES |= {"speed": speed, "losses": losses, "pairs": pairs, "scaling": scaling, "serving": serving}
TABLES |= {"overview": overview, "curves": curves, "grids": grids, "ranks": ranks}
TABLES |= {"plain_layers": plain_layers, "token_groups": token_groups, "sublayers": sublayers}
TABLES["cross_branch_start"] = cross_branch_start
TABLES |= {"coupling_loss": coupling_loss, "quality_ridge": partial(quality, "quality_ridge_0.001")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name in DOCUMENTS:
        file = ROOT / name
        old = file.read_text()
        new = re.sub(
            r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
            lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
            old,
            flags=re.DOTALL,
        )
        if new != old:
            stale.append(name)
            if not check:
                file.write_text(new)
    print(f"{'Out of date' if check else 'Rewritten'}: {', '.join(stale) or 'nothing'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
