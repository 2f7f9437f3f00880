"""Triton's kernels compile for an H100 and an A100, without one: the interpreter accepts what the compiler refuses.

compile_kernels.py launches them with the library's own functions in a process of its own and reads the machine code:
no spilled registers, shared memory that there is, no fused multiply-add, exact divisions and roots.

Run: pytest tests/ops/test_kernels_compile.py (needs triton); with -m slow: all cases, about half an hour
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which brings the compiler and the assembler"
)


def compile_kernels(folder: Path, *arguments: str) -> dict:
    report = folder / "report.json"
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "REVFFN_KERNELS")}
    script = Path(__file__).parent / "compile_kernels.py"
    command = [sys.executable, script, "--json", report, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert report.exists(), done.stdout + done.stderr
    return json.loads(report.read_text())


def check(report: dict) -> None:
    assert not report["problems"], [(row["case"], row["kernel"], row["problems"]) for row in report["problems"]]
    assert not report["missing"], report["missing"]


def test_every_kernel_compiles(tmp_path):
    report = compile_kernels(tmp_path, "--short")
    check(report)
    # Rows of models' widths are read as vectors; the others read numbers by the row or lists of places, and
    # `_products` copies rows to shared memory without loading them.
    narrow = {row["kernel"] for row in report["rows"] if row["load"] < 16 and "vector" not in row["case"]}
    streams = {"_innovation_move", "_innovation_undo"}
    assert narrow <= {"_judge", "_rope", "_add_pairs", "_add_all", "_products"} | streams, narrow


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["90", "80"])
def test_every_case_compiles(tmp_path, arch):
    check(compile_kernels(tmp_path, "--arch", arch))
