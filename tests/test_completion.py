"""Shell completion knows every command, option and choice, and the scripts run in their shells.

Run: pytest tests/test_completion.py
"""

import re
import shutil
import subprocess

import pytest

from revffn.__main__ import COMMANDS, main
from revffn.completion import HELP, SHELLS, TAKES, script

BASH = shutil.which("bash")
WORDS = {
    "a command": ("revffn tr", ["train"]),
    "all commands": ("revffn ", [*COMMANDS, "help"]),
    "an option": ("revffn train --training.num_e", ["--training.num_epochs"]),
    "an option of another command": ("revffn plan --side", ["--side_bits"]),
    "a choice": ("revffn train recipe.yaml --optimizer.rounding n", ["nearest"]),
    "all choices": ("revffn upcycle --dtype ", ["bfloat16", "float32"]),
    "a shell": ("revffn completion ", list(SHELLS)),
    "help of a command": ("revffn help ev", ["evaluate"]),
    "help": ("revffn export --h", list(HELP)),
    "files": ("revffn train rec", []),  # left to the shell
    "a value of any kind": ("revffn train --training.num_steps ", []),
}


def completed(line: str, capsys) -> list[str]:
    """What bash offers, by running the script."""
    assert main(["completion", "bash"]) == 0
    words = line.split(" ")
    ask = f"COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}; _revffn; "
    code = capsys.readouterr().out + ask + 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run([BASH, "--norc", "-u", "-c", code], capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.skipif(BASH is None, reason="needs bash, which runs the script")
@pytest.mark.parametrize("name", WORDS)
def test_bash(name, capsys):
    line, expected = WORDS[name]
    assert completed(line, capsys) == expected


CHECK = {"bash": ["-n"], "zsh": ["-n"], "fish": ["--no-execute"]}


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_everything(shell, tmp_path):
    text = script(shell, dict.fromkeys(COMMANDS, "it's done"))
    assert set(COMMANDS) <= set(re.findall(r"[\w.]+", text))
    assert "training.num_epochs" in text and "stochastic nearest master" in text
    if shutil.which(shell):
        (tmp_path / "script").write_text(text)
        subprocess.run([shell, *CHECK[shell], tmp_path / "script"], check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_are_those_of_the_help(command, capsys):
    """A command whose help has options that are not completed is missing in `TAKES`."""
    try:
        main([command, "--help-all"])
    except SystemExit as stop:
        assert stop.code == 0
    shown = re.findall(r"^ *(--[\w.]+) ", capsys.readouterr().out, re.MULTILINE)
    completed = re.search(rf"^ *{command}\) found=\((.*)\);;", script("bash", {command: ""}), re.MULTILINE)[1]
    assert [word for word in completed.split() if word not in HELP] == shown
    assert bool(shown) == (command in TAKES)


def test_bad_words(refused):
    assert "There is one for bash, zsh, fish" in refused("completion", "tcsh")
    assert "expected the name of a shell" in refused("completion")
