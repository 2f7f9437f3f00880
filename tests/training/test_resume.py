"""Nothing is lost: checkpoints are whole or not counted, a run goes on as the run it was, faults end in one line.

Run: pytest tests/training/test_resume.py
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from test_trainer import metrics, moved, run, weights

from revffn import files
from revffn.__main__ import main
from revffn.training import checkpoint
from revffn.training.checkpoint import MANIFEST, checkpoints, delete_old, newest, write_manifest, wrong_with
from revffn.training.trainer import RevFFNTrainer

FOUR = ("--training.num_steps", "4", "--training.save_steps", "2")
RESUME = ("--training.resume", "true")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder):
    """`finished()`: a copy of a finished run of four steps with checkpoints at 2 and 4, and its recipe."""
    made = tmp_path_factory.mktemp("finished")
    from conftest import RECORDS

    data = made / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    recipe = made / "recipe.yaml"
    recipe.write_text(
        f"model:\n  path: {model_folder()}\n  dtype: float32\n"
        f"data:\n  path: {data}\n  heldout: 8\n  max_length: 64\n"
        f"training:\n  output_dir: {made / 'run'}\n  num_steps: 4\n  save_steps: 2\n  batch_size: 4\n"
        "optimizer:\n  learning_rate: 1e-3\n"
    )
    run(recipe)

    def copy(where: Path):
        shutil.copytree(made / "run", where / "run")
        return recipe, where / "run", ["train", str(recipe), "--training.output_dir", str(where / "run"), *RESUME]

    return copy


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def said(capsys):
    """The one line on stderr."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("revffn")]
    assert len(lines) == 1
    return lines[0]


# --- files and checkpoints -------------------------------------------------------------------------------------------


def test_a_folder_is_whole_or_not_there(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    with pytest.raises(ZeroDivisionError), files.new_folder(tmp_path / "a") as partial:
        (partial / "half").touch()
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "old"]
    with files.new_folder(tmp_path / "a") as partial:
        (partial / "new").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "new"]
    with pytest.raises(ZeroDivisionError), files.new_folder(tmp_path / "b" / "c"):
        raise ZeroDivisionError
    assert not (tmp_path / "b").exists()


DAMAGES = ["cut", "changed", "missing", "new", "renamed", "no manifest", "cut manifest", "odd manifest", "fewer files"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_makes_a_checkpoint_incomplete(tmp_path, damage):
    tmp_path = tmp_path / "stage2" / "checkpoint-4"
    tmp_path.mkdir(parents=True)
    (tmp_path / "weights").write_bytes(b"weights")
    write_manifest(tmp_path, name="stage2/checkpoint-4")
    assert wrong_with(tmp_path) is None
    if damage == "cut":
        (tmp_path / "weights").write_bytes(b"weight")
    elif damage == "changed":
        (tmp_path / "weights").write_bytes(b"Weights")
    elif damage == "missing":
        (tmp_path / "weights").unlink()
    elif damage == "new":
        (tmp_path / "adapter_config.json").touch()
    elif damage == "renamed":
        tmp_path = tmp_path.rename(tmp_path.with_name("checkpoint-6"))
    elif damage == "fewer files":
        manifest = json.loads((tmp_path / MANIFEST).read_text())
        (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"files": {}}))
    elif damage == "no manifest":
        (tmp_path / MANIFEST).unlink()
    else:
        text = (tmp_path / MANIFEST).read_text()
        (tmp_path / MANIFEST).write_text(text[:-9] if damage == "cut manifest" else '{"files": {"weights": 1}}')
    assert wrong_with(tmp_path) and "\n" not in wrong_with(tmp_path)


def test_the_last_complete_checkpoint_is_never_deleted(tmp_path):
    def make(step, complete=True):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").touch()
        if complete:
            write_manifest(folder)

    make(2)
    for step in (4, 6, 8):
        make(step, complete=False)
        delete_old(tmp_path, 2)
    assert newest(tmp_path.parent).checkpoint is None
    assert [checkpoint.step_of(path) for path in checkpoints(tmp_path)] == [2, 4, 6, 8]
    make(10)
    delete_old(tmp_path, 2)
    assert [checkpoint.step_of(path) for path in checkpoints(tmp_path)] == [2, 10]
    make(12)
    delete_old(tmp_path, 2, best=str(tmp_path / "checkpoint-2"))
    assert [checkpoint.step_of(path) for path in checkpoints(tmp_path)] == [2, 10, 12]
    delete_old(tmp_path, 2)
    assert [checkpoint.step_of(path) for path in checkpoints(tmp_path)] == [10, 12]


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_export_and_pictures_are_whole_or_not_there(finished, tmp_path, capsys):
    _, folder, _ = finished(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(["export", str(folder), str(tmp_path / "out" / "plain")]) == 1
        assert "could not be written: No space left on device" in said(capsys)
        with pytest.raises(files.StorageError), files.new_file(tmp_path / "plot.svg") as partial:
            partial.write_text("half")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_finished_run_stays_as_it_is(finished, tmp_path, capsys):
    _, folder, words = finished(tmp_path)
    before = contents(folder)
    assert main(words) == 0 and contents(folder) == before
    assert "this run is finished" in capsys.readouterr().out
    assert main([*words, "--training.num_steps", "3"]) == 2
    assert "is finished with 4" in said(capsys)


def test_a_finished_run_goes_on_from_the_newest_complete_checkpoint(finished, tmp_path, capsys):
    """Over an incomplete one and a cut line; totals are those of the whole run, and run.json says what ran."""
    recipe, folder, words = finished(tmp_path)
    whole = run(recipe, "--training.num_steps", "6", "--training.output_dir", str(tmp_path / "whole"))
    before = checkpoint.read_manifest(folder / "stage2" / "checkpoint-2")["seconds"]
    (folder / "stage2" / "checkpoint-4" / "trainer_state.json").unlink()
    lines = folder / "metrics.jsonl"
    lines.write_text(lines.read_text()[:-20])
    tokens = metrics(whole)[-1]["num_tokens"]
    assert main([*words, "--training.num_steps", "6", "--training.save_steps", "3", "--training.log_steps", "2"]) == 0
    out = capsys.readouterr().out
    assert f"Resuming from {folder}/stage2/checkpoint-2, step 2; passed over as incomplete" in out
    assert "checkpoint-4 (trainer_state.json is missing)" in out and "1 cut or damaged line left out" in out
    assert [line["step"] for line in metrics(folder)] == [1, 2, 4, 6]
    summary = json.loads((folder / "run.json").read_text())
    assert summary["finished"] and summary["config"]["training"]["num_steps"] == 6
    assert summary["num_tokens"]["stage2"] == tokens == metrics(folder)[-1]["num_tokens"]
    seconds = [checkpoint.read_manifest(path)["seconds"] for path in checkpoints(folder / "stage2")]
    assert summary["seconds"] > seconds[1] > seconds[0] > before
    assert [path.name for path in checkpoints(folder / "stage2")] == ["checkpoint-3", "checkpoint-6"]


REFUSED = {
    "--training.seed 1": "training.seed=1, recorded 0",
    "--training.batch_size 2 --optimizer.learning_rate 1e-2": "training.batch_size=2, recorded 4",
    "--data.max_length 32": "data.max_length=32, recorded 64",
    "--model.dtype bfloat16": "model.dtype=bfloat16, recorded float32",
    "--reversible.coupling none": "reversible.coupling=none, recorded innovation",
    "--reversible.side_bits 1": "reversible.side_bits",
    "--optimizer.name sgd": "optimizer.name=sgd, recorded adafactor",
    "--model.path elsewhere": "model.path=elsewhere",
    "--training.num_epochs 2 --training.num_steps null": "went by training.num_steps",
}


@pytest.mark.parametrize("given", REFUSED)
def test_settings_that_make_another_run_are_refused_by_name(finished, tmp_path, capsys, given):
    _, folder, words = finished(tmp_path)
    before = contents(folder)
    assert main([*words, *given.split()]) == 2
    assert REFUSED[given] in said(capsys) and contents(folder) == before


def test_other_data_under_the_same_name_are_refused(finished, tmp_path, capsys):
    recipe, folder, words = finished(tmp_path)
    data = recipe.with_name("data.jsonl")
    text = data.read_text()
    try:
        data.write_text(text.replace("red", "rad"))
        assert main([*words, "--training.num_steps", "6"]) == 2
        assert "not the examples" in said(capsys)
    finally:
        data.write_text(text)


def test_other_held_out_data_are_refused(recipe_file, data_file, tmp_path, capsys):
    """What a run is measured with is its own file here: `data_sha256` is that of the training examples."""
    heldout = data_file([{"question": "red?", "answer": "red"}], "heldout.jsonl")
    recipe = recipe_file()
    words = ["train", str(recipe), "--data.heldout", str(heldout), "--training.save_steps", "2"]
    assert main(words) == 0
    data_file([{"question": "red?", "answer": "green"}], "heldout.jsonl")
    assert main([*words, *RESUME, "--training.num_steps", "4"]) == 2
    assert "data.heldout holds not the examples" in said(capsys)


@pytest.mark.parametrize("name", ["run.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"])
@pytest.mark.parametrize("how", ["cut", "missing"])
def test_what_is_cut_or_missing_is_one_line(finished, tmp_path, capsys, name, how):
    _, folder, words = finished(tmp_path)
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "stage2" / "checkpoint-2")
    file = folder / name if name == "run.json" else folder / "stage2" / "checkpoint-4" / name
    file.unlink() if how == "missing" else file.write_bytes(file.read_bytes()[:-20])
    assert main(words) == 2
    assert name in said(capsys) and not (folder / "model").exists()
    if how == "missing" and name in checkpoint.STATES:
        assert main([*words[:-1], "weights", "--training.num_steps", "6"]) == 0
        assert f"Without {name}, as asked" in capsys.readouterr().out
        rates = [line["learning_rate"] for line in metrics(folder)]
        assert 0 < rates[5] < rates[4] < rates[1]  # the schedule goes on


ODD_RECORDS = {
    "memory": ({"batch": 1}, "(memory"),
    "num_tokens": ({"stage2": "x"}, "(num_tokens.stage2)"),
    "heldout": ({"before": {"loss": None}}, "(heldout.before.loss)"),
    "answers": ({"before": "\ud800"}, "(answers.before)"),
    "peak_bytes": (10**400, "(peak_bytes)"),
    "config": ({"training": {}}, "does not say how long"),
}


@pytest.mark.parametrize("name", ODD_RECORDS)
def test_a_record_with_other_values_is_refused(finished, tmp_path, capsys, name):
    _, folder, words = finished(tmp_path)
    value, message = ODD_RECORDS[name]
    summary = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(summary | {name: value}))
    before = contents(folder)
    assert main(words) == 2 and message in said(capsys) and contents(folder) == before
    (folder / "run.json").write_text("[" * 10**5 + "]" * 10**5)
    assert main(words) == 2 and "run.json is cut or damaged" in said(capsys)


def test_before_the_first_checkpoint_there_is_one_way_on(recipe_file, tmp_path, capsys, monkeypatch):
    recipe = recipe_file()

    def stops(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RevFFNTrainer, "training_step", stops)
        assert main(["train", str(recipe)]) == 130
    line = said(capsys)
    assert "stopped by SIGINT; there is no checkpoint yet. Go on with training.resume: true" in line
    assert main(["train", str(recipe)]) == 2
    assert "set training.resume: true to go on" in said(capsys)
    assert main(["train", str(recipe), *RESUME]) == 0
    assert "starts from the beginning" in capsys.readouterr().out
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]


def test_a_run_that_stopped_behind_its_last_checkpoint_takes_no_further_step(finished, tmp_path):
    recipe, folder, words = finished(tmp_path)
    before = weights(folder / "model")
    summary = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(summary | {"finished": False}))
    shutil.rmtree(folder / "model")
    assert main(words) == 0
    assert not moved(before, weights(folder / "model"))
    after = json.loads((folder / "run.json").read_text())
    assert after["heldout"] == summary["heldout"] and after["num_tokens"] == summary["num_tokens"]
