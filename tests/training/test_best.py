"""Early stopping and the best checkpoint: which step stops a run, whose weights are saved, that both go on after an
interruption as if there had been none, and what is refused.

Run: pytest tests/training/test_best.py
"""

import json

import pytest
from test_resume import RESUME, contents
from test_trainer import COUPLINGS, metrics, moved, run, weights

from revffn.__main__ import main
from revffn.command_line import load_run_config
from revffn.training.best import best_checkpoint, evaluations_since_lowest, is_exhausted, lowest
from revffn.training.checkpoint import checkpoints, step_of, write_manifest
from revffn.training.room import disk_bytes
from revffn.training.trainer import RevFFNTrainer

SCRIPT = [5.0, 2.5, 3.0, 2.6, 4.0, 4.0, 4.0, 1.0]
"""Held-out losses of steps 1, 2, ..."""
CONSTANT = "optimizer:\n  learning_rate: 1e-2\n  schedule: constant\n"
EVERY = ("--training.num_steps", "6", "--evaluation.every_steps", "1")
BEST = (*EVERY, "--training.save_steps", "2", "--training.load_best_model_at_end", "true")


@pytest.fixture
def scripted(monkeypatch):
    """`scripted(losses)`: what evaluations find on the way, by step; the training is a real one."""
    evaluate = RevFFNTrainer.evaluate

    def write(losses):
        def found(self, *args, **kwargs):
            self.on_the_way = lambda: {"heldout_loss": losses[self.state.global_step - 1]}
            return evaluate(self, *args, **kwargs)

        monkeypatch.setattr(RevFFNTrainer, "evaluate", found)

    return write


def summary(folder):
    return json.loads((folder / "run.json").read_text())


def steps(folder, name="loss", stage=2):
    return [line["step"] for line in metrics(folder) if name in line and line["stage"] == stage]


# --- what decides ----------------------------------------------------------------------------------------------------


def test_the_lowest_loss_and_what_came_after_it():
    nan = float("nan")
    losses = {2: 5.0, 4: nan, 6: 3.0, 8: 3.0, 10: nan}
    assert lowest(losses) == 6 and evaluations_since_lowest(losses) == 2
    assert is_exhausted(2, losses) and not is_exhausted(3, losses) and not is_exhausted(None, losses)
    assert lowest({2: nan, 4: nan}) is None and evaluations_since_lowest({2: nan, 4: nan}) == 2
    assert lowest({}) is None and not is_exhausted(1, {})


def test_only_complete_checkpoints_with_a_loss_are_compared(tmp_path):
    for step in (2, 4, 6, 8, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("1")
        if step != 2:
            write_manifest(folder)
    losses = {2: 1.0, 4: 2.0, 5: 0.5, 6: 2.0, 10: 3.0}
    assert step_of(best_checkpoint(tmp_path, losses)) == 4
    (tmp_path / "checkpoint-4" / "weights").write_text("2")
    assert step_of(best_checkpoint(tmp_path, losses)) == 4
    assert step_of(best_checkpoint(tmp_path, losses, contents=True)) == 6
    assert best_checkpoint(tmp_path, {8: float("nan"), 12: 1.0}) is None


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_stops_when_the_held_out_loss_does_not_fall(recipe_file, tmp_path, scripted, capsys):
    """In stage 2; the weights are those of a run of so many steps."""
    recipe = recipe_file(CONSTANT)
    scripted(SCRIPT)
    two_stages = [*COUPLINGS["cross_branch"], "--training.stage1_steps", "6"]
    folder = run(recipe, *EVERY, *two_stages, "--evaluation.patience", "2")
    assert steps(folder, stage=1) == [1, 2, 3, 4, 5, 6] and steps(folder) == [1, 2, 3, 4]
    assert steps(folder, "heldout_loss") == [1, 2, 3, 4] and not checkpoints(folder / "stage2")
    assert summary(folder)["stopped_early"] == {"step": 4, "evaluations": 2, "lowest_at": 2}
    assert "Stopped at step 4 of 6: no lower held-out loss since step 2 (2.5000 nats), in 2 evaluations." in (
        capsys.readouterr().out
    )
    words = [*two_stages, "--training.num_steps", "4", "--training.output_dir", str(tmp_path / "4")]
    assert not moved(weights(run(recipe, *words) / "model"), weights(folder / "model"))
    assert summary(tmp_path / "4")["stopped_early"] is None and summary(tmp_path / "4")["best"] is None


WAYS = {
    "cross_branch": COUPLINGS["cross_branch"],
    "host": ["--reversible.coupling", "innovation", "--memory.weights", "host"],
}


@pytest.mark.parametrize("way", WAYS)
def test_the_model_is_that_of_the_best_checkpoint(recipe_file, scripted, capsys, way):
    """Not of the lowest loss, which has no checkpoint; the best one outlives newer ones."""
    scripted([5.0, 2.5, 1.0, 3.0, 3.0, 2.5])
    folder = run(recipe_file(CONSTANT), *BEST, *WAYS[way])
    assert [step_of(path) for path in checkpoints(folder / "stage2")] == [2, 4, 6]
    kept, last = (weights(folder / "stage2" / f"checkpoint-{step}") for step in (2, 6))
    model = weights(folder / "model")
    assert not moved(kept, model) and moved(last, model)
    assert summary(folder)["best"] == {"step": 2, "heldout_loss": 2.5}
    assert "Model of step 2, the lowest held-out loss of a checkpoint: 2.5000 nats." in capsys.readouterr().out


def test_the_best_loss_is_that_of_the_saved_model(recipe_file):
    """With the losses that were measured."""
    folder = run(recipe_file("optimizer:\n  learning_rate: 6e-2\n  schedule: constant\n"), *BEST)
    losses = {line["step"]: line["heldout_loss"] for line in metrics(folder) if "heldout_loss" in line}
    found = summary(folder)
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert found["best"]["heldout_loss"] == min(losses[step] for step in (2, 4, 6)) == losses[found["best"]["step"]]
    assert found["heldout"]["after"]["loss"] == found["best"]["heldout_loss"]


def test_without_a_finite_loss_the_last_weights_are_saved(recipe_file, scripted, capsys):
    scripted([float("nan")] * 6)
    folder = run(recipe_file(CONSTANT), *BEST)
    assert not moved(weights(folder / "stage2" / "checkpoint-6"), weights(folder / "model"))
    assert summary(folder)["best"] is None and "No checkpoint has a finite held-out loss" in capsys.readouterr().out


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["at the best checkpoint", "after the best checkpoint", "at the stop"])
def test_an_interrupted_run_stops_and_keeps_as_if_it_had_not_been(
    recipe_file, tmp_path, scripted, monkeypatch, capsys, moment
):
    """Bit for bit: the count of evaluations goes on, and the best checkpoint is the one before the interruption."""
    scripted(SCRIPT)
    recipe = recipe_file(CONSTANT)
    words = [*BEST, "--training.num_steps", "8", "--evaluation.patience", "3"]
    whole = run(recipe, *words, "--training.output_dir", str(tmp_path / "whole"))
    assert summary(whole)["stopped_early"]["step"] == 5 and summary(whole)["best"]["step"] == 2
    with monkeypatch.context() as patch:
        if moment == "at the stop":
            patch.setattr("revffn.training.run.finish", interrupt)
        else:
            step = RevFFNTrainer.training_step
            last = 3 if moment == "at the best checkpoint" else 4
            patch.setattr(
                RevFFNTrainer,
                "training_step",
                lambda self, *a, **k: interrupt() if self.state.global_step == last else step(self, *a, **k),
            )
        assert main(["train", str(recipe), *words]) == 130
    found = {"at the best checkpoint": 2, "after the best checkpoint": 4, "at the stop": 5}[moment]
    assert main(["train", str(recipe), *words, *RESUME]) == 0
    assert f"checkpoint-{found}, step {found}." in capsys.readouterr().out
    folder = tmp_path / "run"
    assert not moved(weights(whole / "model"), weights(folder / "model"))
    for name in ("stopped_early", "best", "heldout", "num_tokens"):
        assert summary(folder)[name] == summary(whole)[name]
    assert [(line["step"], line.get("loss")) for line in metrics(folder)] == [
        (line["step"], line.get("loss")) for line in metrics(whole)
    ]


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_more_patience_goes_on_with_a_run_that_stopped(recipe_file, tmp_path, scripted, capsys):
    scripted(SCRIPT)
    recipe = recipe_file(CONSTANT)
    words = ["train", str(recipe), *EVERY, "--training.save_steps", "6"]
    assert main([*words, "--evaluation.patience", "2"]) == 0
    before = contents(tmp_path / "run")
    assert main([*words, "--evaluation.patience", "2", "--training.num_steps", "8", *RESUME]) == 0
    assert "A larger evaluation.patience goes on with it." in capsys.readouterr().out
    assert contents(tmp_path / "run") == before
    assert main([*words, "--evaluation.patience", "5", *RESUME]) == 0
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6] and summary(tmp_path / "run")["stopped_early"] is None
    whole = run(recipe, *EVERY, "--training.output_dir", str(tmp_path / "whole"))
    assert not moved(weights(whole / "model"), weights(tmp_path / "run" / "model"))


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED = {
    "--evaluation.patience 2": "patience=2 counts the evaluations of every_steps, which is null",
    "--evaluation.patience 0 --evaluation.every_steps 1": "patience must be at least 1",
    "--evaluation.patience 2 --evaluation.every_steps 1 --data.heldout 0": "no example is held out",
    "--training.load_best_model_at_end true --training.save_steps 2": "evaluation.every_steps (got null)",
    "--training.load_best_model_at_end true --evaluation.every_steps 2": "training.save_steps (got null)",
    "--training.load_best_model_at_end true --evaluation.every_steps 2 --training.save_steps 3": "(got 3), a multiple",
    "--training.load_best_model_at_end true --evaluation.every_steps 1 --training.save_steps 1 --data.heldout 0": (
        "training.load_best_model_at_end goes by the held-out loss, and no example is held out"
    ),
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_cannot_be_compared_is_refused(recipe_file, refused, given):
    assert REFUSED[given] in refused("train", recipe_file(), *given.split())


def test_the_best_checkpoint_needs_room_too(recipe_file):
    recipe = recipe_file()
    most = [disk_bytes(load_run_config(recipe, list(words)), 100, 10) for words in (BEST[:-2], BEST)]
    assert most == [3 * 110, 3 * 110 + 100]  # of three checkpoints; then all stay while the model is written
    longer = [*BEST, "--training.num_steps", "100"]
    assert disk_bytes(load_run_config(recipe, longer), 100, 10) == 4 * 110
