"""Held-out loss by step, one method after the other, on equal tokens: same model, data order and learning rate.

    python benchmarks/quality.py --model runs/smollm2-moe --output benchmarks/results/quality_smollm2-moe_dolly.json

Every method fine-tunes all parameters but the routers on dolly-15k, with AdamW in float32 unless its name says
otherwise. cross_branch trains its projection adapters alone for the first half of the steps, as the paper does. Two
held-out losses in nats per response token are taken: `exported` (eval mode: the original architecture; for
cross_branch its own function) and `trained` (the coupled function that was trained). The file is written after each
method; methods that are in it already are not run again, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import revffn
from revffn.architectures import router_parameters
from revffn.data import batches, load_conversations, tokenize_all
from revffn.evaluation import coupled, heldout_loss
from revffn.optim import OptimizerInBackward, parameter_groups
from revffn.recipe import DataConfig


@dataclass(kw_only=True)
class Method:
    """What differs from method to method; everything else is the same for all."""

    reversible: dict
    stage1_steps: int = 0
    """The first steps train only what the coupling added, at `STAGE1_LEARNING_RATE`, as the paper does."""
    rule: Literal["adamw", "adafactor"] = "adamw"
    """Of `OptimizerInBackward`; AdamW has float32 states, Adafactor factored ones."""
    dtype: torch.dtype = torch.float32
    """Of weights and computation; bf16 weights are rounded stochastically."""


STAGE1_LEARNING_RATE = 1e-3
HALF = 20
METHODS: dict[str, Method] = {
    "none (plain SFT)": Method(reversible=dict(coupling="none")),
    "innovation m=2 random": Method(reversible=dict()),
    "innovation m=1 random": Method(reversible=dict(side_bits=1)),
    "innovation m=3 random": Method(reversible=dict(side_bits=3)),
    "innovation m=2 fixed": Method(reversible=dict(random_sign=False)),
    "innovation m=1 fixed": Method(reversible=dict(side_bits=1, random_sign=False)),
    "innovation m=3 fixed": Method(reversible=dict(side_bits=3, random_sign=False)),
    "cross_branch right": Method(
        reversible=dict(coupling="cross_branch", query_stream="right"), stage1_steps=HALF
    ),
    "cross_branch left": Method(
        reversible=dict(coupling="cross_branch", query_stream="left", verify="report"), stage1_steps=HALF
    ),
    "none, adafactor, bf16": Method(reversible=dict(coupling="none"), rule="adafactor", dtype=torch.bfloat16),
    "innovation m=2 random, adafactor, bf16": Method(reversible=dict(), rule="adafactor", dtype=torch.bfloat16),
    "innovation m=2 random, trained predictor": Method(reversible=dict(train_predictor=True)),
    "innovation m=2 random, predictor rank 64": Method(reversible=dict(predictor_rank=64)),
    "innovation m=2 random, identity predictor": Method(reversible=dict(predictor_rank=0)),
}


def run(name: str, arguments: argparse.Namespace, training: list, heldout: list, tokenizer) -> dict:
    method = METHODS[name]
    torch.manual_seed(arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=method.dtype)
    pad, size = tokenizer.pad_token_id, arguments.batch_size
    config = revffn.ReversibleConfig(**method.reversible)
    calibration = batches(training[: 16 * size], size, pad, model.device)
    revffn.convert(model, config, calibration=None if config.coupling == "none" else calibration)
    for parameter in router_parameters(model):
        parameter.requires_grad_(False)
    trainable = {p for p in model.parameters() if p.requires_grad}

    def optimizer_for(stage: int) -> OptimizerInBackward:
        added = {p for _, p in revffn.coupling_parameters(model)}
        for parameter in trainable:
            parameter.requires_grad_(stage == 2 or parameter in added)
        # Clipping by the norm of this very step, the same for all methods: so the step comes after backward.
        return OptimizerInBackward(
            parameter_groups(model, 0.0), rule=method.rule, betas=(0.9, 0.95), in_backward=False, seed=arguments.seed
        )

    curve: list[dict] = []

    def measure(step: int) -> None:
        point = {"step": step, "exported": heldout_loss(model, heldout, size, pad)["loss"]}
        if config.coupling == "innovation":
            with coupled(model):  # the same signs at every measurement
                point["trained"] = heldout_loss(model, heldout, size, pad)["loss"]
        curve.append(point)
        print(f"{name}: {point}", flush=True)

    measure(0)
    start, tokens, optimizer = time.perf_counter(), 0, None
    model.train()
    for step, batch in enumerate(batches(training[: arguments.steps * size], size, pad, model.device), start=1):
        torch.manual_seed(arguments.seed + step)
        stage, first = (1, 1) if step <= method.stage1_steps else (2, method.stage1_steps + 1)
        if step == first:
            optimizer = optimizer_for(stage)
        peak = STAGE1_LEARNING_RATE if stage == 1 else arguments.learning_rate
        warmup = min(1.0, (step - first + 1) / max(1, arguments.steps // 10))
        for group in optimizer.param_groups:
            group["lr"] = peak * warmup
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int(batch["attention_mask"].sum())
        if step % arguments.measure_every == 0:
            measure(step)
            model.train()
    report = revffn.reversible_report(model)
    return {
        "config": config.to_dict(),
        "stage1_steps": method.stage1_steps,
        "rule": method.rule,
        "dtype": str(method.dtype).removeprefix("torch."),
        "calibration": getattr(model.config, "revffn_calibration", None),
        "curve": curve,
        "tokens": tokens,
        "seconds_with_measuring": time.perf_counter() - start,
        "mismatched_states_total": report["mismatched_states_total"],
        "walks": report["walks"],
        "anchor_layers": report["anchor_layers"],
    }


def table(results: dict) -> str:
    """Markdown: one row per method, held-out loss by step."""
    steps = [point["step"] for point in next(iter(results["methods"].values()))["curve"]]
    lines = [
        "| method | held-out loss of | " + " | ".join(f"step {s}" for s in steps) + " |",
        "|---" * (len(steps) + 2) + "|",
    ]
    for name in METHODS:
        if (result := results["methods"].get(name)) is None:
            continue
        for key in ("exported", "trained"):
            if key in result["curve"][0]:
                values = " | ".join(f"{point[key]:.3f}" for point in result["curve"])
                own = key == "exported" and result["config"]["coupling"] == "cross_branch"
                lines.append(f"| {name} | {'its own function' if own else key} | {values} |")
    return "\n".join(lines)


def read(file: Path, settings: dict) -> dict:
    """The results so far."""
    if not file.exists():
        return {"settings": settings, "methods": {}}
    results = json.loads(file.read_text())
    if results["settings"] != settings:
        raise SystemExit(f"{file} was made with other settings: {results['settings']}. Name another file.")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=2 * HALF)
    parser.add_argument("--measure-every", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--num-heldout", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    data = DataConfig(num_examples=2000, num_heldout=arguments.num_heldout, max_length=arguments.max_length)
    training, heldout = (tokenize_all(rows, tokenizer, data.max_length) for rows in load_conversations(data))
    settings = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k not in ("methods", "output")
    }
    for name in arguments.methods:
        if name in read(arguments.output, settings)["methods"]:
            continue
        result = run(name, arguments, training, heldout, tokenizer)
        results = read(arguments.output, settings)  # another process may have added methods meanwhile
        results["methods"][name] = result
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        results["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__, "commit": commit}
        results["device"] = f"cpu, {torch.get_num_threads()} threads, {platform.machine()}"
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(read(arguments.output, settings)))


if __name__ == "__main__":
    main()
