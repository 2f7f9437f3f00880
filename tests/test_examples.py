"""Every script in examples/ runs as its first lines say, on a tiny model, and leaves a plain one that loads.

Run: pytest tests/test_examples.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import revffn

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.name)
def test_an_example_runs(script, model_folder, data_file, tmp_path):
    (command,) = re.findall(r"^    python (examples/\S+) (.*)$", script.read_text(), re.MULTILINE)
    assert command[0] == f"examples/{script.name}"
    words = command[1].split()
    words[words.index("--model") + 1] = str(model_folder())
    words[words.index("--output") + 1] = str(tmp_path / "out")
    words += ["--steps", "3", *(["--data", str(data_file())] if "--data" in script.read_text() else [])]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(\d+) (?:of (\d+) )?states differ", done.stdout)
    assert found and all(int(differ) == 0 for differ, _ in found)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).state_dict()
    assert not revffn.is_reversible(trained)
    assert all(not torch.equal(weight, before[name]) for name, weight in trained.state_dict().items() if "mlp" in name)


def test_examples_are_listed():
    text = (ROOT / "examples" / "README.md").read_text()
    assert EXAMPLES and all(f"({script.name})" in text for script in EXAMPLES)
