"""MMLU, GSM8K and MGSM through lm-evaluation-harness: its prompts, metrics and model wrapper, data from local files.

The task files in tasks/ name the harness's own tasks, so that a prompt here is a prompt there. What they change is the
class: `LocalTask` reads a task's data from a folder if one is given, and else from the Hub as the harness does.
Importing this module imports the harness.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length
from lm_eval.tasks import TaskManager
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data import read_file
from ..recipe import InputError

TASKS = Path(__file__).parent / "tasks"
# What a task file may name; the harness's whole index would take longer to read than a quick look takes.
HARNESS_FOLDERS = ("mmlu/default", "gsm8k", "mgsm/direct", "mgsm/native_cot")
Splits = dict[str, list[dict[str, Any]]]


# --- local files -----------------------------------------------------------------------------------------------------


def find_split(folder: Path, split: str) -> Path:
    """`split.jsonl.gz` or `split.jsonl` in a folder."""
    for suffix in (".jsonl.gz", ".jsonl"):
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    raise InputError(f"{folder}: no {split}.jsonl.gz or {split}.jsonl here. Give the folder that has it.")


def read_records(file: Path, check: Callable[[Any], bool], accepted: str) -> list[dict[str, Any]]:
    """The records of a file, all of them checked."""
    records = []
    for record, where in read_file(file):
        if not isinstance(record, dict) or not check(record):
            raise InputError(f"{where}: not a record of {accepted}. Correct the file.")
        records.append(record)
    if not records:
        raise InputError(f"{file}: no records. Give a file with records of {accepted}.")
    return records


def is_mmlu(record: dict[str, Any]) -> bool:
    choices = record.get("choices")
    return (
        isinstance(record.get("subject"), str)
        and isinstance(record.get("question"), str)
        and isinstance(choices, list)
        and len(choices) == 4
        and record.get("answer") in (0, 1, 2, 3)
    )


@functools.cache
def read_mmlu(folder: Path) -> dict[str, Splits]:
    """Subject -> split -> records, from `test` and `dev`."""
    subjects: dict[str, Splits] = {}
    for split in ("test", "dev"):
        accepted = "subject, question, choices (4 texts) and answer (0 to 3)"
        for record in read_records(find_split(folder, split), is_mmlu, accepted):
            subjects.setdefault(record["subject"], {"test": [], "dev": []})[split].append(record)
    return subjects


def mmlu(folder: Path, subject: str) -> Splits:
    splits = read_mmlu(folder).get(subject)
    if splits is None or not splits["test"] or len(splits["dev"]) < 5:
        raise InputError(
            f"{folder}: subject {subject!r} needs at least one record in test and five in dev. Complete the files, or "
            "leave the subject out with --mmlu_subjects."
        )
    return splits


def gsm8k(folder: Path, name: str) -> Splits:
    def is_gsm8k(record: dict[str, Any]) -> bool:
        return isinstance(record.get("question"), str) and "####" in str(record.get("answer"))

    accepted = "question and answer (ending with #### and a number)"
    return {"test": read_records(find_split(folder, "test"), is_gsm8k, accepted)}


def mgsm(folder: Path, language: str) -> Splits:
    file = folder / f"mgsm_{language}.tsv"
    if not file.is_file():
        raise InputError(
            f"{folder}: no {file.name} here. Give the folder with a mgsm_<language>.tsv for each language."
        )
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        question, tab, answer = line.rpartition("\t")
        try:
            value = int(answer.replace(",", ""))
        except ValueError:
            tab = ""
        if not tab:
            raise InputError(f"{file} line {number}: expected a question, a tab and a number. Correct the line.")
        # As on the Hub, where the test split has no worked answers; the prompts ask whether there is one.
        records.append({"question": question, "answer": None, "answer_number": value, "equation_solution": None})
    if not records:
        raise InputError(f"{file}: no lines. Give a file with one question a line.")
    # The worked examples are not part of the published files, and the harness asks without any.
    return {"train": [], "test": records}


# The name on the Hub -> the option that gives a folder instead, and what reads it.
READERS: dict[str, tuple[str, Callable[[Path, str], Splits]]] = {
    "cais/mmlu": ("mmlu_path", mmlu),
    "openai/gsm8k": ("gsm8k_path", gsm8k),
    "juletxara/mgsm": ("mgsm_path", mgsm),
}


class LocalTask(ConfigurableTask):
    """A task of the harness that reads a local folder where the run names one."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        option, read = READERS[self.config.dataset_path]
        folder = self.config.metadata.get(option)
        if folder is not None:
            splits = read(Path(folder), self.config.dataset_name)
            self.dataset = datasets.DatasetDict(
                {name: datasets.Dataset.from_list(records) for name, records in splits.items()}
            )
            return
        try:
            super().download(dataset_kwargs, **kwargs)
        except Exception as error:  # of several libraries, for no network, no such name, a broken download
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self.config.task}: {self.config.dataset_path!r} cannot be had from the Hub ({reason}). Give "
                f"--{option} a folder with the data; docs/evaluation.md says which files."
            ) from None


# --- tasks and results -----------------------------------------------------------------------------------------------


def load_task(name: str, paths: dict[str, str | None], mmlu_subjects: list[str] | None = None) -> Group:
    """One task with its data.

    Args:
        name: Of a file in tasks/.
        paths: `mmlu_path` and so on; None is the Hub.
        mmlu_subjects: The only ones wanted of mmlu; None is all.

    Raises:
        InputError: The data cannot be read, or a subject is unknown.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    harness = Path(lm_eval.tasks.__file__).parent
    manager = TaskManager(
        include_path=[*(harness / folder for folder in HARNESS_FOLDERS), TASKS],
        include_defaults=False,
        metadata={option: path for option, path in paths.items() if path is not None},
    )
    if name == "mmlu" and mmlu_subjects is not None:
        known = [task.removeprefix("mmlu_") for task in manager.all_subtasks if task.startswith("mmlu_")]
        unknown = sorted(set(mmlu_subjects) - set(known))
        if unknown:
            raise InputError(f"mmlu_subjects: unknown {', '.join(unknown)}. Known: {', '.join(known)}.")
        keep_only(manager, {f"mmlu_{subject}" for subject in mmlu_subjects})
    return manager.load([f"revffn_{name}"])["groups"][f"revffn_{name}"]


def keep_only(manager: TaskManager, wanted: set[str]) -> None:
    """Take the other subjects out of the harness's tags, before their data is read."""
    for entry in manager.task_index.values():
        if entry.name.startswith("mmlu_") and entry.tags and entry.yaml_path is None:
            entry.tags &= wanted


def check_context(group: Group, model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a task whose answers are generated and whose first prompt, without a chat template, has no room beside
    the longest answer: the harness would cut it from the left, or fail.

    Raises:
        InputError: What the task needs, and what the model has.
    """
    longest = resolve_max_length(model_config, tokenizer)
    for task in group.get_all_tasks():
        if task.OUTPUT_TYPE != "generate_until":
            continue
        answer = normalize_gen_kwargs(task.config.generation_kwargs)["max_gen_toks"]
        text = task.fewshot_context(task.eval_docs[0], num_fewshot=task.config.num_fewshot or 0)
        prompt = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if prompt + answer > longest:
            raise InputError(
                f"{task.config.task} needs {prompt + answer} tokens ({prompt} of its first prompt, {answer} for the "
                f"answer), and the model sees {longest}. Leave the task out, or give a model with a longer context."
            )


def wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> HFLM:
    """The harness's own wrapper around a loaded model."""
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def run_task(
    group: Group, lm: HFLM, limit: int | None, chat_template: bool, answers: Path | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluate one loaded task.

    Args:
        answers: Beginning, up to `_rank`, of the name of a database of the harness. What is in it is not asked again,
            and each answer is written to it as it comes. It must hold answers of the same model.

    Returns:
        Harness task or group -> `metrics` (name -> value, stderr), `questions`, and for a task `num_fewshot` and
        `prompts_sha256`, which is equal where and only where all prompts are. Names are the harness's.
    """
    found = lm_eval.simple_evaluate(
        model=lm, tasks=[group], task_manager=TaskManager(include_defaults=False), limit=limit,
        apply_chat_template=chat_template, fewshot_as_multiturn=chat_template,
        use_cache=None if answers is None else str(answers).removesuffix("_rank"),
    )  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    for name, values in found["results"].items():
        metrics: dict[str, dict[str, float | None]] = {}
        for key, value in values.items():
            metric, comma, which = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                stderr = values.get(f"{metric}_stderr,{which}")
                metrics[metric if which == "none" else key] = {
                    "value": float(value),
                    "stderr": None if stderr in (None, "N/A") else float(stderr),
                }
        if metrics:
            rows[name] = {"metrics": metrics, "questions": values["sample_len"]}
    for name, samples in found["samples"].items():
        rows[name]["num_fewshot"] = found["n-shot"][name]
        prompts = sorted({argument[0] for sample in samples for argument in sample["arguments"]})
        rows[name]["prompts_sha256"] = hashlib.sha256("\0".join(prompts).encode()).hexdigest()
    return rows
