"""Command line: one table, command -> function. `revffn COMMAND --help` lists what a command takes."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .interrupts import Interrupts, at_once

EXTRA_OF = {"trl": "train", "datasets": "train", "accelerate": "train", "gguf": "upcycle", "matplotlib": "plot"}
EXTRA_OF |= {"plotly": "report", "lm_eval": "evaluate", "torchao": "lowbit", "rich": "train", "pyarrow": "train"}
"""The extra that brings a package."""
ACCEPTED_GAP = 0.02
"""Nats that export may cost without a warning."""
HELP = {"-h", "--help", "--help-all"}


def train(words: list[str]) -> None:
    """Fine-tune a model: revffn train RECIPE, or MODEL DATA; [--section.key value ...] [--dry-run]"""
    from . import command_line, recipe

    if not words or HELP & set(words):
        program = "revffn train RECIPE, or revffn train MODEL DATA;"
        command_line.from_words(recipe.RunConfig, words or ["--help"], program)
    dry_run = "--dry-run" in words
    config, path = command_line.run_from_words([word for word in words if word != "--dry-run"])
    from .parallel.launch import check_launch, is_first

    check_launch(config.parallel.strategy)
    missing = [name for name in ("trl", "datasets", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise recipe.InputError(not_installed(missing[0]))
    # After the recipe, because the imports take seconds.
    if dry_run:
        from .training.introduction import describe
        from .training.preflight import check

        if is_first():
            print(describe(check(config, path)))
        return
    from .engine.recompute import StateMismatchError
    from .optim import NonFiniteGradientError
    from .training.run import train

    try:
        train(config, path)
    except (StateMismatchError, NonFiniteGradientError) as error:
        sys.exit(f"revffn train: stopped, because training on would use wrong gradients. {error}")


def data(words: list[str]) -> None:
    """Show what a run would learn from: revffn data RECIPE, or MODEL DATA; [--section.key value ...]"""
    from . import command_line, options

    if not words or HELP & set(words):
        program = "revffn data RECIPE, or revffn data MODEL DATA;"
        command_line.from_words(options.ShowDataConfig, words or ["--help"], program)
    config, path = command_line.run_from_words(words)
    from .data.command import data_command

    with Interrupts():
        data_command(config, path)


def upcycle(words: list[str]) -> None:
    """Make a small Mixture-of-Experts model from a dense one: revffn upcycle --output FOLDER [--key value ...]"""
    from . import command_line, options, recipe

    config = command_line.from_words(options.UpcycleConfig, words, "revffn upcycle")
    from .models.upcycle_command import upcycle_command

    try:
        with Interrupts():
            upcycle_command(config)
    except ValueError as error:
        raise recipe.InputError(str(error)) from None


def export(words: list[str]) -> None:
    """Write the plain Hugging Face model of a finished run: revffn export RUN OUT"""
    from .recipe import InputError

    if HELP & set(words):
        return explain(export)
    if len(words) != 2 or words[0].startswith("-"):
        raise InputError("command line: expected two folders. Usage: revffn export RUN OUT")
    run, out = Path(words[0]), Path(words[1])
    folder = run / "model" if (run / "model").is_dir() else run
    if not (folder / "config.json").is_file():
        raise InputError(f"{run}: no model here. Give the folder of a finished run, or of a saved reversible model.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty. Name a new folder.")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from .files import new_folder
    from .models.architectures import fit_for_servers
    from .models.conversion import export as plain_model
    from .models.loading import load_causal_lm
    from .quiet import without_bars

    try:
        # A rehearsal without weights: what export refuses, it refuses before they are read.
        with torch.device("meta"):
            plain_model(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)))
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from None
    plain = plain_model(load_causal_lm(folder, "auto"))
    about_servers = fit_for_servers(plain)
    with Interrupts(), new_folder(out) as partial, without_bars():
        plain.save_pretrained(partial)
        if (folder / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(folder).save_pretrained(partial)
    print(f"{out}: {type(plain).__name__}, loadable without revffn.")
    for line in about_servers:
        print(line)
    report_gap(run)


def report_gap(run: Path) -> None:
    """What dropping the coupling costs, as the run measured it."""
    from .files import read_json

    if not (run / "run.json").is_file():
        return
    try:
        heldout = read_json(run / "run.json")["heldout"]
    except (ValueError, KeyError, TypeError) as error:
        print(f"revffn export: warning: what export costs is not known: {error}.", file=sys.stderr)
        return
    exported, trained = (heldout.get(when) for when in ("after", "after, as trained"))
    if exported is None or trained is None:
        return
    gap = exported["loss"] - trained["loss"]
    print(
        f"Held-out loss, nats per response token: {exported['loss']:.4f} exported, {trained['loss']:.4f} as trained "
        f"with the coupling ({gap:+.4f})."
    )
    if gap > ACCEPTED_GAP:
        print(
            f"revffn export: warning: the exported model is worse than the trained one by more than {ACCEPTED_GAP} "
            "nats. It was trained to rely on the coupling: train with more reversible.side_bits, or more "
            "training.calibration_tokens.",
            file=sys.stderr,
        )


def plan(words: list[str]) -> None:
    """Say before a run what it takes: revffn plan --model NAME --batch B --tokens T [--gpu 80GiB]"""
    from . import command_line, options, recipe

    config = command_line.from_words(options.PlanConfig, words, "revffn plan")
    from .memory.command import plan_command

    try:
        with Interrupts():
            problem = plan_command(config)
    except (ValueError, ImportError) as error:
        raise recipe.InputError(str(error)) from None
    if problem is not None:
        sys.exit(f"revffn plan: {problem}")


def report(words: list[str]) -> None:
    """A page about a run, or several side by side: revffn report RUN [RUN ...] [--output FILE]"""
    from . import command_line, options, recipe

    split = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    folders = words[:split]
    if not words:
        raise recipe.InputError("command line: name a run's folder. Usage: revffn report RUN [RUN ...]")
    config = command_line.from_words(options.ReportConfig, words[split:], "revffn report RUN [RUN ...]")
    if not folders:
        raise recipe.InputError("command line: the runs' folders come first. Usage: revffn report RUN [RUN ...]")
    from .report.command import report_command

    with Interrupts():
        print(report_command(folders, config))


def evaluate(words: list[str]) -> None:
    """Score a model, or compare scores: revffn evaluate MODEL --tasks mmlu,gsm8k --output FILE; --compare FILE FILE"""
    from . import command_line, options

    if words[:1] == ["--compare"] and not HELP & set(words):
        from .evaluation.command import compare_command

        with Interrupts():
            return compare_command(words[1:])
    if words and not words[0].startswith("-"):
        words = ["--model", *words]
    config = command_line.from_words(options.EvaluateConfig, words, "revffn evaluate MODEL")
    from .evaluation.command import evaluate_command
    from .evaluation.mt_bench import JudgeError

    try:
        with Interrupts():
            evaluate_command(config)
    except JudgeError as error:
        sys.exit(f"revffn evaluate: {error}")


def chat(words: list[str]) -> None:
    """Talk to a model, or to two side by side: revffn chat MODEL [OTHER] [--key value ...]"""
    from . import command_line, options, recipe

    number = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    if number > 2:
        raise recipe.InputError(
            f"command line: expected one model or two, got {' '.join(words[:number])!r}. Usage: revffn chat MODEL "
            "[OTHER] [--key value ...]"
        )
    names = [f"--{key}={given}" for key, given in zip(("model", "other"), words[:number], strict=False)]
    config = command_line.from_words(options.ChatConfig, names + words[number:], "revffn chat MODEL [OTHER]")
    from .evaluation.chat import chat_command

    with Interrupts():
        chat_command(config)


def completion(words: list[str]) -> None:
    """Print what a shell needs to complete commands and options: revffn completion bash | zsh | fish"""
    from .completion import script
    from .recipe import InputError

    if HELP & set(words):
        return explain(completion)
    if len(words) != 1:
        raise InputError("command line: expected the name of a shell. Usage: revffn completion bash | zsh | fish")
    print(script(words[0], {name: summary(function).partition(":")[0] for name, function in COMMANDS.items()}), end="")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "data": data,
    "upcycle": upcycle,
    "export": export,
    "plan": plan,
    "report": report,
    "evaluate": evaluate,
    "chat": chat,
    "completion": completion,
}


def summary(command: Callable) -> str:
    """What a command is for, and how it is called: its first line."""
    return (inspect.getdoc(command) or "").partition("\n")[0]


def explain(command: Callable) -> None:
    """The help of a command without options."""
    what, _, how = summary(command).partition(": ")
    print(f"usage: {how}\n\n{what}.")


def main(words: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0; or after one line on stderr 2 for what the user gave, 1 for what the machine did not let
        be written or read, 130 or 143 for Ctrl-C or SIGTERM.
    """
    words = sys.argv[1:] if words is None else words
    while words[:1] == ["help"]:  # alone, or with a command
        words = [*words[1:2], "--help"]
    if not words or words[0] in HELP:
        print("usage: revffn COMMAND ...\n")
        for name, function in COMMANDS.items():
            print(f"  {name:<10} {summary(function)}")
        print("\nrevffn help COMMAND, or revffn COMMAND --help, lists what a command takes; revffn --version.")
        return 0
    if words[0] == "--version":
        from . import __version__

        print(f"revffn {__version__}")
        return 0
    # TRL reports each run's model and machine over the network unless told not to.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars that nobody sees move
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], [*COMMANDS, "help"], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(f"revffn: unknown command {words[0]!r}.{hint} Commands: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    with at_once(f"revffn {words[0]}"):
        status, line = in_one_line(COMMANDS[words[0]], words[1:])
    from .parallel.launch import is_first

    if line and is_first():
        print(f"revffn {words[0]}: {' '.join(line.split())}", file=sys.stderr)
    return status


def in_one_line(command: Callable[[list[str]], None], words: list[str]) -> tuple[int, str]:
    """Run a command: its exit status, and what is to be said if that is not 0."""
    from .files import describe
    from .quiet import without_noise
    from .recipe import InputError

    try:
        with without_noise():
            command(words)
    except InputError as error:
        return 2, str(error)
    except OSError as error:
        return 1, describe(error)
    except KeyboardInterrupt as error:
        return getattr(error, "status", 130), str(error) or "stopped."
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA_OF:
            raise
        return 2, not_installed(package)
    return 0, ""


def not_installed(package: str) -> str:
    return f"the package {package} is not installed. Install it with: pip install 'revffn[{EXTRA_OF[package]}]'"


if __name__ == "__main__":
    sys.exit(main())
