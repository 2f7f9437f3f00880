"""The figures of a report. Colours of text and grid are the page's, which has a light and a dark form."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from .record import Record

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
"""Paul Tol's bright scheme: told apart by readers who do not see all colours."""
GIB = 2**30
MIB = 2**20


def over_time(records: list[Record]) -> dict[str, go.Figure]:
    """Title -> figure of what all runs are compared in; what no run has is left out."""
    made = {
        "Loss, nats per token": losses(records),
        "Learning rate": lines(records, "learning_rate"),
        "Gradient norm": lines(records, "grad_norm"),
        "Tokens per second": lines(records, "tokens_per_second"),
    }
    for figure in made.values():
        figure.update_xaxes(title="step")
    return {title: figure for title, figure in made.items() if figure.data}


def of_run(record: Record, changes: dict[str, dict[int, float]]) -> dict[str, go.Figure]:
    """Title -> figure of one run."""
    made = {
        "Memory of a step: planned and measured": memory(record),
        "A step beyond weights and gradients, against activation checkpointing": step_bytes(record),
        "Peak memory of the process so far": peak(record),
        "Rebuilt states": states(record),
        "Expert load: tokens over an even share": load(record),
        "Evenness of expert load, by layer (1 = even)": evenness(record),
        "Routers over time": routers(record),
        "Router drift: share of the base model's choices no longer made": drift(record),
        "Change of the weights, relative to their norm": weights(changes),
    }
    return {title: figure for title, figure in made.items() if figure.data}


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its beginning; what is not finite is passed over."""
    mean, left, out = 0.0, 1.0, []
    for value in values:
        if math.isfinite(value):
            mean, left = weight * mean + (1 - weight) * value, weight * left
        out.append(mean / (1 - left) if left < 1 else math.nan)
    return out


def losses(records: list[Record]) -> go.Figure:
    """Each step, faint; their running mean; and the held-out loss, as points that are joined."""
    figure = go.Figure()
    for i, record in enumerate(records):
        colour, name = COLOURS[i % len(COLOURS)], "" if len(records) == 1 else f"{record.name}, "
        x, y = record.series("loss")
        if x:
            figure.add_scatter(x=x, y=y, line=dict(color=colour, width=1), opacity=0.35, showlegend=False, name="step")
            figure.add_scatter(x=x, y=smooth(y), line=dict(color=colour, width=2), name=f"{name}training")
        x, y = record.series("heldout_loss")
        ends, found = {"before": 0, "after": last_step(record)}, record.summary.get("heldout", {})
        points = sorted({*zip(x, y, strict=True), *((ends[w], found[w]["loss"]) for w in ends if w in found)})
        if points:
            figure.add_scatter(
                x=[point[0] for point in points],
                y=[point[1] for point in points],
                mode="lines+markers",
                line=dict(color=colour, dash="dot"),
                name=f"{name}held-out",
            )
    return figure


def last_step(record: Record) -> int:
    return max((record.x(line) for line in record.metrics), default=0)


def lines(records: list[Record], metric: str) -> go.Figure:
    figure = go.Figure(layout=dict(showlegend=len(records) > 1))
    for i, record in enumerate(records):
        x, y = record.series(metric)
        if x:
            figure.add_scatter(x=x, y=y, line=dict(color=COLOURS[i % len(COLOURS)]), name=record.name)
    return figure


def memory(record: Record) -> go.Figure:
    """The plan's parts, one on the other, beside what was measured."""
    found, figure = record.summary.get("memory") or {}, go.Figure(layout=dict(barmode="stack"))
    if not found:
        return figure
    for i, (part, size) in enumerate(found["predicted_parts"].items()):
        if size:
            figure.add_bar(
                y=["planned"], x=[size / GIB], name=part, orientation="h", marker_color=COLOURS[i % len(COLOURS)]
            )
    figure.add_bar(y=["measured"], x=[found["measured_bytes"] / GIB], name="measured", orientation="h")
    figure.data[-1].marker.color = "#999999"
    return figure.update_xaxes(title=f"GiB, a step of {found['batch']} x {found['tokens']} tokens")


def step_bytes(record: Record) -> go.Figure:
    """What a step needs as it has more tokens: at the peak, and kept from forward for backward."""
    figure = go.Figure()
    for i, (name, steps) in enumerate((record.summary.get("step_bytes") or {}).items()):
        if not isinstance(steps, list):
            continue  # of an older version
        x = [step["batch"] * step["tokens"] for step in steps]
        for what, dash, label in (("peak_bytes", "solid", "peak"), ("kept_bytes", "dot", "kept")):
            figure.add_scatter(
                x=x,
                y=[step[what] / MIB for step in steps],
                mode="lines+markers",
                line=dict(color=COLOURS[i % len(COLOURS)], dash=dash),
                name=f"{name}, {label}",
            )
    return figure.update_yaxes(title="MiB", rangemode="tozero").update_xaxes(title="tokens a step", rangemode="tozero")


def peak(record: Record) -> go.Figure:
    x, y = record.series("peak_bytes")
    figure = go.Figure()
    if x:
        figure.add_scatter(x=x, y=[value / GIB for value in y], line=dict(color=COLOURS[0]), name="peak")
    return figure.update_yaxes(title="GiB", rangemode="tozero").update_xaxes(title="step")


def states(record: Record) -> go.Figure:
    """How many states each step rebuilt and checked, and how many were not forward's."""
    figure = go.Figure()
    for i, (metric, name) in enumerate((("verified_states", "checked"), ("mismatched_states", "differ"))):
        x, y = record.series(metric)
        if x:
            figure.add_scatter(x=x, y=y, line=dict(color=COLOURS[i], shape="hv"), name=name)
    return figure.update_xaxes(title="step").update_yaxes(rangemode="tozero")


def load(record: Record) -> go.Figure:
    """A heat map for every line of the file, with a slider; the last is shown first."""
    figure = go.Figure()
    if not record.routers:
        return figure
    frames = []
    for row in record.routers:
        z = [[round(value * len(layer) / max(sum(layer), 1), 2) for value in layer] for layer in row["load"]]
        heat = go.Heatmap(z=z, y=[str(layer) for layer in row["layers"]], colorscale="Viridis", zmin=0, zmax=3)
        heat.hovertemplate = "layer %{y}, expert %{x}: %{z} times the even share<extra></extra>"
        frames.append(go.Frame(data=[heat], name=str(record.x(row))))
    figure.add_trace(frames[-1].data[0])
    figure.frames = frames
    move = dict(frame=dict(duration=0, redraw=True), mode="immediate")
    steps = [dict(label=frame.name, method="animate", args=[[frame.name], move]) for frame in frames]
    figure.update_layout(
        sliders=[dict(steps=steps, active=len(steps) - 1, currentvalue=dict(prefix="up to step "), pad=dict(t=50))]
    )
    return figure.update_xaxes(title="expert").update_yaxes(title="layer", type="category", autorange="reversed")


def evenness(record: Record) -> go.Figure:
    figure = go.Figure()
    if len(record.routers) > 1:
        z = [[round(entropy(layer), 3) for layer in row["load"]] for row in record.routers]
        figure.add_heatmap(
            z=list(zip(*z, strict=True)),
            x=[record.x(row) for row in record.routers],
            y=[str(layer) for layer in record.routers[-1]["layers"]],
            colorscale="Viridis",
        )
    return figure.update_xaxes(title="step").update_yaxes(title="layer", type="category", autorange="reversed")


def entropy(counts: list[int]) -> float:
    """Of the shares, 1 where all are the same."""
    total = max(sum(counts), 1)
    return -sum(c / total * math.log(c / total) for c in counts if c) / math.log(max(len(counts), 2))


def routers(record: Record) -> go.Figure:
    names = dict(
        router_entropy="evenness (1 = even)",
        router_max_load="fullest expert (times the even share)",
        router_idle_experts="experts without a token",
    )
    figure = go.Figure()
    for i, (metric, name) in enumerate(names.items()):
        x, y = record.series(metric)
        if x:
            figure.add_scatter(x=x, y=y, line=dict(color=COLOURS[i]), name=name)
    return figure.update_xaxes(title="step").update_yaxes(rangemode="tozero")


def drift(record: Record) -> go.Figure:
    by_layer = (record.summary.get("router") or {}).get("drift_by_layer") or {}
    figure = go.Figure()
    if by_layer:
        figure.add_bar(x=list(by_layer), y=list(by_layer.values()), marker_color=COLOURS[0], name="after")
    return figure.update_xaxes(title="layer", type="category").update_yaxes(tickformat=".1%")


def weights(changes: dict[str, dict[int, float]]) -> go.Figure:
    """Kinds of modules by layers; what lies outside the layers is in a column of its own."""
    figure = go.Figure()
    layers = sorted({layer for by_layer in changes.values() for layer in by_layer})
    if layers:
        figure.add_heatmap(
            z=[[by_layer.get(layer) for layer in layers] for by_layer in changes.values()],
            x=["outside" if layer < 0 else str(layer) for layer in layers],
            y=list(changes),
            colorscale="Viridis",
            colorbar=dict(tickformat=".1e", exponentformat="power"),
        )
        figure.update_layout(height=max(360, 22 * len(changes) + 120))
    return figure.update_xaxes(title="layer", type="category").update_yaxes(automargin=True, autorange="reversed")
