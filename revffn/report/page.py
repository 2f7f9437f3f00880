"""A report as one HTML file: nothing in it is fetched from anywhere when it is opened."""

from __future__ import annotations

from typing import Any

import yaml
from jinja2 import Environment, PackageLoader
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from ..memory.amounts import gib
from . import figures
from .record import Record

Rows = list[tuple[str, list[str]]]


def page(records: list[Record], changes: list[dict[str, dict[int, float]]]) -> str:
    """HTML of a report.

    Args:
        records: The runs.
        changes: What `weight_changes` found for each.
    """
    drawn: list[Figure] = []
    compared = numbered(figures.over_time(records), drawn)
    runs = [
        {
            "name": record.name,
            "folder": str(record.folder),
            "figures": numbered(figures.of_run(record, change), drawn),
            "answers": answers(record),
            "question": record.summary["config"].get("evaluation", {}).get("prompt"),
            "recipe": yaml.safe_dump(record.summary["config"], sort_keys=False, allow_unicode=True),
            "versions": record.summary.get("versions") or {},
        }
        for record, change in zip(records, changes, strict=True)
    ]
    environment = Environment(loader=PackageLoader("revffn.report"), autoescape=True)
    # A script ends at the first "</", in whatever string it stands.
    data = "[" + ",".join(figure.to_json() for figure in drawn) + "]"
    return environment.get_template("page.html").render(
        title=", ".join(record.name for record in records),
        names=[record.name for record in records],
        rows=at_a_glance(records),
        compared=compared,
        runs=runs,
        data=data.replace("</", "<\\/"),
        plotly=get_plotlyjs(),
    )


def numbered(made: dict[str, Figure], drawn: list[Figure]) -> list[tuple[int, str]]:
    """Append figures to those that are drawn; their places there, and titles."""
    places = []
    for title, figure in made.items():
        places.append((len(drawn), title))
        drawn.append(figure)
    return places


def answers(record: Record) -> list[tuple[str, str]]:
    """When, and what the model said to the recipe's question."""
    ends = record.summary.get("answers") or {}
    on_the_way = [(f"step {record.x(line)}", line["answer"]) for line in record.metrics if "answer" in line]
    first, last = ([(when, ends[when])] if when in ends else [] for when in ("before", "after"))
    return [*first, *on_the_way, *last]


def at_a_glance(records: list[Record]) -> Rows:
    """A line for each thing that is known of some run, a column for each run."""
    columns = [facts(record) for record in records]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return [(name, [column.get(name, "") for column in columns]) for name in names]


def facts(record: Record) -> dict[str, str]:
    """The numbers one looks for first."""
    summary, config, found = record.summary, record.summary["config"], {}
    found["state"] = "finished" if summary.get("finished") else "not finished"
    found["model"] = config["model"]["path"]
    found["parameters"] = f"{summary['num_parameters']:,}"
    found["coupling"] = str(config["reversible"]["coupling"])
    found["device"] = summary["device"]
    found["steps"] = f"{figures.last_step(record):,}"
    found["tokens"] = f"{sum(summary['num_tokens'].values()):,}"
    found["time"] = f"{summary['seconds'] / 60:,.1f} minutes"
    for when, loss in summary["heldout"].items():
        found[f"held-out loss {when.replace('_', ' ')}"] = f"{loss['loss']:.4f} nats per response token"
    if summary.get("stopped_early"):
        found["stopped early"] = f"at step {summary['stopped_early']['step']:,} of stage 2"
    if summary.get("best"):
        found["the model's weights"] = f"those of step {summary['best']['step']:,} of stage 2"
    found |= memory_facts(summary)
    report = summary.get("reversible_report")
    if report:
        total = sum(record.series("verified_states")[1])
        found["rebuilt states"] = f"{report['mismatched_states_total']:,} of {total:,} logged differ from forward's"
    _, drift = record.series("router_drift")
    if drift:
        found["router drift"] = f"{drift[-1]:.2%} of the base model's choices, at the last held-out evaluation"
    return found


def memory_facts(summary: dict[str, Any]) -> dict[str, str]:
    found = {"peak memory of the run": gib(summary["peak_bytes"])}
    memory = summary.get("memory")
    if memory:
        found["a step's tensors, planned"] = gib(memory["predicted_bytes"])
        found["a step's tensors, measured"] = gib(memory["measured_bytes"])
    return found
