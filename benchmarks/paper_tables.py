"""The run of the paper's recipe, and dispatches -> tables of the documents. Written by report.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def paper_run(result: dict) -> str:
    """The CPU recipe of the paper's system, by stage."""
    lines = [
        "| stage | steps | loss, first and last three | layers kept | most tokens kept | states that differ |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for stage in (1, 2):
        steps = [step for step in result["metrics"] if step.get("stage") == stage and "loss" in step]
        first, last = (sum(s["loss"] for s in part) / 3 for part in (steps[:3], steps[-3:]))
        cells = (stage, len(steps), f"{first:.2f}, {last:.2f}", max(s["num_anchors"] for s in steps))
        cells += (f"{max(s['kept_rows_at_most'] for s in steps):.1%}", sum(s["mismatched_states"] for s in steps))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def paper_layers(result: dict) -> str:
    """How the layers of its last step were inverted."""
    layers = {int(k): layer for k, layer in result["run"]["reversible_report"]["layers"].items()}
    lines = [
        "| layers | bits kept of an element | tokens kept whole | iterations | an iteration shrinks a step to |",
        "|---|---:|---:|---:|---:|",
    ]
    groups = ((0, 0), (1, 1), (2, 2), (3, 9), (10, 19), (20, 29))
    for first, last in groups:
        some = [layers[k] for k in range(first, last + 1)]
        spans = []
        for name, unit in (("kept_bits", ""), ("kept_rows", " %"), ("iterations", ""), ("contraction", "")):
            found = [x[name] * (100 if unit else 1) for x in some]
            low, high = (f"{f(found):.2g}" for f in (min, max))
            spans.append((low if low == high else f"{low} to {high}") + unit)
        where = str(first) if first == last else f"{first} to {last}"
        lines.append(f"| {where} | {' | '.join(spans)} |")
    return "\n".join(lines)


def dispatches(result: dict) -> str:
    """Operations that the host issues, before there were fused ones and now."""
    before = json.loads((RESULTS / "dispatches_before.json").read_text())
    lines = [
        "| what | before: all | that launch | now: all | that launch |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, words in (
        ("further_tile", "a further tile of a layer: forward, recomputation, backward"),
        ("layer", "a layer, one tile, with its optimizer"),
    ):
        cells = [f"{found[name][kind]:,}" for found in (before, result) for kind in ("all", "launching")]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def of_file(table: Callable[[dict], str], name: str) -> str:
    return table(json.loads((RESULTS / f"{name}.json").read_text()))


TABLES = {
    function.__name__: partial(of_file, function, name)
    for function, name in ((paper_run, "paper_cpu"), (paper_layers, "paper_cpu"), (dispatches, "dispatches"))
}
