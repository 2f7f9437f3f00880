"""Folders of runs with anything in them changed: a run goes on from an intact checkpoint, or is refused in a line.

Run: pytest tests/training/test_broken_checkpoints.py; REVFFN_MUTATIONS=10000 for more
"""

import json
import random
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from mutations import changed_file, changed_folder, fresh, number_of, same_tree
from test_trainer import moved, run, weights

from revffn.__main__ import main
from revffn.command_line import load_run_config
from revffn.interrupts import Interrupts
from revffn.models.loading import load_causal_lm
from revffn.recipe import InputError
from revffn.training import preflight, resume
from revffn.training.results import Results
from revffn.training.trainer import RunCallback

MORE = ["--training.num_steps", "6", "--training.resume", "true"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory, model_folder):
    """A run of four steps with two checkpoints, and one of six steps without a stop; the recipe of both."""
    from conftest import RECORDS

    made = tmp_path_factory.mktemp("begun")
    (made / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    recipe = made / "recipe.yaml"
    recipe.write_text(
        f"model:\n  path: {model_folder()}\n  dtype: float32\n"
        f"data:\n  path: {made / 'data.jsonl'}\n  heldout: 4\n  max_length: 64\n"
        f"training:\n  output_dir: {made / 'run'}\n  num_steps: 4\n  save_steps: 2\n  batch_size: 4\n"
        # The same rates however long the run is told to be.
        "optimizer:\n  learning_rate: 1e-3\n  schedule: constant_with_warmup\n  warmup_ratio: 0\n"
    )
    run(recipe)
    return recipe, made / "run", run(recipe, "--training.num_steps", "6", "--training.output_dir", str(made / "whole"))


def mutated(numbers, pristine, folder):
    """A copy with something in it changed: what was done."""
    fresh(pristine, folder)
    if numbers.random() < 0.5:  # broken off before its end
        summary = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(summary | {"finished": False}))
        shutil.rmtree(folder / "model")
    two, four = (folder / "stage2" / f"checkpoint-{step}" for step in (2, 4))
    how = numbers.choice(["run.json"] * 3 + ["manifest"] * 3 + ["checkpoint"] * 6 + ["metrics", "folders", "anything"])
    if how == "run.json":
        changed_file(numbers, folder / "run.json")
    elif how == "metrics":
        changed_file(numbers, folder / "metrics.jsonl")
    elif how == "manifest":
        changed_file(numbers, numbers.choice([two, four]) / "manifest.json")
    elif how == "checkpoint":
        one, other = numbers.sample([two, four], 2)
        how = f"{how}: {changed_folder(numbers, one, (other,))}"
    elif how == "anything":
        how = f"{how}: {changed_folder(numbers, folder)}"
    else:
        how = f"{how}: {changed_folders(numbers, folder, two, four)}"
    return how


def changed_folders(numbers, folder, two, four):
    """A checkpoint under another's name."""
    how = numbers.choice(["swapped", "older as newer", "other stage", "far", "gone", "file", "stage gone"])
    if how == "swapped":
        two.rename(two.with_name("x"))
        four.rename(two)
        two.with_name("x").rename(four)
    elif how in ("older as newer", "gone", "file"):
        shutil.rmtree(four)
        if how == "file":
            four.touch()
        elif how == "older as newer":
            two.rename(four)
    elif how == "far":
        two.rename(two.with_name("checkpoint-100"))
    elif how == "other stage":
        two.parent.rename(folder / "stage1")
    else:
        shutil.rmtree(two.parent)
    return how


def outcome(config, folder, pristine, taken_over):
    """`refused`, `newest`, `older`, `none`, or what is wrong. Whatever else is raised is a traceback to the user."""
    try:
        found = resume.find(config, folder)
    except InputError as error:
        line = str(error)
        return "refused" if "\n" not in line and len(line) < 3000 else f"said badly: {line}"
    except Exception as error:
        return f"not found: {error!r}"
    if found.checkpoint is None:
        there = [path.name for path in folder.glob("stage*/checkpoint-*/")]
        return f"begins anew beside {there}" if there or found.finished else "none"
    original = pristine / found.checkpoint.relative_to(folder)
    if not original.is_dir() or not same_tree(found.checkpoint, original):
        return f"goes on from {found.checkpoint.name}, which is not what was saved"
    newest = found.checkpoint.name == "checkpoint-4"
    passed_over = not newest and (folder / "stage2" / "checkpoint-4").is_dir()
    if str(found.checkpoint) not in found.says[0] or (passed_over and "checkpoint-4 (" not in found.says[0]):
        return f"does not say so: {found.says}"
    try:
        taken_over(found)
    except OSError:
        pass  # one line: ending.py
    except Exception as error:
        return f"not taken over: {error!r}"
    return "newest" if newest else "older"


def test_a_mutated_run_goes_on_from_an_intact_checkpoint_or_is_refused(begun, tmp_path):
    """All but the training: what is read, compared, taken over and written again."""
    recipe, pristine, _ = begun
    folder, numbers, problems, counts = tmp_path / "run", random.Random(0), [], Counter()
    config = load_run_config(recipe, [*MORE, "--training.output_dir", str(folder)])
    checked = preflight.check(load_run_config(recipe, ["--training.output_dir", str(tmp_path / "new")]))
    model = load_causal_lm(config.model.path, torch.float32)

    def taken_over(found):
        results = Results(replace(checked, config=config, resume=found, output_dir=folder), model)
        results.read()
        results.table().encode()
        results.write(folder)
        RunCallback(2, folder / "metrics.jsonl", None, None, Interrupts()).forget_after(4)

    for i in range(number_of("checkpoints")):
        done = mutated(numbers, pristine, folder)
        found = outcome(config, folder, pristine, taken_over)
        counts[found] += 1
        if found not in ("refused", "newest", "older", "none"):
            problems.append(f"{i}: {done}: {found}")
    assert not problems, f"{len(problems)}\n" + "\n".join(problems)
    assert min(counts[name] for name in ("refused", "newest", "older")) > number_of("checkpoints") / 20


@pytest.mark.parametrize("seed", range(max(3, number_of("checkpoints") // 100)))
def test_a_mutated_run_ends_with_the_same_bits_or_is_refused(begun, tmp_path, capsys, seed):
    recipe, pristine, whole = begun
    folder, numbers = tmp_path / "run", random.Random(1000 + seed)
    done = mutated(numbers, pristine, folder)
    status = main(["train", str(recipe), *MORE, "--training.output_dir", str(folder)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("revffn")]
    assert status in (0, 1, 2) and len(lines) == (status > 0), done
    if status == 0:
        assert not moved(weights(folder / "model"), weights(whole / "model")), done
