"""Runs a script of kernel comparisons in Triton's interpreter, in a process of its own: the interpreter is chosen when
Triton is imported. What the interpreter shows: indexing, masks, integers, float32. bf16 is rounded by integers in the
kernels, so its bits count too."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

ROOT = Path(__file__).parents[2]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, whose interpreter runs kernels on a CPU"
)


def interpret(script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a file of this folder; its output and exit status."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "REVFFN_KERNELS": "triton", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, Path(__file__).parent / script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


def on_gpu(script: str, *arguments: str) -> subprocess.CompletedProcess:
    """The same on the GPU that is there."""
    environment = {**os.environ, "REVFFN_KERNELS": "triton", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, Path(__file__).parent / script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


def assert_same(found: Tensor | tuple, expected: Tensor | tuple, what: str) -> None:
    """Bit for bit, NaN included."""
    found, expected = ((x,) if isinstance(x, Tensor) else tuple(x) for x in (found, expected))
    assert len(found) == len(expected), what
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, (what, i, a.shape, b.shape, a.dtype, b.dtype)
        wrong = (a != b) & ~((a != a) & (b != b))
        assert not wrong.any(), f"{what}, output {i}: {int(wrong.sum())} of {a.numel()} elements differ"
