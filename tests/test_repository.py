"""The documents say what is there: the README's tree, links, tables, public names; importing stays light.

Run: pytest tests/test_repository.py
"""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import revffn

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    file
    for pattern in ("*.md", "docs/*.md", "recipes/*.md", "examples/*.md", "experiments/*.md", "data/*/*.md")
    for file in sorted(ROOT.glob(pattern))
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


PACKAGE = ROOT / "revffn"
FOLDERS = sorted(
    file.parent for file in PACKAGE.rglob("__init__.py") if "ops" not in file.parts and file.parent != PACKAGE
)
"""Those that list their modules; the folders of ops are all alike."""


def order_in(folder: Path) -> list[str]:
    return order_of_folders() if folder == PACKAGE else order_of_modules(folder)


def test_the_tree_in_the_readme_is_the_package():
    there = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"}
    there |= {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert sorted(order_of_folders()) == sorted(there)
    docs = re.findall(r"\w+\.md", tree())
    assert set(docs) == {file.name for file in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(PACKAGE)))
def test_a_folder_lists_its_modules(folder):
    there = {f.stem for f in folder.iterdir() if f.name not in ("__init__.py", "__pycache__")}
    assert sorted(order_of_modules(folder)) == sorted(there)


def imports(file: Path) -> list[list[str]]:
    """What a module imports from this package when it is imported: paths below the package."""
    inside, found = file.relative_to(PACKAGE).parts, []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            # The folder that the dots lead to, then the names.
            path = [*inside[: len(inside) - node.level], *filter(None, (node.module or "").split("."))]
            found += [path] if node.module else [[*path, alias.name] for alias in node.names]
    return found


def test_modules_import_only_from_those_above_them():
    """Folders in the order of the README's tree, the modules of a folder in that of its docstring. What a function
    imports when it is called does not count, and a folder's `__init__.py` is its last word."""
    for file in sorted(PACKAGE.rglob("*.py")):
        here = [part.removesuffix(".py") for part in file.relative_to(PACKAGE).parts if part != "__init__.py"]
        for path in imports(file):
            level = next((i for i, (a, b) in enumerate(zip(here, path, strict=False)) if a != b), None)
            if level is None or (level and here[0] == "ops"):
                continue  # from a folder's own modules in its __init__, or the other way round
            order = order_in(PACKAGE.joinpath(*here[:level]))
            assert order.index(path[level]) < order.index(here[level]), f"{file} imports {'.'.join(path)}"


def test_experiments_depend_on_the_rest_and_never_the_reverse():
    names = {file.stem for file in (ROOT / "experiments").glob("*.py")}
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            found = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not names & {name.partition(".")[0] for name in found}, file


OTHERS_PRIVATE = {
    "torch": (
        "_C", "_apply", "_backward_hooks", "_buffers", "_call_impl", "_cdata", "_execution_engine", "_forward_hooks",
        "_forward_pre_hooks", "_gen_transform_infos", "_last_lr", "_len_torch_dispatch_stack", "_modules", "_orig_mod",
        "_parameters", "_post_accumulate_grad_hooks", "_version",
    ),
    "accelerate": ("_hf_hook",),
    "os": ("_exit",),
    "trl": ("_metrics", "_total_train_tokens"),
}  # fmt: skip
"""Private names of others than transformers that the package uses."""


def private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def private_names_used(tree: ast.AST) -> set[str]:
    """Attributes; and strings that name one: to `getattr` and its kin, before `in`, as the key of a dictionary."""
    found: set[object] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name):
                found.add(name)
            case ast.Call(func=ast.Name("getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(name), *_]):
                found.add(name)
            case ast.Compare(left=ast.Constant(name), ops=[ast.In() | ast.NotIn()]):
                found.add(name)
            case ast.Dict(keys=keys):
                found |= {key.value for key in keys if isinstance(key, ast.Constant)}
    return set(filter(private, found))


def names_defined(tree: ast.AST) -> set[str]:
    """Functions, classes, variables, and what an `__init__` gives to its object."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name="__init__"):
                stored = (n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
                found |= {attribute.attr for attribute in stored}
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
    return found


def test_what_transformers_does_not_promise_is_in_one_module():
    """upstream.py has all of it: elsewhere names come from `transformers` itself, and private ones are our own."""
    trees = {file: ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py") if file.name != "upstream.py"}
    known = {name for names in OTHERS_PRIVATE.values() for name in names}.union(*map(names_defined, trees.values()))
    for file, tree in trees.items():
        assert private_names_used(tree) <= known, f"{file}: {sorted(private_names_used(tree) - known)}"
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            if isinstance(node, ast.Import):
                assert not [name for name in names if name.startswith("transformers.")], f"{file} imports {names}"
            elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "transformers":
                hidden = [name for name in names if importlib.util.find_spec(f"transformers.{name}")]
                assert node.module == "transformers" and not hidden, f"{file} imports {node.module}: {names}"


def test_private_names_are_seen():
    code = "a._b; getattr(a, '_c'); '_d' in a; {'_e': 1}; self._f()\nclass G:\n  def __init__(self): self._g = 1\n"
    tree = ast.parse(code + "def _h(self): self._i = 1")
    assert private_names_used(tree) == {"_b", "_c", "_d", "_e", "_f", "_g", "_i"}
    assert {"_g", "_h"} <= names_defined(tree) and not {"_b", "_i"} & names_defined(tree)


def test_the_oldest_versions_are_those_declared():
    """tests/oldest.txt pins the lower end of every range; torch is that of the main environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *(row for rows in project["optional-dependencies"].values() for row in rows)]
    bounds = ((row.name, bound) for row in map(Requirement, declared) for bound in row.specifier)
    lowest = {name: Version(bound.version) for name, bound in bounds if bound.operator == ">="}
    pins = [line for line in (ROOT / "tests" / "oldest.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = {row.name: Version(next(iter(row.specifier)).version) for row in map(Requirement, pins)}
    assert {"transformers", "trl", "datasets", "pydantic", "peft"} <= set(pinned)
    assert pinned == {name: lowest[name] for name in pinned}


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
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == revffn.__all__
    assert all(getattr(revffn, name).__doc__ for name in revffn.__all__)


def test_import_is_light():
    """Nothing optional, no CUDA, and the libraries' logging is left as it is."""
    code = (
        "import logging, sys, revffn, torch; from transformers.utils import logging as hf; "
        "optional = ('trl', 'datasets', 'lm_eval', 'matplotlib', 'plotly', 'gguf', 'rich.progress'); "
        "filters = [f for name in (None, 'torchao', 'torch.utils._pytree') for f in logging.getLogger(name).filters]; "
        "print([m for m in optional if m in sys.modules], "
        "torch.cuda.is_initialized(), filters, hf.is_progress_bar_enabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False [] True"


def test_no_two_test_files_have_one_name():
    """pytest imports them by it, and refuses the second."""
    names = Counter(file.name for file in (ROOT / "tests").rglob("*.py") if file.name != "__init__.py")
    assert not [name for name, number in names.items() if number > 1]
