"""`revffn data RECIPE` shows what the run would learn from: by the same functions, without a model.

Run: pytest tests/data/test_command.py
"""

import io
import json
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from revffn.__main__ import main
from revffn.command_line import load_run_config
from revffn.data import IGNORED, Example, tokenize
from revffn.data.command import histogram, printable, rendered
from revffn.training.preflight import check


@pytest.fixture
def shown(capsys):
    """`shown(words)`: what the command prints, and its exit status."""

    def show(*words):
        capsys.readouterr()
        status = main(["data", *map(str, words)])
        return capsys.readouterr(), status

    return show


def test_it_shows_what_a_run_learns_from(recipe_file, shown):
    recipe = recipe_file()
    run = check(load_run_config(recipe))
    printed, status = shown(recipe)
    assert status == 0 and printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0] == f"{recipe.parent / 'data.jsonl'}: 64 records" and lines[1] == "Columns: dolly (64)"
    for name, counts in (("Data", run.counts["training"]), ("Held-out data", run.counts["heldout"])):
        assert counts.line(name, 64) in lines
        assert f"  {counts.tokens:,} tokens, {counts.learnt_tokens:,} of them learnt" in printed.out
    assert sum(int(n) for n in re.findall(r"^ *≤ \d+ .*? (\d+)  ", printed.out, re.MULTILINE)) == 56
    heads = re.findall(r"^Example (\d), .*data\.jsonl line \d+: (\d+) tokens, (\d+) learnt", printed.out, re.MULTILINE)
    assert [head[0] for head in heads] == list("12345")
    for (_, tokens, learnt), row in zip(heads, run.training, strict=False):
        assert int(tokens) == len(row["input_ids"]) and int(learnt) == sum(x != IGNORED for x in row["labels"])
        answer = run.tokenizer.decode([label for label in row["labels"] if label != IGNORED])
        assert f"<|im_start|>assistant\n[[{answer}]]" in printed.out


def test_options_win_and_what_is_not_drawn_is_said(recipe_file, shown):
    printed, _ = shown(recipe_file(), "--data.num_examples", 10, "--data.heldout", "0.25", "--data.max_length", 20)
    assert "Data: 10 examples" in printed.out and "Held-out data: 16 examples" in printed.out
    assert "data.jsonl: 64 records, 26 drawn\n" in printed.out and "truncated" in printed.out


def test_it_ends_with_the_line_that_a_run_is_refused_with(recipe_file, data_file, shown, refused):
    long = [{"question": "red " * 60, "answer": "x"}] * 30 + [{"question": "a", "answer": "b"}] * 10
    words = [recipe_file(), "--data.path", data_file(long, "long.jsonl"), "--data.heldout", 0]
    printed, status = shown(*words)
    assert status == 2 and "30 left out (no response token within max_length=64)" in printed.out
    assert "left out, none of its" in printed.out and "= max_length" in printed.out
    assert printed.err.replace("revffn data:", "revffn train:") == refused("train", *words)


def test_packing_is_that_of_the_trainer(recipe_file, shown, monkeypatch):
    from revffn.training.run import train
    from revffn.training.trainer import RevFFNTrainer

    class Stop(Exception):
        pass

    def stop(self, **kwargs):
        raise Stop(self.train_dataset)

    monkeypatch.setattr(RevFFNTrainer, "train", stop)
    recipe = recipe_file()
    with pytest.raises(Stop) as stopped:
        train(load_run_config(recipe, ["--data.packing", "true"]), recipe)
    (table,) = stopped.value.args
    printed, _ = shown(recipe, "--data.packing", "true")
    assert f"Packed: {len(table)} sequences" in printed.out
    # No token is lost or cut, and no two sequences would fit into one.
    packed = []
    for row in table:
        ends = [sum(row["seq_lengths"][:i]) for i in range(len(row["seq_lengths"]) + 1)]
        packed += [row["input_ids"][a:b] for a, b in zip(ends, ends[1:], strict=False)]
    rows = check(load_run_config(recipe, ["--training.output_dir", str(recipe.parent / "other")])).training
    assert sorted(packed) == sorted(row["input_ids"] for row in rows)
    shortest = sorted(len(row["input_ids"]) for row in table)[:2]
    assert sum(shortest) > 64


def test_what_is_not_learnt_is_grey(tokenizer):
    answer = {"role": "assistant", "content": "red [bold]"}
    example = Example(prompt=[{"role": "user", "content": "Say é🙂."}], completion=[answer])
    row = tokenize(example, tokenizer, 100)
    whole = tokenizer.decode(row["input_ids"])
    plain, styled = (rendered(row, tokenizer, styled) for styled in (False, True))
    assert plain.plain == whole.replace("red [bold]<|im_end|>\n", "[[red [bold]<|im_end|>\n]]")
    assert styled.plain == whole and [whole[s.start : s.end] for s in styled.spans] == [whole.partition("red")[0]]
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="standard", soft_wrap=True).print(styled)
    assert "\x1b[90m<|im_start|>user" in out.getvalue() and "\x1b[90mred" not in out.getvalue()


def test_nothing_in_a_text_reaches_the_terminal_but_text():
    assert printable("a\x1b[2J\r\x00b\tc\nd") == "a\\x1b[2J\\r\\x00b\tc\nd"
    assert len(printable("x" * 10_000)) < 700 and "9,400 characters" in printable("x" * 10_000)


def test_every_length_is_in_one_bar():
    lengths = [1, 2, 3, 4, 5, 60, 64, 65, 1000]
    lines = histogram(lengths, 64)
    counts = {line.split()[1]: int(line.split()[-2 - 2 * ("max_length" in line)]) for line in lines}
    assert counts == dict(
        zip("1 2 4 8 16 32 64 128 256 512 1,024".split(), (1, 1, 2, 1, 0, 0, 2, 1, 0, 0, 1), strict=True)
    )
    (marked,) = (line for line in lines if "max_length" in line)
    assert lines[-1].endswith("100.0%") and marked.split()[1] == "64" and marked.endswith("77.8%  = max_length")
    assert "= max_length" in histogram([100], 70)[0] and histogram([100], 1024)[0].split()[1] == "128"


def test_help_has_only_what_matters(capsys):
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    out = capsys.readouterr().out
    assert "usage: revffn data RECIPE, or revffn data MODEL DATA; [--section.key value ...]" in out
    assert "--data.path" in out and "--optimizer" not in out


@pytest.mark.slow
def test_no_model_and_no_trainer_is_loaded(recipe_file):
    words = [sys.executable, "-m", "revffn", "data", str(recipe_file())]
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "revffn.data.command" in imported
    assert not [name for name in imported if name in ("trl", "datasets") or name.startswith("revffn.models")]


def test_a_table_of_many_layouts(recipe_file, data_file, shown):
    records = [{"text": "red " * 200}, {"question": "a", "answer": "b"}, {"prompt": "c", "completion": "d"}] * 4
    printed, status = shown(recipe_file(), "--data.path", data_file(records, "mixed.jsonl"), "--data.heldout", 0)
    assert status == 0 and "text (4)" in printed.out and "question_answer (4)" in printed.out
    assert re.search(r"\d+ tokens, \d+ learnt, in \d sequences, of which this is the first", printed.out)
    assert json.dumps(records[2]["completion"]).strip('"') in printed.out
