"""Recipes and options of the command line -> the dataclasses of recipe.py; what is wrong in them, in one line.

`load_run_config` merges the recipe's values and the overrides by key, then hands all of them to one typed parser, so
that both are accepted, refused and described alike. An error says where the value stood: file and line, or the command
line.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TypeVar, get_type_hints

import yaml

from .config import RETIRED
from .recipe import InputError, RunConfig

COMMAND_LINE = "command line"


T = TypeVar("T")


@dataclass
class Given:
    """A value as the user wrote it, and where."""

    words: list[str]
    where: str


def load_run_config(recipe: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a recipe and apply command-line overrides.

    Args:
        recipe: Path of a YAML file with the sections of `RunConfig`.
        overrides: `["--section.key", "value", ...]`.

    Raises:
        InputError: The file is missing or is not YAML, a key is unknown, or a value has the wrong type or range.
    """
    recipe = Path(recipe)
    given = read_recipe(recipe) | read_overrides(overrides or [])
    words = [word for name, value in given.items() for word in (f"--{name}", *value.words)]
    try:
        config = from_words(RunConfig, words, "revffn train RECIPE")
    except InputError as error:
        raise InputError(place(str(error), given, recipe)) from None
    if config.training.output_dir is None:
        config.training.output_dir = str(Path("runs", recipe.stem))
    return config


def from_words(make: Callable[..., T], words: list[str], program: str) -> T:
    """Call a dataclass or function with the arguments that command-line words say.

    Raises:
        InputError: The words do not fit.
        SystemExit: They ask for help, which has been printed.
    """
    import tyro

    markers = (tyro.conf.FlagConversionOff, tyro.conf.OmitSubcommandPrefixes)
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(make, args=words, prog=program, config=markers, use_underscores=True)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(first_paragraph(message.getvalue())) from None


def first_paragraph(box: str) -> str:
    """What a framed message of the command-line library says, without frame, title and hints."""
    lines = [line.strip(" │|") for line in box.splitlines() if not re.match(r"\s*[╭╰]", line)]
    parts = [part.strip() for part in re.split(r"[-─]{10,}", " ".join(line for line in lines if line))]
    # The title is part of a drawn frame; without one (a plain terminal) it is a paragraph of its own.
    text = parts[0 if "╭" in box else 1]
    text = re.sub(r"could not convert string to float: ('.*')", r"expected a number, like 2e-5, got \1.", text)
    text = re.sub(r"invalid literal for int\(\) with base 10: ('.*')", r"expected a whole number, got \1.", text)
    return re.sub(r"no type matching (\S+) could be instantiated from \[('[^']*')\]\. .*", one_of_types, text)


def one_of_types(message: re.Match) -> str:
    """Of a value that may be of several types: what those are, in words."""
    kinds = {"INT": "a whole number", "FLOAT": "a number", "{None}": "null"}
    *first, last = [kinds.get(kind, kind.strip("{}").replace(",", ", ")) for kind in message[1].split("|")]
    return f"expected {', '.join(first)} or {last}, got {message[2]}."


def place(message: str, given: dict[str, Given], recipe: Path) -> str:
    """Put file and line, or "command line", in front of the message about one of the given values."""
    message = re.sub(r"^Error parsing (--)?(RunConfig: )?", "", message)
    if message.startswith("Unrecognized options"):
        # All names are known here, so these are values too many.
        surplus = message.split()[-1]
        for name, value in given.items():
            if surplus in value.words[1:]:
                return f"{value.where}: {name} takes one value, got {' '.join(value.words)!r}."
    # Messages of `__post_init__` name the section and the field apart: "optimizer: beta1 must be ...".
    text = re.sub(r"^(\w+): (\w+) ", r"\1.\2 ", message)
    found = {name: re.search(rf"(^|[\s'-]){re.escape(name)}\b", text) for name in given}
    # What was typed last is what the user is looking at; then what the message is about first.
    named = sorted((given[name].where != COMMAND_LINE, match.start(), name) for name, match in found.items() if match)
    if named:
        return f"{given[named[0][2]].where}: {message}"
    if "model.path" in message:
        return f"{recipe}: the section model has no path. Add `path:` there, or --model.path on the command line."
    return f"{recipe}: {message}"


def read_overrides(words: list[str]) -> dict[str, Given]:
    """`["--section.key", "value", ...]` to values by name."""
    given: dict[str, Given] = {}
    name = None
    for word in words:
        if word == "--force":
            name, given["memory.force"] = None, Given(["True"], COMMAND_LINE)
        elif word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            check_name(name, COMMAND_LINE)
            given[name] = Given([normalize(value)] if equals else [], COMMAND_LINE)
        elif name is None:
            raise InputError(f"{COMMAND_LINE}: expected --section.key value, got {word!r}. See revffn train --help.")
        else:
            given[name].words.append(normalize(word))
    return given


def read_recipe(recipe: Path) -> dict[str, Given]:
    """A YAML file to values by name, each with its line."""
    try:
        text = recipe.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{recipe}: no such recipe. The shipped ones are in recipes/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{recipe}: cannot be read as a recipe ({error}). Give a YAML text file.") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{recipe}{line}: not valid YAML ({getattr(error, 'problem', None) or error}).") from None
    given: dict[str, Given] = {}

    def where(node: yaml.Node) -> str:
        return f"{recipe} line {node.start_mark.line + 1}"

    for section, body in mapping(root, f"{recipe}: a recipe is a mapping of the sections {', '.join(sections())}"):
        check_name(section.value, where(section))
        remedy = f"{where(section)}: {section.value} is a section, write its keys on indented lines below it"
        for key, value in mapping(body, remedy):
            name = f"{section.value}.{key.value}"
            check_name(name, where(key))
            if name in given:
                raise InputError(f"{where(key)}: {name} is already set ({given[name].where}). Keep one of the two.")
            leaves = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if not all(isinstance(leaf, yaml.ScalarNode) for leaf in leaves):
                raise InputError(f"{where(key)}: {name} takes a value or a list of values, got a nested structure.")
            given[name] = Given([normalize(leaf.value, leaf.tag) for leaf in leaves], where(key))
    return given


def mapping(node: yaml.Node | None, remedy: str) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    if node is None or (isinstance(node, yaml.ScalarNode) and node.value == ""):
        return []
    if not isinstance(node, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
        raise InputError(f"{remedy}.")
    return node.value


def normalize(word: str, tag: str = "") -> str:
    """YAML's spelling of null, true and false to Python's."""
    if tag.endswith(":null"):
        return "None"
    if tag.endswith(":bool"):
        return str(word.lower() in ("true", "yes", "on"))
    if tag.endswith(":str"):
        return word
    return {"null": "None", "true": "True", "false": "False"}.get(word.lower(), word)


def sections() -> dict[str, list[str]]:
    """Every section of a recipe and its keys."""
    hints = get_type_hints(RunConfig)
    return {
        f.name: [key.name for key in fields(hints[f.name])] for f in fields(RunConfig) if is_dataclass(hints[f.name])
    }


def check_name(name: str, where: str) -> None:
    """Refuse an unknown section or section.key, with the nearest known one and what is accepted."""
    section, dot, key = name.partition(".")
    known = sections()
    if section in known and (not dot or key in known[section]):
        return
    if section == "reversible" and key in RETIRED:
        raise InputError(f"{where}: {name} is gone: every state is exact without it. Leave the key out.")
    everything = [f"{s}.{k}" for s, keys in known.items() for k in keys]
    same_key = [full for full in everything if full.endswith("." + (key or section))]
    near = same_key or difflib.get_close_matches(name, everything if dot else [*known, *everything], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    accepted = (
        f"keys of {section}: {', '.join(known[section])}" if section in known else f"sections: {', '.join(known)}"
    )
    raise InputError(f"{where}: unknown key {name!r}.{hint} Accepted {accepted}.")
