"""Held-out quality of ways to fine-tune: one method on one workload with one seed -> one JSON.

    python benchmarks/quality.py --model runs/smollm2-moe --workload dolly --methods sft innovation_fixed --seeds 0 1 2
    python benchmarks/quality.py --model runs/smollm2-moe --workload dolly --methods sft lora --sweep
    python benchmarks/quality.py --list

Equal for every method: the model, the tokens and their order, the number of steps, the schedule (warm-up over a tenth
of the steps, then linear decay to zero), clipping at norm 1 and, where a method has no rule of its own, AdamW in
float32 without weight decay. The learning rate is the one with the lowest held-out loss in the method's own sweep
(`--sweep`: three rates, then further ones while the best is the lowest or the highest of them); a method with
`rate_of` takes another's, untuned. All parameters but the routers are trained, or what the method trains instead.

Measured on examples nobody trains on, in nats per response token: `exported`, the function a user gets (for
innovation the original architecture; for cross_branch its own), and `trained`, the coupled function that was trained.
`accuracy` is the share of response tokens that are the most likely one. `drift` is taken on text of another kind (Tiny
Shakespeare): its loss, and the divergence KL(base || tuned) per token. `kept_bytes` is what the decoder layers keep
from forward for backward, for one batch of the run.

A file that is there already is not made again, so an interrupted run goes on where it stopped, and several processes
may share the work.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import methods as benchmark_methods
import torch
import transformers
from simulate import git_state
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import revffn
from revffn.data import IGNORED, batches, load_conversations, tokenize_all
from revffn.models.architectures import router_parameters
from revffn.optim import OptimizerInBackward, parameter_groups
from revffn.recipe import DataConfig
from revffn.training.heldout import coupled, mode, step_bytes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality"
UNRELATED = ROOT / "data" / "tiny_shakespeare" / "input.txt.gz"
CALIBRATION_ROWS = 256


@dataclass(kw_only=True, frozen=True)
class Workload:
    """What is learnt. Examples longer than `max_length` are left out, not cut."""

    path: str
    steps: int = 300
    batch_size: int = 2
    max_length: int = 96
    num_heldout: int = 96


WORKLOADS = {
    "dolly": Workload(path="data/databricks-dolly-15k/databricks-dolly-15k.jsonl.gz"),
    "gsm8k": Workload(path="data/gsm8k/train.jsonl.gz", batch_size=1, max_length=192),
}


@dataclass(kw_only=True, frozen=True)
class Method:
    """What differs from method to method."""

    description: str
    reversible: dict[str, Any] | None = None
    """Of `ReversibleConfig`; None does not convert."""
    change: Callable[[PreTrainedModel], Any] = lambda model: model
    """What a method without conversion makes of the plain model."""
    rule: Literal["adamw", "adafactor", "lomo", "galore", "galore_linear"] = "adamw"
    dtype: torch.dtype = torch.float32
    """Of weights and computation; bf16 weights are rounded stochastically."""
    stage1: float = 0.0
    """This share of the steps trains only what the coupling added, as the paper does."""
    stage1_rate: float | None = 1e-3
    """Learning rate of that; None: the same as afterwards."""
    distil: bool = False
    """The first of the two stages learns the base model's distribution, of all tokens, in place of the responses."""
    schedule: dict[float, int | Literal["plain", "refit"]] = field(default_factory=dict)
    """What changes after this share of the steps, of innovation: m; `plain`, the rest is trained without the coupling;
    `refit`, the predictors are fitted again."""
    rate_of: str | None = None
    """Takes the learning rate found for this method."""
    rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4)
    """The sweep's first three, rising."""
    steps: int | None = None
    """In place of the workload's."""
    points: int = 3
    """Measurements on the way, evenly spaced, a multiple of 3; one more before the first step."""


def _innovation(words: str, schedule: dict[float, Any] | None = None, **settings: Any) -> Method:
    return Method(
        description=f"innovation, {words}",
        reversible={"coupling": "innovation", "side_bits": 2, "random_sign": False, "grid_growth": 0, **settings},
        schedule=schedule or {},
        rate_of="sft",
    )


def _peft(description: str, config_class: str, **settings: Any) -> Method:
    def change(model: PreTrainedModel) -> Any:
        return benchmark_methods.peft(model, None, config_class, **settings)

    return Method(description=description, change=change, rates=(5e-4, 1e-3, 2e-3))


def _checkpointing(model: PreTrainedModel) -> Any:
    return benchmark_methods.checkpointing(model, None)


def _cross_branch(words: str, query_stream: str, **fields: Any) -> Method:
    """As in the paper; `stream_maps` makes it better than that."""
    reversible = dict(coupling="cross_branch", verify="report", query_stream=query_stream)
    reversible["stream_maps"] = fields.pop("stream_maps", False)
    return Method(description=f"cross_branch, {words}", reversible=reversible, stage1=0.5, **fields)


_FITTED: dict[str, Any] = dict(query_stream="right", stream_maps=True, stage1_rate=None, distil=True)

METHODS: dict[str, Method] = {
    "sft": Method(description="plain SFT", reversible=dict(coupling="none")),
    "sft_checkpointing": Method(
        description="transformers SFT + activation checkpointing", change=_checkpointing, rate_of="sft"
    ),
    "innovation_grown": _innovation("m = 2, growing grid", grid_growth=None),
    "innovation_m1_grown": _innovation("m = 1, growing grid", side_bits=1, grid_growth=None),
    "innovation_m0_grown": _innovation("m = 0, growing grid", side_bits=0, grid_growth=None),
    "innovation_fixed": _innovation("m = 2, fixed sign"),
    "innovation_m1_fixed": _innovation("m = 1, fixed sign", side_bits=1),
    "innovation_m4_fixed": _innovation("m = 4, fixed sign", side_bits=4),
    "innovation_m1_rising": _innovation("m = 1, then 4 for the last fifth, fixed sign", {0.0: 1, 0.8: 4}, side_bits=1),
    "innovation_m1_plain_end": _innovation(
        "m = 1, growing grid, then plain for the last tenth", {0.9: "plain"}, side_bits=1, grid_growth=None
    ),
    "innovation_m1_refit": _innovation(
        "m = 1, growing grid, fitted again after each third",
        {1 / 3: "refit", 2 / 3: "refit"},
        side_bits=1,
        grid_growth=None,
    ),
    "innovation_random": _innovation("m = 2, random sign", random_sign=True),
    "innovation_m1_random": _innovation("m = 1, random sign", side_bits=1, random_sign=True),
    "innovation_plain2": _innovation("m = 2, two plain layers", plain_layers=2),
    "innovation_rank64": _innovation("m = 2, predictors of rank 64", predictor_rank=64),
    "innovation_identity": _innovation("m = 2, identity predictors", predictor_rank=0),
    "innovation_trained": _innovation("m = 2, trained predictors", train_predictor=True),
    "lora": _peft("LoRA, rank 16 on all linear maps", "LoraConfig", **benchmark_methods.LORA),
    # DoRA divides by the norms of a map's rows; an upcycled model's shared-expert gates are zero: NaN.
    "dora": _peft(
        "DoRA, rank 16 on all linear maps but zero ones",
        "LoraConfig",
        use_dora=True,
        exclude_modules=["shared_expert_gate"],
        **benchmark_methods.LORA,
    ),
    "ia3": _peft("IA3", "IA3Config", **benchmark_methods.IA3),
    "lomo": Method(description="LOMO", change=_checkpointing, rule="lomo", rates=(1e-2, 3e-2, 1e-1)),
    "galore": Method(description="GaLore, experts projected", change=_checkpointing, rule="galore"),
    "galore_linear": Method(
        description="GaLore, experts with plain AdamW", change=_checkpointing, rule="galore_linear"
    ),
    "cross_branch": _cross_branch("queries from the right", query_stream="right"),
    "cross_branch_fitted": _cross_branch(
        "queries from the right, adapters fitted, then distilled", **_FITTED, rates=(1e-5, 3e-5, 1e-4)
    ),
    "cross_branch_long": _cross_branch(
        "queries from the right, adapters fitted, then distilled, longer",
        **_FITTED,
        rate_of="cross_branch_fitted",
        steps=1200,
        points=12,
    ),
    "cross_branch_left": _cross_branch(
        "queries from the left (the paper's)", query_stream="left", rates=(2e-4, 4e-4, 8e-4)
    ),
    "sft_adafactor": Method(
        description="plain SFT, adafactor, bf16",
        reversible=dict(coupling="none"),
        rule="adafactor",
        dtype=torch.bfloat16,
    ),
    "innovation_adafactor": Method(
        description="innovation, m = 2, growing grid, adafactor, bf16",
        reversible=dict(coupling="innovation", side_bits=2, random_sign=False, grid_growth=None),
        rule="adafactor",
        dtype=torch.bfloat16,
        rate_of="sft_adafactor",
    ),
}

# --- data ------------------------------------------------------------------------------------------------------------


def load(workload: Workload, tokenizer: Any, seed: int) -> tuple[list, list]:
    """(training, held-out) rows. Held-out ones are the same for every seed; the seed orders the others."""
    data = DataConfig(path=workload.path, heldout=4 * workload.num_heldout)
    training, heldout = load_conversations(data)
    needed = workload.steps * workload.batch_size
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed)).tolist()
    return (
        rows_of((training[i] for i in order), tokenizer, workload.max_length, needed),
        rows_of(iter(heldout), tokenizer, workload.max_length, workload.num_heldout),
    )


def rows_of(conversations: Iterator, tokenizer: Any, max_length: int, number: int) -> list[dict[str, list[int]]]:
    rows: list[dict[str, list[int]]] = []
    for conversation in conversations:
        if len(rows) == number:
            break
        rows += [r for r in tokenize_all([conversation], tokenizer, 8192) if len(r["input_ids"]) <= max_length]
    if len(rows) < number:
        raise SystemExit(f"{len(rows)} examples of at most {max_length} tokens, {number} are needed.")
    return rows


def unrelated(tokenizer: Any, num_rows: int = 8, num_tokens: int = 128) -> Tensor:
    """Text of another kind, (num_rows, num_tokens) token ids."""
    text = gzip.decompress(UNRELATED.read_bytes()).decode()
    ids = tokenizer(text[: 16 * num_rows * num_tokens], return_tensors="pt").input_ids[0]
    return ids[: num_rows * num_tokens].view(num_rows, num_tokens)


# --- measuring -------------------------------------------------------------------------------------------------------


def backbone(model: Any) -> PreTrainedModel:
    """The causal language model inside, which PEFT wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def log_probabilities(model: Any, ids: Tensor) -> Iterator[Tensor]:
    """Of every next token, row by row, (T, V) float32."""
    inner = backbone(model)
    with mode(model, training=False):
        for row in ids:
            hidden = inner.model(input_ids=row[None], use_cache=False).last_hidden_state[0]
            yield inner.get_output_embeddings()(hidden).float().log_softmax(-1)


def drift(model: Any, ids: Tensor, base: list[Tensor]) -> dict[str, float]:
    """Loss on unrelated text, and the divergence from the base model on it, in nats per token."""
    losses, divergences = [], []
    for row, now, before in zip(ids, log_probabilities(model, ids), base, strict=True):
        losses.append(F.nll_loss(now[:-1], row[1:]).item())
        divergences.append(F.kl_div(now, before.float(), log_target=True, reduction="batchmean").item())
    return {"loss": statistics.mean(losses), "divergence": statistics.mean(divergences)}


@torch.no_grad()
def heldout(model: Any, rows: list, batch_size: int, pad: int) -> dict[str, float]:
    """Loss in nats per response token, and the share of response tokens that are the most likely one."""
    inner, total, right, number = backbone(model), 0.0, 0, 0
    with mode(model, training=False):
        for batch in batches(sorted(rows, key=lambda row: -len(row["input_ids"])), batch_size, pad):
            hidden = inner.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            ).last_hidden_state
            labels = batch["labels"][:, 1:]
            counts = labels != IGNORED
            logits = inner.get_output_embeddings()(hidden[:, :-1][counts]).float()
            total += F.cross_entropy(logits, labels[counts], reduction="sum").item()
            right += int((logits.argmax(-1) == labels[counts]).sum())
            number += int(counts.sum())
    return {"loss": total / number, "accuracy": right / number}


# --- one run ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Updates:
    """What makes the updates: `step(model, batch)` is forward, backward and update at the rate last set. The model may
    be another around the same parameters."""

    step: Callable[[Any, dict[str, Tensor]], float]
    set_lr: Callable[[float], None]


def divergence_from(teacher: PreTrainedModel, model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Of the model's next-token distribution, in nats per token, all tokens counted: a loss."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    counts = batch["attention_mask"].bool()
    with torch.no_grad():
        target = teacher(**inputs, use_cache=False).logits[counts].log_softmax(-1)
    found = model(**inputs, use_cache=False).logits[counts].log_softmax(-1)
    return F.kl_div(found, target, log_target=True, reduction="batchmean")


def updates_of(
    method: Method, model: Any, learning_rate: float, seed: int, teacher: PreTrainedModel | None = None
) -> Updates:
    if method.rule in ("lomo", "galore", "galore_linear"):
        row = benchmark_methods.METHODS[method.rule]
        training = row.start(model, benchmark_methods.OptimizerSettings(lr=learning_rate))
        return Updates(step=lambda _, batch: training.step(batch).item(), set_lr=training.set_lr)
    if method.rule == "adamw":
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    else:
        # After backward, because the norm that clips is this very step's, the same for all methods.
        optimizer = OptimizerInBackward(
            parameter_groups(model, 0.0), rule=method.rule, betas=(0.9, 0.95), in_backward=False, seed=seed
        )

    def step(model: Any, batch: dict[str, Tensor]) -> float:
        loss = divergence_from(teacher, model, batch) if teacher else model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def set_lr(lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr

    return Updates(step=step, set_lr=set_lr)


def run(model_path: str, method: Method, workload: Workload, learning_rate: float, seed: int, name: str) -> dict:
    """Train once and measure on the way."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    training, held = load(workload, tokenizer, seed)
    pad, size, steps = tokenizer.pad_token_id, workload.batch_size, workload.steps
    text = unrelated(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=method.dtype)
    base = [p.to(torch.bfloat16) for p in log_probabilities(model, text)]
    for parameter in router_parameters(model):
        parameter.requires_grad_(False)
    torch.manual_seed(seed)
    calibration = None

    def convert(model: PreTrainedModel) -> None:
        config = revffn.ReversibleConfig.from_dict(method.reversible)
        fits = config.coupling != "none"
        revffn.convert(model, config, calibration=batches(training[:CALIBRATION_ROWS], size, pad) if fits else None)

    if method.reversible is None:
        model = method.change(model)
    else:
        convert(model)
        calibration = getattr(model.config, "revffn_calibration", None)
    is_innovation = (method.reversible or {}).get("coupling") == "innovation"
    curve: list[dict[str, Any]] = []

    def measure(step: int) -> None:
        now = heldout(model, held, 2 * size, pad)
        point = {"step": step, "tokens": tokens, "exported": now["loss"], "accuracy": now["accuracy"]}
        if is_innovation and revffn.is_reversible(model):
            with coupled(model):  # the same signs at every measurement
                point["trained"] = heldout(model, held, 2 * size, pad)["loss"]
        curve.append(point)
        print(name, point, flush=True)

    kept = step_bytes(backbone(model), next(batches(training, size, pad)))
    updates, losses, tokens, largest, mismatched = None, [], 0, 0, 0
    last_coupled = model if revffn.is_reversible(model) else None
    measure(0)
    start = drift(model, text, base)
    trainable = {p for p in model.parameters() if p.requires_grad}
    model.train()
    first_of_stage2 = round(method.stage1 * steps) + 1
    looks = {round(steps * i / method.points) for i in range(1, method.points + 1)}
    for step, batch in enumerate(batches(training[: steps * size], size, pad), start=1):
        torch.manual_seed(1000 * seed + step)
        stage, first, last = (1, 1, first_of_stage2 - 1) if step < first_of_stage2 else (2, first_of_stage2, steps)
        if step == first:
            added = {p for _, p in revffn.coupling_parameters(model)} if method.stage1 else set()
            for parameter in trainable:
                parameter.requires_grad_(stage == 2 or parameter in added)
            teacher = None
            if method.distil and stage == 1:
                teacher = AutoModelForCausalLM.from_pretrained(model_path, dtype=method.dtype).eval()
            updates = updates_of(method, model, learning_rate, seed, teacher)
        for share, change in method.schedule.items():
            if step == 1 + round(share * steps):
                if change == "plain":
                    model = revffn.export(model)
                elif change == "refit":
                    mismatched += revffn.reversible_report(model)["mismatched_states_total"]
                    model = revffn.export(model)
                    convert(model)
                    last_coupled = model
                else:
                    for layer in model.model.layers:
                        if layer.coupling.side_bits is not None:
                            layer.coupling.side_bits = change
        own_rate = stage == 1 and method.stage1_rate is not None
        peak, warm = method.stage1_rate if own_rate else learning_rate, max(1, (last - first + 1) // 10)
        done = step - first + 1
        updates.set_lr(peak * min(done / warm, (last - step + 1) / (last - first + 2 - warm)))
        losses.append(updates.step(model, batch))
        tokens += int(batch["attention_mask"].sum())
        if revffn.is_reversible(model):
            largest = max(largest, revffn.reversible_report(model)["largest_grid_value"])
        if step in looks:
            measure(step)
            model.train()
    result = {
        "learning_rate": learning_rate,
        "curve": curve,
        "losses": [round(loss, 4) for loss in losses],
        "drift": {"before": start, "after": drift(model, text, base)},
        "tokens": tokens,
        "trained_parameters": sum(p.numel() for p in trainable),
        "kept_bytes": kept["kept_bytes"],
        "peak_bytes_above_weights": kept["peak_bytes"],
        "kept_bytes_of_tokens": next(batches(training, size, pad))["input_ids"].numel(),
        "calibration": calibration,
    }
    if last_coupled is not None:
        report = revffn.reversible_report(last_coupled)
        result["mismatched_states"] = mismatched + report["mismatched_states_total"]
        if any("kept_bits" in layer for layer in report["layers"].values()):
            result["layers"] = report["layers"]
        result["grids"] = last_coupled.config.revffn["grids"]
        result["largest_grid_value"] = largest
    return result


# --- many runs -------------------------------------------------------------------------------------------------------


def file_of(workload: str, method: str, seed: int, learning_rate: float | None = None) -> Path:
    """A run's file; with a learning rate, one of the sweep's."""
    if learning_rate is None:
        return RESULTS / workload / f"{method}_seed{seed}.json"
    return RESULTS / workload / "sweep" / f"{method}_{learning_rate:g}.json"


def final(result: dict) -> float:
    """Held-out loss at the end; infinite for a run that failed or diverged."""
    loss = result["curve"][-1]["exported"] if result.get("curve") else math.inf
    return loss if math.isfinite(loss) else math.inf


def swept(workload: str, method: str) -> dict[float, float]:
    """Held-out loss by learning rate, as far as the method's sweep has come."""
    found = {}
    for file in (RESULTS / workload / "sweep").glob(f"{method}_*.json"):
        result = json.loads(file.read_text())
        if result["method"] == method:
            found[result["settings"]["learning_rate"]] = final(result)
    return found


def chosen_rate(workload: str, method: str) -> float:
    """The learning rate with the lowest held-out loss in the sweep."""
    name = METHODS[method].rate_of or method
    found = swept(workload, name)
    if not found:
        raise SystemExit(f"No learning rate for {method} on {workload}: run --methods {name} --sweep first.")
    return min(found, key=found.get)


def next_rate(found: dict[float, float]) -> float | None:
    """The rate beyond the best one where that is the lowest or the highest tried; None where it lies between others,
    or where nothing trained."""
    rates = sorted(found)
    best = min(rates, key=found.get)
    if len(rates) < 2 or found[best] == math.inf or rates[0] < best < rates[-1]:
        return None
    neighbour = rates[1] if best == rates[0] else rates[-2]
    return float(f"{best * best / neighbour:.2g}")


def sweep(arguments: argparse.Namespace, name: str) -> None:
    rates = list(METHODS[name].rates)
    while rates:
        rate = rates.pop(0)
        one(arguments, name, 0, rate, file_of(arguments.workload, name, 0, rate))
        found = swept(arguments.workload, name)
        if not rates and set(METHODS[name].rates) <= set(found):
            further = next_rate(found)
            rates += [] if further is None else [further]


def one(arguments: argparse.Namespace, name: str, seed: int, learning_rate: float, file: Path) -> None:
    """Make one file, unless it is there or another process is at it."""
    lock = file.with_suffix(".running")
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.touch(exist_ok=False)
    except FileExistsError:
        print(f"{lock}: another process is at it; delete the file if none is.", flush=True)
        return
    workload = WORKLOADS[arguments.workload]
    steps = arguments.steps or (METHODS[name].steps or workload.steps) // (3 if arguments.sweep else 1)
    workload = Workload(**{**vars(workload), "steps": steps})
    git = git_state()
    try:
        try:
            result = run(arguments.model, METHODS[name], workload, learning_rate, seed, file.stem)
        except Exception as error:
            # A peer that crashes on this model: that is its result.
            if METHODS[name].reversible is not None or isinstance(error, benchmark_methods.NotAvailable):
                raise
            result = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
        result = {
            "method": name,
            "description": METHODS[name].description,
            "settings": {
                "model": arguments.model,
                "workload": arguments.workload,
                **vars(workload),
                "seed": seed,
                "learning_rate": learning_rate,
                "rule": METHODS[name].rule,
                "reversible": METHODS[name].reversible,
                "stage1": METHODS[name].stage1,
                "stage1_rate": METHODS[name].stage1_rate,
                "distil": METHODS[name].distil,
                "schedule": METHODS[name].schedule,
                "dtype": str(METHODS[name].dtype).removeprefix("torch."),
            },
            **result,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "git": git,
            "device": f"cpu, {torch.get_num_threads()} threads, {platform.machine()}",
        }
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(file)
    finally:
        lock.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/smollm2-moe", help="folder of a Mixture of Experts (revffn upcycle)")
    parser.add_argument("--workload", choices=list(WORKLOADS), default="dolly")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="instead of the workload's, for a trial: with --results")
    parser.add_argument("--results", type=Path, help="folder for the runs' files, in place of the repository's")
    parser.add_argument(
        "--sweep", action="store_true", help="find the learning rate, with a third of the steps, seed 0"
    )
    parser.add_argument("--list", action="store_true", help="methods, and what they are")
    arguments = parser.parse_args()
    trial = arguments.steps is not None or arguments.model != parser.get_default("model")
    if trial and (arguments.results is None or arguments.sweep):
        parser.error("another model or number of steps is a trial: give --results FOLDER, and no --sweep")
    if arguments.list:
        for name, method in METHODS.items():
            print(f"{name:24} {method.description}")
        return
    for name in arguments.methods if arguments.sweep else ():
        if METHODS[name].rate_of is None:
            sweep(arguments, name)
    for seed in () if arguments.sweep else arguments.seeds:
        for name in arguments.methods:
            file = file_of(arguments.workload, name, seed)
            if arguments.results is not None:
                file = arguments.results / file.relative_to(RESULTS)
            if file.exists():
                print(f"{file}: there already. --results FOLDER makes it anew.", flush=True)
            else:
                one(arguments, name, seed, chosen_rate(arguments.workload, name), file)


if __name__ == "__main__":
    main()
