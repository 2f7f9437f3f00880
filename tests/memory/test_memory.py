"""The planner: what is counted is exact, what is predicted is within 3 % of the full simulated step, and what it says
to do helps.

Run: pytest tests/memory/test_memory.py; the grid of benchmarks/planner.py with -m slow (about half an hour).
"""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from revffn import ReversibleConfig
from revffn.__main__ import main
from revffn.memory import measure as memory
from revffn.memory import plan as planner
from revffn.memory.amounts import parse_bytes
from revffn.memory.answers import ACCEPTED_ERROR, USUAL_TILE, Comparison
from revffn.memory.live_bytes import PARTS
from revffn.memory.measure import count
from revffn.memory.plan import changed_method, check, choose_tile, plan, tiled, what_would_fit
from revffn.memory.predict import Predictor
from revffn.memory.simulation import Method, simulate_step
from revffn.models import losses
from revffn.models.known import known_models, load_config

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PUBLISHED = {
    "deepseek-v2-lite": 15_706_484_224,
    "gpt-oss-20b": 20_914_757_184,
    "mixtral-8x7b": 46_702_792_704,
    "olmoe-1b-7b": 6_919_161_856,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen3-30b-a3b": 30_532_122_624,
}
"""Parameters of the checkpoints on the Hub (elements of their safetensors files)."""


def benchmark(name: str):
    """A script of benchmarks/, as a module."""
    sys.path.insert(0, str(BENCHMARKS))  # it imports its neighbours
    try:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


GRID = benchmark("planner")


def reversible(**settings) -> Method:
    other = {name: settings.pop(name) for name in ("optimizer", "rounding") if name in settings}
    return Method(reversible=ReversibleConfig.from_dict({"tile_tokens": 256, **settings}), **other)


# --- counted ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", known_models())
def test_parameters_are_exact(name):
    """The planner's count, the model on the meta device, and the published number are one."""
    config = load_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    counts = count(config, Method(name="plain"))
    assert counts.num_parameters == sum(p.numel() for p in model.parameters()) == PUBLISHED[name]
    tensors = [*model.parameters(), *model.buffers()]
    assert counts.weight_bytes == sum(t.nbytes for t in tensors)
    assert counts.trainable_bytes == sum(p.nbytes for p in model.parameters())


def test_every_known_model_is_published():
    assert set(PUBLISHED) == set(known_models())


@pytest.mark.parametrize("optimizer, rounding, bytes_per_parameter", [
    ("sgd", "stochastic", 0),
    ("adamw", "stochastic", 8),
    ("adamw", "master", 12),
    ("sgd", "master", 4),
])  # fmt: skip
def test_optimizer_state_is_exact(optimizer, rounding, bytes_per_parameter):
    counts = count(load_config("olmoe-1b-7b"), Method(name="plain", optimizer=optimizer, rounding=rounding))
    assert counts.optimizer_bytes == bytes_per_parameter * counts.num_parameters


def test_a_tied_head_is_counted_once():
    config = load_config("olmoe-1b-7b", tie_word_embeddings=True)
    head = config.vocab_size * config.hidden_size
    assert count(config, Method(name="plain")).num_parameters == PUBLISHED["olmoe-1b-7b"] - head


def test_low_rank_trains_little():
    counts = count(load_config("olmoe-1b-7b"), Method(name="plain", optimizer="adamw", lora_rank=16))
    config = load_config("olmoe-1b-7b")
    # Four square maps per layer, each with two factors.
    assert counts.num_trainable == 4 * 2 * 16 * config.hidden_size * config.num_hidden_layers
    assert counts.optimizer_bytes == 8 * counts.num_trainable


# --- predicted -------------------------------------------------------------------------------------------------------

TRANSFORMERS = dict(optimizer_in_backward=False, linear_cross_entropy=False)
# More layers than the planner measures, more tiles, a last tile that is not full; all at full width.
SMALL = {
    "innovation": ("olmoe-1b-7b", 5, 9, 128, reversible()),
    "cross_branch, left": ("olmoe-1b-7b", 5, 5, 256, reversible(coupling="cross_branch", optimizer="sgd")),
    # Attention sinks: scores of T x T.
    "one long sequence": ("gpt-oss-20b", 5, 1, 4000, reversible(optimizer="sgd", tile_tokens=512)),
    "none": ("deepseek-v2-lite", 5, 5, 256, reversible(coupling="none", optimizer="sgd")),
    "checkpointing": ("qwen1.5-moe-a2.7b", 6, 3, 256, Method(name="checkpointing", optimizer="sgd", **TRANSFORMERS)),
    "plain": ("mixtral-8x7b", 6, 2, 512, Method(name="plain", optimizer="sgd", **TRANSFORMERS)),
    "low rank": (
        "qwen3-30b-a3b", 6, 4, 512, Method(name="checkpointing", optimizer="adamw", lora_rank=16, **TRANSFORMERS)
    ),
}  # fmt: skip


def held(model, num_layers, batch, tokens, method):
    """The plan of so many layers, which the simulated step holds to."""
    config = load_config(model, num_hidden_layers=num_layers)
    assert num_layers > memory.shallow(config, method)[0].num_hidden_layers
    answer = plan(config, batch, tokens, method, with_alternatives=False)
    comparison = check(config, batch, tokens, method, answer)
    assert abs(comparison.relative_error) <= ACCEPTED_ERROR, comparison.table()
    assert comparison.problem is None, comparison.table()
    return answer


@pytest.mark.parametrize("losses", [("router_aux_loss",), ("router_z_loss",), ("router_aux_loss", "router_z_loss")])
def test_losses_of_the_routers_are_predicted(losses):
    """What they add to the peak, which is little beside it, and grows with the depth."""
    without = reversible(optimizer="sgd")
    method = replace(without, **dict.fromkeys(losses, True))
    more = []
    for num_layers in (6, 9):
        config = load_config("qwen3-30b-a3b", num_hidden_layers=num_layers)
        predicted, simulated = (
            kind(method) - kind(without)
            for kind in (
                lambda way, config=config: plan(config, 8, 256, way, with_alternatives=False).peak_bytes,
                lambda way, config=config: simulate_step(config, 8, 256, way)["peak_bytes"],
            )
        )
        assert predicted == pytest.approx(simulated, rel=0.01)
        more.append(predicted)
    logits = 8 * 256 * 128 * 2
    assert more[0] >= 4 * logits and more[1] - more[0] >= 3 * logits


@pytest.mark.parametrize("case", SMALL)
def test_prediction_against_simulation(case):
    """Few layers weigh little, so the same 3 % are asked more of the rest than at full depth."""
    held(*SMALL[case])


@pytest.mark.parametrize(
    "batch, tokens, tile",
    # Tiles of few tokens, so that three of them are less than a chunk of the loss; tiles of so many that the
    # embedding's gradient is more than the streams of three of them, and less than those of four.
    [(26, 128, 256), (1, 3584, 256), (12, 2048, 2048)],
    ids=["batch", "length", "large tiles"],
)
def test_every_phase_is_extended_rightly(batch, tokens, tile):
    """What is extended is as if measured, in the phases that are not the peak too."""
    config, method = load_config("olmoe-1b-7b", num_hidden_layers=4), reversible(tile_tokens=tile)
    extended, _ = Predictor("", config, method).phases(batch, tokens)
    measured = memory.measure(config, method, batch, tokens)
    assert {"embedding", "forward", "loss", "top", "optimizer"} < set(extended) <= set(measured)
    for phase, parts in extended.items():
        assert sum(parts.values()) == pytest.approx(sum(measured[phase].values()), rel=ACCEPTED_ERROR), phase


def test_the_largest_batch_and_sequence_just_fit():
    config, method = load_config("olmoe-1b-7b", num_hidden_layers=5), reversible()
    gpu_bytes = plan(config, 40, 256, method, with_alternatives=False).total_bytes
    answer = plan(config, 4, 256, method, gpu_bytes=gpu_bytes, with_alternatives=False)
    assert answer.largest_batch == 40

    def total(tokens: int) -> int:
        return plan(config, 1, tokens, method, with_alternatives=False).total_bytes

    assert total(answer.longest_sequence) <= gpu_bytes < total(answer.longest_sequence + 1)


def test_masks_of_the_square_of_the_length_are_seen():
    """transformers makes this model a mask of T x T, which no layer reads; a small vocabulary leaves it the peak."""
    config = load_config("qwen1.5-moe-a2.7b", num_hidden_layers=5, vocab_size=4096)
    method = Method(name="checkpointing", optimizer="sgd")
    answer = plan(config, 1, 100_000, method, with_alternatives=False)
    assert answer.phase == "embedding"
    comparison = check(config, 1, 100_000, method, answer)
    assert comparison.problem is None, comparison.table()


@pytest.mark.parametrize("error, wrong", [(0.029, False), (-0.029, False), (0.031, True), (-0.031, True)])
def test_the_checker_fails_when_it_should(error, wrong):
    simulated = dict.fromkeys(PARTS, 10**6)
    predicted = simulated | {"weights": 10**6 + round(error * 10**6 * len(PARTS))}
    comparison = Comparison(predicted, simulated, 1.0)
    assert comparison.relative_error == pytest.approx(error)
    assert (comparison.problem is not None) == wrong


@pytest.mark.parametrize("fault", ["one expert counted", "gradients forgotten", "depth forgotten"])
def test_a_planner_that_is_wrong_is_found_out(fault, monkeypatch):
    """The comparison above is sharp enough to see what planners usually get wrong."""
    config = load_config("olmoe-1b-7b", num_hidden_layers=6)
    usual = Method(name="plain", optimizer="sgd", **TRANSFORMERS)
    answer = plan(config, 1, 256, usual, with_alternatives=False)
    if fault == "one expert counted":
        lean = load_config("olmoe-1b-7b", num_hidden_layers=6, num_experts=8)
        answer = plan(lean, 1, 256, usual, with_alternatives=False)
    elif fault == "gradients forgotten":
        answer = replace(answer, parts=answer.parts | {"gradients": 0})
    else:
        answer = plan(load_config("olmoe-1b-7b", num_hidden_layers=5), 1, 256, usual, with_alternatives=False)
    assert check(config, 1, 256, usual, answer).problem is not None


# --- the grid --------------------------------------------------------------------------------------------------------


def test_the_committed_grid():
    """30 cases, those of the script, each within 3 %; its numbers belong together."""
    results = json.loads(GRID.FILE.read_text())
    assert len(results) == len(GRID.GRID) == 30
    assert list(results) == [GRID.name_of(case) for case in GRID.GRID]
    for name, result in results.items():
        simulated, predicted = result["simulated"], result["predicted"]
        assert simulated["peak_bytes"] == sum(simulated["parts"].values()), name
        assert predicted["peak_bytes"] == sum(predicted["parts"].values()), name
        assert result["relative_error"] == GRID.errors(predicted, simulated)["relative_error"], name
        assert abs(result["relative_error"]) <= ACCEPTED_ERROR, name
        # The left form reports its contraction, one float32 per layer, which stays until the next step.
        left = result["reversible"].get("query_stream") == "left"
        assert simulated["leaked_bytes"] == 4 * left * load_config(result["model"]).num_hidden_layers, name


def test_the_grid_covers_what_it_says():
    models, couplings, optimizers = set(), set(), set()
    for model, _, _, settings, optimizer, _ in GRID.GRID:
        couplings.add((model, settings["coupling"]))
        optimizers.add(optimizer)
        models.add(model)
    assert models == set(known_models())
    assert len(couplings) == 3 * len(models)
    assert optimizers == {"adafactor", "adamw", "adamw8bit", "sgd"}


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID.GRID, ids=GRID.name_of)
def test_grid(case):
    assert abs(GRID.run_case(case)["relative_error"]) <= ACCEPTED_ERROR


# --- tiles by budget -------------------------------------------------------------------------------------------------

TILED = {
    "innovation": ("olmoe-1b-7b", 30, 1024, reversible(optimizer="sgd")),
    "none": ("olmoe-1b-7b", 17, 3000, reversible(coupling="none", optimizer="sgd")),
    "one sequence": ("olmoe-1b-7b", 1, 40_000, reversible(optimizer="sgd")),
}
"""A tile is whole sequences, some of them, or a part of one. Whole batches are between powers of two."""


@pytest.mark.parametrize("case", TILED)
def test_auto_takes_the_largest_tile_that_fits(case, monkeypatch):
    """Against the predictions of all sizes: at each one's own total, at one byte less, and beyond both ends."""
    monkeypatch.setattr(planner, "SMALLEST_TILE", 2048)  # smaller ones take long
    model, batch, tokens, method = TILED[case]
    config = load_config(model, num_hidden_layers=3)
    sizes = [None, *(size for size in (32768, 16384, 8192, 4096, 2048) if size < batch * tokens)]
    totals = [plan(config, batch, tokens, tiled(method, size), with_alternatives=False).total_bytes for size in sizes]
    assert totals[1:] == sorted(totals[1:], reverse=True)
    chosen = []
    for limit in sorted({total - less for total in totals for less in (0, 1)} | {2 * max(totals)}):
        fitting = [size for size, total in zip(sizes, totals, strict=True) if total <= limit]
        choice = choose_tile(config, batch, tokens, method, limit_bytes=limit)
        if fitting:
            assert choice.tile_tokens == fitting[0] and "fits" in choice.reason, (limit, choice)
            chosen.append(choice.tile_tokens or batch * tokens)
        else:
            assert choice.reason.startswith("none fits"), (limit, choice)
            # The usual one is the smallest here.
            assert totals[sizes.index(choice.tile_tokens)] == min(totals)
    assert chosen == sorted(chosen) and chosen[-1] == batch * tokens
    assert len(set(chosen)) > 2


def test_auto_on_a_cpu_takes_no_more_than_is_usual():
    config, method = load_config("olmoe-1b-7b", num_hidden_layers=3), reversible(optimizer="sgd")
    cpu = dict(reserve_bytes=0, largest=USUAL_TILE)
    enough = plan(config, 16, 512, tiled(method, USUAL_TILE), with_alternatives=False).peak_bytes
    for limit, expected in ((2**50, USUAL_TILE), (enough, USUAL_TILE), (enough - 1, USUAL_TILE // 2)):
        assert choose_tile(config, 16, 512, method, limit_bytes=limit, **cpu).tile_tokens == expected
    assert "CPU" in choose_tile(config, 16, 512, method, limit_bytes=2**50, **cpu).reason


def test_auto_measures_nothing_where_the_weights_do_not_fit(monkeypatch):
    monkeypatch.setattr(memory, "run_step", None)
    choice = choose_tile(load_config("olmoe-1b-7b"), 4, 2048, Method(), limit_bytes=2**30)
    assert choice.tile_tokens == USUAL_TILE and "weights" in choice.reason


def test_few_chunks_of_the_loss_stand_for_all(monkeypatch):
    """A measurement leaves out most chunks, and is as if it had not."""
    config, method = load_config("olmoe-1b-7b", num_hidden_layers=2), reversible(optimizer="sgd")
    assert 4 * losses.chunk_size(4500, config.vocab_size) < 4500
    few = memory.measure(config, method, 3, 1500)
    monkeypatch.setattr(memory, "few_starts", losses.chunk_starts)
    # Another key of the cache, the same step.
    every = memory.measure(config, reversible(optimizer="sgd", num_iterations=17), 3, 1500)
    assert few == every


# --- what would fit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_what_would_fit_fits(optimizer):
    """Every change, made, brings the run under the limit; where a batch is named, one sequence more is too many."""
    config, method = load_config("olmoe-1b-7b", num_hidden_layers=5), reversible(optimizer=optimizer, tile_tokens=1024)
    with_adamw = count(config, reversible(optimizer="adamw"))
    least_with_adamw = with_adamw.weight_bytes + with_adamw.optimizer_bytes
    # Room for the weights and some streams; not for AdamW's states, nor for tiles as large as they are.
    gpu_bytes = plan(config, 64, 256, reversible(tile_tokens=512), with_alternatives=False).total_bytes
    assert gpu_bytes < least_with_adamw
    changes = what_would_fit(config, 64, 256, method, gpu_bytes=gpu_bytes)
    if optimizer == "adamw":
        assert changes and all(change.settings["optimizer"] == "adafactor" for change in changes)
    else:
        assert {"tile_tokens": 512} in [change.settings for change in changes]
    assert any("batch" in change.settings for change in changes)
    for change in changes:
        batch, changed = change.settings.get("batch", 64), changed_method(method, change.settings)
        total = plan(config, batch, 256, changed, with_alternatives=False).total_bytes
        assert total == change.total_bytes <= gpu_bytes, change
        if "batch" in change.settings:
            assert plan(config, batch + 1, 256, changed, with_alternatives=False).total_bytes > gpu_bytes


def test_nothing_would_fit():
    assert what_would_fit(load_config("olmoe-1b-7b"), 4, 256, gpu_bytes=2 * 2**30) == []


def test_one_long_sequence_is_shortened():
    config, method = load_config("olmoe-1b-7b", num_hidden_layers=5), reversible()
    gpu_bytes = plan(config, 1, 4096, method, with_alternatives=False).total_bytes
    changes = what_would_fit(config, 1, 6000, method, gpu_bytes=gpu_bytes)
    assert any(change.settings == {"batch": 1, "tokens": 4096} for change in changes)


def test_stored_inputs_in_host_memory_are_not_on_the_device():
    config = load_config("olmoe-1b-7b", num_hidden_layers=8)
    stored, offloaded = (
        plan(config, 8, 256, reversible(coupling="none", offload_inputs=offload), with_alternatives=False)
        for offload in (False, True)
    )
    moved = offloaded.host_bytes - stored.host_bytes
    assert moved == (8 - planner.LAYERS_ON_DEVICE) * 8 * 256 * config.hidden_size * 2
    assert offloaded.peak_bytes < stored.peak_bytes
    with pytest.raises(ValueError, match="one memory"):
        check(config, 8, 256, reversible(coupling="none", offload_inputs=True), offloaded)


# --- input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    ("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("24", 24 * 2**30), ("0.5g", 2**29), ("512MiB", 2**29),
    (" 10 mb ", 10**7),
])  # fmt: skip
def test_parse_bytes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "24XB", "-3GiB", "0GiB", "1e3", "24 GiB GiB"])
def test_parse_bytes_refuses(text):
    with pytest.raises(ValueError, match="24GiB"):
        parse_bytes(text)


def test_names_with_and_without_organisation():
    names = ("Qwen/Qwen1.5-MoE-A2.7B", "qwen1.5-moe-a2.7b")
    assert len({load_config(name).to_json_string() for name in names}) == 1


QUESTION = ["plan", "--model", "olmoe-1b-7b", "--batch", "2", "--tokens", "64"]
BAD = {
    "unknown model": (["--model", "no-such-model"], "olmoe-1b-7b"),
    "a folder without config": (["--model", "."], "config.json"),
    "zero batch": (["--batch", "0"], "at least 1, got 0"),
    "negative tokens": (["--tokens", "-5"], "at least 1"),
    "words for a number": (["--batch", "many"], "expected a whole number, got 'many'"),
    "no link": (["--weights", "host", "--link_gb_per_s", "0"], "link_gb_per_s must be a number above 0, got 0.0"),
    "no compute": (["--weights", "host", "--tflops", "nan"], "tflops must be a number above 0, got nan"),
    "no size of a tile": (["--tile_tokens", "autoo"], "expected a whole number or auto, got 'autoo'"),
    "a negative tile": (["--tile_tokens", "-3"], "must be auto (the largest that fits), 0 (the whole batch) or at"),
    "unknown optimizer": (["--optimizer", "lion"], "adafactor"),
    "unknown coupling": (["--coupling", "additive"], "innovation"),
    "side bits out of range": (["--side-bits", "9"], "0 to 4"),
    "an amount of memory that is none": (["--gpu", "lots"], "24GiB"),
    "no kind of picture": (["--plot", "plan.txt"], ".png"),
    "no folder for the picture": (["--plot", "nowhere/plan.png"], "nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, capsys, tmp_path, monkeypatch):
    """One line that says what is accepted, status 2, nothing measured first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "run_step", None)
    words, message = BAD[name]
    assert main([*QUESTION, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("revffn plan: ") and error.count("\n") == 1
    assert message in error


def test_an_architecture_without_layout():
    with pytest.raises(ValueError, match="adding_an_architecture"):
        plan(AutoConfig.for_model("gpt2"), 1, 1)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of full width and two layers, known by its config alone."""
    folder = tmp_path_factory.mktemp("model")
    load_config("olmoe-1b-7b", num_hidden_layers=2).save_pretrained(folder)
    return folder


def ask(folder: Path, *words: str) -> int:
    return main(["plan", "--model", str(folder), "--batch", "3", "--tokens", "64", "--tile-tokens", "64", *words])


def test_command_with_picture(folder, capsys, tmp_path):
    """Every way in the table and in the JSON, a picture that is one, and the answer to --gpu."""
    picture = tmp_path / "plan.png"
    assert ask(folder, "--gpu", "2GiB", "--plot", str(picture)) == 0
    text = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    for words in ("innovation m=2", "checkpointing every", "host RAM", "plain transformers", "LoRA", "reserve"):
        assert words in text
    assert "does not fit 2GiB" in text
    assert ask(folder, "--gpu", "2GiB", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["alternatives"]) == 8 and not answer["fits"]
    for way in (answer, *answer["alternatives"]):
        assert way["peak_bytes"] == sum(way["parts"].values())
        assert way["total_bytes"] == way["peak_bytes"] + way["reserve_bytes"]
        assert f"{way['total_bytes'] / 2**30:.2f}" in text


def test_command_alone(folder, capsys):
    assert ask(folder, "--no-alternatives", "--json", "--gpu", "80GiB") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"] and answer["alternatives"] == [] and answer["largest_batch"] > 3


def test_command_names_the_tile_it_chose(folder, capsys):
    """`auto` is the default: what fits the device; the largest batch and sequence may have smaller tiles."""
    words = ["plan", "--model", str(folder), "--batch", "32", "--tokens", "1024", "--no-alternatives"]
    words += ["--kept_layers", "0"]
    assert main([*words, "--gpu", "80GiB", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["tile"]["tile_tokens"] is None and whole["fits"]
    assert main([*words, "--tile_tokens", "2048", "--gpu", "80GiB", "--json"]) == 0
    usual = json.loads(capsys.readouterr().out)
    assert usual["tile"] == {"tile_tokens": 2048}
    for name in ("largest_batch", "longest_sequence"):
        assert usual[name] == whole[name] > 0
    tight = (usual["total_bytes"] + 1) / 1e6
    assert main([*words, "--gpu", f"{tight:.6f}MB"]) == 0
    out = capsys.readouterr().out
    assert "Tiles: 2,048 tokens (the largest that fits: " in out and "with tiles of at most 2,048 tokens" in out
    assert "adafactor fits" in out
    assert main(words) == 0
    assert "Tiles: 2,048 tokens (no --gpu to fit)" in capsys.readouterr().out


def test_command_with_dtype_and_rounding(folder, capsys):
    peaks = []
    for words in ((), ("--rounding", "master"), ("--dtype", "float32")):
        assert ask(folder, "--no-alternatives", "--json", "--optimizer", "sgd", *words) == 0
        answer = json.loads(capsys.readouterr().out)
        peaks.append(answer["parts"]["weights"] + answer["parts"]["optimizer"])
    assert peaks[1] == peaks[0] + 4 * answer["num_trainable"]
    assert peaks[2] == pytest.approx(2 * peaks[0], rel=1e-6)


def test_command_checks(folder, capsys, monkeypatch):
    """Status 0 beside a true simulation, 1 beside one that takes more."""
    words = ("--no-alternatives", "--check", "--json")
    assert ask(folder, *words) == 0
    checked = json.loads(capsys.readouterr().out)["check"]
    assert abs(checked["relative_error"]) <= ACCEPTED_ERROR
    more = checked["simulated"] | {"weights": int(1.2 * checked["simulated"]["weights"])}
    monkeypatch.setattr(planner, "simulate_step", lambda *_: {"parts": more, "seconds": 1.0})
    with pytest.raises(SystemExit, match="off by -"):
        ask(folder, "--no-alternatives", "--check")
    table = capsys.readouterr().out
    assert "predicted" in table and "stored activations" in table
