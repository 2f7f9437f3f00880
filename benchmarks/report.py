"""Result files -> the tables of README.md and docs/experiments.md.

python benchmarks/report.py            # rewrites the text between the markers `<!-- table: NAME -->` and `<!--
end -->` python benchmarks/report.py --check    # changes nothing; exit status 1 if a document differs from the
files
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "docs/experiments.md")
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


TABLES = {"memory": memory, "quality": quality}


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
