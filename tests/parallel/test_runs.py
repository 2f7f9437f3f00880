"""`revffn train` in several processes on gloo: what one process trains, trained by two and four; resumed by another
number; one of them killed.

Run: pytest tests/parallel/test_runs.py
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import RECORDS
from helpers import tiny_model
from safetensors.torch import load_file
from transformers import AutoConfig

from revffn.command_line import load_run_config
from revffn.memory.plan import plan
from revffn.training.room import method_of

WORKER = Path(__file__).with_name("worker.py")
# Of a weight, absolute, and of a loss, relative; float32, CPU, 2026-11. Sums in another order, and four updates whose
# size does not depend on the gradient's.
WEIGHTS, LOSS = 1e-5, 2e-6  # observed 1.6e-6 and 4.8e-7
# In bf16: of a loss, relative, and of what all weights moved by.
HALF_LOSS, HALF_WEIGHTS = 5e-3, 0.1  # observed 1.7e-3 and 0.031
FAMILIES = {
    "qwen2_moe": ("qwen2_moe", dict(num_experts=8)),
    "mixtral": ("mixtral", dict(num_local_experts=8)),
    "deepseek_v3": ("deepseek_v3", {}),
    "tied": ("qwen2_moe", dict(num_experts=8, tie_word_embeddings=True)),  # as SmolLM2 is
}
AFTER = ["--optimizer.in_backward", "false"]
PACKED = ["--data.packing", "true", "--data.max_length", "96"]
# Two stages: what trains changes when shards are there.
PAPER = ["--reversible.coupling", "cross_branch", "--training.stage1_steps", "2"]
# Newer versions of transformers leave its routers in float32.
HALF = ["--model.dtype", "bfloat16", "--training.freeze_router", "false", "--training.router_aux_loss_coef", "0"]
NO_CLIP = ["--optimizer.max_grad_norm", "0"]

# name -> (processes, family, options, fault)
RUNS = {
    **{f"{family}-one": (1, family, []) for family in FAMILIES},
    **{f"{family}-{s}": (2, family, ["--parallel.strategy", s]) for family in FAMILIES for s in ("fsdp", "ep")},
    "qwen2_moe-fsdp-four": (4, "qwen2_moe", ["--parallel.strategy", "fsdp"]),
    "qwen2_moe-ep-four": (4, "qwen2_moe", ["--parallel.strategy", "ep"]),
    "one-tiles": (1, "qwen2_moe", ["--reversible.tile_tokens", "32"]),
    "ep-tiles": (2, "qwen2_moe", ["--parallel.strategy", "ep", "--reversible.tile_tokens", "32"]),
    "one-packed": (1, "qwen2_moe", PACKED),
    "fsdp-packed": (2, "qwen2_moe", ["--parallel.strategy", "fsdp", *PACKED]),
    "ep-packed": (2, "qwen2_moe", ["--parallel.strategy", "ep", *PACKED]),
    "one-paper": (1, "qwen2_moe", PAPER),
    "ep-paper": (2, "qwen2_moe", ["--parallel.strategy", "ep", *PAPER]),
    "one-after": (1, "qwen2_moe", AFTER),
    "ddp": (2, "qwen2_moe", ["--parallel.strategy", "ddp", *AFTER]),
    "fsdp-after": (2, "qwen2_moe", ["--parallel.strategy", "fsdp", *AFTER]),
    "fsdp-in": (2, "qwen2_moe", ["--parallel.strategy", "fsdp", *NO_CLIP]),
    "fsdp-after-unclipped": (2, "qwen2_moe", ["--parallel.strategy", "fsdp", *AFTER, *NO_CLIP]),
    "one-half": (1, "deepseek_v3", HALF),
    "fsdp-half": (2, "deepseek_v3", ["--parallel.strategy", "fsdp", *HALF]),
    "ep-half": (2, "deepseek_v3", ["--parallel.strategy", "ep", *HALF]),
    "other_order": (2, "qwen2_moe", ["--parallel.strategy", "fsdp"], "other_order"),
    "lost_sum": (2, "qwen2_moe", ["--parallel.strategy", "fsdp"], "lost_sum"),
    "lost_share": (2, "qwen2_moe", ["--parallel.strategy", "ep"], "lost_share"),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """`group(size, runs, folder)`: processes that make the runs together; exit status and seconds after the first end,
    of each."""
    paths = [str(WORKER.parent.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    environment["REVFFN_CACHE"] = str(tmp_path_factory.mktemp("cache"))  # the same plans again and again
    worker = subprocess.Popen(
        [sys.executable, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )

    def make(size: int, runs: list[dict], folder: Path) -> list[tuple[int, float]]:
        folder.mkdir(parents=True, exist_ok=True)
        asked = {"size": size, "folder": str(folder), "runs": [run | {"port": free_port()} for run in runs]}
        print(json.dumps(asked), file=worker.stdin, flush=True)
        return json.loads(worker.stdout.readline())

    yield make
    worker.stdin.close()
    worker.wait()


def results(folder: Path, rank: int = 0) -> dict[str, dict]:
    """What came of the runs of a group, as one of its processes says."""
    lines = (folder / f"out{rank}").read_text().splitlines()
    return {line["name"]: line for line in map(json.loads, (text for text in lines if text.startswith('{"name"')))}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory, tokenizer):
    """A recipe for each family."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    special = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=2)
    for family, (model_type, settings) in FAMILIES.items():
        tiny_model(model_type, **special, **settings).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
        # Nine examples in batches of four: an epoch's last batch cannot be divided evenly.
        (folder / f"{family}.yaml").write_text(
            f"model:\n  path: {folder / family}\n  dtype: float32\n"
            f"data:\n  path: {folder / 'data.jsonl'}\n  heldout: 7\n  num_examples: 9\n  max_length: 64\n"
            "training:\n  num_steps: 4\n  batch_size: 4\n  save_steps: 2\n"
            "optimizer:\n  learning_rate: 3e-3\nevaluation:\n  every_steps: 2\n  batch_size: 4\n"
        )
    return folder


@pytest.fixture(scope="module")
def made(recipes, group, tmp_path_factory):
    """All runs: the folder they are in, and what each process saw."""
    folder = tmp_path_factory.mktemp("runs")
    seen = {}
    for size in sorted({size for size, *_ in RUNS.values()}):
        work = [
            {
                "name": name,
                "recipe": str(recipes / f"{family}.yaml"),
                "options": ["--training.output_dir", str(folder / name), *options],
                "fault": (*fault, None)[0],
            }
            for name, (number, family, options, *fault) in RUNS.items()
            if number == size
        ]
        for status, _ in group(size, work, folder / f"group{size}"):
            assert status == 0, (folder / f"group{size}" / "err0").read_text()[-2000:]
        found = [results(folder / f"group{size}", rank) for rank in range(size)]
        seen |= {name: [of_rank[name] for of_rank in found] for name in found[0]}
    return folder, seen


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def apart(one: Path, other: Path) -> tuple[float, float]:
    """Largest difference of a weight, and relative of a loss, in training or held out."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    losses = [
        [line.get("loss", line.get("heldout_loss")) for line in metrics(folder) if "loss" in str(line.keys())]
        for folder in (one, other)
    ]
    assert len(losses[0]) == len(losses[1]) >= 5
    return (
        max((ours[name] - theirs[name]).abs().max().item() for name in ours),
        max(abs(a / b - 1) for a, b in zip(*losses, strict=True)),
    )


SAME = {
    **{f"{family}-{s}": f"{family}-one" for family in FAMILIES for s in ("fsdp", "ep")},
    "qwen2_moe-fsdp-four": "qwen2_moe-one",
    "qwen2_moe-ep-four": "qwen2_moe-one",
    "one-tiles": "qwen2_moe-one",
    "ep-tiles": "qwen2_moe-one",
    "fsdp-packed": "one-packed",
    "ep-packed": "one-packed",
    "ep-paper": "one-paper",
    "ddp": "one-after",
    "fsdp-after": "one-after",
}


@pytest.mark.parametrize("name", SAME)
def test_several_processes_train_what_one_trains(made, name):
    folder, seen = made
    assert all(of_rank["error"] is None for of_rank in seen[name])
    weight, loss = apart(folder / name, folder / SAME[name])
    assert weight <= WEIGHTS and loss <= LOSS
    steps = [line for line in metrics(folder / name) if "loss" in line]
    single = [line for line in metrics(folder / SAME[name]) if "loss" in line]
    for ours, theirs in zip(steps, single, strict=True):
        assert ours["mismatched_states"] == 0
        assert ours["verified_states"] >= theirs["verified_states"] > 0
        assert ours["num_tokens"] == theirs["num_tokens"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        for key in ("router_entropy", "router_max_load", "router_idle_experts"):
            assert ours.get(key) == pytest.approx(theirs.get(key), rel=1e-6), key


@pytest.mark.parametrize("name", [name for name, (_, _, options, *_) in RUNS.items() if AFTER[0] not in options])
def test_no_gradient_outlives_backward(made, name):
    """Those that are stepped in backward, experts' shards too."""
    _, seen = made
    assert all(step["kept"] == 0 for of_rank in seen[name] for step in of_rank["seen"])


@pytest.mark.parametrize(
    "names",
    [
        ("qwen2_moe-fsdp", "fsdp-in", "other_order", "lost_sum"),
        ("qwen2_moe-ep", "lost_share"),
        ("mixtral-ep",),
        ("qwen2_moe-fsdp-four",),
    ],
    ids=lambda names: names[0],
)
def test_a_rank_takes_what_was_planned(made, recipes, names):
    """At this tiny size within five percent, in the least of the same step's ranks and runs: threads of gloo's may
    hold what was sent for a moment more, and with ep a rank may receive more than its even part."""
    size, family, options, *_ = RUNS[names[0]]
    config = load_run_config(recipes / f"{family}.yaml", options)
    hf_config = AutoConfig.from_pretrained(config.model.path)
    method = replace(method_of(config, hf_config), gpus=size, parallel=config.parallel.strategy)
    ratios = []
    for of_rank in (of_rank for name in names for of_rank in made[1][name]):
        (batch, tokens), measured = next(step["measured"] for step in of_rank["seen"] if step["measured"])
        predicted = plan(hf_config, batch * size, tokens, method, with_alternatives=False).peak_bytes
        ratios.append(measured / predicted)
    assert min(ratios) == pytest.approx(1, abs=0.05), ratios


@pytest.mark.parametrize("name", ["qwen2_moe-fsdp", "qwen2_moe-ep-four", "ep-packed"])
def test_they_see_the_same_tokens_in_every_step(made, name):
    """Of an epoch's last batch too, which cannot be divided evenly."""
    _, seen = made
    for step, alone in enumerate(seen[SAME[name]][0]["seen"]):
        parts = [of_rank["seen"][step] for of_rank in seen[name]]
        tokens = sorted(token for part in parts for token in part["tokens"])
        if "packed" in name:  # filled up with tokens of their own
            assert len({tuple(part["shape"]) for part in parts}) == 1
            tokens = tokens[len(tokens) - len(alone["tokens"]) :]
        assert tokens == alone["tokens"]
        assert sum(part["learnt"] for part in parts) == alone["learnt"]
        assert len({tuple(part["shape"]) for part in parts}) == 1


def test_stepping_in_backward_is_stepping_after_it_bit_for_bit(made):
    folder, _ = made
    ours, theirs = weights(folder / "fsdp-in"), weights(folder / "fsdp-after-unclipped")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["fsdp-half", "ep-half"])
def test_in_bf16_with_routers_that_train(made, name):
    folder, seen = made
    assert all(of_rank["error"] is None for of_rank in seen[name])
    ours, theirs = weights(folder / name), weights(folder / "one-half")
    assert {name: w.dtype for name, w in ours.items()} == {name: w.dtype for name, w in theirs.items()}
    routers = [name for name in ours if "mlp.gate.weight" in name]
    before = load_file(next(folder.parent.glob("recipes*/deepseek_v3")) / "model.safetensors")
    assert routers and not any(torch.equal(ours[name].float(), before[name].float()) for name in routers)
    # A gradient in bf16 that is rounded otherwise moves a weight by a place now and then.
    assert apart(folder / name, folder / "one-half")[1] <= HALF_LOSS
    moved = [(ours[name].float() - before[name]).norm() for name in ours if name in before]
    apart_by = [(ours[name].float() - theirs[name].float()).norm() for name in ours if name in before]
    assert sum(apart_by) <= HALF_WEIGHTS * sum(moved)


@pytest.mark.parametrize("name", ["other_order", "lost_sum", "lost_share"])
def test_a_fault_is_seen(made, name):
    """What the tests above would find: the comparison fails by far."""
    folder, seen = made
    assert all(of_rank["error"] is None for of_rank in seen[name])
    weight, loss = apart(folder / name, folder / "qwen2_moe-one")
    assert weight > 10 * WEIGHTS or loss > 10 * LOSS


def test_the_model_is_an_ordinary_folder(made):
    folder, _ = made
    config = json.loads((folder / "qwen2_moe-ep" / "model" / "config.json").read_text())
    assert config["architectures"] == ["RevFFNQwen2MoeForCausalLM"]
    alone, together = (
        sorted(path.name for path in (folder / name / "model").iterdir()) for name in ("qwen2_moe-one", "qwen2_moe-ep")
    )
    assert alone == together
    summary = json.loads((folder / "qwen2_moe-ep" / "run.json").read_text())
    assert summary["finished"] and summary["router"]["drift_by_layer"]


# --- resumed, and killed ---------------------------------------------------------------------------------------------


def broken_off(folder: Path, source: Path) -> Path:
    """A finished run as it was when its second step had been saved."""
    subprocess.run(["cp", "-r", source, folder], check=True)
    subprocess.run(["rm", "-r", folder / "model", folder / "stage2" / "checkpoint-4"], check=True)
    return folder


@pytest.fixture(scope="module")
def resumed(made, recipes, group, tmp_path_factory):
    """Runs of two processes, gone on with by one, two, and four; and one of one process by two."""
    folder = tmp_path_factory.mktemp("resumed")
    cases = {
        1: [("by_one", "qwen2_moe-fsdp", [])],
        2: [
            ("by_two", "qwen2_moe-fsdp", ["--parallel.strategy", "fsdp"]),
            ("of_one", "qwen2_moe-one", ["--parallel.strategy", "ep"]),
        ],
        4: [("by_four", "qwen2_moe-ep", ["--parallel.strategy", "fsdp"])],
    }
    for size, runs in cases.items():
        work = [
            {
                "name": name,
                "recipe": str(recipes / "qwen2_moe.yaml"),
                "options": [
                    *("--training.output_dir", str(broken_off(folder / name, made[0] / source))),
                    *("--training.resume", "true"),
                    *options,
                ],
            }
            for name, source, options in runs
        ]
        assert all(status == 0 for status, _ in group(size, work, folder / f"group{size}"))
        assert all(line["error"] is None for line in results(folder / f"group{size}").values())
    return folder


@pytest.mark.parametrize("name", ["by_one", "by_two", "by_four", "of_one"])
def test_another_number_of_processes_goes_on(made, resumed, name):
    weight, loss = apart(resumed / name, made[0] / "qwen2_moe-one")
    assert weight <= WEIGHTS and loss <= LOSS


def test_the_same_number_goes_on_bit_for_bit(made, resumed):
    ours, theirs = weights(resumed / "by_two"), weights(made[0] / "qwen2_moe-fsdp")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_killed_process_ends_the_others_in_one_line_and_one_goes_on(made, recipes, group, tmp_path):
    options = ["--training.output_dir", str(tmp_path / "run"), "--parallel.strategy", "fsdp"]
    work = {"name": "killed", "recipe": str(recipes / "qwen2_moe.yaml"), "options": options, "fault": "killed"}
    (first, seconds), (second, _) = group(2, [work], tmp_path / "group")
    assert (first, second) == (1, -9) and seconds < 60
    said = (tmp_path / "group" / "err0").read_text().splitlines()[-1]
    assert said.startswith("revffn train: rank 1 of 2 is gone (process")
    assert said.endswith("checkpoint-2. Go on with training.resume: true.")
    work = {"name": "alone", "recipe": work["recipe"], "options": [*options[:2], "--training.resume", "true"]}
    assert group(1, [work], tmp_path / "alone")[0][0] == 0
    weight, loss = apart(tmp_path / "run", made[0] / "qwen2_moe-one")
    assert weight <= WEIGHTS and loss <= LOSS
