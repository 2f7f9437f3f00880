"""Layers that keep what they save: what they take is predicted, and `auto` has as many as fit."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from revffn.__main__ import main
from revffn.command_line import load_run_config
from revffn.config import ReversibleConfig
from revffn.memory import measure
from revffn.memory import plan as planner
from revffn.memory.plan import choose_kept, keeping, plan, predictor, what_would_fit
from revffn.memory.simulation import Method, simulate_step
from revffn.models.known import load_config
from revffn.parallel import launch
from revffn.training import preflight, room


def reversible(kept_layers: int = 0, coupling: str = "innovation", tile_tokens: int | None = 1024, **method) -> Method:
    settings = ReversibleConfig(coupling=coupling, tile_tokens=tile_tokens, kept_layers=kept_layers)
    return Method(reversible=settings, optimizer=method.pop("optimizer", "sgd"), **method)


PREDICTED = {
    "one layer": ("olmoe-1b-7b", 9, reversible(1)),
    "two": ("olmoe-1b-7b", 9, reversible(2)),
    "some": ("olmoe-1b-7b", 9, reversible(5, tile_tokens=None)),
    "all but the first": ("olmoe-1b-7b", 9, reversible(8)),
    "all, the dense one too": ("deepseek-v2-lite", 9, reversible(9)),
    "gradients until the end": ("olmoe-1b-7b", 9, reversible(4, optimizer_in_backward=False)),
    "cross_branch, left": ("olmoe-1b-7b", 9, reversible(4, "cross_branch")),
    "none": ("qwen1.5-moe-a2.7b", 9, reversible(4, "none")),
    "routers' losses": ("olmoe-1b-7b", 9, reversible(4, router_aux_loss=True)),
    "weights on the host": ("olmoe-1b-7b", 9, reversible(4, weights="host")),
}


@pytest.mark.parametrize("case", PREDICTED)
def test_prediction_against_simulation(case):
    """At the peak, and where everything that is kept is there."""
    model, num_layers, method = PREDICTED[case]
    config = load_config(model, num_hidden_layers=num_layers)
    simulated = simulate_step(config, 4, 1024, method)["phases"]
    peaks = []
    for way in (method, keeping(method, 0)):
        phases, _ = predictor(config, way).phases(4, 1024)
        peaks.append([sum(phases["loss"].values()), max(sum(parts.values()) for parts in phases.values())])
    totals = {phase: sum(parts.values()) for phase, parts in simulated.items()}
    assert peaks[0] == pytest.approx([totals["loss"], max(totals.values())], rel=0.001)
    assert peaks[0][0] > 1.01 * peaks[1][0]  # so that it would be seen


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("special", [1, 2, 3])
def test_few_layers_tell_of_both_kinds(kept, special):
    few = measure.Depth(9 - kept, kept).few(special)
    assert few.recomputed <= 9 - kept and few.kept <= kept
    if few.recomputed < 9 - kept:  # one that is neither special nor of the last two says what the others store
        assert few.recomputed > special and few.recomputed + few.kept >= special + 3
    if few.kept < kept:
        assert few.kept >= 3 + max(0, special - (9 - kept))


def test_auto_keeps_as_many_as_fit():
    """At each number's own total (and the slack above it), and at a byte less."""
    config, method = load_config("olmoe-1b-7b", num_hidden_layers=6), reversible(tile_tokens=None)
    totals = [plan(config, 4, 512, keeping(method, n), with_alternatives=False).total_bytes for n in range(7)]
    assert totals == sorted(totals) and len(set(totals)) > 5  # a first layer may be for nothing
    for total in totals:
        limit = 1 + round((total + 1) / (1 - planner.KEPT_SLACK))
        choice = choose_kept(config, 4, 512, method, limit_bytes=limit)
        assert choice.kept_layers == max(n for n in range(7) if totals[n] <= total)
        fewer = choose_kept(config, 4, 512, method, limit_bytes=limit - 3)
        assert fewer.kept_layers == max((n for n in range(7) if totals[n] < total), default=0)
    assert choose_kept(config, 4, 512, method, limit_bytes=2**50).kept_layers == 6
    assert str(choice).startswith("Kept layers: 6 of 6 (fit: ")


def test_auto_measures_nothing_where_the_weights_do_not_fit(monkeypatch):
    monkeypatch.setattr(measure, "run_step", None)
    choice = choose_kept(load_config("olmoe-1b-7b"), 4, 2048, Method(), limit_bytes=2**30)
    assert choice.kept_layers == 0 and choice.reason == "no memory to spare"


def test_too_many_that_were_asked_for_are_named_among_what_would_fit():
    config, method = load_config("olmoe-1b-7b", num_hidden_layers=6), reversible(6, tile_tokens=None)
    enough = plan(config, 4, 512, keeping(method, 0), with_alternatives=False).total_bytes
    changes = what_would_fit(config, 4, 512, method, gpu_bytes=enough)
    assert {"kept_layers": 0} in [change.settings for change in changes]


def test_command(capsys, tmp_path):
    load_config("olmoe-1b-7b", num_hidden_layers=6, vocab_size=4096).save_pretrained(tmp_path)
    words = ["plan", "--model", str(tmp_path), "--batch", "4", "--tokens", "512", "--no-alternatives"]

    def answer(*more: str) -> dict:
        assert main([*words, *more, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    auto = answer("--gpu", "80GiB")
    assert auto["kept"] == auto["kept"] | {"kept_layers": 6, "num_layers": 6} and "6 layers kept" in auto["label"]
    given, none = answer("--gpu", "80GiB", "--kept_layers", "2"), answer("--gpu", "80GiB", "--kept_layers", "0")
    assert none["peak_bytes"] < given["peak_bytes"] < auto["peak_bytes"] and "kept" not in given
    assert auto["largest_batch"] == none["largest_batch"]
    assert answer()["peak_bytes"] == answer("--kept_layers", "0")["peak_bytes"]
    words.remove("--no-alternatives")
    labels = [way["label"] for way in answer("--gpu", "80GiB")["alternatives"]]
    assert labels[0] == none["label"] and labels.count(labels[0]) == 1
    assert [way["label"] for way in answer("--gpu", "80GiB", "--kept_layers", "0")["alternatives"]] == labels[1:]
    assert main([*words, "--gpu", "80GiB"]) == 0
    assert "Kept layers: 6 of 6 (fit: " in capsys.readouterr().out
    assert main([*words, "--kept_layers", "-1"]) == 2
    assert "kept_layers must be auto (as many as fit) or at least 0, got -1." in capsys.readouterr().err


# --- a run -----------------------------------------------------------------------------------------------------------


def chosen(recipe, limit: str, *words: str) -> preflight.Run:
    return preflight.check(load_run_config(recipe, ["--memory.limit", limit, *words]))


def test_a_run_keeps_as_many_as_fit_a_gpu_and_none_on_a_cpu(recipe_file, monkeypatch):
    recipe = recipe_file()
    assert chosen(recipe, "80GiB").config.reversible.kept_layers == 0
    monkeypatch.setattr(room.torch.cuda, "is_available", lambda: True)
    run = chosen(recipe, "80GiB")
    num_layers = AutoConfig.from_pretrained(run.config.model.path).num_hidden_layers
    assert run.config.reversible.kept_layers == run.method.reversible.kept_layers == num_layers > 1
    assert run.kept.num_layers == num_layers and "80.00 GiB" in run.kept.reason
    without = plan(run.hf_config, run.plan.batch, run.plan.tokens, keeping(run.method, 0), with_alternatives=False)
    assert run.plan.peak_bytes > without.peak_bytes
    # With the slack, the reserve and one layer's bytes less than all take.
    tight = (run.plan.total_bytes - 1) / (1 - planner.KEPT_SLACK) / 1e6
    assert 0 < chosen(recipe, f"{tight:.6f}MB").config.reversible.kept_layers < num_layers
    told = chosen(recipe, "80GiB", "--reversible.kept_layers", "1")
    assert told.config.reversible.kept_layers == 1 and told.kept is None
    monkeypatch.setattr(launch, "number_of_processes", lambda: 2)
    monkeypatch.setattr(room, "number_of_processes", lambda: 2)
    words = ["--parallel.strategy", "ddp", "--optimizer.in_backward", "false"]
    ddp = room.choose_layers(load_run_config(recipe, words), run.hf_config, run.method, run.training)
    assert ddp[0].reversible.kept_layers == 0 and ddp[1] is None
