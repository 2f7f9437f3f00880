"""The documents say what is there: the README's tree, links, tables, public names; importing stays light.

Run: pytest tests/test_repository.py
"""

import ast
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


def tree() -> str:
    return re.search(r"```text\nrevffn/\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)[1]


def order_of_folders() -> list[str]:
    """As the README's tree has them; modules at the top without their suffix."""
    return re.findall(r"^  (\w+)(?:\.py|/) ", tree(), re.MULTILINE)


def order_of_modules(folder: Path) -> list[str]:
    """As the folder's docstring has them."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()), clean=False) or ""
    return re.findall(r"^ *(\w+)(?:\.py|/) ", text, re.MULTILINE)


FOLDERS = sorted(file.parent for file in (ROOT / "revffn").glob("*/__init__.py"))


def test_the_tree_in_the_readme_is_the_package():
    there = {file.stem for file in (ROOT / "revffn").glob("*.py")} - {"__init__"} | {file.name for file in FOLDERS}
    assert sorted(order_of_folders()) == sorted(there)
    docs = re.findall(r"\w+\.md", tree())
    assert set(docs) == {file.name for file in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f.name != "ops"], ids=lambda folder: folder.name)
def test_a_folder_lists_its_modules(folder):
    there = {f.stem for f in folder.iterdir() if f.name not in ("__init__.py", "__pycache__")}
    assert sorted(order_of_modules(folder)) == sorted(there)


def test_modules_import_only_from_those_above_them():
    """Folders in the order of the README's tree, the modules of a folder in that of its docstring. What a function
    imports when it is called does not count."""
    order = order_of_folders()
    for file in sorted((ROOT / "revffn").rglob("*.py")):
        inside = file.relative_to(ROOT / "revffn").parts
        if inside == ("__init__.py",):
            continue
        place = order.index(inside[0].removesuffix(".py"))
        mine = order_of_modules(ROOT / "revffn" / inside[0]) if len(inside) > 1 and inside[0] != "ops" else []
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            # The folder that the dots lead to, then the names.
            path = [*inside[: len(inside) - node.level], *(node.module or "").split(".")]
            names = [*filter(None, path)] or [alias.name for alias in node.names]
            if names[0] != inside[0]:
                assert order.index(names[0]) < place, f"{file} imports {names}, which the README lists below it"
            elif mine and file.name != "__init__.py":
                other = names[1] if len(names) > 1 else node.names[0].name
                if other != inside[1].removesuffix(".py"):
                    assert mine.index(other) < mine.index(inside[1].removesuffix(".py")), f"{file} imports {other}"


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
