"""The command `revffn plan`: the planner's answers as tables, JSON and a picture."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from ..files import new_file
from ..models.known import config_file
from . import disk
from .amounts import gib, parse_bytes
from .answers import OF_RANKS, USUAL_TILE, Answer, Plan, Wire

COLUMNS = (
    ("weights", ("weights",)),
    ("gradients", ("gradients",)),
    ("optimizer", ("optimizer",)),
    ("streams", ("streams", "stream_gradients")),
    ("side bits", ("side_bits_and_routing",)),
    ("stored", ("stored_activations",)),
    ("gathered", ("gathered",)),
    ("exchange", ("exchange",)),
    ("working set", ("working_set",)),
    ("loss", ("loss",)),
)
"""Heading -> parts: every part once, in the order in which they are drawn."""


def sizes(way: Plan) -> dict[str, int]:
    """Bytes by heading of `COLUMNS`, and the reserve; they add up to `total_bytes`."""
    columns = [(head, parts) for head, parts in COLUMNS if way.gpus > 1 or head not in OF_RANKS]
    return {head: sum(way.parts[part] for part in parts) for head, parts in columns} | {"reserve": way.reserve_bytes}


def table(answer: Plan, gpu: str | None, found: str = "") -> str:
    """One line for each way, GiB by part; `found`: with what the largest batch was looked for."""
    heads = ["GiB", *sizes(answer), "total", "host RAM"]
    asked = answer.largest_batch is not None
    heads += [f"batch x {answer.tokens}", f"{answer.gpus} x tokens"] * asked
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
        lines.append(
            f"The last two columns: the largest batch, and the longest single sequence"
            f"{' on each GPU' * (answer.gpus > 1)}, that fit {gpu}{found}."
        )
    return "\n".join(lines)


def wire_table(ways: list[Wire], link_gb_per_s: float | None, tflops: float) -> str:
    """What a rank sends, a line for each strategy."""
    rows = [["GiB that a GPU sends in a step", "gathers", "reductions", "rows", "total"]]
    rows[0] += ["seconds at least", "tokens that hide it"] * (link_gb_per_s is not None)
    for way in ways:
        numbers = (way.gathers, way.reductions, way.rows, way.num_bytes)
        rows.append([way.strategy, *(f"{size / 2**30:.2f}" if size else "-" for size in numbers)])
        if link_gb_per_s is not None:
            hidden = "never" if way.hidden_tokens is None else f"{way.hidden_tokens:,}"
            rows[-1] += [f"{way.seconds:.3f}", hidden]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    if link_gb_per_s is not None:
        lines.append(
            f"At {link_gb_per_s:g} GB/s, and {tflops:g} TFLOP/s (assumed: --tflops). The last column: tokens per step "
            "and GPU from which computing takes longer than sending."
        )
    if ways[0].break_even_tokens is not None:
        lines.append(
            f"ep sends less than fsdp with fewer than {ways[0].break_even_tokens:,} tokens per step and GPU; here are "
            f"{ways[0].tokens:,}."
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


DISPLAY = ("check", "json", "plot")
"""What a question says about the way it is answered; the answer is the same."""


def known_answer(question: Any) -> Answer:
    """As it was found before, without importing torch, or now."""
    asked = {name: value for name, value in vars(question).items() if name not in DISPLAY}
    key = ["plan_command", asked, config_text(question.model)]
    kept = disk.recall(key) if key[-1] is not None else None
    if kept is not None:
        return Answer.from_dict(kept)
    from .question import answer

    found = answer(question)
    if key[-1] is not None:
        disk.remember(key, found.as_dict())
    return found


def config_text(model: str) -> str | None:
    """The config of a folder or a known model; None if it has to come from elsewhere."""
    for file in (Path(model) / "config.json", config_file(model)):
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
    return None


def plan_command(question: Any) -> str | None:
    """Answer a `options.PlanConfig` on standard output.

    Returns:
        What `--check` found wrong.

    Raises:
        ValueError: See `question.answer`, `require_picture`.
    """
    gpu_bytes = None if question.gpu is None else parse_bytes(question.gpu)
    if question.plot is not None:
        require_picture(Path(question.plot))
    shape = f"{question.batch} x {question.tokens}"
    with disk.in_use():
        found = known_answer(question)
    answer, tile, kept, changes, copied = found.plan, found.tile, found.kept, found.changes, found.traffic
    fits = gpu_bytes is None or answer.total_bytes <= gpu_bytes
    comparison = None
    if question.check:
        from .question import simulated

        comparison = simulated(question, found)
    if question.plot is not None:
        title = f"{question.model}, {shape} tokens"
        plot(answer, title, Path(question.plot), gpu_bytes)
    if question.json:
        values = answer.as_dict() | {"fits": fits} if gpu_bytes is not None else answer.as_dict()
        values |= {"tile": vars(tile) if tile else {"tile_tokens": question.tile_tokens or None}}
        values |= {"kept": vars(kept)} if kept else {}
        values |= {"would_fit": [vars(change) for change in changes]} if not fits else {}
        values |= {"check": comparison.as_dict()} if comparison else {}
        values |= {"traffic": vars(copied)} if copied else {}
        values |= {"wire": [vars(way) | {"num_bytes": way.num_bytes} for way in found.wire]} if found.wire else {}
        print(json.dumps(values, indent=2))
        return comparison.problem if comparison else None
    of_one = f"; one of {question.gpus} GPUs" * (question.gpus > 1)
    print(f"{question.model}, {shape} tokens in a step, {answer.num_parameters / 1e9:.3f} B parameters{of_one}\n")
    with_tiles = f", with tiles of at most {USUAL_TILE:,} tokens" if tile else ""
    print(table(answer, question.gpu, with_tiles + ", without kept layers" * (kept is not None)))
    for choice in (tile, kept):
        if choice is not None:
            print(choice)
    print(f"\nThe peak is in: {answer.phase}. Reserve: CUDA context and kernels, workspaces, rounding up.")
    if copied is not None:
        print(
            f"A step copies {gib(copied.to_device_bytes)} to the device and {gib(copied.to_host_bytes)} back. At "
            f"{question.link_gb_per_s:g} GB/s and {question.tflops:g} TFLOP/s (assumed: --link-gb-per-s, --tflops) "
            f"computing hides that from {copied.break_even_tokens:,} tokens per step on."
        )
    if answer.second_part_bytes is not None:
        print(
            f"Choices of experts are taken to be spread evenly over the GPUs. One that receives twice its part takes "
            f"{gib(answer.second_part_bytes)} more; {question.gpus} times is the most."
        )
    if found.wire:
        print(f"\n{wire_table(found.wire, question.gpu_link_gb_per_s, question.tflops)}")
    if gpu_bytes is not None:
        print(f"{answer.label} {'fits' if fits else 'does not fit'} {question.gpu}.")
    if not fits and changes:
        print("What would fit:", *changes, sep="\n  ")
    elif not fits:
        remedy = f"Take a larger device{', or more' * (question.gpus > 1)}."
        print(f"Nothing would make it fit: weights and optimizer state alone are too large. {remedy}")
    if comparison is not None:
        print(f"\nThe full step on fake tensors ({comparison.seconds:.0f} s):\n{comparison.table()}")
    return comparison.problem if comparison else None
