"""Faults of the machine and of whoever runs it: full disks, signals, several processes, kills. One line each, and a
run goes on to the same bits.

Run: pytest tests/training/test_faults.py (with -m slow every moment)
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_resume import RESUME, contents, full, said
from test_trainer import moved, run, weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from revffn.__main__ import main
from revffn.command_line import load_run_config
from revffn.parallel.launch import check_launch
from revffn.training import lock, trainer
from revffn.training.checkpoint import newest
from revffn.training.room import disk_bytes
from revffn.training.trainer import RevFFNTrainer


def fill_up(patch, place, name, number):
    """From its n-th call on, counted from 0, a function that writes finds no space."""
    real, left = getattr(place, name), [number]

    def counted(*args, **kwargs):
        left[0] -= 1
        return real(*args, **kwargs) if left[0] >= 0 else full()

    patch.setattr(place, name, counted)


WRITERS = {
    "weights": (PreTrainedModel, "save_pretrained", (0, 1, 2)),  # two checkpoints, the model
    "tensors": (torch, "save", (0, 1, 2, 5)),
    "rename": (os, "rename", (1, 12)),
    "replace": (os, "replace", (0, 1)),  # run.json at the beginning and at the end
    "sync": (os, "fsync", (3, 20)),
    "line": (trainer, "append_line", (0, 1)),
    "manifest": (trainer, "write_manifest", (1,)),
}
MOMENTS = [(name, number) for name, (_, _, numbers) in WRITERS.items() for number in numbers]


@pytest.mark.parametrize("name, number", MOMENTS)
def test_a_full_disk_is_one_line_and_loses_nothing(recipe_file, tmp_path, capsys, name, number):
    words = ["train", str(recipe_file()), "--training.num_steps", "2", "--training.save_steps", "1"]
    words += ["--data.heldout", "0"]
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        place, call, _ = WRITERS[name]
        fill_up(patch, place, call, number)
        assert main(words) == 1
    line = said(capsys)
    assert "No space left on device" in line and ("bytes are free" in line or name == "line")
    found = newest(folder)
    # Only run.json is written after the model.
    assert found.passed_over == [] and (folder / "model").exists() == ((name, number) == ("replace", 1))
    assert not [path for path in folder.rglob("*.partial-*")]
    if found.checkpoint:
        assert str(found.checkpoint) in line
        AutoModelForCausalLM.from_pretrained(found.checkpoint)
    else:
        assert "there is no checkpoint yet" in line or "nothing of the run was written" in line


@pytest.fixture
def no_room(tmp_path, monkeypatch):
    """`no_room(folder, ...)`: no model can be saved below these. The temporary and the home folder are the test's."""
    real = PreTrainedModel.save_pretrained
    for name in ("temporary", "home", "asked"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def refuse(*places):
        def save(self, folder, *args, **kwargs):
            return full() if any(Path(folder).is_relative_to(place) for place in places) else real(self, folder)

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)

    return refuse


PLACES = {"temporary": ["run"], "home": ["run", "temporary"], "nowhere": ["run", "temporary", "home"]}


@pytest.mark.parametrize("saved_in", PLACES)
def test_without_room_for_the_model_and_without_checkpoints_it_is_saved_elsewhere(
    recipe_file, tmp_path, capsys, no_room, saved_in
):
    no_room(*(tmp_path / name for name in PLACES[saved_in]))
    recipe = recipe_file()
    assert main(["train", str(recipe)]) == 1
    line = said(capsys)
    assert "No space left on device" in line and not (tmp_path / "run" / "model").exists()
    if saved_in == "nowhere":
        assert "the trained model is nowhere" in line and not list((tmp_path / "home").iterdir())
        return
    (place,) = (tmp_path / saved_in).iterdir()
    assert f"the trained model is in {place} instead" in line
    whole = run(recipe, "--training.output_dir", str(tmp_path / "whole"))
    assert not moved(weights(whole / "model"), weights(place / "model"))
    assert json.loads((place / "run.json").read_text())["finished"]
    assert main(["export", str(place), str(tmp_path / "plain")]) == 0


def test_a_terminal_is_asked_where_the_model_is_to_go(recipe_file, tmp_path, capsys, monkeypatch, no_room):
    no_room(tmp_path / "run", tmp_path / "temporary")
    answers = iter([str(tmp_path / "temporary"), str(tmp_path / "asked")])
    recipe = recipe_file()
    with monkeypatch.context() as patch:
        for stream in (sys.stdin, sys.stderr):
            patch.setattr(stream, "isatty", lambda: True)
        patch.setattr("builtins.input", lambda: next(answers))
        assert main(["train", str(recipe)]) == 1
    err = capsys.readouterr().err
    assert err.count("Another folder for the trained model") == 2
    (place,) = (tmp_path / "asked").iterdir()
    assert f"the trained model is in {place} instead" in err and weights(place / "model")


def test_what_goes_wrong_after_the_model_is_saved_costs_no_training(recipe_file, tmp_path, capsys, monkeypatch):
    recipe = recipe_file()
    with monkeypatch.context() as patch:
        patch.setattr("revffn.training.run.Results.measure", lambda self, when, ask=False: when != "after" or full())
        assert main(["train", str(recipe)]) == 1
    trained = f"the trained model is complete in {tmp_path / 'run' / 'model'}"
    assert trained in said(capsys)
    before = contents(tmp_path / "run")
    assert main(["train", str(recipe), *RESUME]) == 2
    assert trained.replace("trained model", "trained model of this run") in said(capsys)
    assert contents(tmp_path / "run") == before


def test_room_is_asked_for_before_the_run(recipe_file, refused, monkeypatch, tmp_path):
    recipe = recipe_file()
    config = load_run_config(recipe, ["--training.save_steps", "1"])
    assert disk_bytes(config, 100, 10) == 3 * 110  # two kept, one being written
    assert disk_bytes(load_run_config(recipe), 100, 10) == 100
    both = load_run_config(recipe, ["--training.save_steps", "2", "--training.stage1_steps", "9"])
    assert disk_bytes(both, 100, 10) == 2 * 100 + 2 * 110 + 100
    forever = load_run_config(recipe, ["--training.save_steps", "2", "--training.num_steps", "null"])
    assert disk_bytes(forever, 100, 300) == 3 * 400

    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    line = refused("train", recipe)
    assert "the run is going to write up to" in line and "1,000 are free" in line


def test_folders_that_cannot_be_written_to_are_refused(recipe_file, refused, tmp_path, monkeypatch):
    recipe = recipe_file()
    (tmp_path / "file").touch()
    refused_for = {"x" * 300: "too long", "file/run": "is not a folder", "y/" * 2100: "too long"}
    for name, reason in refused_for.items():
        assert reason in refused("train", recipe, "--training.output_dir", tmp_path / name)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written to" in refused("train", recipe)


def test_a_folder_is_one_run_s_at_a_time(recipe_file, refused, tmp_path):
    recipe, folder = recipe_file(), tmp_path / "run"
    with lock.locked(folder):
        for words in ((), RESUME):
            line = refused("train", recipe, *words)
            assert f"another run is writing there (process {os.getpid()})" in line
    assert not folder.exists()
    folder.mkdir()
    (folder / lock.LOCK).write_text("1\n")  # a killed run's
    assert main(["train", str(recipe)]) == 0
    assert not (folder / lock.LOCK).exists()


@pytest.fixture
def handled():
    """`handled(number, handler)`: a signal's handler for a test. Whoever runs the tests in a background shell has told
    them to ignore Ctrl-C, which runs respect."""
    before = {}

    def handle(number, handler):
        before.setdefault(number, signal.signal(number, handler))

    yield handle
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_that_is_ignored_stays_ignored(recipe_file, monkeypatch, handled):
    handled(signal.SIGINT, signal.SIG_IGN)
    real = RevFFNTrainer.training_step

    def signalled(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(RevFFNTrainer, "training_step", signalled)
    assert main(["train", str(recipe_file())]) == 0


@pytest.mark.parametrize("number, saves", [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_signals_end_a_run_in_one_line(recipe_file, tmp_path, capsys, monkeypatch, handled, number, saves):
    handled(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    recipe = recipe_file()
    real = RevFFNTrainer.training_step

    def signalled(self, *args, **kwargs):
        if self.state.global_step == 1:
            os.kill(os.getpid(), number)
        return real(self, *args, **kwargs)

    words = ["train", str(recipe), "--training.save_on_interrupt", str(saves)]
    with monkeypatch.context() as patch:
        patch.setattr(RevFFNTrainer, "training_step", signalled)
        before = signal.getsignal(number)
        assert main(words) == 128 + number
        assert signal.getsignal(number) is before
    line = said(capsys)
    assert "go on with training.resume: true" in line.lower()
    name = signal.Signals(number).name
    saved = tmp_path / "run" / "stage2" / "checkpoint-2"
    assert f"stopped by {name}; " in line and ("there is no checkpoint yet" in line) != saves
    assert saved.exists() == saves and (not saves or str(saved) in line)
    assert main([*words, *RESUME]) == 0
    whole = run(recipe, "--training.output_dir", str(tmp_path / "whole"))
    assert not moved(weights(whole / "model"), weights(tmp_path / "run" / "model"))


SEVERAL = {
    "torchrun": {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
    "its second": {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
    "mpirun": {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
    "mpiexec": {"PMI_SIZE": "2", "PMI_RANK": "0"},
    "srun": {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
    "a rank alone": {"LOCAL_RANK": "1"},
}
ONE = ({}, {"WORLD_SIZE": "1", "RANK": "0"}, {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})


@pytest.mark.parametrize("name", SEVERAL)
def test_several_processes_are_refused(recipe_file, refused, monkeypatch, name):
    for variable, value in SEVERAL[name].items():
        monkeypatch.setenv(variable, value)
    assert "started as one of several processes" in refused("train", recipe_file())


@pytest.mark.parametrize("environment", ONE)
def test_one_process_is_not(environment):
    check_launch(None, environment)


# --- killed, and without room --------------------------------------------------------------------------------------


def broken_off(recipe: Path, folder: Path, moments: list[str]) -> dict[str, dict]:
    """A run for each moment, broken off there, and gone on with; what came of it."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("broken_off.py"), recipe, folder, *moments],
        capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{found['writes']} writes; {len(found['moments'])} runs")
    return found["moments"]


FEW = ["save 1", "fsync 2", "rename 2", "fsync 28", "rename 4", "step 2"]
CALLS = {
    "save": range(12), "weights": range(4), "manifest": range(3), "line": range(2), "replace": range(2),
    "rmtree": range(1), "step": range(3), "fsync": range(0, 54, 4), "rename": range(1, 38, 4),
}  # fmt: skip
MANY = [f"{call} {number}" for call, numbers in CALLS.items() for number in numbers]


@pytest.mark.parametrize("moments", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_killed_at_any_moment_a_run_goes_on_to_the_same_bits(recipe_file, tmp_path, moments):
    recipe = recipe_file("  save_steps: 1\noptimizer:\n  learning_rate: 1e-3\n")
    results = broken_off(recipe, tmp_path, moments)
    assert set(results) == set(moments)
    for moment, result in results.items():
        assert result["reached"], f"{moment}: it was not reached"
        assert result["torn"] == [], moment
        assert result["resumed"] == 0 and result["same"], moment
        assert result["left"] == [], moment
    if moments is MANY:
        assert len(results) >= 50 and sum(result["in_save"] for result in results.values()) >= 20


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, with little room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m,nr_inodes=400", "tmpfs", disk])
        mounted = done.returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a tmpfs cannot be mounted here; runs as root where mounting is allowed, as in CI")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize(
    "moments", [["full every 16"], pytest.param(["full every 1", "inodes every 5"], marks=pytest.mark.slow)],
    ids=["few", "all"],
)  # fmt: skip
def test_a_disk_that_is_full_from_any_write_on(recipe_file, small_disk, moments):
    """One line, nothing half-written under its final name, and with room again the run goes on to the same bits."""
    recipe = recipe_file("  save_steps: 1\noptimizer:\n  learning_rate: 1e-3\n")
    recipe.write_text(recipe.read_text().replace("num_steps: 3", "num_steps: 2"))
    results = broken_off(recipe, small_disk, moments)
    assert len(results) > 4
    wrong = {moment: result for moment, result in results.items() if not lost_nothing(result)}
    assert not wrong, json.dumps(wrong, indent=1)


def lost_nothing(result: dict) -> bool:
    lines = [line for line in result["said"].splitlines() if line.startswith("revffn")]
    # Seen before the run; or on its way; or by nobody, where the last writes need no room.
    expected = {2: ["the run is going to write up to"], 1: ["could not be written", "No space left on device"], 0: []}
    said = expected.get(result["status"])
    return (
        result["reached"]
        and "Traceback" not in result["said"]
        and said is not None
        and len(lines) == bool(said)
        and all(any(words in line for words in said) for line in lines)
        and result["torn"] == result["leavings"] == result["left"] == []
        and result["resumed"] == 0
        and result["same"]
    )
