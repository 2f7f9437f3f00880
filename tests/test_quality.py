"""benchmarks/quality.py and its tables: one run, sweeps, and what the tables say of them.

Run: pytest tests/test_quality.py
"""

import argparse
import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import revffn

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts that import each other
figures, quality, quality_tables = map(importlib.import_module, ("figures", "quality", "quality_tables"))



def test_quality_of_the_same_function_is_the_same_and_seeds_differ(model_folder, data_file):
    """Plain SFT through our engine and through transformers with checkpointing; the coupling is another function."""
    workload = quality.Workload(path=str(data_file()), steps=6, batch_size=2, max_length=64, num_heldout=4)
    folder = str(model_folder())

    def go(name: str, seed: int = 0) -> dict:
        return quality.run(folder, quality.METHODS[name], workload, 1e-3, seed, name)

    plain, checkpointing, other = go("sft"), go("sft_checkpointing"), go("sft", seed=1)
    assert [point["step"] for point in plain["curve"]] == [0, 2, 4, 6] and len(plain["losses"]) == 6
    seen = [point["tokens"] for point in plain["curve"]]
    assert seen[0] == 0 < seen[1] < seen[2] < seen[3] == plain["tokens"]
    assert plain["losses"] == pytest.approx(checkpointing["losses"], rel=1e-3)
    assert plain["losses"] != other["losses"] and plain["curve"][0] == other["curve"][0]
    assert plain["curve"][-1]["exported"] < plain["curve"][0]["exported"]
    coupled = go("innovation_m1_rising")
    assert coupled["curve"][0]["exported"] == pytest.approx(plain["curve"][0]["exported"], rel=1e-5)
    assert coupled["curve"][0]["trained"] != coupled["curve"][0]["exported"] and coupled["mismatched_states"] == 0
    assert coupled["drift"]["before"]["divergence"] < coupled["drift"]["after"]["divergence"]
    adapters = go("cross_branch")
    assert adapters["curve"][0]["exported"] != pytest.approx(plain["curve"][0]["exported"], rel=1e-2)
    method = quality.METHODS["cross_branch_fitted"]
    distilled, fitted = (
        quality.run(folder, dataclasses.replace(method, distil=distil), workload, 1e-3, 0, "cross_branch_fitted")
        for distil in (True, False)
    )
    assert fitted["calibration"]["explained"] and distilled["curve"][0] == fitted["curve"][0] != adapters["curve"][0]
    assert all(a != b for a, b in zip(distilled["losses"], fitted["losses"], strict=True))
    # The second stage learns the responses: a loss of the same kind as the other's.
    assert distilled["losses"][3:] == pytest.approx(fitted["losses"][3:], rel=0.05)


def test_schedules_of_innovation(model_folder, data_file, monkeypatch):
    """Without the coupling for the last step, the losses are those with it until then; predictors fitted again are
    others, fitted on the weights of that step, and the optimizer goes on with the same parameters."""
    workload = quality.Workload(path=str(data_file()), steps=6, batch_size=2, max_length=64, num_heldout=4)
    fitted, convert = [], revffn.convert

    def noted(model, config, **rest):
        made = convert(model, config, **rest)
        fitted.append(model.model.layers[1].coupling.predictor.up.weight.detach().clone())
        return made

    monkeypatch.setattr(revffn, "convert", noted)

    def go(name: str, **changes) -> dict:
        method = dataclasses.replace(quality.METHODS[name], **changes)
        return quality.run(str(model_folder()), method, workload, 1e-3, 0, name)

    coupled = go("innovation_m1_grown")
    plain_end = go("innovation_m1_plain_end", schedule={5 / 6: "plain"})
    assert plain_end["losses"][:5] == coupled["losses"][:5] and plain_end["losses"][5] != coupled["losses"][5]
    assert "trained" in plain_end["curve"][-2] and "trained" not in plain_end["curve"][-1]
    assert plain_end["curve"][-1]["exported"] != plain_end["curve"][-2]["exported"]  # it learns on
    refit = go("innovation_m1_refit")
    assert len(fitted) == 5 and all(torch.equal(fitted[i], fitted[0]) for i in (1, 2))
    assert not torch.equal(fitted[3], fitted[2]) and not torch.equal(fitted[4], fitted[3])
    assert refit["losses"][:2] == coupled["losses"][:2] and refit["losses"][2:] != coupled["losses"][2:]
    assert refit["losses"] == pytest.approx(coupled["losses"], rel=0.05)
    for result in (coupled, plain_end, refit):
        assert result["mismatched_states"] == 0 and result["curve"][-1]["exported"] < result["curve"][0]["exported"]


def test_divergence_from_the_base_model(model_folder):
    """Zero from itself, else its definition over the tokens that count; only the model gets a gradient."""
    teacher = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()
    batch = {"input_ids": torch.randint(0, 40, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    batch["attention_mask"][1, 4:] = 0
    counts = batch["attention_mask"].bool()
    assert quality.divergence_from(teacher, model, batch).item() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        model.lm_head.weight[3] += 1.0
        probabilities, others = (m(**batch).logits.softmax(-1)[counts] for m in (teacher, model))
        expected = (probabilities * (probabilities / others).log()).sum(-1).mean()
    loss = quality.divergence_from(teacher, model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and loss.item() > 1e-3
    loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0 and teacher.lm_head.weight.grad is None


@pytest.mark.parametrize(
    ("best", "tried"),
    [(1e-4, [5e-5, 1e-4, 2e-4]), (1.25e-5, [5e-5, 1e-4, 2e-4, 2.5e-5, 1.2e-5, 5.8e-6]), (None, [5e-5, 1e-4, 2e-4])],
)
def test_a_sweep_goes_on_past_its_edge(best, tried, tmp_path, monkeypatch):
    """Until the best rate lies between two others; `best` None: no rate trains."""
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    made = []

    def one(arguments, name, seed, rate, file):
        made.append(rate)
        curve = [{"exported": abs(math.log(rate / best)) if rate < 2e-4 else math.nan}] if best else []
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"method": name, "settings": {"learning_rate": rate}, "curve": curve}))

    monkeypatch.setattr(quality, "one", one)
    quality.sweep(argparse.Namespace(workload="dolly"), "sft")
    assert made == pytest.approx(tried)
    if best:
        assert quality.chosen_rate("dolly", "innovation_fixed") == pytest.approx(best, rel=0.1)


def test_a_trial_of_quality_stays_out_of_the_results(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(quality, "one", lambda arguments, name, seed, rate, file: made.append(file))

    def main(*words):
        monkeypatch.setattr(sys, "argv", ["quality.py", "--methods", "sft", "--seeds", "9", *words])
        quality.main()

    for words in (["--steps", "8"], ["--model", "other"], ["--steps", "8", "--sweep", "--results", str(tmp_path)]):
        with pytest.raises(SystemExit, match="2"):
            main(*words)
        assert "give --results FOLDER" in capsys.readouterr().err and not made
    main("--steps", "8", "--results", str(tmp_path))
    main()
    assert made == [tmp_path / "dolly" / "sft_seed9.json", quality.RESULTS / "dolly" / "sft_seed9.json"]


def test_quality_tables_pair_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(quality_tables, "RESULTS", tmp_path)
    assert quality_tables.quality() == quality_tables.NO_RESULTS
    folder = tmp_path / "quality" / "dolly"
    folder.mkdir(parents=True)
    found = {
        "sft": [2.0, 2.2, 2.4],
        "innovation": [2.01, 2.22, 2.43],
        "longer": [1.9],
        "galore": [],
        "half": [None, 2.3],
    }
    for method, losses in found.items():
        for seed, loss in enumerate(losses or [None]):
            steps = 1200 if method == "longer" else 300
            settings = {"seed": seed, "steps": steps, "learning_rate": 5e-5, "reversible": None}
            result = {"method": method, "description": method, "settings": settings, "failed": "IndexError: 3-D"}
            if loss is not None:
                result |= {
                    # Straight down; the longer run starts higher, looks twice as often, and counts its tokens.
                    "curve": [
                        {"step": steps * i // n, "exported": start + (loss - start) * i / n, "accuracy": 0.5}
                        | ({"tokens": 100 * i + 11} if method == "longer" else {})
                        for start, n in [(3.1, 6) if method == "longer" else (2.5, 3)]
                        for i in range(n + 1)
                    ],
                    "tokens": 600,
                    "trained_parameters": 7000,
                    "kept_bytes": 900,
                    "kept_bytes_of_tokens": 9,
                }
                result["drift"] = {"after": {"divergence": 0.1}}
                del result["failed"]
            (folder / f"{method}_seed{seed}.json").write_text(json.dumps(result))
    rows = {line.split("|")[2].strip(): line for line in quality_tables.quality().splitlines()}
    # Student's interval of 0.01, 0.02, 0.03: 4.303 * 0.01 / sqrt(3)
    assert "| 2.2000 | – |" in rows["sft"] and "| 2.2200 | +0.0200 ± 0.0248 |" in rows["innovation"]
    assert "failed: IndexError: 3-D" in rows["galore"] and len({line.count("|") for line in rows.values()}) == 1
    assert "| 1 | 300 | 5e-05 | 2.3000 | +0.1000 |" in rows["half"]  # one seed failed, and is not among the seeds
    assert "| 1.9000 | – |" in rows["longer"]  # than plain SFT: no comparison
    assert "longer" not in quality_tables.overview() and "+0.0200 ± 0.0248 (3)" in quality_tables.overview()
    assert "| half | +0.1000 (1) | 100 |" in quality_tables.overview()
    rows = {line.split("|")[2].strip(): line for line in quality_tables.curves().splitlines()}
    assert "| 2.5000 | 2.4000 | 2.3000 | 2.2000 | 600 | 0 |" in rows["sft"]
    assert "| 3.1000 | 2.7000 | 2.3000 | 1.9000 | 600 | 311 |" in rows["longer"]  # 2.5 at the third of six looks


def test_figures_show_what_the_files_say(tmp_path, monkeypatch):
    drawn = figures.figures()
    assert {f"{name}.svg" for name in drawn} == {file.name for file in figures.FIGURES.iterdir()}
    folder = figures.RESULTS / "quality" / "gsm8k"
    runs = figures.runs_by_method(folder)
    number = {name: len(list(folder.glob(f"{name}_seed*.json"))) for name in figures.TUNED}
    assert "galore" not in runs and {name: len(seeds) for name, seeds in runs.items()}.items() <= number.items()
    assert len(runs["sft"]) == number["sft"] >= 3
    left, right = drawn["quality_gsm8k"].axes
    curves = {line.get_label(): line for line in left.lines}
    label = figures.TUNED["cross_branch_long"][0]
    points = runs["cross_branch_long"][0]["curve"]
    assert [*curves[label].get_xdata()] == [point["tokens"] for point in points]
    assert [*curves[label].get_ydata()] == [point["exported"] for point in points]
    gaps = {name: quality_tables.gaps_of(runs[name], runs["sft"]) for name in runs}
    heights = sorted(line.get_ydata()[0] for line in right.lines)
    assert heights == pytest.approx(sorted(sum(gap) / len(gap) for gap in gaps.values() if gap))
    assert not gaps["cross_branch_long"] and len(gaps["innovation_m1_grown"]) == number["innovation_m1_grown"] >= 3
    # The same files, the same picture, to the byte.
    for name in ("a", "b"):
        monkeypatch.setattr(sys, "argv", ["figures.py", "--out", str(tmp_path / name)])
        figures.main()
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
