"""The page about a run: its numbers are the run's, a browser draws all of it without a network, and whatever a run's
files say stays text.

Run: pytest tests/report
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from browser import VIEWS, browser, contrast, faults, look
from conftest import RECORDS
from transformers import AutoModelForCausalLM

from revffn.__main__ import main
from revffn.command_line import load_run_config
from revffn.report import figures
from revffn.report.page import at_a_glance
from revffn.report.record import read_runs
from revffn.report.weight_changes import weight_changes
from revffn.training.run import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder):
    """A run of two stages with all that a report shows; the question would break a page that does not quote it."""
    folder = tmp_path_factory.mktemp("report")
    data, recipe = folder / "data.jsonl", folder / "recipe.yaml"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    recipe.write_text(
        f"model: {{path: {model_folder()}, dtype: float32}}\n"
        f"data: {{path: {data}, heldout: 8, max_length: 64}}\n"
        "reversible: {coupling: cross_branch, cross_branch: {query_stream: right}}\n"
        f"training: {{output_dir: {folder / 'run'}, stage1_steps: 2, num_steps: 6, batch_size: 4,\n"
        "  freeze_router: false}\n"
        "evaluation: {every_steps: 2, max_new_tokens: 4, compare_checkpointing: [2, 8],\n"
        "  prompt: '</script><img src=x onerror=alert(1)>'}\n"
        "optimizer: {learning_rate: 3e-3}\n"
    )
    return train(load_run_config(recipe, []), recipe)


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def report(*words):
    return main(["report", *map(str, words)])


def test_figures_show_what_the_run_wrote(run):
    (record,) = read_runs([run])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    training = figures.losses([record]).data[0]
    assert list(training.x) == list(range(1, 9)) and list(training.y) == [line["loss"] for line in steps]
    kept = figures.step_bytes(record).data[1]
    assert kept.name == "activation checkpointing, kept" and kept.x[1] > kept.x[0] and kept.y[1] > kept.y[0]
    heldout = figures.losses([record]).data[2]
    summary = json.loads((run / "run.json").read_text())
    between = [line["heldout_loss"] for line in lines if "heldout_loss" in line]
    ends = [summary["heldout"][when]["loss"] for when in ("before", "after")]
    assert list(heldout.y) == [ends[0], *between, ends[1]] and len(between) == 2
    checked, differ = figures.states(record).data
    assert min(checked.y) > 0 and set(differ.y) == {0}
    planned = figures.memory(record).data[:-1]
    assert sum(bar.x[0] for bar in planned) * 2**30 == pytest.approx(summary["memory"]["predicted_bytes"])
    assert figures.drift(record).data[0].y == tuple(summary["router"]["drift_by_layer"].values())
    # A load of 1 is the even share, whatever the number of tokens.
    heat = figures.load(record)
    assert len(heat.frames) == len(record.routers) == 8
    assert all(sum(layer) / len(layer) == pytest.approx(1, abs=0.01) for layer in heat.data[0].z)
    rows = dict(at_a_glance([record]))
    assert rows["steps"] == ["8"] and rows["state"] == ["finished"]
    assert "stopped early" not in rows and "the model's weights" not in rows
    summary |= {"stopped_early": {"step": 5}, "best": {"step": 4, "heldout_loss": 1.0}}
    (run / "run.json").write_text(json.dumps(summary))
    chosen = dict(at_a_glance(read_runs([run])))
    assert "step 5 " in chosen["stopped early"][0] and "step 4 " in chosen["the model's weights"][0]
    assert rows["rebuilt states"][0].startswith("0 of ")


def test_router_rows_count_every_token_of_training(run):
    """Against the tokens that the trainer counts; two experts a token, three sparse layers."""
    rows = [json.loads(line) for line in (run / "router.jsonl").read_text().splitlines()]
    tokens = sum(json.loads((run / "run.json").read_text())["num_tokens"].values())
    assert sum(sum(map(sum, row["load"])) for row in rows) == 3 * 2 * tokens


def test_running_mean_is_corrected_for_its_beginning():
    assert figures.smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert figures.smooth([1.0, math.nan, 2.0]) == pytest.approx([1.0, 1.0, (0.09 * 1 + 0.1 * 2) / 0.19])


def test_weight_changes_are_those_of_the_tensors(run, model_folder):
    before, after = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (model_folder(), run / "model"))
    found = weight_changes(str(model_folder()), run / "model")

    def expected(name):
        return ((after[name] - before[name]).norm() / before[name].norm()).item()

    assert found["self_attn.o_proj"][1] == pytest.approx(expected("model.layers.1.self_attn.o_proj.weight"))
    assert found["mlp.experts.down_proj"][3] == pytest.approx(expected("model.layers.3.mlp.experts.down_proj"))
    assert found["mlp.gate"][0] > 0 and found["embed_tokens"][-1] > 0
    biased = [f"model.layers.0.self_attn.q_proj.{part}" for part in ("weight", "bias")]
    change, norm = (torch.cat([tensor.flatten() for tensor in tensors]).norm() for tensors in (
        [after[name] - before[name] for name in biased], [before[name] for name in biased]
    ))  # fmt: skip
    assert found["self_attn.q_proj"][0] == pytest.approx((change / norm).item())
    assert weight_changes("not-a-model/of-anyone", run / "model") == {}


@pytest.mark.skipif(browser() is None, reason="needs Chromium; runs wherever there is one")
@pytest.mark.parametrize("view", VIEWS)
def test_a_browser_draws_it_all_and_asks_for_nothing(run, tmp_path, view):
    assert report(run) == 0
    found = look(run / "report.html", *VIEWS[view], tmp_path)
    assert faults(found) == [] and len(found["plots"]) == 13
    dark = contrast(found["paper"], "rgb(0, 0, 0)") < 2
    assert dark == view.startswith("dark")


@pytest.mark.skipif(browser() is None, reason="needs Chromium; runs wherever there is one")
def test_the_browser_test_sees_faults(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<html><head></head><body style='width: 3000px'><div class=plot aria-label=Empty></div>"
        "<script>missing()</script><img src='http://example.com/x.png'></body></html>"
    )
    found = " ".join(faults(look(page, *VIEWS["light-wide"], tmp_path)))
    for part in ("missing is not defined", "asked for http://example.com/x.png", "too wide", "Empty: nothing drawn"):
        assert part in found


def test_what_the_files_say_stays_text(run):
    file = run / "metrics.jsonl"
    file.write_text(file.read_text() + '{"stage": 2, "step": 6, "answer": "</script><script>alert(2)</script>"}\n')
    assert report(run, "--weights", "false") == 0
    text = (run / "report.html").read_text()
    assert "<img src=x" not in text and "<script>alert" not in text
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in text and "&lt;script&gt;alert(2)" in text


def test_two_runs_stand_side_by_side(run, tmp_path, monkeypatch):
    other = shutil.copytree(run, tmp_path / "elsewhere" / "run")
    monkeypatch.chdir(tmp_path)
    assert report(run, other, "--weights", "false") == 0
    text = (tmp_path / "report.html").read_text()
    assert "elsewhere/run" in text and not (run / "report.html").exists()
    assert len(figures.losses(read_runs([run, other])).data) == 6


def test_a_run_that_goes_on_has_a_page(run):
    """Nothing but what there is after the first step; a line that is being written is left out."""
    summary = json.loads((run / "run.json").read_text())
    summary |= {"finished": False, "memory": {}, "router": None, "heldout": {}, "answers": {}, "num_tokens": {}}
    (run / "run.json").write_text(json.dumps(summary))
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().splitlines()[0] + '\n{"stage": 1, "st')
    (run / "router.jsonl").unlink()
    shutil.rmtree(run / "model")
    assert report(run) == 0
    assert "not finished" in (run / "report.html").read_text()


def test_what_is_no_run_is_refused_in_a_line(run, tmp_path, refused):
    assert "run.json is missing" in refused("report", tmp_path)
    assert "given twice" in refused("report", run, f"{run}/../run")
    assert "come first" in refused("report", "--output", "x.html")
    assert "name a run's folder" in refused("report")
    for text, said in (("{", "damaged"), ("[1]", "not a run's record"), ('{"config": {}}', "no report can be made")):
        (run / "run.json").write_text(text)
        assert said in refused("report", run)
    assert not (run / "report.html").exists()
