"""Recipes and options -> the dataclasses of recipe.py and options.py; what is wrong in them, in one line.

Values are kept as they were written, with their place, by the name of the field: `optimizer.learning_rate`. pydantic
makes them what the fields' types say; an error names the place: file and line, or the command line.
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError

from .config import RETIRED, ReversibleConfig, groups_of, offered
from .recipe import RENAMED, InputError, RunConfig, Source
from .usage import usage

COMMAND_LINE = "command line"

T = TypeVar("T")


@dataclass
class Given:
    """A value as the user wrote it, and where."""

    value: Any
    """A text, None, a mapping of them, or a list of all these."""
    where: str = COMMAND_LINE


RECIPES = (".yaml", ".yml")
DATA = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".gz", ".zst")
USAGE = "Usage: revffn train RECIPE, or revffn train MODEL DATA; then [--section.key value ...]"


def run_from_words(words: list[str]) -> tuple[RunConfig, Path | None]:
    """What `revffn train` is told: a recipe, or a model and its data; then overrides.

    Returns:
        The run, and the recipe if there is one.

    Raises:
        InputError: See `load_run_config`; or it is neither.
    """
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    named, overrides = words[:first], words[first:]
    if not named:
        raise InputError(f"{COMMAND_LINE}: a recipe, or a model and its data, comes first, got {words[0]!r}. {USAGE}")
    if len(named) == 1:
        check_is_recipe(named[0])
        return load_run_config(named[0], overrides), Path(named[0])
    recipe = next((word for word in named if word.endswith(RECIPES)), None)
    if recipe is not None:
        raise InputError(
            f"{COMMAND_LINE}: the recipe {recipe} names model and data itself, so it stands alone, got "
            f"{' '.join(named)!r}. Other ones are given with --model.path and --data.path. {USAGE}"
        )
    if len(named) > 2:
        raise InputError(f"{COMMAND_LINE}: expected a model and its data, got {len(named)} words. {USAGE}")
    return run_without_recipe(*named, overrides), None


def check_is_recipe(word: str) -> None:
    """Refuse a model or data that stand alone, with what is missing beside them."""
    if word.endswith(RECIPES):
        return
    is_model = (Path(word) / "config.json").is_file()
    if is_model or not Path(word).is_file() and not word.endswith(DATA) and word.count("/") == 1:
        kind = "a model" if is_model else "no recipe (a .yaml file)"
        raise InputError(f"{COMMAND_LINE}: {word} is {kind}. Name its data too: revffn train {word} DATA.")
    if word.endswith(DATA) or Path(word).is_dir():
        kind = "a folder" if Path(word).is_dir() else "data"
        raise InputError(f"{COMMAND_LINE}: {word} is {kind}. Name a model before it: revffn train MODEL {word}.")


def run_without_recipe(model: str, data: str, overrides: list[str]) -> RunConfig:
    """The defaults, on whatever machine this is; weights wait in host memory where they do not fit otherwise."""
    given = {"model.path": Given(model), "data.path": Given(data), "memory.weights": Given("auto")}
    config = build(RunConfig, given | read_words(RunConfig, aliased(overrides)), COMMAND_LINE)
    if config.training.output_dir is None:
        config.training.output_dir = str(Path("runs", f"{Path(model).name}-{name_of_data(data)}"))
    return config


def name_of_data(data: str) -> str:
    """A file's or folder's name without what says how to read it."""
    name = Path(data).name
    while name.endswith(DATA):
        name = name.rpartition(".")[0]
    return name


def aliased(words: list[str]) -> list[str]:
    return [word if word != "--force" else "--memory.force" for word in words]


def load_run_config(recipe: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a recipe and apply command-line overrides.

    Args:
        recipe: Path of a YAML file with the sections of `RunConfig`.
        overrides: `["--section.key", "value", ...]`.

    Raises:
        InputError: The file is missing or is not YAML, a key is unknown, or a value has the wrong type or range.
    """
    recipe = Path(recipe)
    given = read_recipe(recipe) | read_words(RunConfig, aliased(overrides or []))
    if "model.path" not in given:
        raise InputError(f"{recipe}: the section model has no path. Add `path:` there, or --model.path VALUE.")
    config = build(RunConfig, given, str(recipe))
    if config.training.output_dir is None:
        config.training.output_dir = str(Path("runs", recipe.stem))
    return config


def from_words(make: type[T], words: list[str], program: str) -> T:
    """Fill a dataclass from `--key value ...`.

    Raises:
        InputError: The words do not fit.
        SystemExit: They ask for help, which has been printed.
    """
    for word, everything in (("-h", False), ("--help", False), ("--help-all", True)):
        if word in words:
            print(usage(make, program, everything))
            raise SystemExit(0)
    return build(make, read_words(make, words), COMMAND_LINE)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_words(make: type, words: list[str]) -> dict[str, Given]:
    """`["--section.key", "value", ...]` to values by name; alone, an option means yes, and `--no-key` means no."""
    options: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            options.append((name.replace("-", "_"), [value] if equals else []))
        elif not options:
            shape = "--section.key value" if make is RunConfig else "--key value"
            raise InputError(f"{COMMAND_LINE}: expected {shape}, got {word!r}. --help-all lists what there is.")
        else:
            options[-1][1].append(word)
    given: dict[str, Given] = {}
    known = leaves(make)
    for name, following in options:
        # As YAML would have it: null is nothing.
        values = [None if word in ("null", "None") else word for word in following]
        opposite = name.removeprefix("no_")
        if name not in known and opposite in known and not values and bool in kinds(known[opposite]):
            name, values = opposite, ["false"]
        name = renamed(make, name, COMMAND_LINE)
        check_name(make, name, COMMAND_LINE)
        if name not in known:
            inside = [key for key in known if key.startswith(name + ".")]
            raise InputError(f"{COMMAND_LINE}: {name} is a section. Name a key of it, like --{inside[0]}.")
        if not values:
            if bool not in kinds(known[name]):
                raise InputError(f"{COMMAND_LINE}: {name} needs a value: {accepted(known[name])}.")
            values = ["true"]
        given[name] = Given(values[0] if len(values) == 1 else values)
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

    def read(config: type, body: yaml.Node | None, prefix: str, remedy: str) -> None:
        groups = groups_of(config)
        for key, value in mapping(body, remedy):
            name = renamed(RunConfig, prefix + key.value, where(key))
            check_name(RunConfig, name, where(key))
            if key.value in groups:
                remedy_within = f"{where(key)}: {name} is a section, write its keys on indented lines below it"
                read(groups[key.value], value, name + ".", remedy_within)
                continue
            if name in given:
                raise InputError(f"{where(key)}: {name} is already set ({given[name].where}). Keep one of the two.")
            is_list = isinstance(value, yaml.SequenceNode)
            nodes = value.value if is_list else [value]
            values = [plain(node, name, where(node)) for node in nodes]
            given[name] = Given(values if is_list else values[0], where(key))

    names = ", ".join(groups_of(RunConfig))
    read(RunConfig, root, "", f"{recipe}: a recipe is a mapping of the sections {names}")
    return given


def plain(node: yaml.Node, name: str, where: str) -> str | None | dict[str, str | None]:
    """A value as it is written; a mapping where the field `name` takes a dataclass."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag.endswith(":null") else node.value
    made = dataclass_in(leaves(RunConfig)[name])
    if made is None or not isinstance(node, yaml.MappingNode):
        raise InputError(f"{where}: {name} takes a value or a list of values, got a nested structure.")
    keys, found = [field.name for field in fields(made)], {}
    for key, value in mapping(node, f"{where}: {name} takes a mapping with the keys {', '.join(keys)}"):
        if key.value not in keys or key.value in found:
            what = "is there twice" if key.value in found else "is unknown"
            raise InputError(f"{where}: {name}: the key {key.value!r} {what}. Accepted keys: {', '.join(keys)}.")
        if not isinstance(value, yaml.ScalarNode):
            raise InputError(f"{where}: {name}: {key.value} takes one value, got a nested structure.")
        found[key.value] = plain(value, name, where)
    if found.get("path") is None:
        raise InputError(f"{where}: {name}: a source has no path. Add path: there.")
    return found


def mapping(node: yaml.Node | None, remedy: str) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    if node is None or (isinstance(node, yaml.ScalarNode) and node.value == ""):
        return []
    if not isinstance(node, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
        raise InputError(f"{remedy}.")
    return node.value


# --- what there is ---------------------------------------------------------------------------------------------------


def leaves(config: type) -> dict[str, Any]:
    """Names and types of the fields that are offered."""
    return {name: hint for name, hint, *_ in offered(config)}


def renamed(make: type, name: str, where: str) -> str:
    """The present name of a key of before; a line says so."""
    section, _, last = name.partition(".")
    if make is not RunConfig or section != "data" or last not in RENAMED:
        return name
    print(f"{where}: {name} is called data.{RENAMED[last]} now.", file=sys.stderr)
    return f"data.{RENAMED[last]}"


def check_name(make: type, name: str, where: str) -> None:
    """Refuse an unknown section or key, with the nearest known one and what is accepted."""
    known = leaves(make)
    if name in known or any(key.startswith(name + ".") for key in known):
        return
    section, _, last = name.rpartition(".")
    if section == "reversible" and last in RETIRED:
        raise InputError(f"{where}: {name} is gone: every state is exact without it. Leave the key out.")
    if section == "reversible" and last in closed():
        raise InputError(f"{where}: {name} is no setting of a run: {closed()[last]}. Leave the key out.")
    same = [full for full in known if full.rpartition(".")[2] == last]
    near = same or difflib.get_close_matches(name, [*known, *groups_of(make)], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    within = [full for full in known if section and full.startswith(section + ".")]
    if within:
        names = f"keys of {section}: {', '.join(full.removeprefix(section + '.') for full in within)}"
    elif groups_of(make):
        names = f"sections: {', '.join(groups_of(make))}"
    else:
        names = f"keys: {', '.join(known)}"
    raise InputError(f"{where}: unknown key {name!r}.{hint} Accepted {names}.")


def closed() -> dict[str, str]:
    """Settings of a model that recipes do not offer, and what decides them."""
    reasons = {"grids": "calibration finds it", "innovation": "experiments have settled it (docs/experiments.md)"}
    groups = groups_of(ReversibleConfig)
    return {found.name: reason for group, reason in reasons.items() for found in fields(groups[group])}


# --- values ----------------------------------------------------------------------------------------------------------


def build(make: type[T], given: dict[str, Given], otherwise: str) -> T:
    """The dataclass with what was given.

    Args:
        otherwise: The place of an error that no given value can be blamed for.

    Raises:
        InputError: A value is missing, has the wrong type or is out of range.
    """
    tree: dict[str, Any] = {}
    known = leaves(make)
    for name, value in given.items():
        *path, last = name.split(".")
        inner = tree
        for group in path:
            inner = inner.setdefault(group, {})
        # One value is a list of one, where only a list will do.
        alone = get_origin(known.get(name)) is list and isinstance(value.value, str)
        inner[last] = [value.value] if alone else value.value
    try:
        return TypeAdapter(make).validate_python(tree)
    except ValidationError as failed:
        problem = failed.errors(include_url=False)[0]
    path = [part for part in problem["loc"] if isinstance(part, str)]
    if problem["type"] == "value_error":
        # Of __post_init__: "beta1 must be ...", of the section that the path names.
        text = f"{'.'.join(path)}: {problem['ctx']['error']}" if path else str(problem["ctx"]["error"])
        raise InputError(f"{blamed(text, given, otherwise)}: {text}") from None
    # Behind the field's name there may be the member of a union that did not fit either.
    name = next(".".join(path[:i]) for i in range(len(path), 0, -1) if ".".join(path[:i]) in known)
    if problem["type"] == "missing":
        raise InputError(f"{otherwise}: {name} is missing. Give --{name}: {accepted(known[name])}.") from None
    value, where = given[name].value, given[name].where
    if isinstance(value, list) and not any(get_origin(kind) is list for kind in kinds(known[name])):
        raise InputError(f"{where}: {name} takes one value, got {' '.join(map(str, value))!r}.") from None
    raise InputError(f"{where}: {name}: expected {accepted(known[name])}, got {written(value)}.") from None


def blamed(text: str, given: dict[str, Given], otherwise: str) -> str:
    """The place of the given value that a message is about."""
    section, _, rest = text.partition(": ")
    words = {word.strip(",.:;()'\"=") for word in f"{section} {section}.{rest} {rest}".replace("=", " ").split()}
    named = [name for name in given if name in words or name.rpartition(".")[2] in words]
    # What was typed last is what the user is looking at; then what the message names in full, or is about first.
    named.sort(
        key=lambda name: (given[name].where != COMMAND_LINE, name not in words, text.find(name.rpartition(".")[2]))
    )
    return given[named[0]].where if named else otherwise


def kinds(hint: Any) -> list[Any]:
    """The members of a union, or the type alone; literals and lists as they are."""
    if get_origin(hint) in (Literal, list) or not get_args(hint):
        return [hint]
    return [kind for member in get_args(hint) for kind in kinds(member)]


def dataclass_in(hint: Any) -> type | None:
    """The dataclass that a field may hold, alone or in a list."""
    found = [hint] if is_dataclass(hint) else map(dataclass_in, get_args(hint))
    return next(filter(None, found), None)


def accepted(hint: Any) -> str:
    """A field's type in words."""
    words = {str: "a text", int: "a whole number", float: "a number, like 2e-5", bool: "true or false"}
    words |= {NoneType: "null", list[int]: "a list of whole numbers", list[str]: "a list of texts"}
    keys = ", ".join(field.name for field in fields(Source))
    words |= {Source: f"a mapping with some of {keys}", list[str | Source]: "a list of those"}
    found = []
    for kind in kinds(hint):
        found += [", ".join(map(str, get_args(kind)))] if get_origin(kind) is Literal else [words[kind]]
    found.sort(key=lambda word: word == "null")
    return " or ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


def written(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else repr(value)
