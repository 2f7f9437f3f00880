"""Recipes: what a value may look like, and that every mistake is one line with its place and a remedy.

Run: pytest tests/training/test_recipe.py
"""

import json
import math
import random
import re
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
from mutations import number_of
from transformers import SchedulerType, Trainer

from revffn import ReversibleConfig
from revffn.command_line import from_words, leaves, load_run_config
from revffn.config import groups_of
from revffn.memory.amounts import parse_bytes
from revffn.memory.plan import choose_tile, plan, tiled
from revffn.models.known import load_config
from revffn.options import EvaluateConfig, PlanConfig, UpcycleConfig
from revffn.recipe import InputError, OptimizerConfig, RunConfig, RunReversibleConfig, with_kept, with_tile
from revffn.training.preflight import check_schedule
from revffn.training.room import method_of
from revffn.training.run import sft_arguments

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))

TEXT = """\
# a comment
model: {path: some/model}
reversible:
  side_bits: [1, 2, 2]
  coupling: none
optimizer:
  learning_rate: 1e-5
training:
  freeze_router: null
  resume: no
  num_steps: 10
"""


@pytest.fixture
def recipe(tmp_path):
    def write(text=TEXT):
        (tmp_path / "mine.yaml").write_text(text)
        return tmp_path / "mine.yaml"

    return write


def test_values_come_with_their_types(recipe):
    config = load_run_config(recipe())
    assert config.model.path == "some/model"
    assert config.reversible.side_bits == [1, 2, 2] and config.reversible.coupling == "none"
    # PyYAML alone reads 1e-5 as a text.
    assert config.optimizer.learning_rate == 1e-5
    assert config.training.freeze_router is None and config.training.resume is False
    assert config.training.output_dir == "runs/mine"


def test_overrides_win(recipe):
    words = "--optimizer.learning-rate=2e-5 --training.resume true --reversible.side_bits 3 --model.path x".split()
    config = load_run_config(recipe(), words)
    assert config.optimizer.learning_rate == 2e-5 and config.training.resume is True
    assert config.reversible.side_bits == 3 and config.model.path == "x"


def test_null_coupling_is_the_plain_model(recipe):
    assert load_run_config(recipe(), ["--reversible.coupling", "null"]).reversible.resolve(calibrated=True) is None
    assert (
        load_run_config(recipe("model: {path: x}\nreversible: {coupling: null}")).reversible.resolve(calibrated=True)
        is None
    )


def test_tiles_are_automatic_until_a_number_is_put(recipe):
    config = load_run_config(recipe())
    assert config.reversible.tile_tokens == "auto"
    for half in (config, with_tile(config, 512), with_kept(config, 3)):
        with pytest.raises(ValueError, match="no number yet"):
            half.reversible.resolve(calibrated=True)
    told = dict(coupling="none", side_bits=[1, 2, 2])
    for size in (None, 512):
        resolved = with_kept(with_tile(config, size), 3).reversible.resolve(calibrated=True)
        assert resolved == ReversibleConfig(tile_tokens=size, kept_layers=3, **told)
    for words, size in (("2048", 2048), ("null", None), ("64", 64), ("auto", "auto")):
        assert load_run_config(recipe(), ["--reversible.tile_tokens", words]).reversible.tile_tokens == size
    for words, number in (("2", 2), ("0", 0), ("auto", "auto")):
        assert load_run_config(recipe(), ["--reversible.kept_layers", words]).reversible.kept_layers == number
    # The library itself takes numbers.
    for name in ("tile_tokens", "kept_layers"):
        with pytest.raises(ValueError, match=f"{name} must be .*got 'auto'"):
            ReversibleConfig(**{name: "auto"})


BAD_RECIPES = {
    "unknown key": (
        TEXT.replace("learning_rate", "learning_rat"),
        "line 7: unknown key 'optimizer.learning_rat'. Did you",
    ),
    "unknown section": (
        TEXT.replace("optimizer:", "optimiser:"),
        "line 6: unknown key 'optimiser'. Did you mean optimizer?",
    ),
    "key in the wrong section": (TEXT.replace("freeze_router", "packing"), "Did you mean data.packing?"),
    "a key of before": (TEXT.replace("coupling: none", "max_drift: 0.1"), "line 5: reversible.max_drift is gone"),
    "a key that moved": (
        TEXT.replace("coupling: none", "query_stream: left"),
        "line 5: unknown key 'reversible.query_stream'. Did you mean reversible.cross_branch.query_stream?",
    ),
    "what calibration finds": (
        TEXT.replace("coupling: none", "grid_growth: 0"),
        "line 5: reversible.grid_growth is no setting of a run: calibration finds it. Leave the key out.",
    ),
    "what is settled": (
        TEXT.replace("coupling: none", "random_sign: true"),
        "line 5: reversible.random_sign is no setting of a run: experiments have settled it",
    ),
    "unknown in a group": (
        TEXT.replace("coupling: none", "cross_branch: {query: left}"),
        "line 5: unknown key 'reversible.cross_branch.query'. Did you mean reversible.cross_branch.query_stream?",
    ),
    "wrong type": (TEXT.replace("num_steps: 10", "num_steps: many"), "line 11: training.num_steps: "),
    "wrong choice": (
        TEXT.replace("coupling: none", "coupling: no"),
        "line 5: reversible.coupling: expected innovation, cross_branch, none or null, got 'no'.",
    ),
    "wrong in a list": (
        TEXT.replace("[1, 2, 2]", "[1, x]"),
        "line 4: reversible.side_bits: expected a whole number or a",
    ),
    "a list for one": (TEXT.replace("1e-5", "[1, 2]"), "line 7: optimizer.learning_rate takes one value, got '1 2'"),
    "out of range": (TEXT.replace("1e-5", "-1"), "line 7: optimizer: learning_rate must be at least 0"),
    "range of the core": (TEXT.replace("[1, 2, 2]", "9"), "line 4: reversible: side_bits must be 0 to 4"),
    "nothing to train": (
        TEXT.replace("none", "null").replace("num_steps", "stage1_steps"),
        "line 11: training.stage1_steps",
    ),
    "nested": (TEXT.replace("1e-5", "{a: 1}"), "line 7: optimizer.learning_rate takes a value"),
    "twice": (TEXT + "  resume: yes\n", "line 12: training.resume is already set"),
    "not a section": ("model: some/model\n", "line 1: model is a section"),
    "a list": ("- a\n", "a recipe is a mapping of the sections model, reversible"),
    "not YAML": (TEXT + "  a: [1\n", "not valid YAML"),
    "empty": ("", "the section model has no path"),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_mistakes_in_a_recipe_are_named_with_their_line(recipe, name):
    text, message = BAD_RECIPES[name]
    file = recipe(text)
    with pytest.raises(InputError) as error:
        load_run_config(file)
    assert message in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


BAD_WORDS = {
    "unknown key": ("--optimizer.learning_rat 1", "command line: unknown key 'optimizer.learning_rat'. Did you mean"),
    "no section": ("--learning_rate 1", "Did you mean optimizer.learning_rate?"),
    "wrong type": ("--optimizer.beta1 x", "command line: optimizer.beta1: expected a number, like 2e-5, got 'x'."),
    "no value": ("--optimizer.beta1", "command line: optimizer.beta1 needs a value: a number, like 2e-5."),
    "half a number": ("--training.num_steps 2.5", "training.num_steps: expected a whole number or null, got '2.5'."),
    "too many": ("--optimizer.beta1 0.1 0.2", "command line: optimizer.beta1 takes one value"),
    "no size of a tile": (
        "--reversible.tile_tokens autoo",
        "reversible.tile_tokens: expected a whole number, auto or null, got 'autoo'.",
    ),
    "a negative tile": ("--reversible.tile_tokens -3", "null (the whole batch) or at least 1, got -3. Leave it out"),
    "no number of layers": (
        "--reversible.kept_layers all",
        "reversible.kept_layers: expected a whole number or auto, got 'all'.",
    ),
    "negative layers": ("--reversible.kept_layers -1", "(as many as fit) or at least 0, got -1"),
    "a section": (
        "--reversible 3",
        "command line: reversible is a section. Name a key of it, like --reversible.coupling.",
    ),
    "a group": ("--reversible.cross_branch", "command line: reversible.cross_branch is a section. Name a key of it"),
    "no option": ("optimizer.beta1 1", "command line: expected --section.key value"),
    "conflict": (
        "--training.activation_checkpointing true",
        "command line: training.activation_checkpointing goes with",
    ),
}


@pytest.mark.parametrize("name", BAD_WORDS)
def test_mistakes_on_the_command_line_are_named(recipe, name):
    words, message = BAD_WORDS[name]
    with pytest.raises(InputError) as error:
        load_run_config(recipe(), words.split())
    assert message in str(error.value) and "\n" not in str(error.value)


PIECES = (
    "model: {path: x}", "path: x", "training:", "  num_steps: 3", "reversible:", "  cross_branch:",
    "    stream_maps: yes", "  cross_branch: {query_stream: right}", "- 1", "[1, 2", "}", ": :", "\t", "&a *a",
    "!!python/object:os.system x", "~", "optimizer: {learning_rate: .inf}", "  seed: 1e400", "  side_bits: [1, [2]]",
    "  side_bits: {}", "? a : b", "é\u2028", "data: null", "data: []", "  true: false", "  1: 2",
    "memory: {limit: 9999999999999999999999GiB, force: maybe}",
)  # fmt: skip


def test_a_mutated_recipe_is_taken_or_refused_in_a_line(tmp_path):
    """Lines of a good recipe and strange ones, in any order and cut anywhere."""
    numbers = random.Random(0)
    taken, file = 0, tmp_path / "mine.yaml"
    for _ in range(number_of("recipes")):
        lines = TEXT.splitlines()
        for _ in range(numbers.randrange(4)):
            place = numbers.randrange(len(lines) + 1)
            lines[place : place + numbers.randrange(2)] = [numbers.choice(PIECES)]
        text = "\n".join(lines)
        if numbers.random() < 0.3:
            text = text[: numbers.randrange(len(text) + 1)]
        file.write_text(text)
        words = numbers.choice(
            [[], ["--training.num_steps"], ["--model.path=x"], ["--reversible.side_bits", "1", "x"]]
        )
        try:
            taken += isinstance(load_run_config(file, words), RunConfig)
        except InputError as error:
            assert "\n" not in str(error) and str(error), text
    assert 0.05 < taken / number_of("recipes") < 0.9


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no such recipe"):
        load_run_config(tmp_path / "nothing.yaml")


def help_of(config, word, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        from_words(config, [word], "revffn a command")
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_has_first_what_a_newcomer_needs(capsys):
    """On two screens; everything is in the other, in full."""
    out, all_of_it = (help_of(RunConfig, word, capsys) for word in ("--help", "--help-all"))
    assert "--training.batch_size" in out and "--optimizer.beta1" not in out and "--help-all" in out
    assert len(out.splitlines()) <= 80 and max(map(len, out.splitlines())) <= 100
    for name in leaves(RunConfig):
        assert f"--{name} " in all_of_it
    assert "--reversible.cross_branch.query_stream left | right  (left)" in all_of_it
    assert "--training.num_epochs X  (1.0)" in all_of_it and "--training.seed N  (0)" in all_of_it
    assert "adamw's decay rate of the first moment." in all_of_it


@pytest.mark.parametrize("config", [PlanConfig, EvaluateConfig, UpcycleConfig])
def test_help_of_other_commands_has_every_option_with_its_text(config, capsys):
    lines = help_of(config, "--help", capsys).splitlines()
    for name in leaves(config):
        (place,) = [i for i, line in enumerate(lines) if line.startswith(f"--{name} ")]
        assert lines[place + 1].startswith("    ") and len(lines[place + 1]) > 8


def test_switches_need_no_value():
    words = "--model x --batch 2 --tokens 8".split()
    assert from_words(PlanConfig, words, "revffn plan") == PlanConfig(model="x", batch=2, tokens=8)
    changed = from_words(PlanConfig, [*words, "--no-alternatives", "--json", "--tile-tokens", "0"], "revffn plan")
    assert changed == PlanConfig(model="x", batch=2, tokens=8, alternatives=False, json=True, tile_tokens=0)


def test_few_dials():
    """What a run may say of the reversible blocks; what calibration finds and experiments settled is not offered."""
    offered = list(leaves(RunReversibleConfig))
    own = [f"cross_branch.{field.name}" for field in fields(groups_of(ReversibleConfig)["cross_branch"])]
    assert offered == ["coupling", "side_bits", "offload_inputs", "tile_tokens", "kept_layers", "verify", *own]
    assert [field.name for field in fields(RunReversibleConfig)] == [field.name for field in fields(ReversibleConfig)]


def test_groups_in_a_recipe(recipe):
    text = TEXT.replace("coupling: none", "cross_branch:\n    query_stream: right\n    stream_maps: null")
    config = load_run_config(recipe(text), ["--reversible.cross_branch.num_iterations", "4"])
    told = replace(config.reversible.cross_branch, query_stream="right", num_iterations=4)
    assert config.reversible.cross_branch == told and told.stream_maps is None


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_shipped_recipes_are_valid_and_described(file):
    assert isinstance(load_run_config(file), RunConfig)
    assert file.name in (file.parent / "README.md").read_text()


def test_recipes_are_shipped():
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("file", [file for file in RECIPES if "_cpu" not in file.stem], ids=lambda file: file.name)
def test_gpu_recipes_fit_the_memory_they_name(file):
    """In their names, or in their first line. With the tile that `auto` chooses there, which is the whole batch on one
    GPU; on several it has room for a rank that receives twice its part."""
    config = load_run_config(file)
    assert config.reversible.tile_tokens == "auto"
    hf_config = load_config(config.model.path.removesuffix("-Chat").removesuffix("-v0.1"))
    named = re.search(r"_(?:(\d+)x)?(\d+gb)$", file.stem)
    number, named = named.groups() if named else (None, re.search(r"GPU of (\d+ GB)", file.read_text())[1])
    gpus, limit = int(number or 1), parse_bytes(named.replace(" ", ""))
    assert (gpus > 1) == (config.parallel.strategy is not None)
    method = method_of(with_tile(config, None), hf_config)
    if gpus > 1:
        assert f"torchrun --nproc-per-node {gpus} -m revffn train recipes/{file.name}" in file.read_text()
        method = replace(method, gpus=gpus, parallel=config.parallel.strategy)
    step = config.training.batch_size, config.data.max_length
    tile = choose_tile(hf_config, *step, method, limit_bytes=limit)
    assert tile.tile_tokens is None or gpus > 1
    method = tiled(method, tile.tile_tokens)
    assert plan(hf_config, *step, method, with_alternatives=False).total_bytes <= limit


# --- schedules -------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "constant": ({}, lambda i: 1.0),
    "constant_with_warmup": ({}, lambda i: min(1.0, i / 2)),
    "linear": ({}, lambda i: i / 2 if i < 2 else (8 - i) / 6),
    "cosine": ({}, lambda i: i / 2 if i < 2 else (1 + math.cos(math.pi * (i - 2) / 6)) / 2),
    "cosine_with_min_lr": (
        {"min_lr_rate": 0.1},
        lambda i: i / 2 if i < 2 else 0.1 + 0.9 * (1 + math.cos(math.pi * (i - 2) / 6)) / 2,
    ),
    "inverse_sqrt": ({"timescale": 2}, lambda i: i / 2 if i < 2 else math.sqrt(2 / i)),
    "warmup_stable_decay": (
        {"num_decay_steps": 4, "decay_type": "linear"},
        lambda i: i / 2 if i < 2 else 1.0 if i < 4 else (8 - i) / 4,
    ),
    "polynomial": ({"power": 2, "lr_end": 0.0}, lambda i: i / 2 if i < 2 else ((8 - i) / 6) ** 2),
    "cosine_with_restarts": (
        {"num_cycles": 2},
        lambda i: i / 2 if i < 2 else (1 + math.cos(math.pi * (2 * (i - 2) / 6 % 1.0))) / 2,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_follow_the_schedule(name, recipe_file):
    """Of a run's eight steps, two of them warming up, against the formula."""
    kwargs, formula = SCHEDULES[name]
    words = ["--training.num_steps", "8", "--optimizer.schedule", name, "--optimizer.warmup_ratio", "0.25"]
    words += ["--optimizer.schedule_kwargs", json.dumps(kwargs)] if kwargs else []
    config = load_run_config(recipe_file(), words)
    check_schedule(config)
    run = SimpleNamespace(config=config, output_dir=Path("run"))
    arguments = sft_arguments(run, 2, None)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    trainer = SimpleNamespace(args=arguments, optimizer=optimizer, lr_scheduler=None)
    schedule = Trainer.create_scheduler(trainer, 8, optimizer)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"] / arguments.learning_rate)
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([formula(i) for i in range(8)])


def test_every_schedule_of_transformers_is_accepted_or_known_not_to_fit():
    hints = get_type_hints(OptimizerConfig)["schedule"]
    others = {"reduce_lr_on_plateau", "greedy"}  # need a loss at every step
    assert {kind.value for kind in SchedulerType} <= {*get_args(hints), *others}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer.schedule_kwargs", "x"], "must be a JSON object"),
        (["--optimizer.schedule_kwargs", "[1]"], "must be a JSON object"),
        (["--optimizer.schedule_kwargs", '{"cycles": 2}'], "optimizer.schedule cosine does not go with"),
        (["--optimizer.schedule", "cosine_with_min_lr"], "optimizer.schedule cosine_with_min_lr does not go with"),
        (["--optimizer.schedule", "polynomial", "--optimizer.learning_rate", "1e-8"], "a learning rate of 1e-08"),
        (["--optimizer.schedule", "constant", "--optimizer.schedule_kwargs", '{"a": 1}'], "constant takes none"),
    ],
)
def test_schedules_that_cannot_be(words, message, recipe_file, refused):
    assert message in refused("train", recipe_file(), *words)
