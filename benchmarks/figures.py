"""Result files -> docs/figures/*.svg.

python benchmarks/figures.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from quality_tables import gaps_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"


def two_panels(height: float) -> tuple[Figure, Axes, Axes]:
    figure = Figure(figsize=(10, height), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e5e9f0")
        axes.set_axisbelow(True)
    return figure, left, right


# --- results of scaling.py -------------------------------------------------------------------------------------------

SCALED = {
    "ours_innovation_tiles": ("ours, innovation m = 2", "#5e81ac"),
    "hf_checkpointing_linear_ce": ("transformers + checkpointing", "#bf616a"),
}


def scaling(result: dict[str, Any], axis: str) -> Figure:
    """Time on the left, memory on the right; `axis` is tokens, depth or experts."""
    figure, left, right = two_panels(3.8)
    for name, (label, color) in SCALED.items():
        points = result[axis]["time"][name]
        sizes = [point["size"] for point in points]
        low, high = zip(*(point["ratio"]["quartiles"] for point in points), strict=True)
        left.plot(sizes, [point["ratio"]["median"] for point in points], "o-", color=color, label=label)
        left.fill_between(sizes, low, high, color=color, alpha=0.2, linewidth=0)
        points = result[axis]["memory"][name]
        sizes = [point["size"] for point in points]
        right.plot(sizes, [p["peak_bytes"] / 2**30 for p in points], "o-", color=color)
        rest = [(p["peak_bytes"] - p["parts"]["weights"] - p["parts"]["optimizer"]) / 2**30 for p in points]
        right.plot(sizes, rest, "o--", color=color, markerfacecolor="white")
    if axis == "tokens":
        left.plot(sizes, [size / sizes[0] for size in sizes], ":", color="black", label="linear")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
        left.set_yscale("log", base=2)
    unit = {"tokens": "tokens per step", "depth": "decoder layers", "experts": "experts per layer"}[axis]
    left.set_title(f"step time, {sizes[0]} {unit} = 1 (small model)", loc="left", fontsize=10)
    right.set_title("peak, GiB (true width; dashed: without weights and optimizer)", loc="left", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel(unit)
        axes.set_xticks(sizes, [f"{size // 1024}k" if size >= 1024 else str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_ylim(bottom=None if axes is left and axis == "tokens" else 0)
    left.legend(frameon=False, fontsize=9)
    return figure


# --- results of quality.py -------------------------------------------------------------------------------------------

TUNED = {
    "sft": ("plain SFT", "#2e3440", "s"),
    "sft_checkpointing": ("SFT + checkpointing", "#7b88a1", "s"),
    "innovation_grown": ("innovation, m = 2", "#2f5d9e", "o"),
    "innovation_m1_grown": ("innovation, m = 1", "#88b0e0", "o"),
    "lora": ("LoRA", "#a3be8c", "^"),
    "dora": ("DoRA", "#6b8e4e", "v"),
    "ia3": ("IA3", "#ebcb8b", "<"),
    "galore_linear": ("GaLore, experts with AdamW", "#d08770", ">"),
    "lomo": ("LOMO", "#b48ead", "D"),
    "cross_branch": ("cross_branch, queries from the right", "#e3a0a6", "P"),
    "cross_branch_fitted": ("cross_branch, fitted, distilled", "#bf616a", "X"),
    "cross_branch_long": ("the same, 1,200 steps", "#bf616a", "*"),
}
"""Of quality.py's methods: label, colour and marker of those drawn."""


def runs_by_method(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """The runs of one workload that ended, by method in the order of `TUNED` and by seed."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for name in TUNED:
        results = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{name}_seed*.json"))]
        if results and not any("failed" in result for result in results):
            runs[name] = {result["settings"]["seed"]: result for result in results}
    return runs


def quality(folder: Path) -> Figure:
    """Held-out loss on the way to the left; to the right, at the end, what it is above plain SFT's with the same seeds
    against bytes, for runs of as many steps. Means over seeds."""
    runs = runs_by_method(folder)
    figure, left, right = two_panels(4.8)
    shown: list[tuple[float, float, str]] = []
    for name, by_seed in runs.items():
        label, color, marker = TUNED[name]
        style = {"color": color, "marker": marker, "zorder": 3 if name.startswith("innovation") else 2}
        results = list(by_seed.values())
        at_step = list(zip(*(result["curve"] for result in results), strict=True))
        losses = [statistics.mean(point["exported"] for point in points) for points in at_step]
        # Older files do not say how many tokens a point had seen.
        share = statistics.mean(result["tokens"] for result in results) / results[0]["settings"]["steps"]
        tokens = [statistics.mean(p.get("tokens", p["step"] * share) for p in points) for points in at_step]
        left.plot(tokens, losses, markersize=5, linewidth=1.5, label=label, **style)
        gaps = gaps_of(by_seed, runs["sft"])
        if gaps:
            kept = results[0]["kept_bytes"] / results[0]["kept_bytes_of_tokens"]
            right.plot([kept], [statistics.mean(gaps)], linestyle="none", markersize=7, **style)
            shown.append((kept, statistics.mean(gaps), label))
    base = next(iter(runs["sft"].values()))["curve"][0]["exported"]
    left.axhline(base, color="black", linestyle=":", linewidth=1)
    left.annotate("base model, untrained", (0.25, base), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    left.set_yscale("log")
    low, high = left.get_ylim()
    ticks = [tick for tick in (0.7, 0.8, 1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 10) if low <= tick <= high]
    left.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    left.minorticks_off()
    left.set_xlabel("tokens")
    left.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
    left.set_title(f"{folder.name}: held-out loss, nats per response token", loc="left", fontsize=10)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)

    right.set_xscale("log")
    sizes = (2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
    right.set_xticks(sizes, [f"{size // 1000}k" for size in sizes])
    right.set_xlim(sizes[0], sizes[-1])
    right.set_yscale("symlog", linthresh=0.02)
    right.set_ylim(-0.015, 10)
    gaps_shown = (-0.01, 0, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5)
    right.set_yticks(gaps_shown, [f"{gap:+g}" if gap else "0" for gap in gaps_shown])
    right.minorticks_off()
    right.set_xlabel("bytes kept for backward per token, all layers")
    right.set_title("loss at the end above plain SFT, nats (linear up to 0.02)", loc="left", fontsize=10)
    to_axes = right.transData + right.transAxes.inverted()
    places = sorted((*to_axes.transform((kept, gap)), label) for kept, gap, label in shown)
    # Those that keep layer inputs lie above each other: names in a column beside them.
    column = sorted((y, x, label) for x, y, label in places if x > 0.8)
    heights: list[float] = []
    for y, _, _ in column:
        heights.append(max(y, heights[-1] + 0.052) if heights else y - 0.1)
    at = {"xycoords": "axes fraction", "va": "center", "fontsize": 8}
    for (y, x, label), height in zip(column, heights, strict=True):
        line = {"arrowstyle": "-", "color": "#9aa5b8", "lw": 0.6, "relpos": (1, 0.5)}
        right.annotate(label, (x, y), (0.8, height), **at, textcoords=at["xycoords"], ha="right", arrowprops=line)
    for x, y, label in places:
        if x <= 0.8:
            beside = {"xytext": (-8, 0), "ha": "right"} if x > 0.3 else {"xytext": (8, 0)}
            right.annotate(label, (x, y), **beside, **at, textcoords="offset points")
    return figure


def figures() -> dict[str, Figure]:
    """Name without ending -> figure."""
    scaled = json.loads((RESULTS / "scaling.json").read_text())
    drawn = {f"scaling_{axis}": scaling(scaled, axis) for axis in ("tokens", "depth", "experts")}
    return drawn | {f"quality_{name}": quality(RESULTS / "quality" / name) for name in ("dolly", "gsm8k")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIGURES)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    # The same results give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "revffn"}):
        for name, figure in figures().items():
            figure.savefig(out / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
