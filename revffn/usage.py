"""The help of a command, from its dataclass: field texts are the only description.

`--help` shows what a newcomer needs, each in its first sentence; `--help-all` everything, in full.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import shutil
import textwrap
from dataclasses import MISSING, Field, is_dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from .config import groups_of, offered

WIDEST = 100


def usage(make: type, program: str, everything: bool) -> str:
    """What a command takes.

    Args:
        make: The dataclass that its options fill. If no field of it is marked `first`, all are shown.
        everything: All fields, with their whole texts.
    """
    is_recipe = bool(groups_of(make))
    lines = [f"usage: {program} {'[--section.key value ...]' if is_recipe else '--key value ...'}", ""]
    width = min(WIDEST, shutil.get_terminal_size((WIDEST, 40)).columns)
    text = inspect.getdoc(make) or ""
    lines += textwrap.wrap(" ".join((text if everything else sentence(text)).split()), width)
    everything = everything or not any(found.metadata.get("first") for *_, found in offered(make))
    last = None
    for name, hint, owner, found in offered(make):
        if not (everything or found.metadata.get("first")):
            continue
        section = name.rpartition(".")[0].partition(".")[0]
        if section != last:
            lines += ["", section] if section else [""]
            last = section
        indent = "  " if is_recipe else ""
        lines.append(f"{indent}--{name} {shape(hint)}{default_of(found)}")
        words = field_texts(owner).get(found.name, "")
        text, within = words if everything else sentence(words), indent + "    "
        lines += textwrap.wrap(" ".join(text.split()), width, initial_indent=within, subsequent_indent=within)
    if not everything:
        lines += ["", "--help-all: all options, each with its whole text."]
    return "\n".join(lines)


@functools.cache
def field_texts(make: type) -> dict[str, str]:
    """The text below each field of a dataclass, and of those it is made from."""
    found: dict[str, str] = {}
    for part in reversed(make.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        for line, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[line.target.id] = ast.literal_eval(below.value)
    return found


def sentence(text: str) -> str:
    """The first one."""
    return re.split(r"(?<=[.:?]) (?=[A-Z`])|(?<=\.)\n\n", " ".join(text.split()), maxsplit=1)[0].rstrip(":")


def shape(hint: Any) -> str:
    """A field's type as a word of the usage."""
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return f"{shape(get_args(hint)[0])} ..."
    if get_args(hint):
        # What only a recipe can write has no word here.
        members = [member for member in get_args(hint) if member is not NoneType and not is_dataclass(member)]
        return " | ".join(map(shape, members))
    return {str: "TEXT", int: "N", float: "X", bool: "true | false"}[hint]


def default_of(found: Field) -> str:
    value = found.default
    if value is MISSING:
        return "  (required)" if found.default_factory is MISSING else "  (none)"
    is_word = value is None or isinstance(value, bool)
    return f"  ({ {None: 'null', True: 'true', False: 'false'}[value] if is_word else value })"
