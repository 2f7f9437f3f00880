"""`revffn evaluate`: benchmark scores of a model with confidence intervals, and tables that compare runs.

Everything that can be refused is refused before weights are loaded. The results are written after every task, whole or
not at all, and a second call with the same settings goes on with what is missing, also in the middle of a task of the
harness or of MT-Bench, whose answers are kept beside the results. Intervals are 95 %, value plus and
minus 1.96 standard errors; which standard error, each task's module says (harness: lm-evaluation-harness's own).
"""

from __future__ import annotations

import copy
import glob
import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..files import write_text
from ..models.conversion import export, is_reversible
from ..models.loading import load_causal_lm
from ..options import EvaluateConfig
from ..recipe import InputError

HARNESS_TASKS = ("mmlu", "gsm8k", "mgsm", "mgsm_cot")
TASKS = (*HARNESS_TASKS, "perplexity", "mt_bench")
Z = 1.959964  # of the normal distribution, two-sided 95 %


# --- command ---------------------------------------------------------------------------------------------------------


def evaluate_command(config: EvaluateConfig) -> None:
    """Evaluate as told and write the results.

    Raises:
        InputError: Something given cannot be used; nothing has been written.
    """
    tasks = list(dict.fromkeys(task.strip() for task in config.tasks.split(",")))
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise InputError(f"tasks: unknown {', '.join(map(repr, unknown))}. Known: {', '.join(TASKS)}.")
    output = Path(config.output)
    if output.suffix != ".json":
        raise InputError(f"output {config.output!r}: expected a name that ends in .json.")
    found = read_results(output) if output.exists() else None
    if not output.resolve().parent.is_dir():
        raise InputError(f"output {config.output!r}: there is no folder {output.resolve().parent}. Make it first.")
    device = find_device(config.device)
    folder, model_config, tokenizer = find_model(config.model)
    settings = {task: task_settings(task, config) for task in tasks}
    done = {task: found["results"].get(task) for task in tasks} if found else {}
    done = {task: result for task, result in done.items() if result is not None and result.get("complete", True)}
    for task, result in done.items():
        differing = sorted(key for key, value in settings[task].items() if result["settings"].get(key) != value)
        if differing:
            raise InputError(
                f"{output} holds {task} with other settings ({', '.join(differing)}). Name another file, or repeat "
                "with the same settings."
            )
    work = {task: prepare(task, config, model_config, tokenizer) for task in tasks if task not in done}
    model, function = load_model(folder, device)
    about = {
        "model": config.model,
        "model_type": model.config.model_type,
        "function": function,
        "weights": digest(model),
        "config": config_digest(model.config),
        "tokenizer": tokenizer_digest(tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    results = results_of(output, about)
    for task, run in work.items():
        how = {"settings": settings[task], "device": device.type, "versions": versions()}
        result = with_intervals(run(model, about, how))
        results = results_of(output, about)  # another call may have written meanwhile
        results["results"][task] = how | result
        write_results(output, results)
        for file in output.parent.glob(glob.escape(answers_prefix(output, task, about, how)) + "*"):
            file.unlink(missing_ok=True)
    print(table({output.name: results}))


Run = Callable[[PreTrainedModel, dict[str, Any], dict[str, Any]], dict[str, Any]]
"""What runs a task: the model, what is told about it, and how it is run -> metrics."""


def prepare(
    task: str, config: EvaluateConfig, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Run:
    """Read and check what a task needs; what is returned runs it."""
    if task == "mt_bench" or (task in HARNESS_TASKS and config.chat_template):
        check_chat_template(tokenizer, config.model)
    if task in HARNESS_TASKS:
        return prepare_harness(task, config, tokenizer)
    if task == "perplexity":
        from .perplexity import check, perplexity, read_text

        if config.text is None:
            raise InputError("perplexity needs a text: --text FILE.")
        text = read_text(config.text)
        check(model_config, tokenizer, config.window)
        return lambda model, about, how: perplexity(
            model,
            tokenizer,
            text,
            window=config.window,
            stride=config.stride or max(config.window // 2, 1),
            limit=config.limit,
            batch_size=config.batch_size,
        )
    from .mt_bench import Bench

    if config.mt_bench_path is None:
        raise InputError("mt_bench needs its questions and judge prompts: --mt_bench_path FOLDER, from FastChat.")
    bench = Bench(config)
    return lambda model, about, how: bench.run(model, tokenizer, about)


def prepare_harness(task: str, config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase) -> Run:
    missing = [name for name in ("lm_eval", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{task} needs {' and '.join(missing)}, not installed here: pip install 'lm-eval>=0.4.13'. perplexity and "
            "mt_bench do without."
        )
    from ..evaluation import harness

    paths = {name: getattr(config, name) for name in ("mmlu_path", "gsm8k_path", "mgsm_path")}
    subjects = None
    if config.mmlu_subjects is not None:
        subjects = [subject.strip() for subject in config.mmlu_subjects.split(",")]
    group = harness.load_task(task, paths, subjects)

    def run(model: PreTrainedModel, about: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
        lm = harness.wrap(model, tokenizer, config.batch_size)
        output = Path(config.output)
        answers = output.with_name(answers_prefix(output, task, about, how))
        rows = harness.run_task(group, lm, config.limit, config.chat_template, answers)
        whole = rows[{"mmlu": "mmlu", "gsm8k": "gsm8k_cot"}.get(task, f"revffn_{task}")]
        return {**copy.deepcopy(whole), "harness_tasks": rows}

    return run


def check_chat_template(tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    if tokenizer.chat_template is None:
        raise InputError(f"{model}: the tokenizer has no chat template. Put a chat_template.jinja into the folder.")


def task_settings(task: str, config: EvaluateConfig) -> dict[str, Any]:
    """The options that a task's numbers depend on."""
    names = {
        "mmlu": ("limit", "batch_size", "chat_template", "mmlu_path", "mmlu_subjects"),
        "gsm8k": ("limit", "batch_size", "chat_template", "gsm8k_path"),
        "mgsm": ("limit", "batch_size", "chat_template", "mgsm_path"),
        "mgsm_cot": ("limit", "batch_size", "chat_template", "mgsm_path"),
        "perplexity": ("limit", "batch_size", "text", "window", "stride"),
        "mt_bench": ("limit", "mt_bench_path", "max_new_tokens", "seed", "judge_model"),
    }[task]
    settings = {name: getattr(config, name) for name in names}
    if task == "perplexity" and config.text is not None and Path(config.text).is_file():
        settings["text_sha256"] = short_sha256(Path(config.text).read_bytes())
    return settings


# --- model -----------------------------------------------------------------------------------------------------------


def find_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}). Try cpu, or cuda.") from None
    return device


def find_model(given: str) -> tuple[str, PretrainedConfig, PreTrainedTokenizerBase]:
    """The folder with the weights, or the name on the Hub as it is; the model's config and its tokenizer."""
    folder = next((str(place) for place in (Path(given, "model"), Path(given)) if place.is_dir()), given)
    try:
        # Not told about a model's own code, transformers asks the terminal.
        model_config, tokenizer = (
            kind.from_pretrained(folder, trust_remote_code=False) for kind in (AutoConfig, AutoTokenizer)
        )
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(f"model {given!r}: it is code of its own, which is not run here.") from None
        raise InputError(
            f"model {given!r}: no model with a tokenizer here, nor one that can be had from the Hub "
            f"({' '.join(str(error).split())[:200]}). Give the folder of a model or of a finished run."
        ) from None
    if type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"model {given!r}: a model of type {model_config.model_type!r} does not continue a text. Give a causal "
            "language model."
        )
    return folder, model_config, tokenizer


def load_model(folder: str, device: torch.device) -> tuple[PreTrainedModel, str]:
    """A model, and which function is evaluated: plain, exported, or its own (cross_branch, which has no other)."""
    model, function = load_causal_lm(folder, "auto"), "plain"
    if is_reversible(model):
        try:
            model, function = export(model), "exported"
        except ValueError:
            function = "its own"
    return model.to(device).eval(), function


def digest(model: PreTrainedModel) -> str:
    """Of some values of every parameter: tells models apart, also two states of one training."""
    seen = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu()
        seen.update(f"{name} {tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return seen.hexdigest()[:16]


def config_digest(config: PretrainedConfig) -> str:
    """Of what the model computes, not of where it came from or who wrote it."""
    values = config.to_dict()
    for name in ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"):
        values.pop(name, None)
    return short_sha256(json.dumps(values, sort_keys=True, default=str).encode())


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of a few texts' tokens, the special tokens and the chat template: what prompts come to the model as."""
    texts = ("The house is red.\n\nOne river, 东京, grün; x = 3.14e-5", " A", "Question: 12 + 7?\nAnswer:", "")
    ids = [tokenizer(text)["input_ids"] for text in texts]
    vocabulary = sorted(tokenizer.get_vocab().items())
    return short_sha256(json.dumps([ids, vocabulary, tokenizer.chat_template, tokenizer.special_tokens_map],
                                   sort_keys=True, default=str).encode())  # fmt: skip


def short_sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def versions() -> dict[str, str]:
    from .. import __version__

    found = {"revffn": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    if importlib.util.find_spec("lm_eval") is not None:
        from importlib.metadata import version

        found["lm_eval"] = version("lm_eval")
    return found


# --- results ---------------------------------------------------------------------------------------------------------


def with_intervals(result: dict[str, Any]) -> dict[str, Any]:
    """Every metric with its 95 % interval beside value and standard error."""
    parts = [result, *result.get("harness_tasks", {}).values(), *result.get("categories", {}).values()]
    for part in parts:
        for metric in part["metrics"].values():
            value, stderr = metric["value"], metric["stderr"]
            metric["interval"] = None if stderr is None else [value - Z * stderr, value + Z * stderr]
    return result


def answers_prefix(output: Path, task: str, about: dict[str, Any], how: dict[str, Any]) -> str:
    """How the file's name begins that keeps a model's answers until the harness's task is done. Those of another
    model, device, version or setting are elsewhere."""
    key = short_sha256(json.dumps([about, how], sort_keys=True).encode())
    return f"{output.stem}.{task}_{key}_rank"


def results_of(output: Path, about: dict[str, Any]) -> dict[str, Any]:
    """What the file holds, or will.

    Raises:
        InputError: It holds another model's.
    """
    if not output.exists():
        return {"about": about, "results": {}}
    results = read_results(output)
    if results["about"] != about:
        differing = [key for key, value in about.items() if results["about"].get(key) != value]
        raise InputError(f"{output} holds the results of another model ({', '.join(differing)}). Name another file.")
    return results


def write_results(output: Path, results: dict[str, Any]) -> None:
    """The whole file or none of it."""
    write_text(output, json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def read_results(file: Path) -> dict[str, Any]:
    """The results of an earlier call.

    Raises:
        InputError: There are none in this file.
    """
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file}: cannot be read as results ({error}). Give a file that revffn evaluate wrote."
        ) from None
    if not isinstance(results, dict) or not {"about", "results"} <= results.keys():
        raise InputError(f"{file}: not a file of results. Give one that revffn evaluate wrote.")
    return results


def compare_command(files: list[str]) -> None:
    """Print one table of several results."""
    if not files:
        raise InputError("command line: expected result files. Usage: revffn evaluate --compare A.json B.json")
    runs: dict[str, dict[str, Any]] = {}
    for file in files:
        name = Path(file).name if len({Path(other).name for other in files}) == len(files) else file
        runs[name] = read_results(Path(file))
    print(table(runs))


def table(runs: dict[str, dict[str, Any]]) -> str:
    """One row a metric, one column a run: value and half the interval. Below it what makes them hard to compare."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    notes: list[str] = []
    for name, run in runs.items():
        for task, result in run["results"].items():
            for metric, numbers in result["metrics"].items():
                half = "" if numbers["stderr"] is None else f" ± {Z * numbers['stderr']:.4f}"
                rows.setdefault((task, metric), {})[name] = f"{numbers['value']:.4f}{half}"
    for task in dict.fromkeys(task for task, _ in rows):
        there = {name: run["results"][task] for name, run in runs.items() if task in run["results"]}
        for key in sorted({key for result in there.values() for key in result["settings"]}):
            values = {name: result["settings"].get(key) for name, result in there.items()}
            if len(set(map(str, values.values()))) > 1:
                notes.append(f"{task}: {key} differs: {', '.join(f'{n} {v}' for n, v in values.items())}.")
        for key in ("device", "versions"):
            if len({json.dumps(result.get(key), sort_keys=True) for result in there.values()}) > 1:
                notes.append(f"{task}: {key} differ." if key == "versions" else f"{task}: {key} differs.")
        prompts = [
            {name: row["prompts_sha256"] for name, row in result["harness_tasks"].items() if "prompts_sha256" in row}
            for result in there.values()
            if "harness_tasks" in result
        ]
        if any(other != prompts[0] for other in prompts[1:]):
            notes.append(f"{task}: the prompts differ.")
    cells = [["task", "metric", *runs]]
    cells += [[task, metric, *(row.get(name, "-") for name in runs)] for (task, metric), row in rows.items()]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *notes, "± is half of a 95 % interval."])
