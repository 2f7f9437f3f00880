"""`revffn completion SHELL`: a script that completes commands, their options and an option's values.

It is made from the dataclasses that the options fill, and from nothing else. Where there is nothing to choose from the
shell completes files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from .command_line import kinds
from .config import offered
from .options import ChatConfig, EvaluateConfig, PlanConfig, ReportConfig, ShowDataConfig, UpcycleConfig
from .recipe import InputError, RunConfig
from .usage import field_texts, sentence

TAKES: dict[str, type] = {
    "train": RunConfig,
    "data": ShowDataConfig,
    "upcycle": UpcycleConfig,
    "plan": PlanConfig,
    "report": ReportConfig,
    "evaluate": EvaluateConfig,
    "chat": ChatConfig,
}
"""What the options of a command fill; a command without options is not here."""
HELP = ("--help", "--help-all")


def script(shell: str, commands: dict[str, str]) -> str:
    """What a shell reads to complete `revffn`.

    Args:
        commands: Each with its description, in the order in which they are offered.

    Raises:
        InputError: There is no script for this shell.
    """
    if shell not in SHELLS:
        raise InputError(f"command line: no completion for {shell!r}. There is one for {', '.join(SHELLS)}.")
    return SHELLS[shell]({**commands, "help": "What a command takes"})


def options(command: str) -> Iterator[tuple[str, str, list[str]]]:
    """Every option of a command with its text, in one sentence, and the words that it takes if they are known."""
    make = TAKES.get(command)
    for name, hint, owner, found in offered(make) if make else ():
        yield f"--{name}", sentence(field_texts(owner).get(found.name, "")), choices(hint)


def choices(hint: Any) -> list[str]:
    """The words that a field takes; none if it takes others too."""
    found: list[str] = []
    for kind in kinds(hint):
        if get_origin(kind) is Literal:
            found += map(str, get_args(kind))
        elif kind is bool:
            found += ["true", "false"]
        elif kind is type(None):
            found += ["null"]
        else:
            return []
    return found


def first_words(commands: dict[str, str]) -> dict[str, list[str]]:
    """What may follow these commands."""
    return {"help": [name for name in commands if name != "help"], "completion": list(SHELLS)}


def cases(commands: dict[str, str]) -> tuple[list[str], list[str]]:
    """Branches of a `case` that set the array `found`, for bash and zsh alike: by command and the word before the one
    that is completed, and by command alone."""
    values, names = [], []
    for command in commands:
        found = [*HELP]
        for option, _, words in options(command):
            found.append(option)
            if words:
                values.append(f'        "{command} {option}") found=({" ".join(words)});;')
        names.append(f"        {command}) found=({' '.join(found)});;")
    for command, words in first_words(commands).items():
        values.append(f'        "{command} {command}") found=({" ".join(words)});;')
    return values, names


BASH = """\
# bash: source <(revffn completion bash)
_revffn() {
    local command="${COMP_WORDS[1]}" word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"
    local -a found=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        found=(@commands@)
    else
        case "$command $before" in
@values@
        esac
    fi
    if [ ${#found[@]} -eq 0 ] && [[ "$word" == -* ]]; then
        case "$command" in
@names@
        esac
    fi
    COMPREPLY=($(compgen -W "${found[*]}" -- "$word"))
}
complete -o default -F _revffn revffn
"""
ZSH = """\
#compdef revffn
# zsh: source <(revffn completion zsh), after compinit
_revffn() {
    local -a found
    if (( CURRENT == 2 )); then
        found=(@commands@)
    else
        case "$words[2] $words[CURRENT-1]" in
@values@
        esac
    fi
    if (( ! $#found )) && [[ "$words[CURRENT]" == -* ]]; then
        case "$words[2]" in
@names@
        esac
    fi
    if (( $#found )); then compadd -- $found; else _files; fi
}
compdef _revffn revffn
"""


def filled(template: str, commands: dict[str, str]) -> str:
    values, names = cases(commands)
    texts = {"commands": " ".join(commands), "values": "\n".join(values), "names": "\n".join(names)}
    for name, text in texts.items():
        template = template.replace(f"@{name}@", text)
    return template


def fish(commands: dict[str, str]) -> str:
    lines = ["# fish: revffn completion fish | source"]
    for command, text in commands.items():
        lines.append(f"complete -c revffn -n __fish_use_subcommand -f -a {command} -d {quoted(text)}")
    for command in commands:
        within = f"complete -c revffn -n '__fish_seen_subcommand_from {command}'"
        lines += [f"{within} -l {option.removeprefix('--')}" for option in HELP]
        for option, text, words in options(command):
            values = f"-x -a {quoted(' '.join(words))}" if words else "-r"
            lines.append(f"{within} -l {option.removeprefix('--')} {values} -d {quoted(text)}")
    for command, words in first_words(commands).items():
        lines.append(f"complete -c revffn -n '__fish_seen_subcommand_from {command}' -f -a {quoted(' '.join(words))}")
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """As fish reads it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS = {
    "bash": lambda commands: filled(BASH, commands),
    "zsh": lambda commands: filled(ZSH, commands),
    "fish": fish,
}
