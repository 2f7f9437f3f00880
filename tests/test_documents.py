"""What the documents tell a reader to type works: every command is parsed by the program it calls, those of a first
session run on a tiny model, and the README's Python runs.

Run: pytest tests/test_documents.py
     pytest tests/test_documents.py -m slow      the plans and small benchmarks as they stand there
"""

import argparse
import ast
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from helpers import tiny_model

from revffn.__main__ import COMMANDS as REVFFN
from revffn.__main__ import main
from revffn.command_line import load_run_config

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    file
    for pattern in (
        "*.md",
        "docs/*.md",
        "recipes/*.md",
        "benchmarks/*.md",
        "examples/*.md",
        "experiments/*.md",
        "data/*/*.md",
    )
    for file in sorted(ROOT.glob(pattern))
    if file.name != "CHANGELOG.md"
]
PLACEHOLDERS = {
    "RECIPE": "recipes/qwen1.5-moe-a2.7b_40gb.yaml",
    "MODEL": "org/model",
    "DATA": "my.jsonl",
    "COMMAND": "train",
}
"""What a reader puts in place of a word in capitals, where a parser looks at it."""


def commands() -> dict[str, list[str]]:
    """By where it stands: the words of every line of code, and of code in a sentence, that calls a program of ours."""
    found = {}
    for file in DOCUMENTS:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            indented = re.findall(r"^    ((?:revffn|python|make|pip) .*)", line)
            inline = re.findall(rf"`((?:revffn (?:{'|'.join(REVFFN)}|help)|make|pip install) [^`]+)`", line)
            for i, text in enumerate(indented + inline):
                words = [PLACEHOLDERS.get(word, word) for word in shlex.split(text, comments=True)]
                part = i >= len(indented) and words[1] == "plan" and "--model" not in words  # of a command
                if not part and not any(mark in text for mark in ("...", "…", "NAME.yaml")):
                    found[f"{file.relative_to(ROOT)}:{number}" + "'" * i] = words
    return found


COMMANDS = commands()


def of(*programs: str) -> list:
    return [pytest.param(words, id=where) for where, words in COMMANDS.items() if words[0] in programs]


def test_there_are_commands():
    programs = {words[0] for words in COMMANDS.values()}
    assert programs == {"revffn", "python", "make", "pip"} and len(COMMANDS) > 50


class Parsed(Exception):
    """The words were taken; nothing is to be done."""


def stop(*args, **kwargs):
    raise Parsed(args)


@pytest.mark.parametrize("words", of("revffn"))
def test_commands_are_taken(words, monkeypatch):
    """By the command line's own parsing, up to the function that does the work."""
    for place in (
        "revffn.training.run.train",
        "revffn.data.command.data_command",
        "revffn.training.preflight.check",
        "revffn.models.upcycle_command.upcycle_command",
        "revffn.memory.command.plan_command",
        "revffn.evaluation.command.evaluate_command",
        "revffn.evaluation.command.compare_command",
        "revffn.report.command.report_command",
        "revffn.evaluation.chat.chat_command",
    ):
        monkeypatch.setattr(place, stop)
    monkeypatch.chdir(ROOT)
    if words[1] == "export":
        assert len(words) in (2, 4)  # in a sentence it stands alone
    elif words[1] in ("completion", "--version", "--help"):
        assert main(words[1:3]) == 0
    elif {"help", "--help", "--help-all"} & set(words):
        with pytest.raises(SystemExit) as ended:
            main(words[1:])
        assert ended.value.code == 0
    else:
        with pytest.raises(Parsed):
            status = main(words[1:])
            raise AssertionError(f"refused with status {status}")


@pytest.mark.parametrize("words", of("python"))
def test_benchmarks_take_their_words(words, monkeypatch):
    script = ROOT / words[1]
    assert script.is_file(), f"there is no {words[1]}"
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        raise Parsed(parse(self, *args, **kwargs))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [str(script), *words[2:]])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("words", of("make"))
def test_make_has_the_target(words):
    assert re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("words", of("pip"))
def test_extras_exist(words):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
        assert set(named.split(",")) <= set(extras)


@pytest.mark.parametrize("file", sorted((ROOT / "docs").glob("*.md")), ids=lambda file: file.name)
def test_recipes_in_documents_are_taken(file, tmp_path):
    for i, text in enumerate(re.findall(r"```yaml\n(.*?)```", file.read_text(), re.DOTALL)):
        (tmp_path / f"{i}.yaml").write_text(text)
        load_run_config(tmp_path / f"{i}.yaml")


# --- what is said ----------------------------------------------------------------------------------------------------


def rows(document: str) -> list[list[str]]:
    """The cells of its tables' rows, without heads and lines of dashes."""
    lines = (ROOT / "docs" / document).read_text().splitlines()
    heads = {i - 1 for i, line in enumerate(lines) if line.startswith("|---")}
    found = [line for i, line in enumerate(lines) if line.startswith("| ") and i not in heads]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found]


def test_the_comparison_names_tests_that_are_there():
    tests = set(re.findall(r"def (test_\w+)", "".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))))
    features = [(cells[0], cells[1]) for cells in rows("comparison.md") if not cells[0].startswith("**")]
    assert len(features) > 25
    for feature, ours in features:
        named = re.findall(r"`(test_\w+)`", ours)
        assert set(named) <= tests, f"{feature}: there is no {set(named) - tests}"
        assert named or ours.startswith("no"), f"{feature}: no test shows it"


def test_the_comparison_has_its_sources():
    text = (ROOT / "docs" / "comparison.md").read_text()
    given = set(re.findall(r"^\[(\w+)\]: https://", text, re.MULTILINE))
    table, _, listed = text.partition("## Sources")
    assert set(re.findall(r"\[([TAUL]\d+)\]", table)) == given == set(re.findall(r"\[([TAUL]\d+)\](?!:)", listed))


def messages() -> set[str]:
    """Every string of the package that is no docstring; what is filled in stands as …"""
    found = set()
    for file in (ROOT / "revffn").rglob("*.py"):
        tree = ast.parse(file.read_text())
        said = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in said:
                found.add(node.value)
    return found


def test_errors_are_quoted_as_they_are():
    there = "\n".join(messages())
    quoted = [cells[0].strip("`") for cells in rows("troubleshooting.md")]
    assert len(quoted) > 40
    assert not [text for text in quoted if text not in there]


def test_numbers_for_a_choice_are_those_of_the_tables():
    """docs/choosing.md measures nothing of its own."""
    sources = ("README.md", "docs/benchmarks.md", "docs/memory.md")
    there = {number for name in sources for number in re.findall(r"\d[\d,.]*\d", (ROOT / name).read_text())}
    text = (ROOT / "docs" / "choosing.md").read_text()
    numbers = re.findall(r"\d+[,.]\d[\d,.]*\d|\d+[.]\d", re.sub(r"(qwen|Qwen)[\w.-]+", "", text))
    assert len(numbers) > 40 and not set(numbers) - there


def pages(navigation: list | dict | str) -> list[str]:
    if isinstance(navigation, str):
        return [navigation]
    inside = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for part in inside for page in pages(part)]


def test_every_page_is_in_the_navigation():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    found = pages(settings["nav"])
    assert sorted(found) == sorted(file.name for file in (ROOT / "docs").glob("*.md"))
    tree = re.search(r"^docs/ (.*?)```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]
    assert found == re.findall(r"\w+\.md", tree)


def test_the_site_builds_and_asks_for_nothing(tmp_path):
    pytest.importorskip("material", reason="of the extra docs; ends when it is installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for file in sorted((ROOT / "docs").glob("*.md")):
        page = (tmp_path / f"{file.stem}.html").read_text()
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(https?:[^\" >]+)", page)
        assert not loaded, f"{file.name} loads {loaded}"


# --- run -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, model_folder, data_file, monkeypatch):
    """A folder like the repository, where a tiny model has the place of the upcycled one."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copytree(model_folder("qwen2_moe"), tmp_path / "runs" / "smollm2-moe")
    data_file()
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHORTER = {
    "train": (
        "--data.path data.jsonl --data.num_examples 48 --data.heldout 8 --evaluation.max_new_tokens 4 "
        "--training.num_steps 2"
    ).split()
}


def test_a_first_session(checkout):
    """README's own train and export, word for word but for the length of the run."""
    found = [words for where, words in COMMANDS.items() if where.startswith("README.md")]
    session = [words for words in found if "--dry-run" not in words]  # of a model on the Hub
    train, export = (next(w for w in session if w[:2] == ["revffn", name]) for name in ("train", "export"))
    assert main(train[1:] + SHORTER["train"]) == 0
    assert main(export[1:]) == 0
    assert json.loads((checkout / export[-1] / "config.json").read_text())["model_type"] == "qwen2_moe"


def test_the_papers_session(checkout):
    """Those of docs/paper.md that need no model of full size."""
    session = [w for where, w in COMMANDS.items() if where.startswith("docs/paper.md") and "qwen1.5" not in str(w)]
    trained = [w for w in session if w[1] == "train"]
    assert trained
    words = trained[0][1:] + SHORTER["train"] + ["--training.stage1_steps", "2", "--training.output_dir", "runs/paper"]
    assert main(words) == 0
    assert (checkout / "runs" / "paper" / "model" / "config.json").is_file()


def test_the_readmes_python(tokenizer, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    asked = []

    def from_pretrained(name, **kwargs):
        asked.append(name)
        special = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=2)
        return tiny_model("qwen2_moe", **special).to(getattr(torch, kwargs["dtype"]))

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)
    words = "red green blue one two tree house river".split()
    names = dict(
        tokenizer=tokenizer,
        some_lists_of_texts=[[" ".join(words * 8)] * 4] * 2,
        ids=tokenizer([" ".join(words)] * 2, return_tensors="pt").input_ids,
    )
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert asked == ["Qwen/Qwen1.5-MoE-A2.7B"]
    assert all(p.grad is None for p in names["model"].parameters())
    assert (tmp_path / "out" / "config.json").is_file()


QUICK = ("dispatches.py", "simulate.py", "report.py", "gpu_suite.py --list", "planner.py --list")


@pytest.mark.slow
@pytest.mark.parametrize("words", of("revffn", "python"))
def test_plans_and_small_benchmarks_run(words, tmp_path):
    """As they stand there: what needs no trained model and no GPU."""
    plan = words[:2] == ["revffn", "plan"] and "--model" in words
    if not plan and not any(f"benchmarks/{text}" in " ".join(words) for text in QUICK):
        pytest.skip("needs a model, a GPU or hours")
    program = [sys.executable, "-m", "revffn"] if words[0] == "revffn" else [sys.executable, str(ROOT / words[1])]
    given = program + (words[1:] if words[0] == "revffn" else words[2:])
    done = subprocess.run(given, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
