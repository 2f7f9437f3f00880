"""The documents say what is there: the README's tree, links, tables, public names; importing stays light.

Run: pytest tests/test_repository.py
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import revffn

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    file for pattern in ("*.md", "docs/*.md", "recipes/*.md", "data/*/*.md") for file in sorted(ROOT.glob(pattern))
]


def test_the_tree_in_the_readme_is_the_package():
    tree = re.search(r"```text\nrevffn/\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    named = re.findall(r"^  (\w+\.py) ", tree, re.MULTILINE)
    there = {file.name for file in (ROOT / "revffn").glob("*.py")} - {"__init__.py"}
    assert set(named) == there and len(named) == len(there)
    folders = re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)
    assert set(folders) == {file.name for file in (ROOT / "revffn").iterdir() if file.is_dir()} - {"__pycache__"}
    docs = re.findall(r"\w+\.md", tree)
    assert set(docs) == {file.name for file in (ROOT / "docs").glob("*.md")}


def test_modules_import_only_from_those_above_them():
    """In the order of the README's tree. What a function imports when it is called does not count."""
    tree = re.search(r"```text\nrevffn/\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    order = re.findall(r"^  (\w+)(?:\.py|/) ", tree, re.MULTILINE)
    for place, name in enumerate(order):
        folder = ROOT / "revffn" / name
        for file in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]:
            # A dot for every folder up to the package.
            dots = r"\." * len(file.relative_to(ROOT / "revffn").parts)
            imported = re.findall(rf"^from {dots}(\w+)[\w.]* import", file.read_text(), re.MULTILINE)
            below = [other for other in imported if order.index(other) >= place]
            assert not below, f"{file} imports {below}, which the README lists below it"


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", file.read_text()):
        if not target.startswith("http"):
            assert (file.parent / target).exists(), f"{file.name} links to {target}"


def test_tables_are_those_of_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "report.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}Run python benchmarks/report.py."


def test_public_names():
    assert revffn.__all__ == sorted(revffn.__all__) and all(hasattr(revffn, name) for name in revffn.__all__)


def test_import_is_light():
    """Nothing optional, no CUDA."""
    code = (
        "import sys, revffn, torch; "
        "optional = ('trl', 'datasets', 'lm_eval', 'matplotlib', 'plotly', 'gguf'); "
        "print([m for m in optional if m in sys.modules], "
        "torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"
