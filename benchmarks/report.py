"""Result files -> the tables of README.md and docs/.

python benchmarks/report.py            # rewrites the text between `<!-- table: NAME -->` and `<!-- end -->`
python benchmarks/report.py --check    # changes nothing; exit status 1 if a document differs from the files
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "docs/experiments.md", "docs/memory.md")
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
    else:
        method = {"checkpointing": "transformers + activation checkpointing", "plain": "transformers"}[method]
        method += f" ({settings['optimizer']} after backward)" if settings["step_after_backward"] else ""
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


def quality() -> str:
    from quality import table

    return "\n\n".join(table(json.loads(file.read_text())) for file in sorted(RESULTS.glob("quality_*.json")))


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


TABLES = {"memory": memory, "quality": quality, "planner": planner, "terms": terms}


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
