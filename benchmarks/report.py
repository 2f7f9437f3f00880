"""Result files -> the tables of README.md and docs/.

python benchmarks/report.py            # rewrites the text between `<!-- table: NAME -->` and `<!-- end -->`
python benchmarks/report.py --check    # changes nothing; exit status 1 if a document differs from the files
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import sys
from pathlib import Path

import gpu_tables
import paper_tables
import quality_tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    "README.md", "docs/benchmarks.md", "docs/experiments.md", "docs/memory.md", "docs/paper.md", "docs/serving.md",
    "docs/several_gpus.md",
)  # fmt: skip
NO_RESULTS = quality_tables.NO_RESULTS
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
        method += {
            "innovation": f", m = {settings['side_bits']}",
            "cross_branch": ", queries from the left (the paper's)",
            "none": " (layer inputs stored)",
        }[method]
        method += ", weights in host memory" if settings.get("weights") == "host" else ""
        method += "" if settings["tile_tokens"] else ", one tile"
        kept = settings.get("kept_layers")  # not in records of before
        method += f", {kept} layers kept" if kept else ""
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


# --- several GPUs ----------------------------------------------------------------------------------------------------

RANK_PARTS = (*PARTS[:3], ("gathered",), *PARTS[3:5], ("stored_activations", "exchange", "working_set"))


def of_ranks(simulated: bool) -> list[dict]:
    results = json.loads((RESULTS / "several_gpus.json").read_text()).values()
    return [result for result in results if ("simulated" in result) == simulated]


def one_rank() -> str:
    """Simulated steps of one rank by part, the plan beside them, and what was sent."""
    heads = ["model", "tokens", "GPUs", "strategy", "predicted", "simulated", "error"]
    heads += [" + ".join(part).replace("_", " ") for part in RANK_PARTS] + ["sent: predicted", "counted", "error"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * 2 + "|---:" + "|---" + "|---:" * (len(heads) - 4) + "|"]
    for r in of_ranks(simulated=True):
        predicted, found = r["predicted"], r["simulated"]
        cells = [r["model"], f"{r['batch']}×{r['tokens']}", str(r["gpus"]), r["parallel"]]
        cells += [gib(predicted["peak_bytes"]), f"**{gib(found['peak_bytes'])}**", f"{r['relative_error']:+.3%}"]
        cells += [gib(sum(found["parts"][name] for name in names)) for names in RANK_PARTS]
        told = sum(predicted["wire"][name] for name in ("gathers", "reductions", "rows"))
        cells += [gib(told), gib(sum(found["sent"].values())), f"{r['relative_error_sent']:+.3%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def node() -> str:
    """A node of eight, as predicted."""
    heads = ("strategy", "tokens", "GiB of a GPU", "and twice its part of the rows", "gathers", "reductions", "rows")
    heads += ("sent, GiB", "seconds at least", "hidden from tokens per GPU", "ep sends less below")
    lines = [f"| {' | '.join(heads)} |", "|---|---" + "|---:" * (len(heads) - 2) + "|"]
    for r in of_ranks(simulated=False):
        predicted, sent = r["predicted"], r["predicted"]["wire"]
        kinds = [sent[name] for name in ("gathers", "reductions", "rows")]
        more = predicted["second_part_bytes"]
        cells = [r["parallel"], f"{r['batch']}×{r['tokens']}", gib(predicted["total_bytes"])]
        cells += ["–" if more is None else f"+ {gib(more)}", *map(gib, kinds), gib(sum(kinds))]
        cells += [f"{sent['seconds']:.2f}", f"{sent['hidden_tokens']:,}", f"{sent['break_even_tokens']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    peer, tokens = r["peer"], sent["tokens"]
    rate = peer["tokens_per_second_per_gpu"]
    lines += [
        "",
        f"Sending: at {sent['link_bytes_per_s'] / 1e9:g} GB/s. Computing, which hides it: at "
        f"{sent['flops_per_s'] / 1e12:g} TFLOP/s. Both are assumed.",
        f"[{peer['name']}]({peer['source']}) states {rate:,} tokens per second and GPU for pre-training this model on "
        f"eight H100 with expert parallelism; {tokens:,} tokens would take {tokens / rate:.1f} seconds at that rate.",
    ]
    return "\n".join(lines)


# --- results of run.py -----------------------------------------------------------------------------------------------

SAME_FUNCTION = (
    "hf_plain",
    "hf_checkpointing",
    "hf_checkpointing_n",
    "hf_checkpointing_offload",
    "hf_checkpointing_linear_ce",
    "hf_same_kernels",
    "ours_none",
    "ours_none_tiles",
    "ours_none_offload_tiles",
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


TABLES = {"memory": memory, "planner": planner, "terms": terms, "serving": serving, "one_rank": one_rank, "node": node}
TABLES |= {"speed": speed, "losses": losses, "pairs": pairs, "scaling": scaling}
TABLES |= quality_tables.TABLES | gpu_tables.TABLES | paper_tables.TABLES
# Experiments come after the benchmarks; their tables alone are asked for here.
TABLES |= runpy.run_path(str(ROOT / "experiments" / "tables.py"))["TABLES"]


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
