"""Records of gpu_suite.py -> the tables of a GPU in docs/benchmarks.md; report.py puts them there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from gpu_profile import CATEGORIES
from gpu_rows import ROWS

GIB = 2**30
RESULTS = Path(__file__).resolve().parent / "results" / "gpu"
NO_RESULTS = "*No results yet.*"
ORDER = [row.name for row in ROWS]


def records() -> list[dict]:
    """Of full size, in the order of the suite."""
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("gpu_*.json"))]
    found = [r for r in found if not r["tiny"] and r["status"] != "running"]
    return sorted(found, key=lambda r: ORDER.index(r["name"]) if r["name"] in ORDER else len(ORDER))


def by_place(found: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    """Records of one workload on one device, and what a reader should know of them."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for record in found:
        device = record.get("device", {}).get("name", "device not recorded")
        groups.setdefault((record["row"]["workload"], device), []).append(record)
    for (workload, device), group in groups.items():
        commits = sorted({record["commit"][:7] or "commit not recorded" for record in group})
        yield f"**{workload}, {device}** ({', '.join(commits)})", group


def described(record: dict) -> str:
    row = record["row"]
    words = [row["description"].replace("|", "\\|")]
    if row["arm"][:3] != "hf_" and row["arm"] != "hf":
        words.append(f"tiles of {row['tile']:,}" if row["tile"] else "whole batch")
    kept = row.get("kept")  # not in records of before
    words += [f"the last {kept} layers"] * bool(kept)
    words += [f"batch of {row['batch']}"] * bool(row["batch"])
    words += [f"{row['cap_gib']} GiB at most"] * bool(row["cap_gib"])
    return ", ".join(words)


def gib(num_bytes: int | None) -> str:
    return "–" if num_bytes is None else f"{num_bytes / GIB:.1f}"


def gpu() -> str:
    """Step time and memory, fastest first; rows without a number at the end, with the reason."""
    heads = ("method", "tokens/s", "step, ms", "peak allocated, GiB")
    heads += ("reserved, GiB", "states that differ")
    tables = []
    for where, group in by_place(records()):
        lines = [where, "", f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
        measured = [r for r in group if r["status"] == "ok"]
        for r in sorted(measured, key=lambda r: -r["tokens_per_second"]):
            states = r.get("reversible", {})
            verified = states.get("verified_states")
            cells = [
                described(r),
                f"{r['tokens_per_second']:,.0f}",
                f"{r['step_time_ms']['median']:,.0f}",
                gib(r["peak_allocated_bytes"]),
                gib(r["peak_reserved_bytes"]),
                f"{states['mismatched_states_total']} of {verified}" if verified else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        for r in group:
            if r["status"] != "ok":
                reason = r["status"].replace("_", " ")
                if r["status"] != "out_of_memory":  # what PyTorch says of that is long, and in the record
                    reason += f": {r['reason']}".replace("|", "\\|")
                lines.append(f"| {described(r)} | {' '.join(reason.split())} |" + " |" * (len(heads) - 2))
        tables.append("\n".join(lines))
    return "\n\n".join(tables) or NO_RESULTS


def gpu_kernels() -> str:
    """Milliseconds of a profiled step by category, a column a row of the suite."""
    tables = []
    for where, group in by_place([r for r in records() if "profile" in r]):
        found = [r["profile"] for r in group]
        times = [profile["ms"] for profile in found]
        lines = [where, "", f"| ms | {' | '.join(map(described, group))} |"]
        lines.append("|---" + "|---:" * len(group) + "|")
        for name in CATEGORIES:
            lines.append(f"| {name} | {' | '.join(f'{ms.get(name, 0):,.0f}' for ms in times)} |")
        for name, key in (
            ("idle", "idle_ms"),
            ("step", "wall_ms"),
            ("number of kernels", "num_kernels"),
        ):
            lines.append(f"| {name} | {' | '.join(f'{p[key]:,.0f}' for p in found)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables) or NO_RESULTS


COLUMNS = {
    "transformers as it comes": "hf_linear_ce",
    "transformers, the same kernels": "hf_same_kernels",
    "ours, innovation": "innovation_m2",
    "ours, innovation, layers kept": "innovation_m2_kept",
    "ours, weights in host memory": "innovation_m2_host",
}
"""Of the overview: an arm, whose fastest row counts."""


def gpu_overview() -> str:
    """Tokens a second and peak memory, a row a workload."""
    groups: dict[str, dict[str, dict]] = {}
    devices = set()
    for record in records():
        if record["status"] == "skipped" or record["row"]["batch"]:
            continue
        arms, arm = groups.setdefault(record["row"]["workload"], {}), record["row"]["arm"]
        if arm not in arms or speed(record) > speed(arms[arm]):
            arms[arm] = record
        devices.add(record.get("device", {}).get("name", "device not recorded"))
    columns = {words: arm for words, arm in COLUMNS.items() if any(arm in arms for arms in groups.values())}
    lines = [f"| {', '.join(sorted(devices))} | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
    for workload, arms in groups.items():
        cells = []
        for arm in columns.values():
            found = arms.get(arm)
            if found is None:
                cells.append("")
            elif found["status"] == "ok":
                cells.append(f"{found['tokens_per_second']:,.0f}, {gib(found['peak_allocated_bytes'])} GiB")
            else:
                cells.append(found["status"].replace("_", " "))
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    return "\n".join(lines) if groups else NO_RESULTS


def speed(record: dict) -> float:
    return record.get("tokens_per_second", 0.0)


TABLES = {"gpu": gpu, "gpu_kernels": gpu_kernels, "gpu_overview": gpu_overview}
