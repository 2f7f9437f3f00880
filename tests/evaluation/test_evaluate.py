"""`revffn evaluate`: numbers and prompts of MMLU and GSM8K are the harness's own; scoring, perplexity against a sum
token by token, intervals, tables, refusals, going on.

Run: pytest tests/evaluation/test_evaluate.py; SmolLM2 with 100 questions a task (an hour or more) with -m slow.
That one reads shared/data beside the checkout, or the folder that REVFFN_DATA names.
"""

import gzip
import importlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import tiny_model

import revffn
from revffn.__main__ import main
from revffn.evaluation import command as evaluate
from revffn.evaluation import perplexity

pytest.importorskip("lm_eval", reason="needs the extra `evaluate`, which the extra `test` includes")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
parity = importlib.import_module("harness_parity")
DATA = Path(os.environ.get("REVFFN_DATA", ROOT.parent / "shared" / "data"))
SUBJECTS = ["anatomy", "management"]
RECORDED = ROOT / "benchmarks" / "results" / "evaluate_smollm2.json"
RECORDED_ALL_SUBJECTS = ROOT / "benchmarks" / "results" / "evaluate_smollm2_all_subjects.json"
STAND_IN = ROOT / "benchmarks" / "results" / "evaluate_stand_in.json"
LANGUAGES = ["bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh"]
TEXT = "The house is red, the tree is grün.\nOne river, two rivers: 東京. " * 7


def write_gz(file, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))


def mmlu_records(split, number):
    return [
        {"subject": subject, "question": f" Is {split} {n} {subject}? ", "choices": ["no", "yes", f"{n}", "both"],
         "answer": (n + len(subject)) % 4}
        for subject in SUBJECTS for n in range(number)
    ]  # fmt: skip


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A few records in the layout of the real files."""
    folder = tmp_path_factory.mktemp("data")
    write_gz(folder / "mmlu" / "test.jsonl.gz", mmlu_records("test", 5))
    write_gz(folder / "mmlu" / "dev.jsonl.gz", mmlu_records("dev", 5))
    problems = [{"question": f"How much is {n} + {n}?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"} for n in range(4)]
    write_gz(folder / "gsm8k" / "test.jsonl.gz", problems)
    (folder / "mgsm").mkdir()
    for language in LANGUAGES:
        (folder / "mgsm" / f"mgsm_{language}.tsv").write_text("Zwei plus zwei?\t4\nTausend plus tausend?\t2,000\n")
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    """A tiny plain model that sees prompts of eight examples."""
    folder = tmp_path_factory.mktemp("plain")
    special = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=2)
    tiny_model("llama", max_position_embeddings=8192, **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def evaluated(model, output, *words):
    """Run the command; the results it wrote."""
    assert main(["evaluate", str(model), "--output", str(output), "--device", "cpu", *map(str, words)]) == 0
    return json.loads(output.read_text())


# --- the harness -----------------------------------------------------------------------------------------------------


def test_numbers_and_prompts_are_those_of_the_harness(folder, data, tmp_path, capsys):
    """Every metric, standard error and prompt of MMLU and GSM8K, against the harness's own path; to the digit."""
    theirs = parity.harness_side(folder, data, SUBJECTS, ["mmlu", "gsm8k"], 2, 8)
    words = ["--mmlu_path", data / "mmlu", "--gsm8k-path", data / "gsm8k", "--mmlu_subjects", ",".join(SUBJECTS)]
    results = evaluated(folder, tmp_path / "r.json", "--tasks", "mmlu,gsm8k", "--limit", "2", *words)
    ours = parity.rows_of(results)
    assert set(theirs) == {"mmlu", "mmlu_anatomy", "mmlu_management", "gsm8k_cot"}
    assert parity.differences(theirs, ours) == []
    # The comparison can fail: another number, another prompt, a task too few.
    changed = json.loads(json.dumps(ours))
    changed["mmlu"]["acc"]["value"] += 1e-9
    changed["gsm8k_cot"]["prompts_sha256"] = "0"
    del changed["mmlu_anatomy"]
    assert len(parity.differences(theirs, changed)) == 3
    mmlu, gsm8k = results["results"]["mmlu"], results["results"]["gsm8k"]
    assert mmlu["questions"] == 4 and gsm8k["questions"] == 2
    assert mmlu["harness_tasks"]["mmlu_anatomy"]["num_fewshot"] == 5
    assert gsm8k["harness_tasks"]["gsm8k_cot"]["num_fewshot"] == 8
    assert set(gsm8k["metrics"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    acc = mmlu["metrics"]["acc"]
    assert acc["interval"] == [acc["value"] - evaluate.Z * acc["stderr"], acc["value"] + evaluate.Z * acc["stderr"]]
    assert f"mmlu   acc                           {acc['value']:.4f} ± " in capsys.readouterr().out


@pytest.fixture
def answers():
    """A stand-in model of the harness: one answer to everything, and it keeps the prompts."""
    from lm_eval.api.model import LM

    class Answers(LM):
        def __init__(self, answer):
            super().__init__()
            self.answer, self.prompts = answer, []

        def generate_until(self, requests, disable_tqdm=False):
            self.prompts += [request.args[0] for request in requests]
            return [self.answer for _ in requests]

        def loglikelihood(self, requests, disable_tqdm=False):
            self.prompts += [request.args[0] for request in requests]
            return [(-1.0 if request.args[1] == self.answer else -2.0, False) for request in requests]

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            raise NotImplementedError

    return Answers


def run_harness(name, data, lm, subjects=None, limit=None):
    from revffn.evaluation import harness

    paths = {f"{part}_path": str(data / part) for part in ("mmlu", "gsm8k", "mgsm")}
    return harness.run_task(harness.load_task(name, paths, subjects), lm, limit, chat_template=False)


def test_mmlu_asks_and_scores_as_published(data, answers):
    lm = answers(" B")
    rows = run_harness("mmlu", data, lm, SUBJECTS)
    right = sum(record["answer"] == 1 for record in mmlu_records("test", 5)) / 10
    assert rows["mmlu"]["metrics"]["acc"]["value"] == right
    assert rows["mmlu_stem"]["questions"] == 5 and rows["mmlu_other"]["questions"] == 5
    # Five solved examples of the subject, then the question.
    introduction = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    assert lm.prompts[0].startswith(f"{introduction}Is dev 0 anatomy?\nA. no\nB. yes\n")
    assert lm.prompts[0].endswith("Is test 0 anatomy?\nA. no\nB. yes\nC. 0\nD. both\nAnswer:")
    assert lm.prompts[0].count("Answer:") == 6


def test_gsm8k_strict_and_flexible(data, answers):
    lm = answers("So it is 2. The answer is 4.\n")
    metrics = run_harness("gsm8k", data, lm)["gsm8k_cot"]["metrics"]
    assert {name: numbers["value"] for name, numbers in metrics.items()} == {
        "exact_match,strict-match": 0.25,
        "exact_match,flexible-extract": 0.25,
    }
    assert lm.prompts[0].count("The answer is") == 8 and lm.prompts[0].endswith("Q: How much is 0 + 0?\nA:")
    loose = run_harness("gsm8k", data, answers("4"))["gsm8k_cot"]["metrics"]
    assert [loose[f"exact_match,{how}"]["value"] for how in ("strict-match", "flexible-extract")] == [0.0, 0.25]


@pytest.mark.parametrize("name, asks", [("mgsm", "Frage: Zwei plus zwei?\nAntwort:"), ("mgsm_cot", "Antwort:")])
def test_mgsm_is_the_mean_over_languages(name, asks, data, answers):
    lm = answers("Die Antwort lautet 2000.")
    rows = run_harness(name, data, lm)
    assert rows[f"revffn_{name}"]["metrics"]["exact_match,flexible-extract"]["value"] == 0.5
    assert rows[f"revffn_{name}"]["questions"] == 22 and len(rows) == 12
    assert any(prompt.startswith("Frage: Zwei plus zwei?") and prompt.endswith(asks) for prompt in lm.prompts)


def test_the_recorded_comparison_says_equal():
    """benchmarks/results/evaluate_smollm2.json: SmolLM2, 100 questions a task."""
    result = json.loads(RECORDED.read_text())
    assert result["settings"]["limit"] == 100
    for task in ("mmlu", "gsm8k"):
        assert parity.differences(result["harness"][task], result["revffn"][task]) == []
        assert result["differences"][task] == []


def test_the_recorded_comparisons_of_all_subjects_say_equal():
    """benchmarks/results/evaluate_smollm2_all_subjects.json and evaluate_stand_in.json: SmolLM2, and a function of the
    text, answer 100 questions of each of 57 subjects; the prompts are the same."""
    for result in (json.loads(file.read_text()) for file in (RECORDED_ALL_SUBJECTS, STAND_IN)):
        rows = result["harness"]["mmlu"]
        assert result["settings"]["limit"] == 100
        assert len(result["settings"]["mmlu_subjects"]) == 57 and len(rows) == 58
        assert parity.differences(rows, result["revffn"]["mmlu"]) == []
        for asked in (json.loads(file.read_text())["harness"]["mmlu"] for file in (RECORDED, STAND_IN)):
            for name in asked.keys() - {"mmlu"}:
                assert asked[name]["prompts_sha256"] == rows[name]["prompts_sha256"]


def test_a_stand_in_sees_a_changed_answer_key(data, tmp_path):
    theirs = parity.harness_side(None, data, ["anatomy"], ["mmlu"], 4, 8)
    assert parity.differences(theirs, parity.revffn_side(None, data, ["anatomy"], ["mmlu"], 4, 8)) == []
    changed = [{**record, "answer": (record["answer"] + 1) % 4} for record in mmlu_records("test", 5)]
    write_gz(tmp_path / "mmlu" / "test.jsonl.gz", changed)
    write_gz(tmp_path / "mmlu" / "dev.jsonl.gz", mmlu_records("dev", 5))
    found = parity.differences(theirs, parity.revffn_side(None, tmp_path, ["anatomy"], ["mmlu"], 4, 8))
    assert found and not any("prompts" in line for line in found)


@pytest.mark.slow
def test_smollm2_with_100_questions_a_task(tmp_path):
    if not (DATA / "mmlu").is_dir():
        pytest.skip(f"no {DATA}; runs wherever the benchmark's data is")
    words = ["harness_parity.py", "--data", str(DATA), "--output", str(tmp_path / "parity.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        assert parity.main() == 0
    result = json.loads((tmp_path / "parity.json").read_text())
    assert result["differences"] == {"gsm8k": [], "mmlu": []}


# --- perplexity ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def token_by_token(model, tokenizer, text, window, stride):
    """Losses of all tokens, each from a forward pass of its own over what its window has before it."""
    ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    losses = []
    for i in range(1, len(ids)):
        start = 0
        while i > start + window:
            start += stride
        logits = model(input_ids=torch.tensor([ids[start:i]])).logits[0, -1]
        losses.append(-logits.double().log_softmax(-1)[ids[i]].item())
    return losses


@pytest.mark.parametrize("window, stride, batch_size", [(16, 8, 3), (16, 16, 8), (10, 3, 1), (4096, 1, 2)])
def test_perplexity_is_the_sum_token_by_token(tokenizer, window, stride, batch_size):
    model = tiny_model("qwen3", vocab_size=len(tokenizer)).eval()
    text = TEXT[:80]
    found = perplexity.perplexity(model, tokenizer, text, window=window, stride=stride, batch_size=batch_size)
    losses = token_by_token(model, tokenizer, text, window, stride)
    metrics = {name: numbers["value"] for name, numbers in found["metrics"].items()}
    assert found["tokens"] == len(losses) and found["bytes"] == len(text.encode())
    assert metrics["nats_per_token"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert metrics["nats_per_byte"] == pytest.approx(sum(losses) / len(text.encode()), rel=1e-5)
    assert metrics["perplexity"] == math.exp(metrics["nats_per_token"])
    # It can fail: windows that move by another step give another number.
    if window < 4096:
        other = perplexity.perplexity(model, tokenizer, text, window=window, stride=1)["metrics"]["nats_per_token"]
        assert abs(other["value"] - metrics["nats_per_token"]) > 1e-5


def test_bytes_and_limit(tokenizer):
    """A character of several tokens counts once, and a limited run counts the bytes that it has read."""
    model = tiny_model("llama", vocab_size=len(tokenizer))
    whole = perplexity.perplexity(model, tokenizer, "東京" * 9, window=4, stride=4)
    assert whole["bytes"] == 54 and whole["tokens"] == 54 and whole["windows"] == 14
    part = perplexity.perplexity(model, tokenizer, "東京" * 9, window=6, stride=6, limit=2)
    assert (part["bytes"], part["tokens"], part["windows"]) == (12, 12, 2)


def test_standard_error_of_a_ratio():
    """With equal windows it is that of their mean; one window has none."""
    losses = torch.randn(50, dtype=torch.float64) + 3
    found = perplexity.ratio((4 * losses).tolist(), [4] * 50)
    assert found["value"] == pytest.approx(losses.mean().item())
    assert found["stderr"] == pytest.approx((losses.std() / 50**0.5).item())
    assert perplexity.ratio([1.0], [2])["stderr"] is None


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling, function", [("innovation", "exported"), ("cross_branch", "its own")])
def test_a_reversible_folder(coupling, function, tokenizer, tmp_path, text_file):
    """Of a run's folder the exported function is evaluated; cross_branch has only its own."""
    model = tiny_model("qwen2_moe", vocab_size=len(tokenizer))
    extra = {"query_stream": "right"} if coupling == "cross_branch" else {}
    model = revffn.convert(model, revffn.ReversibleConfig.from_dict(dict(coupling=coupling, **extra)))
    run = tmp_path / "run" / "model"
    model.save_pretrained(run)
    tokenizer.save_pretrained(run)
    words = ("--tasks", "perplexity", "--text", text_file, "--window", 64)
    results = evaluated(tmp_path / "run", tmp_path / "r.json", *words)
    assert results["about"]["function"] == function
    if coupling == "innovation":
        assert main(["export", str(tmp_path / "run"), str(tmp_path / "plain")]) == 0
        plain = evaluated(tmp_path / "plain", tmp_path / "plain.json", *words)
        assert plain["about"]["function"] == "plain" and plain["about"]["weights"] == results["about"]["weights"]
        assert plain["results"]["perplexity"]["metrics"] == results["results"]["perplexity"]["metrics"]


def test_a_second_call_goes_on(folder, tmp_path, text_file, data, monkeypatch):
    words = ["--tasks", "perplexity", "--text", text_file, "--window", 64, "--limit", 1]
    first = evaluated(folder, tmp_path / "r.json", *words)
    monkeypatch.setattr(perplexity, "perplexity", None)  # would fail if it ran again
    words[1] = "perplexity,gsm8k"
    second = evaluated(folder, tmp_path / "r.json", *words, "--chat_template", "--gsm8k_path", data / "gsm8k")
    assert second["results"].keys() == {"perplexity", "gsm8k"}
    assert second["results"]["perplexity"] == first["results"]["perplexity"]
    gsm8k = second["results"]["gsm8k"]
    plain = evaluated(folder, tmp_path / "r2.json", "--tasks", "gsm8k", "--limit", 1, "--gsm8k_path", data / "gsm8k")
    prompts = [r["harness_tasks"]["gsm8k_cot"]["prompts_sha256"] for r in (gsm8k, plain["results"]["gsm8k"])]
    assert gsm8k["settings"]["chat_template"] is True and prompts[0] != prompts[1]
    (tmp_path / "r2.json").unlink()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["r.json", "text.txt"]


@pytest.mark.parametrize("task, method", [("mmlu", "_model_call"), ("gsm8k", "_model_generate")])
def test_an_interrupted_task_goes_on(task, method, folder, tmp_path, data, monkeypatch):
    """Answers given before the interruption are not asked for again, unless the weights are others; the numbers are
    those of one go, and nothing is left beside them."""
    from lm_eval.models.huggingface import HFLM

    words = ["--tasks", task, "--batch_size", 1, f"--{task}_path", data / task]
    words += ["--mmlu_subjects", ",".join(SUBJECTS)] if task == "mmlu" else []
    calls, last, ask = 0, math.inf, getattr(HFLM, method)

    def counted(*args, **kwargs):
        nonlocal calls
        if calls == last:
            raise KeyboardInterrupt
        calls += 1
        return ask(*args, **kwargs)

    monkeypatch.setattr(HFLM, method, counted)
    one_go = evaluated(folder, tmp_path / "one_go.json", *words)["results"][task]
    total, calls, last = calls, 0, 3
    with pytest.raises(AssertionError, match="130"):  # of Ctrl-C
        evaluated(folder, tmp_path / "r.json", *words)
    assert not (tmp_path / "r.json").exists() and total == (10 if task == "mmlu" else 4)
    calls, last = 0, math.inf
    assert evaluated(folder, tmp_path / "r.json", *words)["results"][task] == one_go
    assert calls == total - 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one_go.json", "r.json"]
    # A quick look at it in between has answers of its own, and leaves those that are there.
    (tmp_path / "r.json").unlink()
    calls, last = 0, 3
    with pytest.raises(AssertionError, match="130"):  # of Ctrl-C
        evaluated(folder, tmp_path / "r.json", *words)
    calls, last = 0, math.inf
    evaluated(folder, tmp_path / "r.json", *words, "--limit", 1)
    assert calls == (2 if task == "mmlu" else 1)
    (tmp_path / "r.json").unlink()
    calls = 0
    assert evaluated(folder, tmp_path / "r.json", *words)["results"][task] == one_go and calls == total - 3
    # Other weights are asked everything, and what another model said stays for it.
    (tmp_path / "r.json").unlink()
    calls, last = 0, 3
    with pytest.raises(AssertionError, match="130"):  # of Ctrl-C
        evaluated(folder, tmp_path / "r.json", *words)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data.mul_(2)
    shutil.copytree(folder, tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    calls, last = 0, math.inf
    evaluated(tmp_path / "other", tmp_path / "r.json", *words)
    assert calls == total and len([*tmp_path.glob("r.*.db")]) == 1


def test_two_calls_on_one_file(folder, tmp_path, text_file, data, monkeypatch):
    """What another call has written meanwhile stays."""
    output, own = tmp_path / "r.json", perplexity.perplexity

    def meanwhile(*args, **kwargs):
        monkeypatch.setattr(perplexity, "perplexity", own)
        evaluated(folder, output, "--tasks", "gsm8k", "--limit", 1, "--gsm8k_path", data / "gsm8k")
        return own(*args, **kwargs)

    monkeypatch.setattr(perplexity, "perplexity", meanwhile)
    found = evaluated(folder, output, "--tasks", "perplexity", "--text", text_file, "--limit", 1)
    assert set(found["results"]) == {"gsm8k", "perplexity"}


def test_what_makes_a_model_another(folder, tmp_path, text_file, refused, capsys):
    """Not its weights alone: its config, its tokenizer, the text that is scored."""
    words = ["--tasks", "perplexity", "--text", str(text_file), "--limit", "1"]
    place, output = tmp_path / "model", tmp_path / "r.json"
    for name, file, change in (
        ("config", "config.json", lambda text: json.dumps({**json.loads(text), "rms_norm_eps": 0.5})),
        ("tokenizer", "chat_template.jinja", lambda text: text + "!"),
    ):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder, place)
        output.unlink(missing_ok=True)
        evaluated(place, output, *words)
        (place / file).write_text(change((place / file).read_text()))
        assert main(["evaluate", str(place), "--output", str(output), *words]) == 2
        assert f"another model ({name})" in capsys.readouterr().err
    text_file.write_text("Another text.")
    assert "other settings (text_sha256)" in refused("evaluate", place, "--output", output, *words)


def test_tables(tmp_path, capsys):
    def run(limit, value, stderr, prompts):
        metrics = {"acc": {"value": value, "stderr": stderr, "interval": None}}
        task = {"settings": {"limit": limit}, "metrics": metrics}
        return {"about": {}, "results": {"mmlu": {**task, "harness_tasks": {"mmlu_x": {"prompts_sha256": prompts}}}}}

    evaluate.write_results(tmp_path / "a.json", run(5, 0.25, 0.1, "p"))
    evaluate.write_results(tmp_path / "b.json", run(6, 0.5, None, "q"))
    evaluate.write_results(tmp_path / "c.json", run(6, 0.5, None, "q"))
    assert main(["evaluate", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    out = capsys.readouterr().out
    assert "mmlu  acc     0.2500 ± 0.1960  0.5000\n" in out
    assert "mmlu: limit differs: a.json 5, b.json 6." in out and "mmlu: the prompts differ." in out
    assert main(["evaluate", "--compare", str(tmp_path / "b.json"), str(tmp_path / "c.json")]) == 0
    assert "differ" not in capsys.readouterr().out


BAD = {
    "unknown task": ("--tasks mmlu2", "unknown 'mmlu2'. Known: mmlu, gsm8k"),
    "no text": ("--tasks perplexity", "--text FILE"),
    "no such text": ("--tasks perplexity --text nothing.txt", "no such file"),
    "window": ("--tasks perplexity --text {text} --window 9000", "max_position_embeddings=8192. Lower --window."),
    "stride": ("--tasks perplexity --text {text} --window 8 --stride 9", "at most the window, 8, got 9"),
    "no MT-Bench": ("--tasks mt_bench", "--mt_bench_path FOLDER"),
    "no folder": ("--tasks perplexity --text {text} --output no/where.json", "Make it first"),
    "device": ("--tasks perplexity --text {text} --device gpu0", "Try cpu, or cuda"),
    "no data": ("--tasks gsm8k --gsm8k_path nowhere", "no test.jsonl.gz or test.jsonl here"),
    "no network": ("--tasks gsm8k", "'openai/gsm8k' cannot be had from the Hub"),
    "unknown subject": ("--tasks mmlu --mmlu_path {data}/mmlu --mmlu_subjects anatomi", "unknown anatomi. Known: a"),
    "subject without data": ("--tasks mmlu --mmlu_path {data}/mmlu", "needs at least one record in test"),
    "limit": ("--tasks mmlu --limit 0", "limit must be at least 1, got 0"),
    "half a judge": ("--tasks mt_bench --judge_url http://x/v1", "judge_url and judge_model go together"),
    "not json": ("--tasks mmlu --output mine.txt", "expected a name that ends in .json"),
    "unknown option": ("--tasks mmlu --mmul_path x", "Did you mean mmlu_path?"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name, folder, data, text_file, refused):
    words, message = BAD[name]
    words = words.format(data=data, text=text_file).split()
    assert message in refused("evaluate", folder, *([] if "--output" in words else ["--output", "r.json"]), *words)


@pytest.mark.parametrize("task, longest", [("gsm8k", 256), ("gsm8k", 600), ("mgsm_cot", 256)])
def test_a_prompt_that_does_not_fit_is_refused(tokenizer, data, tmp_path, refused, monkeypatch, task, longest):
    """Before weights are loaded; with 600 the answer has room, but not the examples, which the harness would cut."""
    special = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=2)
    name = task.removesuffix("_cot")
    words = ("--tasks", task, f"--{name}_path", str(data / name))

    def make(longest):
        place = tmp_path / str(longest)
        tiny_model("llama", max_position_embeddings=longest, **special).save_pretrained(place)
        tokenizer.save_pretrained(place)
        return place

    def asked(longest):
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "load_model", None)
            line = refused("evaluate", make(longest), "--output", "r.json", *words)
        return [int(number) for number in re.search(r"needs (\d+) .*\((\d+) of .* sees (\d+)\.", line).groups()]

    needed, prompt, seen = asked(longest)
    assert needed == prompt + 256 > seen == longest
    if (task, longest) == ("gsm8k", 600):
        assert asked(needed - 1) == [needed, prompt, needed - 1]
        results = evaluated(make(needed), tmp_path / "r.json", *words, "--limit", "1")
        assert results["results"][task]["questions"] == 1


def test_bad_files(folder, tmp_path, refused, data_file):
    def line(task, path):
        return refused("evaluate", folder, "--output", "r.json", "--tasks", task, f"--{task}_path", path)

    (tmp_path / "mgsm_bn.tsv").write_text("two\t2\nno number\tx\n")
    assert "mgsm_bn.tsv line 2: expected a question, a tab and a number" in line("mgsm", tmp_path)
    data_file([{"question": "a", "answer": "#### 1"}, {"question": "a", "answer": "1"}], "test.jsonl")
    assert "test.jsonl line 2: not a record of question and answer" in line("gsm8k", tmp_path)
    assert "test.jsonl line 1: not a record of subject" in line("mmlu", tmp_path)
    line = refused("evaluate", tmp_path / "nowhere", "--output", "r.json", "--tasks", "mmlu")
    assert "no model with a tokenizer here" in line
    assert "expected result files" in refused("evaluate", "--compare")
    shutil.copytree(folder, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "text.gz").write_bytes(gzip.compress(TEXT.encode())[:20] + b"damaged" * 9)
    for place, text, message in (("empty", "test.jsonl", "model.safetensors"), (folder, "text.gz", "cannot be read")):
        words = ("--tasks", "perplexity", "--text", tmp_path / text)
        assert message in refused("evaluate", tmp_path / place, "--output", tmp_path / "r.json", *words)
    (tmp_path / "other.json").write_text("{}")
    assert "not a file of results" in refused("evaluate", "--compare", tmp_path / "other.json")


def test_results_of_something_else_stay(folder, tmp_path, text_file, tokenizer, refused, capsys):
    words = ["--tasks", "perplexity", "--text", str(text_file), "--window", "64"]
    evaluated(folder, tmp_path / "r.json", *words)
    before = (tmp_path / "r.json").read_bytes()
    line = refused("evaluate", folder, "--output", tmp_path / "r.json", *words, "--limit", "2")
    assert "holds perplexity with other settings (limit)" in line
    other = tmp_path / "other"
    tiny_model("llama", max_position_embeddings=8192, vocab_size=len(tokenizer), seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    assert main(["evaluate", str(other), "--output", str(tmp_path / "r.json"), *words]) == 2
    assert "holds the results of another model (model, weights, config)" in capsys.readouterr().err
    assert (tmp_path / "r.json").read_bytes() == before


def test_a_missing_extra(folder, refused, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else found(name, *a))
    line = refused("evaluate", folder, "--output", "r.json", "--tasks", "gsm8k")
    assert "gsm8k needs lm_eval, not installed here: pip install 'lm-eval>=0.4.13'" in line


def test_chat_template_is_asked_for(folder, refused, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "chat_template.jinja").unlink()
    line = refused("evaluate", bare, "--output", "r.json", "--tasks", "gsm8k", "--chat_template")
    assert "no chat template" in line
