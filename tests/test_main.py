"""The command line: bad input is one line on stderr with a remedy, exit status 2, and nothing written; a good run
works.

Run: pytest tests/test_main.py
"""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import revffn
from revffn.__main__ import COMMANDS, main
from revffn.command_line import run_from_words
from revffn.interrupts import Interrupted
from revffn.models.known import load_config
from revffn.recipe import InputError
from revffn.training.preflight import check

ROOT = Path(__file__).parent.parent

BAD_DATA = {
    "missing columns": ([{"question": "a", "reply": "b"}], "line 1: missing columns"),
    "empty file": ([], "no records"),
    "broken JSON line": (['{"instruction": "a", "response": "b"}', '{"instruction": '], "line 2: broken JSON"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(recipe_file, data_file, refused, name):
    records, message = BAD_DATA[name]
    recipe = recipe_file()
    file = data_file(records, "bad.jsonl")
    line = refused("train", recipe, "--data.path", file)
    assert message in line and str(file) in line


BAD_OVERRIDES = {
    "no data file": ("--data.path nothing.jsonl", "no such file"),
    "unknown key": ("--data.paths x", "unknown key 'data.paths'. Did you mean data.path?"),
    "wrong type": ("--training.num_steps x", "training.num_steps"),
    "too long": ("--data.max_length 257", "max_position_embeddings=256"),
    "too short": ("--data.max_length 8", "leaves no token of any response"),
    "no model": ("--model.path nowhere", "model.path 'nowhere': no such folder"),
    "too few records": ("--data.num_examples 60", "64 records, but 68 are needed"),
    "resume nothing": ("--training.resume true", "no checkpoint in"),
    "nothing for stage 1": ("--training.stage1_steps 2", "nothing would train in stage 1"),
    "bad side bits": ("--reversible.side_bits 1 2", "side_bits has 2 entries; the model has 4 decoder layers"),
}


BAD_OVERRIDES |= {
    "a share that is none": ("--data.max_dropped nan", "max_dropped is a share: it must be from 0 to 1, got nan"),
    "another word for turns": ("--data.learn all", "data.learn"),
    "two ways to add up": ("--optimizer.in_backward true --training.gradient_accumulation_steps 2", "walked in tiles"),
    "unknown optimizer": ("--optimizer.name adam", "optimizer.name"),
    "no amount": ("--memory.limit much", "memory.limit: 'much' is not an amount of memory. Write it like 24GiB"),
    "does not fit": ("--memory.limit 0.1MiB", "more than the 0.00 GiB there are. What would fit:"),
}


BAD_OVERRIDES |= {
    "negative seed": ("--training.seed -1", "seed must be 0 to 4294967295, got -1"),
    "huge seed": ("--training.seed 4294967296", "seed must be 0 to 4294967295"),
    "huge data seed": (f"--data.seed {10**30}", "seed"),
    "no number of epochs": ("--training.num_epochs nan", "num_epochs must be a number above 0, got nan"),
    "endless epochs": ("--training.num_epochs inf", "num_epochs must be a number above 0, got inf"),
    "infinite decay": ("--optimizer.weight_decay inf", "weight_decay must be at most 2147483647, got inf"),
    "infinite rate": ("--optimizer.learning_rate inf", "learning_rate must be at most"),
    "no rate": ("--optimizer.stage1_learning_rate nan", "stage1_learning_rate must be at least 0, got nan"),
    "no momentum": ("--optimizer.momentum nan", "momentum must be at least 0 and below 1, got nan"),
    "endless steps": (f"--training.num_steps {10**20}", "num_steps must be at most"),
    "no load balance": ("--training.router_aux_loss_coef inf", "router_aux_loss_coef must be at most"),
    "unknown listener": ("--training.report_to tensorbord", "report_to: tensorbord is not supported, only"),
    "no listener": ("--training.report_to null", "report_to: expected a list of texts, got null"),
    "half a resume": ("--training.resume optimizer", "training.resume: expected true or false or weights"),
}


@pytest.mark.parametrize("name", BAD_OVERRIDES)
def test_bad_settings(recipe_file, refused, name):
    words, message = BAD_OVERRIDES[name]
    assert message in refused("train", recipe_file(), *words.split())


def test_examples_that_are_left_out_are_counted_or_refused(recipe_file, data_file, refused, capsys, tmp_path):
    recipe = recipe_file()
    records = [{"instruction": "red " * 200, "response": "x"}] * 30 + [{"instruction": "red", "response": "x"}] * 10
    words = [recipe, "--data.path", data_file(records, "long.jsonl"), "--data.heldout", "0"]
    line = refused("train", *words)
    assert "30 of 40 training examples, more than data.max_dropped=0.05 allows" in line
    enough, share = re.search(r"data.max_length to at least (\d+), or data.max_dropped to ([\d.]+)", line).groups()
    assert int(enough) > 200 and share == "0.75"
    words = [str(word) for word in ("train", *words, "--training.num_steps", 1, "--data.max_dropped", share)]
    assert main(words) == 0
    said = "Data: 40 examples, 10 learnt, 30 left out (no response token within max_length=64)\n"
    assert said in capsys.readouterr().out
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert recorded["training"]["examples"] == 40 and recorded["training"]["left_out"] == 30
    assert recorded["heldout"]["examples"] == 0


def test_a_run_that_cannot_fit_is_forced(recipe_file, tmp_path, refused):
    recipe = recipe_file()
    line = refused("train", recipe, "--memory.limit", "0.1MB")
    assert "is predicted to take" in line and "--force starts all the same" in line
    assert main(["train", str(recipe), "--memory.limit", "0.1MB", "--force", "--training.num_steps", "1"]) == 0
    assert (tmp_path / "run" / "model").is_dir()


def test_freeze_router_without_a_router(recipe_file, refused):
    line = refused("train", recipe_file(model_type="llama"), "--training.freeze_router", "true")
    assert "not a Mixture-of-Experts model" in line


def test_tokenizer_without_chat_template(recipe_file, refused, model_folder, tmp_path):
    import shutil

    folder = tmp_path / "no_template"
    shutil.copytree(model_folder(), folder)
    (folder / "chat_template.jinja").unlink()
    line = refused("train", recipe_file(), "--model.path", folder)
    assert "no chat template" in line and "chat_template.jinja" in line


def test_unknown_architecture_and_missing_tokenizer(recipe_file, refused, tmp_path):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "No reversible layout for model_type='gpt2'" in refused("train", recipe_file(), "--model.path", folder)
    plain = ["train", recipe_file(), "--model.path", folder, "--reversible.coupling", "null"]
    assert "linear cross-entropy is not known to fit model_type='gpt2'" in refused(*plain)
    line = refused(*plain, "--memory.linear_cross_entropy", "false")
    assert "no usable tokenizer" in line


def test_used_output_folder_and_reversible_model(recipe_file, refused, tmp_path):
    recipe = recipe_file()
    assert main(["train", str(recipe)]) == 0
    assert "is not empty" in refused("train", recipe)
    line = refused("train", recipe, "--model.path", tmp_path / "run" / "model", "--training.output_dir", "other")
    assert "reversible already" in line and "revffn export" in line
    assert "is not empty" in refused("export", tmp_path / "run", tmp_path / "run")


def test_cross_branch_cannot_be_exported(recipe_file, refused, tmp_path):
    words = [
        "--reversible.coupling",
        "cross_branch",
        "--reversible.cross_branch.query_stream",
        "right",
        "--training.num_steps",
        "0",
    ]
    assert main(["train", str(recipe_file()), *words]) == 0
    assert "cross_branch model cannot be exported" in refused("export", tmp_path / "run", tmp_path / "out")


def test_other_bad_command_lines(refused, tmp_path):
    assert "no such recipe" in refused("train", "nothing.yaml")
    assert "a recipe, or a model and its data, comes first" in refused("train", "--model.path", "x")
    assert "unknown command 'trian'. Did you mean train? Commands: train, " in refused("trian")
    assert "unknown command 'xyz'. Commands: train, " in refused("xyz")
    assert "Did you mean help?" in refused("hlep")
    assert "Usage: revffn export RUN OUT" in refused("export", "one")
    assert "output" in refused("upcycle")
    assert "model" in refused("plan") and "model" in refused("evaluate")
    assert "Did you mean num_experts?" in refused("upcycle", "--output", "out", "--num_expert", "4")
    assert "steps must be" in refused("upcycle", "--output", "out", "--steps", "0")
    assert "no model here" in refused("export", tmp_path / "nowhere", "out")


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


def help_of(words, capsys) -> str:
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code
    assert status == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command, capsys):
    out = help_of([command, "--help"], capsys)
    assert out.startswith("usage: revffn " + command)
    assert help_of(["help", command], capsys) == out
    assert help_of([command, "something", "--help"], capsys) == out


def test_help_and_version(capsys):
    out = help_of([], capsys)
    assert out == help_of(["help"], capsys) == help_of(["--help"], capsys) == help_of(["help", "help"], capsys)
    assert help_of(["--version"], capsys) == f"revffn {revffn.__version__}\n"


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "{recipe}", "--training.batch_size", "x"], "training.batch_size: expected a whole number"),
        (["train", "{recipe}", "--reversible.side_bits", "7"], "side_bits must be 0 to 4"),
        (["plan", "--model", "x", "--batch", "1", "--tokens", "x"], "tokens: expected a whole number"),
        (["upcycle"], "output is missing"),
        (["evaluate", "x", "--task", "mmlu"], "Did you mean tasks?"),
        (["evalute"], "unknown command"),
        (["export", "x"], "expected two folders"),
    ],
    ids=str,
)
def test_mistakes_are_seen_before_torch_is_imported(recipe_file, words, message):
    """Its import takes seconds, and transformers' too."""
    words = [word.format(recipe=recipe_file()) for word in words]
    code = "import sys; sys.argv[0] = 'revffn'; sys.modules['torch'] = sys.modules['transformers'] = None; "
    code += f"from revffn.__main__ import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["help", "train"], ["completion", "zsh"]], ids=str)
def test_help_comes_without_torch(words):
    code = "import sys; sys.argv[0] = 'revffn'; sys.modules['torch'] = sys.modules['transformers'] = None; "
    code += f"from revffn.__main__ import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout and not done.stderr


STATUSES = {
    0: None,
    1: OSError(28, "No space left on device"),
    2: InputError("not this"),
    130: Interrupted(signal.SIGINT),
    143: Interrupted(signal.SIGTERM),
}


@pytest.mark.parametrize("status", STATUSES)
def test_the_exit_statuses_are_the_documented_ones(status, monkeypatch, capsys):
    def command(words):
        if STATUSES[status] is not None:
            raise STATUSES[status]

    monkeypatch.setitem(COMMANDS, "export", command)
    assert main(["export"]) == status
    err = capsys.readouterr().err
    assert err.count("\n") == (status != 0) and err.startswith("revffn export: " if status else "")
    table = (ROOT / "docs" / "command_line.md").read_text()
    assert re.findall(r"^\| (\d+) \|", table, re.MULTILINE) == [str(documented) for documented in STATUSES]


def test_every_command_is_documented():
    table = (ROOT / "docs" / "command_line.md").read_text()
    assert set(re.findall(r"^\| `(\w+)", table, re.MULTILINE)) == set(COMMANDS)


SLOW_IMPORTS = [pytest.param(name, marks=pytest.mark.slow) for name in ("numpy", "transformers", "trl", "datasets")]


@pytest.mark.parametrize("name", ["pydantic", "torch._C", *SLOW_IMPORTS])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_packages_are_imported_is_one_line(recipe_file, tmp_path, number, name):
    """Sent when Python looks for the package."""
    code = (
        "import os, signal, sys\n"
        "sys.argv[0] = 'revffn'\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored\n"
        "def hook(event, args):\n"
        f"    if event == 'import' and args[0] == {name!r}: os.kill(os.getpid(), {int(number)})\n"
        "sys.addaudithook(hook)\n"
        "from revffn.__main__ import main\n"
        f"sys.exit(main(['train', {str(recipe_file())!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + number
    lines = [line for line in done.stderr.splitlines() if line.startswith("revffn")]
    assert lines == [f"revffn train: stopped by {number.name}."] and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["trl", "datasets", "accelerate"])
def test_without_the_extra_train(recipe_file, package):
    code = f"import sys; sys.argv[0] = 'revffn'; sys.modules['{package}'] = None; "
    code += f"from revffn.__main__ import main; sys.exit(main(['train', {str(recipe_file())!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("revffn")]
    assert done.returncode == 2 and "pip install 'revffn[train]'" in line and "Traceback" not in done.stderr


def test_as_a_program(recipe_file, tmp_path):
    """Outside of this process too: the exit status, one line and no traceback, in a folder of its own."""
    recipe = recipe_file("optimiser: {}\n")
    done = subprocess.run(
        [sys.executable, "-m", "revffn", "train", str(recipe)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stdout == ""
    # Libraries underneath may have something to say about themselves when they are imported.
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("revffn")]
    assert f"{recipe} line 12: unknown key 'optimiser'" in line and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


# --- a model and its data, without a recipe --------------------------------------------------------------------------

NEITHER = {
    "a model alone": (["{model}"], "is a model. Name its data too: revffn train {model} DATA"),
    "a name of the Hub alone": (["org/model"], "Name its data too: revffn train org/model DATA"),
    "data alone": (["{data}"], "is data. Name a model before it: revffn train MODEL {data}"),
    "a folder alone": (["."], "is a folder. Name a model before it"),
    "a recipe and data": (["recipe.yaml", "{data}"], "the recipe recipe.yaml names model and data itself"),
    "three words": (["{model}", "{data}", "more"], "expected a model and its data, got 3 words"),
    "data that is not there": (["{model}", "nothing.jsonl"], "nothing.jsonl"),
    "a model that is not there": (["nowhere", "{data}", "--data.heldout", "8"], "'nowhere'"),
    "an unknown setting": (["{model}", "{data}", "--data.paths", "x"], "Did you mean data.path?"),
}


@pytest.mark.parametrize("name", NEITHER)
def test_neither_a_recipe_nor_a_model_with_data(refused, model_folder, data_file, name):
    words, message = NEITHER[name]
    there = {"model": model_folder("qwen2_moe"), "data": data_file()}
    assert message.format(**there) in refused("train", *(word.format(**there) for word in words))


SMALL = "--model.dtype float32 --data.heldout 8 --data.max_length 64 --training.num_steps 2".split()


def test_a_model_and_its_data(model_folder, data_file, tmp_path, monkeypatch, capsys):
    """The folder is named for both; a dry run says the plan and writes nothing; what was chosen is recorded."""
    monkeypatch.chdir(tmp_path)
    model, data = model_folder("qwen2_moe"), data_file()
    words = ["train", str(model), str(data), *SMALL, "--training.batch_size", "4"]
    before = sorted(tmp_path.rglob("*"))
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    name = f"{model.name}-{data.name.partition('.')[0]}"
    for words_said in ("Data: ", "Tiles: ", "Memory of the largest step, 4 x ", "innovation m=2", f"runs/{name}"):
        assert words_said in said
    assert main(words) == 0
    recorded = json.loads((tmp_path / "runs" / name / "run.json").read_text())
    assert recorded["finished"] and recorded["config"]["memory"]["weights"] == "device"
    assert recorded["config"]["reversible"]["coupling"] == "innovation"


def test_a_dry_run_is_refused_as_the_run_would_be(recipe_file, refused):
    line = refused("train", recipe_file(), "--dry-run", "--memory.limit", "0.1MB")
    assert "What would fit" in line


def test_weights_wait_on_the_host_where_they_fit_only_so(tmp_path, tokenizer, data_file, monkeypatch, capsys):
    """At what the resident run takes and one byte below it; a place that is named is kept, and refused there."""
    monkeypatch.chdir(tmp_path)
    sizes = dict(num_hidden_layers=8, hidden_size=64, intermediate_size=64, vocab_size=512)
    load_config("olmoe-1b-7b", **sizes, pad_token_id=0, eos_token_id=2).save_pretrained("deep")
    tokenizer.save_pretrained("deep")
    words = ["deep", str(data_file()), *SMALL]
    config, _ = run_from_words([*words, "--memory.weights", "device", "--memory.limit", "1GiB"])
    resident = check(config).plan.peak_bytes
    for less, place in ((0, "device"), (1, "host")):
        limited = [*words, "--memory.limit", f"{(resident - less) / 1e6:.6f}MB"]
        assert check(run_from_words(limited)[0]).config.memory.weights == place
        assert main(["train", *limited, "--dry-run"]) == 0
        assert ("Weights: in host memory" in capsys.readouterr().out) == (place == "host")
    named = [*limited, "--memory.weights", "device", "--force"]
    assert check(run_from_words(named)[0]).config.memory.weights == "device"
