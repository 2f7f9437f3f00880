"""The command `revffn plan`: the planner's answers as tables, JSON and a picture."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from ..config import CrossBranchConfig, ReversibleConfig
from ..files import new_file
from ..models.known import load_config
from .amounts import gib, parse_bytes
from .plan import USUAL_TILE, TileChoice, check, choose_tile, label_of, plan, tiled, traffic, what_would_fit
from .predict import Plan
from .simulation import Method

COLUMNS = (
    ("weights", ("weights",)),
    ("gradients", ("gradients",)),
    ("optimizer", ("optimizer",)),
    ("streams", ("streams", "stream_gradients")),
    ("side bits", ("side_bits_and_routing",)),
    ("stored", ("stored_activations",)),
    ("working set", ("working_set",)),
    ("loss", ("loss",)),
)
"""Heading -> parts: every part once, in the order in which they are drawn."""


def sizes(way: Plan) -> dict[str, int]:
    """Bytes by heading of `COLUMNS`, and the reserve; they add up to `total_bytes`."""
    return {head: sum(way.parts[part] for part in parts) for head, parts in COLUMNS} | {"reserve": way.reserve_bytes}


def table(answer: Plan, gpu: str | None, tile_at_most: int | None = None) -> str:
    """One line for each way, GiB by part."""
    heads = ["GiB", *sizes(answer), "total", "host RAM"]
    asked = answer.largest_batch is not None
    heads += [f"batch x {answer.tokens}", "1 x tokens"] * asked
    rows = [heads]
    for way in (answer, *answer.alternatives):
        numbers = [*sizes(way).values(), way.total_bytes, way.host_bytes]
        cells = [way.label, *(f"{size / 2**30:.2f}" if size else "-" for size in numbers)]
        rows.append(cells + [str(way.largest_batch), str(way.longest_sequence)] * asked)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        lines.append("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))
    if asked:
        tiles = f", with tiles of at most {tile_at_most:,} tokens" if tile_at_most else ""
        lines.append(
            f"The last two columns: the largest batch, and the longest single sequence, that fit {gpu}{tiles}."
        )
    return "\n".join(lines)


PICTURES = (".png", ".svg", ".pdf")
COLORS = ("#4c566a", "#bf616a", "#d08770", "#5e81ac", "#88c0d0", "#a3be8c", "#ebcb8b", "#b48ead", "#c9ced6")


def require_picture(file: Path) -> None:
    """Raise a ValueError if no picture can be drawn into `file`: before a minute of planning, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plot needs matplotlib: pip install 'revffn[plot]'.")
    if file.suffix not in PICTURES:
        raise ValueError(f"plot must be a file ending in {', '.join(PICTURES)}; got {file}.")
    if not file.parent.is_dir():
        raise ValueError(f"plot: there is no folder {file.parent}. Make it, or name a file elsewhere.")


def plot(answer: Plan, title: str, file: Path, gpu_bytes: int | None = None) -> None:
    """Draw a stacked bar for each way, its parts in GiB, and the device's memory as a line.

    Raises:
        ValueError: See `require_picture`.
    """
    require_picture(file)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ways = [answer, *answer.alternatives][::-1]
    # Not through pyplot, which would keep the figure and may look for a screen.
    figure = Figure(figsize=(10, 1.5 + 0.5 * len(ways)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    left = [0.0] * len(ways)
    for head, color in zip(sizes(answer), COLORS, strict=True):
        widths = [sizes(way)[head] / 2**30 for way in ways]
        if any(widths):
            axes.barh([way.label for way in ways], widths, 0.68, left, label=head, color=color)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, way in enumerate(ways):
        axes.annotate(
            f"{way.total_bytes / 2**30:.1f}",
            (way.total_bytes / 2**30, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            # The line of the device's memory may pass here.
            bbox=dict(facecolor="white", edgecolor="none", pad=1),
            fontweight="bold" if way is answer else "normal",
        )
    right = max(left)
    if gpu_bytes is not None:
        right = max(right, gpu_bytes / 2**30)
        axes.axvline(gpu_bytes / 2**30, color="black", linestyle="--", linewidth=1, label="device memory")
    axes.set_xlim(0, 1.08 * right)
    axes.set_xlabel("GiB at the peak of a step")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.grid(True, color="#e5e9f0")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    with new_file(file) as partial:
        figure.savefig(partial, dpi=150)


def plan_command(question: Any) -> str | None:
    """Answer a `options.PlanConfig` on standard output.

    Returns:
        What `--check` found wrong.

    Raises:
        ValueError: See `plan`, `load_config`, `parse_bytes`, `require_picture`.
    """
    gpu_bytes = None if question.gpu is None else parse_bytes(question.gpu)
    reversible = ReversibleConfig(
        coupling=question.coupling,
        side_bits=question.side_bits,
        cross_branch=CrossBranchConfig(query_stream=question.query_stream),
        tile_tokens=USUAL_TILE if question.tile_tokens == "auto" else question.tile_tokens or None,
    ).resolve(calibrated=True)  # as `revffn train` does
    dtype = getattr(torch, question.dtype)
    method = Method(
        reversible=reversible,
        optimizer=question.optimizer,
        rounding=question.rounding,
        dtype=dtype,
        weights=question.weights,
    )
    if question.plot is not None:
        require_picture(Path(question.plot))
    hf_config = load_config(question.model)
    shape = f"{question.batch} x {question.tokens}"
    tile = None
    if question.tile_tokens == "auto":
        tile = TileChoice(USUAL_TILE, "no --gpu to fit")
        if gpu_bytes is not None:
            tile = choose_tile(hf_config, question.batch, question.tokens, method, limit_bytes=gpu_bytes)
        method = tiled(method, tile.tile_tokens)
    options = dict(with_alternatives=question.alternatives, tile_at_most=USUAL_TILE if tile else None)
    answer = plan(hf_config, question.batch, question.tokens, method, gpu_bytes=gpu_bytes, **options)
    fits = gpu_bytes is None or answer.total_bytes <= gpu_bytes
    changes = []
    if not fits:
        changes = what_would_fit(hf_config, question.batch, question.tokens, method, gpu_bytes=gpu_bytes)
    comparison = check(hf_config, question.batch, question.tokens, method, answer) if question.check else None
    copied = None
    if question.weights == "host":
        copied = traffic(hf_config, method, question.link_gb_per_s * 1e9, question.tflops * 1e12)
    if question.plot is not None:
        title = f"{question.model}, {shape} tokens"
        plot(answer, title, Path(question.plot), gpu_bytes)
    if question.json:
        values = answer.as_dict() | {"fits": fits} if gpu_bytes is not None else answer.as_dict()
        values |= {"tile": vars(tile) if tile else {"tile_tokens": method.reversible.tile_tokens}}
        values |= {"would_fit": [vars(change) for change in changes]} if not fits else {}
        values |= {"check": comparison.as_dict()} if comparison else {}
        values |= {"traffic": vars(copied)} if copied else {}
        print(json.dumps(values, indent=2))
        return comparison.problem if comparison else None
    print(f"{question.model}, {shape} tokens in a step, {answer.num_parameters / 1e9:.3f} B parameters\n")
    print(table(answer, question.gpu, options["tile_at_most"]))
    if tile is not None:
        print(tile)
    print(f"\nThe peak is in: {answer.phase}. Reserve: CUDA context and kernels, workspaces, rounding up.")
    if copied is not None:
        print(
            f"A step copies {gib(copied.to_device_bytes)} to the device and {gib(copied.to_host_bytes)} back. At "
            f"{question.link_gb_per_s:g} GB/s and {question.tflops:g} TFLOP/s (assumed: --link-gb-per-s, --tflops) "
            f"computing hides that from {copied.break_even_tokens:,} tokens per step on."
        )
    if gpu_bytes is not None:
        print(f"{label_of(method)} {'fits' if fits else 'does not fit'} {question.gpu}.")
    if not fits and changes:
        print("What would fit:", *changes, sep="\n  ")
    elif not fits:
        print("Nothing would make it fit: weights and optimizer state alone are too large. Take a larger device.")
    if comparison is not None:
        print(f"\nThe full step on fake tensors ({comparison.seconds:.0f} s):\n{comparison.table()}")
    return comparison.problem if comparison else None
