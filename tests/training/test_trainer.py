"""Runs on a tiny random Mixture-of-Experts model: what a run leaves behind, which parameters each stage moves, that
resuming equals not having stopped, and that the loss is on the responses only.

Run: pytest tests/training/test_trainer.py
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from helpers import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

import revffn
from revffn.__main__ import main
from revffn.command_line import load_run_config
from revffn.data import batches
from revffn.memory.plan import plan
from revffn.recipe import with_tile
from revffn.training import room
from revffn.training.heldout import coupled, heldout_loss, response_loss, step_bytes
from revffn.training.preflight import calibration, check
from revffn.training.room import method_of
from revffn.training.run import train
from revffn.training.trainer import RevFFNTrainer

ASK = ("--evaluation.prompt", "Say red 2 times.", "--evaluation.max_new_tokens", "4")


def run(recipe, *overrides):
    return train(load_run_config(recipe, list(overrides)), recipe)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def moved(before, after):
    return {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}


COUPLINGS = {
    "innovation": ["--reversible.coupling", "innovation"],
    "cross_branch": ["--reversible.coupling", "cross_branch", "--reversible.cross_branch.query_stream", "right"],
    "none": ["--reversible.coupling", "none"],
    "plain": ["--reversible.coupling", "null", "--training.activation_checkpointing", "true"],
}


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_run_leaves_a_model_metrics_and_a_summary(recipe_file, coupling, capsys):
    recipe = recipe_file("optimizer:\n  learning_rate: 3e-3\n")
    folder = run(recipe, *COUPLINGS[coupling], *ASK, "--evaluation.every_steps", "2")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert revffn.is_reversible(model) == (coupling != "plain")
    steps = [line for line in metrics(folder) if "loss" in line]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert [line["step"] for line in metrics(folder) if "heldout_loss" in line] == [2]
    assert all({"loss", "learning_rate", "grad_norm", "peak_bytes"} <= step.keys() for step in steps)
    assert all(step["tokens_per_second"] > 0 for step in steps[1:])
    if coupling != "plain":
        assert all(step["mismatched_states"] == 0 for step in steps)
    if coupling in ("innovation", "cross_branch"):
        assert all(step["verified_states"] > 0 for step in steps)
    summary = json.loads((folder / "run.json").read_text())
    first = "converted" if coupling == "cross_branch" else "before"
    assert summary["heldout"]["after"]["loss"] < summary["heldout"][first]["loss"]
    assert summary["heldout"]["after"]["tokens"] > 0 and summary["versions"]["trl"]
    assert set(summary["answers"]) == {"before", "after"}
    out = capsys.readouterr().out
    assert str(folder / "model") in out and "held-out loss after" in out
    # The reported loss is that of the model on disk.
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    shutil.rmtree(folder / "model")  # `check` wants an empty or new folder
    for file in folder.iterdir():
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    rows = check(load_run_config(recipe), recipe).heldout
    assert heldout_loss(model, rows, 3, tokenizer.pad_token_id)["loss"] == pytest.approx(
        summary["heldout"]["after"]["loss"], rel=1e-5
    )


def test_tensorboard_gets_the_numbers_of_metrics_jsonl(recipe_file):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run(recipe_file(), "--training.report_to", "tensorboard", "--evaluation.every_steps", "2")
    (file,) = folder.rglob("events.out.tfevents.*")
    assert file.parent.parent == folder / "stage2" / "runs"
    events = EventAccumulator(str(file))
    events.Reload()
    lines = [line for line in metrics(folder) if "loss" in line]
    assert len(lines) == 3
    for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_bytes", "mismatched_states"):
        written = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert written == pytest.approx({line["step"]: line[name] for line in lines if name in line})
    (heldout,) = (line for line in metrics(folder) if "heldout_loss" in line)
    (written,) = events.Scalars("eval/loss")
    assert (written.step, written.value) == (2, pytest.approx(heldout["heldout_loss"]))


def test_who_is_told_must_be_installed(recipe_file, refused, monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    words = ("--training.report_to", "tensorboard", "wandb")
    assert "report_to: wandb is not installed here" in refused("train", recipe_file(), *words)


def test_innovation_exports_to_what_was_evaluated(recipe_file, tmp_path):
    folder = run(recipe_file())
    assert main(["export", str(folder), str(tmp_path / "plain")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain).__name__ == "Qwen2MoeForCausalLM"
    assert (tmp_path / "plain" / "tokenizer_config.json").exists()
    reversible = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    inputs = torch.arange(3, 20)[None]
    torch.testing.assert_close(plain.eval()(inputs).logits, reversible(inputs).logits, rtol=0, atol=0)


def test_calibration_takes_the_first_batches_that_hold_the_tokens(recipe_file):
    checked = check(load_run_config(recipe_file()))
    size = checked.config.training.batch_size
    lengths = [len(row["input_ids"]) for row in checked.training]
    first, second = sum(lengths[:size]), sum(lengths[: 2 * size])
    model = tiny_model()  # its device is looked at
    for num_tokens, num_batches in ((1, 1), (first, 1), (first + 1, 2), (second, 2)):
        taken = list(calibration(checked, num_tokens, model))
        assert len(taken) == num_batches
        assert sum(int(batch["attention_mask"].sum()) for batch in taken) == sum(lengths[: num_batches * size])
    everything = list(calibration(checked, 10**9, model))  # more than there is
    assert sum(len(batch["input_ids"]) for batch in everything) == len(lengths)


def test_export_says_what_it_costs(recipe_file, tmp_path, capsys):
    """Both losses as the run measured them; a warning where export costs more than 0.02 nats."""
    folder = run(recipe_file(), "--reversible.side_bits", "1")
    losses = json.loads((folder / "run.json").read_text())["heldout"]
    exported, trained = losses["after"]["loss"], losses["after, as trained"]["loss"]
    assert exported != trained
    # The coupled function, measured by hand.
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    rows = check(load_run_config(recipe_file(), ["--training.output_dir", str(tmp_path / "other")])).heldout
    with coupled(model):
        again = heldout_loss(model, rows, 8, 0)["loss"]
    assert again == pytest.approx(trained, rel=1e-5) and model.model.walks_in_eval is False
    capsys.readouterr()
    assert main(["export", str(folder), str(tmp_path / "plain")]) == 0
    captured = capsys.readouterr()
    assert f"{exported:.4f} exported, {trained:.4f} as trained" in captured.out and "warning" not in captured.err
    summary = json.loads((folder / "run.json").read_text())
    summary["heldout"]["after, as trained"]["loss"] = exported - 0.021
    (folder / "run.json").write_text(json.dumps(summary))
    assert main(["export", str(folder), str(tmp_path / "again")]) == 0
    assert "warning" in (error := capsys.readouterr().err) and "calibration_tokens" in error


def test_stage_2_moves_everything_but_the_routers(recipe_file, model_folder):
    folder = run(recipe_file(), "--optimizer.learning_rate", "1e-2")
    before, after = weights(model_folder()), weights(folder / "model")
    still = before.keys() - moved(before, after)
    assert still and all(name.endswith("mlp.gate.weight") for name in still)


def test_routers_train_when_told_to(recipe_file, model_folder):
    folder = run(recipe_file(), "--optimizer.learning_rate", "1e-2", "--training.freeze_router", "false")
    before, after = weights(model_folder()), weights(folder / "model")
    assert any(name.endswith("mlp.gate.weight") for name in moved(before, after))


def test_stage_1_moves_the_coupling_only(recipe_file, model_folder):
    recipe = recipe_file()
    folder = run(recipe, *COUPLINGS["cross_branch"], "--training.stage1_steps", "2", "--training.num_steps", "0")
    before, after = weights(model_folder()), weights(folder / "model")
    assert not moved(before, after)
    assert [line["stage"] for line in metrics(folder)] == [1, 1]
    losses = json.loads((folder / "run.json").read_text())["heldout"]
    assert losses["after_stage1"]["loss"] < losses["converted"]["loss"]


@pytest.mark.parametrize(
    "dtype, stage1_steps, where",
    [("float32", 0, "device"), ("bfloat16", 4, "device"), ("bfloat16", 4, "host")],
)
def test_a_resumed_run_equals_one_that_did_not_stop(recipe_file, tmp_path, dtype, stage1_steps, where, monkeypatch):
    """Stopped after 3 steps of 4 (of the last, or of the only stage), gone on from the checkpoint at 2; with weights
    on the host it still equals the resident run."""
    recipe = recipe_file("optimizer:\n  learning_rate: 1e-3\n")
    same = ["--training.num_steps", "4", "--training.stage1_steps", str(stage1_steps), "--training.save_steps", "2"]
    same += COUPLINGS["cross_branch"] if stage1_steps else []
    same += ["--model.dtype", dtype]  # bf16 weights are rounded stochastically
    whole = run(recipe, *same, "--training.output_dir", str(tmp_path / "whole"))
    halves = ["--training.output_dir", str(tmp_path / "halves"), "--memory.weights", where]

    real = RevFFNTrainer.training_step

    def stops(self, *args, **kwargs):
        if self.state.global_step == 3 and self.args.output_dir.endswith("stage2"):
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RevFFNTrainer, "training_step", stops)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, *same, *halves)
    resumed = run(recipe, *same, *halves, "--training.resume", "true")
    assert not moved(weights(whole / "model"), weights(resumed / "model"))
    told = [[(line["stage"], line["step"], line["loss"]) for line in metrics(folder)] for folder in (whole, resumed)]
    assert told[0] == told[1]
    summaries = [json.loads((folder / "run.json").read_text()) for folder in (whole, resumed)]
    assert summaries[0]["heldout"] == summaries[1]["heldout"]


OPTIMIZERS = {
    "adafactor": [],
    "adafactor, momentum": ["--optimizer.momentum", "0.9"],
    "adamw": ["--optimizer.name", "adamw"],
    "sgd": ["--optimizer.name", "sgd", "--optimizer.learning_rate", "0.3"],
    "bf16": ["--model.dtype", "bfloat16"],
    "bf16, master": ["--model.dtype", "bfloat16", "--optimizer.rounding", "master"],
    "after backward": ["--optimizer.in_backward", "false"],
    "accumulated": ["--training.gradient_accumulation_steps", "2"],
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns(recipe_file, optimizer):
    folder = run(recipe_file("optimizer:\n  learning_rate: 3e-3\n"), *OPTIMIZERS[optimizer])
    losses = json.loads((folder / "run.json").read_text())["heldout"]
    assert losses["after"]["loss"] < losses["before"]["loss"]
    steps = metrics(folder)
    assert all(step["grad_norm"] > 0 for step in steps) and len(steps) == 3


def test_stepping_in_backward_changes_nothing_but_the_clipping(recipe_file, tmp_path):
    """Without clipping: the same weights and the same norms, bit for bit."""
    same = ["--optimizer.max_grad_norm", "0", "--optimizer.learning_rate", "1e-2"]
    folders = [
        run(recipe_file(), *same, "--optimizer.in_backward", setting, "--training.output_dir", str(tmp_path / setting))
        for setting in ("true", "false")
    ]
    assert not moved(*(weights(folder / "model") for folder in folders))
    norms = [[step["grad_norm"] for step in metrics(folder)] for folder in folders]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("packing", ["false", "true"])
def test_the_model_s_own_loss_is_that_of_trl(recipe_file, tmp_path, packing):
    """Linear cross-entropy against TRL's fused head: the same losses and token counts."""
    folders = [
        run(
            recipe_file(), "--memory.linear_cross_entropy", setting, "--data.packing", packing,
            "--training.num_steps", "2", "--training.output_dir", str(tmp_path / setting),
        )
        for setting in ("true", "false")
    ]  # fmt: skip
    for ours, theirs in zip(*map(metrics, folders), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["num_tokens"] == theirs["num_tokens"]
    assert "entropy" in theirs and "entropy" not in ours


def test_prediction_and_measurement_of_a_step(recipe_file):
    """The planner against tensors counted in a real step: within five percent at this tiny size."""
    folder = run(recipe_file(), "--reversible.tile_tokens", "64")
    memory = json.loads((folder / "run.json").read_text())["memory"]
    assert memory["predicted_bytes"] == sum(memory["predicted_parts"].values())
    assert memory["predicted_bytes"] == pytest.approx(memory["measured_bytes"], rel=0.05)
    # The comparison is sharp enough to fail: eight times the tokens would be something else.
    config = load_run_config(recipe_file(), ["--reversible.tile_tokens", "64"])
    hf_config = AutoConfig.from_pretrained(config.model.path)
    method = method_of(config, hf_config)
    other = plan(hf_config, 8 * memory["batch"], memory["tokens"], method, with_alternatives=False)
    assert other.peak_bytes > 1.05 * memory["measured_bytes"]


def told(folder):
    """What run.json and the model's config.json say of the tiles."""
    summary = json.loads((folder / "run.json").read_text())
    return summary, json.loads((folder / "model" / "config.json").read_text())["revffn"]["tile_tokens"]


def test_tiles_are_chosen_once_and_recorded(recipe_file, capsys, monkeypatch):
    """A number in both files, the reason in run.json and on the terminal; a resumed run keeps it although more would
    fit by then, and whatever number it is told."""
    recipe = recipe_file()
    config = load_run_config(recipe)
    same = ["--training.num_steps", "2", "--training.save_steps", "1", "--training.batch_size", "16"]
    hf_config = AutoConfig.from_pretrained(config.model.path)
    monkeypatch.setattr(room, "USUAL_TILE", None)  # as on a GPU: up to the whole batch
    checked = check(load_run_config(recipe, same))
    assert checked.config.reversible.tile_tokens is None and "whole batch" in str(checked.tile)
    tokens = checked.plan.tokens
    sizes = {
        size: plan(
            hf_config, 16, tokens, method_of(with_tile(checked.config, size), hf_config), with_alternatives=False
        )
        for size in (None, 256)
    }
    assert sizes[256].peak_bytes < sizes[None].peak_bytes
    limit = f"{(sizes[256].peak_bytes + 1) / 1e6:.6f}MB"
    folder = run(recipe, *same, "--memory.limit", limit)
    summary, in_model = told(folder)
    assert in_model == summary["config"]["reversible"]["tile_tokens"] == summary["tile"]["tile_tokens"] == 256
    assert summary["tile"]["reason"].startswith("the largest that fits")
    assert f"Tiles: 256 tokens ({summary['tile']['reason']})" in capsys.readouterr().out
    for steps, words in ((3, []), (4, ["--reversible.tile_tokens", "64"])):
        run(recipe, *same, "--training.resume", "true", "--training.num_steps", str(steps), *words)
        summary, in_model = told(folder)
        assert in_model == summary["config"]["reversible"]["tile_tokens"] == 256
        assert f"checkpoint-{steps - 1}" in summary["tile"]["reason"]


def test_tiles_on_a_cpu_and_numbers_that_are_given(recipe_file, tmp_path):
    summary, in_model = told(run(recipe_file()))
    assert in_model == summary["tile"]["tile_tokens"] == 2048 and "CPU" in summary["tile"]["reason"]
    folder = run(recipe_file(), "--reversible.tile_tokens", "64", "--training.output_dir", str(tmp_path / "given"))
    summary, in_model = told(folder)
    assert in_model == summary["config"]["reversible"]["tile_tokens"] == 64 and summary["tile"] is None


def test_kept_layers_train_the_same_weights_and_take_what_was_predicted(recipe_file, tmp_path):
    """Also where a run goes on with another number of them."""
    recipe, trained, memory = recipe_file(), [], []
    for name, numbers in {"none": (0, 0), "all": (9, 9), "other": (1, 9)}.items():
        words = ["--training.output_dir", str(tmp_path / name), "--training.save_steps", "1"]
        for steps, number in zip((2, 3), numbers, strict=True):
            more = ["--training.num_steps", str(steps), "--reversible.kept_layers", str(number)]
            folder = run(recipe, *words, *more, *["--training.resume", "true"] * (steps > 2))
        summary = json.loads((folder / "run.json").read_text())
        assert summary["config"]["reversible"]["kept_layers"] == numbers[1] and summary["kept"] is None
        trained.append(weights(folder / "model"))
        memory.append(summary["memory"])
    for other in trained[1:]:
        assert other.keys() == trained[0].keys() and all(torch.equal(other[n], trained[0][n]) for n in other)
    assert memory[1]["measured_bytes"] > 1.1 * memory[0]["measured_bytes"]
    for its in memory:
        assert its["predicted_bytes"] == pytest.approx(its["measured_bytes"], rel=0.05)


def test_a_run_of_which_no_tile_fits_is_refused(recipe_file, refused, monkeypatch):
    # With a vocabulary as small as this, chunks of the loss are huge: looking for the largest batch takes long.
    monkeypatch.setattr(room, "what_would_fit", lambda *args, **kwargs: [])
    line = refused("train", recipe_file(), "--memory.limit", "0.5MB")
    assert "a step of 4 x 27 tokens is predicted to take" in line and "--force starts all the same" in line


def test_a_gradient_that_is_not_finite_stops_the_run(recipe_file, tmp_path, monkeypatch):
    """After a checkpoint: the message names it, no model is written, and the run goes on from it when asked."""
    recipe = recipe_file()
    words = ["train", str(recipe), "--training.num_steps", "4", "--training.save_steps", "2"]
    real = RevFFNTrainer.compute_loss

    def broken(self, model, *args, **kwargs):
        loss = real(self, model, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 else loss

    with monkeypatch.context() as patch:
        patch.setattr(RevFFNTrainer, "compute_loss", broken)
        with pytest.raises(SystemExit) as stop:
            main(words)
    assert "is not finite" in str(stop.value.code) and "No weight has changed" in str(stop.value.code)
    assert not (tmp_path / "run" / "model").exists()

    handles = []

    def poison(self, *args, **kwargs):
        """Only the gradient of the first layer's norm: everything above it has stepped by then."""
        if self.state.global_step == 3 and not handles:
            weight = self.model.model.layers[0].input_layernorm.weight
            handles.append(weight.register_hook(lambda grad: grad * float("nan")))
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RevFFNTrainer, "compute_loss", poison)
        with pytest.raises(SystemExit) as stop:
            main([*words, "--training.resume", "true"])
    message = str(stop.value.code)
    assert "had already stepped" in message and str(tmp_path / "run" / "stage2" / "checkpoint-2") in message
    assert not (tmp_path / "run" / "model").exists()
    assert main([*words, "--training.resume", "true"]) == 0


def test_memory_with_weights_on_the_host_is_predicted(recipe_file):
    folder = run(recipe_file(), "--memory.weights", "host")
    memory = json.loads((folder / "run.json").read_text())["memory"]
    assert memory["predicted_bytes"] == pytest.approx(memory["measured_bytes"], rel=0.05)
    resident = run(recipe_file(), "--training.output_dir", str(folder.parent / "resident"))
    assert memory["measured_bytes"] < json.loads((resident / "run.json").read_text())["memory"]["measured_bytes"]


@pytest.mark.parametrize(
    "words", [["--reversible.coupling", "null"], ["--optimizer.in_backward", "false"]], ids=["plain", "after backward"]
)
def test_weights_in_host_memory_need_a_walk(recipe_file, words, capsys):
    assert main(["train", str(recipe_file()), "--memory.weights", "host", *words]) == 2
    assert "memory.weights: host" in capsys.readouterr().err


def test_packed_sequences_train_the_same_tokens(recipe_file):
    folder = run(recipe_file(), "--data.packing", "true", "--training.num_steps", "2")
    assert all(line["mismatched_states"] == 0 for line in metrics(folder))


@pytest.mark.parametrize("words", ["", "--training.router_aux_loss_coef 0.1", "--memory.linear_cross_entropy false"])
def test_router_z_loss_is_added(recipe_file, tmp_path, words):
    """To whatever else is in the loss; frozen routers and models without any are refused."""
    words = ["--training.freeze_router", "false", "--training.num_steps", "1", *words.split()]
    if "--training.router_aux_loss_coef" not in words:
        words += ["--training.router_aux_loss_coef", "0"]
    (without,) = metrics(run(recipe_file(), *words))
    again = [*words, "--training.output_dir", str(tmp_path / "again"), "--training.router_z_loss_coef", "0.5"]
    (line,) = metrics(run(recipe_file(), *again))
    assert line["router_z_loss"] > 0.1
    assert line["loss"] == pytest.approx(without["loss"] + 0.5 * line["router_z_loss"], rel=1e-5)
    assert line["grad_norm"] != without["grad_norm"]


@pytest.mark.parametrize("passes", [1, 2])
def test_the_load_balancing_loss_is_added(recipe_file, tmp_path, passes):
    """Of several passes the mean; with linear cross-entropy, whose memory is the planned one."""
    words = ["--training.freeze_router", "false", "--training.num_steps", "1", "--training.batch_size", "4"]
    words += ["--training.gradient_accumulation_steps", str(passes), "--optimizer.in_backward", "false"]
    coef = "--training.router_aux_loss_coef"
    (without,) = metrics(run(recipe_file(), *words, coef, "0"))
    (line,) = metrics(run(recipe_file(), *words, coef, "0.5", "--training.output_dir", str(tmp_path / "again")))
    assert line["aux_loss"] > 0.5 and "aux_loss" not in without
    assert line["loss"] == pytest.approx(without["loss"] + 0.5 * line["aux_loss"], rel=1e-5)
    assert line["grad_norm"] != without["grad_norm"] and "entropy" not in line


@pytest.mark.parametrize(
    "words, losses",
    [
        ("", (False, False)),
        ("--training.freeze_router false", (True, False)),  # as the model's config says
        ("--training.freeze_router false --training.router_z_loss_coef 0.1", (True, True)),
        ("--training.router_aux_loss_coef 0.1", (True, False)),
    ],
)
def test_the_routers_losses_are_planned(recipe_file, words, losses):
    method = check(load_run_config(recipe_file(), words.split())).method
    assert (method.router_aux_loss, method.router_z_loss) == losses


def test_router_z_loss_needs_routers_that_train(recipe_file, refused):
    words = ["--training.router_z_loss_coef", "0.1"]
    assert "trains routers, which are frozen" in refused("train", recipe_file(), *words)
    dense = [recipe_file(model_type="llama"), *words, "--training.freeze_router", "false"]
    assert "has no router" in refused("train", *dense)


def test_a_dense_model_trains(recipe_file):
    folder = run(recipe_file(model_type="llama"))
    assert type(AutoModelForCausalLM.from_pretrained(folder / "model")).__name__ == "RevFFNLlamaForCausalLM"


def test_checkpointing_is_measured_beside_the_coupling(recipe_file, capsys):
    folder = run(recipe_file(), "--evaluation.compare_checkpointing", "2", "8")
    measured = json.loads((folder / "run.json").read_text())["step_bytes"]
    ours, theirs = measured["innovation"], measured["activation checkpointing"]
    assert [step["batch"] for step in ours] == [step["batch"] for step in theirs] == [2, 8]
    for small, large in zip(ours, theirs, strict=True):
        assert 0 < small["kept_bytes"] < large["kept_bytes"] < large["peak_bytes"]
    table = capsys.readouterr().out.split("MiB at the peak")[1].splitlines()[1:4]
    assert table[0].split()[-2:] == [f"{step['batch'] * step['tokens']:,}" for step in ours]
    assert table[1].startswith("activation checkpointing") and table[2].startswith("innovation")


def test_the_trainer_alone_keeps_checkpointing_off(tokenizer, tmp_path):
    model = revffn.convert(tiny_model(vocab_size=len(tokenizer)))
    rows = [{"input_ids": list(range(3, 40)), "labels": list(range(3, 40))}] * 4
    # SFTConfig turns activation checkpointing on by default.
    args = SFTConfig(output_dir=str(tmp_path), bf16=False, max_steps=1, report_to="none", logging_steps=1)
    assert args.gradient_checkpointing
    trainer = RevFFNTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    assert not trainer.args.gradient_checkpointing
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert trainer.state.log_history[0]["verified_states"] > 0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(label_smoothing_factor=0.1), "label_smoothing_factor=0.1 asks for another"),
        (dict(loss_type="dft"), "loss_type='dft' asks for another"),
        (dict(gradient_accumulation_steps=2), "gradient_accumulation_steps=2 adds gradients up"),
    ],
    ids=str,
)
def test_no_option_is_without_effect(tokenizer, tmp_path, options, message):
    """Before the first weight moves."""
    model = revffn.convert(tiny_model(vocab_size=len(tokenizer)))
    optimizer = revffn.OptimizerInBackward(revffn.parameter_groups(model, 0.0))
    rows = Dataset.from_list([{"input_ids": list(range(3, 40)), "labels": list(range(3, 40))}] * 4)
    args = SFTConfig(output_dir=str(tmp_path), bf16=False, max_steps=1, report_to="none", **options)
    words = dict(train_dataset=rows, processing_class=tokenizer, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=message):
        RevFFNTrainer(model, args, linear_cross_entropy=True, **words)
    optimizer.detach()


def test_the_trainer_alone_resumes_with_all_weights(tokenizer, tmp_path):
    """`trainer.train(resume_from_checkpoint=...)` on a model of other weights, not calibrated: experts and grids are
    those of the checkpoint."""

    def trained(seed, calibration=None, **resume):
        model = revffn.convert(tiny_model(vocab_size=len(tokenizer), seed=seed), calibration=calibration)
        rows = [{"input_ids": list(range(3 + i, 40)), "labels": list(range(3 + i, 40))} for i in range(8)]
        args = SFTConfig(
            output_dir=str(tmp_path / str(seed)), bf16=False, max_steps=4, save_steps=2, report_to="none",
            per_device_train_batch_size=2, learning_rate=1e-3,
        )  # fmt: skip
        trainer = RevFFNTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train(**resume)
        return model

    whole = trained(0, calibration=[{"input_ids": torch.arange(3, 40)[None]}])
    assert whole.reversible_config.grids.grid_growth > 0
    resumed = trained(1, resume_from_checkpoint=str(tmp_path / "0" / "checkpoint-2"))
    assert resumed.reversible_config == whole.reversible_config
    assert not moved(whole.state_dict(), resumed.state_dict())


def test_response_loss_is_cross_entropy_of_the_labels_only(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer)).eval()
    row = {"input_ids": list(range(3, 30)), "labels": [-100] * 20 + list(range(23, 30))}
    batch = next(batches([row, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}], 2, 0))
    total, tokens = response_loss(model, batch)
    assert tokens == 9
    theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    torch.testing.assert_close(total / tokens, theirs)


def test_step_bytes_sees_what_a_layer_keeps_and_touches_nothing(tokenizer):
    def measure(num_layers, checkpointing):
        model = tiny_model("llama", num_hidden_layers=num_layers).eval()
        if checkpointing:
            model.gradient_checkpointing_enable()
        batch = {"input_ids": torch.arange(3, 35)[None], "attention_mask": torch.ones(1, 32, dtype=torch.long)}
        batch["labels"] = batch["input_ids"]
        state = torch.get_rng_state()
        measured = step_bytes(model, batch)
        assert torch.equal(state, torch.get_rng_state())
        assert all(p.grad is None for p in model.parameters()) and model.training is False
        return measured["kept_bytes"]

    # Checkpointing keeps one input of 32 tokens x 32 channels in float32 per layer.
    assert measure(6, True) - measure(4, True) == 2 * 32 * 32 * 4
    assert measure(6, False) - measure(4, False) > 10 * 2 * 32 * 32 * 4


CPU_RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*_cpu.yaml"))


@pytest.mark.parametrize("recipe", CPU_RECIPES, ids=lambda file: file.stem)
def test_shipped_cpu_recipes_run(recipe, model_folder, data_file, tmp_path):
    """Start to saved model on a tiny model and a few lines, with nothing changed but paths and the number of steps."""
    words = yaml.safe_load(recipe.read_text())
    stages = {name: "2" for name in ("stage1_steps", "num_steps") if words["training"].get(name)}
    folder = run(
        recipe, "--model.path", str(model_folder("qwen2_moe")), "--data.path", str(data_file()),
        "--data.heldout", "8", "--data.num_examples", "48", "--training.output_dir", str(tmp_path / "run"),
        *(word for name, steps in stages.items() for word in (f"--training.{name}", steps)),
        "--evaluation.max_new_tokens", "4", "--training.log_steps", "1",
    )  # fmt: skip
    assert len([line for line in metrics(folder) if "loss" in line]) == 2 * len(stages)
    assert AutoModelForCausalLM.from_pretrained(folder / "model").config.model_type == "revffn_qwen2_moe"
    report = json.loads((folder / "run.json").read_text())["reversible_report"]
    assert report["mismatched_states"] == 0 and report["verified_states"] > 0


def test_the_papers_system_falls_and_is_exact(recipe_file):
    """Two stages, queries from the left: every rebuilt state of every step is forward's, and metrics say how."""
    recipe = recipe_file("optimizer:\n  learning_rate: 3e-3\n")
    folder = run(
        recipe, "--reversible.coupling", "cross_branch", "--training.stage1_steps", "6", "--training.num_steps", "6"
    )
    steps = [line for line in metrics(folder) if "loss" in line]
    assert len(steps) == 12 and all(step["mismatched_states"] == 0 for step in steps)
    assert all(step["num_anchors"] == 0 and 1 < step["iterations_at_most"] <= 16 for step in steps)
    assert all(step["kept_bits_at_most"] <= 16 and step["kept_rows_at_most"] < 0.5 for step in steps)
    losses = json.loads((folder / "run.json").read_text())["heldout"]
    assert losses["after"]["loss"] < losses["after_stage1"]["loss"] < losses["converted"]["loss"]
