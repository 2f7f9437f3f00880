"""Results of closed experiments -> tables of docs/experiments.md. Written by benchmarks/report.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def first_steps(result: dict) -> str:
    """Held-out loss by step of the first, short comparison of couplings."""
    methods = result["methods"]
    steps = [point["step"] for point in next(iter(methods.values()))["curve"]]
    lines = [
        "| method | held-out loss of | " + " | ".join(f"step {s}" for s in steps) + " |",
        "|---" * (len(steps) + 2) + "|",
    ]
    for name, run in methods.items():
        for key in ("exported", "trained"):
            if key in run["curve"][0]:
                values = " | ".join(f"{point[key]:.3f}" for point in run["curve"])
                own = key == "exported" and run["config"]["coupling"] == "cross_branch"
                lines.append(f"| {name} | {'its own function' if own else key} | {values} |")
    return "\n".join(lines)


def coupling_loss(result: dict) -> str:
    """What the coupling adds to the loss of the untrained model, by how its predictors were fitted."""
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


def grids(result: dict) -> str:
    """What the coupling adds to the loss of the untrained model, by how the grids grow."""
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


def cross_branch_start(result: dict) -> str:
    """The untrained cross_branch by what its adapters were fitted on, and its fixed points in one step."""
    lines = [
        "| queries from the | adapters fitted on tokens | held-out loss | accuracy | loss of what all fits saw | "
    ]
    lines[0] += "layers whose fixed point is not found |"
    lines.append("|---|---:|---:|---:|---:|---:|")
    for row in result["cross_branch"]:
        stream = row["query_stream"] or "plain model"
        tokens = f"{row['calibration']['num_tokens']:,}" if row.get("rows") else "not fitted" if "rows" in row else "–"
        cells = f"{row['loss']:.3f} | {row['accuracy']:.3f} | {row['seen_loss']:.3f} | {not_found(row)}"
        lines.append(f"| {stream} | {tokens} | {cells} |")
    return "\n".join(lines)


def not_found(row: dict) -> str:
    """Layers of which more than 1 % of the tokens ended elsewhere."""
    if "unconverged" in row:  # as it was measured when such a layer was an anchor
        return f"{len(row['anchor_layers'])} of {len(row['unconverged'])}"
    if "layers" not in row:
        return "–"
    hard = [layer for layer in row["layers"].values() if layer["kept_rows"] > 0.01 or layer["kept_bits"] == 32]
    return f"{len(hard)} of {len(row['layers'])}"


def ranks(result: dict) -> str:
    """The same by rank of the predictors, and the operations of a layer's predictor by rank, full = 1."""
    full = result["hidden_size"]
    lines = ["| rank | share of s_{k-1} - s_k predicted | m = 1 | m = 2 | operations, full = 1 |", "|---:" * 5 + "|"]
    for rank, of_rank in by_value(result["ranks"], "predictor_rank").items():
        cells = [f"{r['loss'] - result['plain']:+.3f}" for r in of_rank]
        operations = 1 if rank is None else 2 * rank / full
        words = f"{full} (full)" if rank is None else rank
        lines.append(f"| {words} | {of_rank[0]['explained']:.2f} | {' | '.join(cells)} | {operations:.2f} |")
    return "\n".join(lines)


def plain_layers(result: dict) -> str:
    """The same by the number of leading layers that run plainly."""
    lines = ["| plain layers | share of s_{k-1} - s_k predicted | m = 1 | m = 2 |", "|---:" * 4 + "|"]
    for number, of_number in by_value(result["plain_layers"], "plain_layers").items():
        cells = [f"{r['loss'] - result['plain']:+.3f}" for r in of_number]
        lines.append(f"| {number} | {of_number[0]['explained']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def token_groups(result: dict) -> str:
    """The predicted share by layer, with a map for each of some groups of tokens."""
    rows = result["token_groups"]
    layers = list(dict.fromkeys(r["layer"] for r in rows))
    lines = ["| groups | " + " | ".join(f"layer {k}" for k in layers) + " |", "|---:" * (len(layers) + 1) + "|"]
    for number in dict.fromkeys(r["groups"] for r in rows):
        shares = [f"{r['explained']:.3f}" for r in rows if r["groups"] == number]
        lines.append(f"| {number} | {' | '.join(shares)} |")
    return "\n".join(lines)


def sublayers(result: dict) -> str:
    """What the coupling adds to the loss with a step for each layer, and for each sublayer."""
    lines = [
        "| a step for each | m = 1 | m = 2 | m = 4 | bits kept per layer and channel |",
        "|---|---:|---:|---:|---|",
    ]
    for per, rows in by_value(result["sublayers"], "per").items():
        cells = [f"{r['loss'] - result['plain']:+.3f}" for r in rows]
        cells.append(", ".join(str(r["bits_per_layer"]) for r in rows))
        lines.append(f"| {per} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_prototypes(result: dict) -> str:
    """Whole steps on an H100: the project as it was, and with prototype kernels patched in."""
    lines = [
        "| workload | what | kernels | s per step | tokens/s | peak allocated, GiB | states that differ |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in sorted(result["steps"], key=lambda row: (row["workload"], -row["median_s"])):
        what = "transformers + activation checkpointing" + (
            "" if row["method"] == "hf_checkpointing" else " + linear cross-entropy"
        )
        if row["method"].startswith("ours"):
            what = f"innovation, m = 2, tiles of {row['tile']:,}"
        differ = "" if row.get("verified") is None else f"{row['mismatched']} of {row['verified']}"
        peak = row["peak_alloc_GiB"] - row.get("peak_alloc_GiB_of_an_earlier_model", 0)
        lines.append(
            f"| {row['workload']} | {what} | {row['kernels']} | {row['median_s']:.2f} | {row['tokens_per_s']:,.0f} | "
            f"{peak:.1f} | {differ} |"
        )
    return "\n".join(lines)


def gpu_pieces(result: dict) -> str:
    """Parts of a layer on an H100, in milliseconds: eager and with a prototype kernel."""
    pieces = result["pieces"]
    lines = ["| piece, Qwen1.5-MoE | eager | prototype kernels | products alone |", "|---|---:|---:|---:|"]
    for name, words in (
        ("adafactor_gate_up", "adafactor, experts' gate and up (60, 2816, 2048)"),
        ("adafactor_down", "adafactor, experts' down (60, 2048, 1408)"),
        ("adafactor_embedding", "adafactor, embedding (151936, 2048)"),
    ):
        lines.append(f"| {words} | {pieces[name]['eager_ms']:.2f} | {pieces[name]['fused_ms']:.2f} | – |")
    for tokens in (2048, 8192, 32768):
        piece = pieces[f"experts_{tokens}"]
        alone = sum(piece[f"gemm_{part}_ms"] for part in ("forward", "dgrad", "wgrad"))
        lines.append(
            f"| experts, forward and backward, {tokens:,} tokens | {piece['hf_both_ms']:.2f} | "
            f"{piece['fused_both_ms']:.2f} | {alone:.2f} |"
        )
    eager, fused = (pieces["innovation_8192"][f"{kind}_forward_ms"] for kind in ("eager", "fused"))
    lines.append(f"| a move of innovation, 8,192 tokens | {eager:.2f} | {fused:.2f} | – |")
    return "\n".join(lines)


def gpu_products(result: dict) -> str:
    """A tile's weight gradient on an H100: by a grouped product and an addition, and added inside the product."""
    lines = [
        "| gradient | rows | product, ms | addition, ms | both in one, ms | TFLOP/s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        E, M, N = row["gradient"]
        times = {tuple(c["rows_halfcolumns_tokens_warps_stages"]): c["ms"] for c in row["configurations"]}
        ours = times[128, 128, 64, 8, 4]
        lines.append(
            f"| ({E}, {M}, {N}) | {row['rows']:,} | {row['grouped_mm_ms']:.2f} | {row['add_to_sum_ms']:.2f} | "
            f"**{ours:.2f}** | {2e-9 * row['rows'] * M * N / ours:.0f} |"
        )
    return "\n".join(lines)


def gpu_streams(result: dict) -> str:
    """The streams' kernels on an H100, beside what moving their bytes takes."""
    lines = ["| operation on a stream | ms | bytes at 3.0 TB/s, ms |", "|---|---:|---:|"]
    for name, (took, floor) in result["streams"]["ms"].items():
        lines.append(f"| {name.replace('_', ' ')} | {took:.2f} | {'–' if floor is None else f'{floor:.2f}'} |")
    return "\n".join(lines)


def by_value(rows: list[dict], name: str) -> dict:
    """Rows grouped by a setting, m rising."""
    groups: dict = {}
    for row in sorted(rows, key=lambda row: row["m"]):
        groups.setdefault(row[name], []).append(row)
    return groups


def explained_layers(result: dict) -> list[int]:
    return list(dict.fromkeys(r["layer"] for r in result["features"]))


def of_file(table: Callable[[dict], str], name: str) -> str:
    return table(json.loads((RESULTS / f"{name}.json").read_text()))


TABLES = {
    function.__name__: partial(of_file, function, name)
    for function, name in (
        (first_steps, "quality_smollm2-moe_dolly"),
        (coupling_loss, "coupling_loss"),
        (grids, "coupling_loss_grids"),
        (ranks, "coupling_loss_ranks"),
        (plain_layers, "coupling_loss_plain_layers"),
        (token_groups, "coupling_loss_finer"),
        (sublayers, "coupling_loss_finer"),
        (cross_branch_start, "cross_branch_start"),
        (gpu_prototypes, "gpu_prototypes"),
        (gpu_pieces, "gpu_prototypes"),
        (gpu_products, "gpu_products"),
        (gpu_streams, "gpu_kernels"),
    )
}
