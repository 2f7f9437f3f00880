"""Held-out loss by step, one method after the other, on equal tokens: same model, data order, optimizer and learning
rate.

    python benchmarks/quality.py --model runs/smollm2-moe --steps 20 --output
    benchmarks/results/quality_smollm2-moe_dolly.json

Every method fine-tunes all parameters but the routers on dolly-15k with AdamW in float32. Two held-out losses in nats
per response token are taken: `exported` (eval mode: the original architecture; for cross_branch its own function) and
`trained` (the coupled function that was trained). The file is written after each method; methods that are in it
already are not run again, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import revffn
from revffn.architectures import router_parameters
from revffn.data import batches, load_conversations, tokenize_all
from revffn.evaluation import heldout_loss
from revffn.recipe import DataConfig

TRAINED = dict(train_predictor=True)
METHODS: dict[str, dict] = {
    "none (plain SFT)": dict(coupling="none"),
    "innovation m=2 random": TRAINED,
    "innovation m=2 random, frozen predictor": dict(),
    "innovation m=1 random": dict(side_bits=1, **TRAINED),
    "innovation m=2 fixed": dict(random_sign=False, **TRAINED),
    "innovation m=3 random": dict(side_bits=3, **TRAINED),
    "innovation m=1 fixed": dict(side_bits=1, random_sign=False, **TRAINED),
    "innovation m=3 fixed": dict(side_bits=3, random_sign=False, **TRAINED),
    "cross_branch right": dict(coupling="cross_branch", query_stream="right"),
    "cross_branch left": dict(coupling="cross_branch", verify="report"),
    "innovation m=2 random, predictor rank 64": dict(predictor_rank=64),
    "innovation m=2 random, identity predictor": dict(predictor_rank=0),
}


def run(name: str, arguments: argparse.Namespace, training: list, heldout: list, tokenizer) -> dict:
    torch.manual_seed(arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    pad, size = tokenizer.pad_token_id, arguments.batch_size
    config = revffn.ReversibleConfig(**METHODS[name])
    calibration = batches(training[: 16 * size], size, pad, model.device)
    revffn.convert(model, config, calibration=None if config.coupling == "none" else calibration)
    for parameter in router_parameters(model):
        parameter.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.0)
    curve: list[dict] = []

    def measure(step: int) -> None:
        point = {"step": step, "exported": heldout_loss(model, heldout, size, pad)["loss"]}
        if config.coupling == "innovation":
            model.config.revffn["eval_coupled"] = True
            torch.manual_seed(arguments.seed)  # the same signs at every measurement
            point["trained"] = heldout_loss(model, heldout, size, pad)["loss"]
            model.config.revffn["eval_coupled"] = False
        curve.append(point)
        print(f"{name}: {point}", flush=True)

    measure(0)
    start, tokens = time.perf_counter(), 0
    model.train()
    for step, batch in enumerate(batches(training[: arguments.steps * size], size, pad, model.device), start=1):
        torch.manual_seed(arguments.seed + step)
        warmup = min(1.0, step / max(1, arguments.steps // 10))
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * warmup
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int(batch["attention_mask"].sum())
        if step % arguments.measure_every == 0:
            measure(step)
            model.train()
    report = revffn.reversible_report(model)
    return {
        "config": config.to_dict(),
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
    for name, result in results["methods"].items():
        for key in ("exported", "trained"):
            if key in result["curve"][0]:
                values = " | ".join(f"{point[key]:.3f}" for point in result["curve"])
                own = key == "exported" and result["config"]["coupling"] == "cross_branch"
                lines.append(f"| {name} | {'its own function' if own else key} | {values} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--measure-every", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--num-heldout", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    data = DataConfig(num_examples=2000, num_heldout=arguments.num_heldout, max_length=arguments.max_length)
    training, heldout = (tokenize_all(rows, tokenizer, data.max_length) for rows in load_conversations(data))
    settings = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k not in ("methods", "output")
    }
    results = {"settings": settings, "methods": {}}
    if arguments.output.exists():
        results = json.loads(arguments.output.read_text())
        if results["settings"] != settings:
            raise SystemExit(
                f"{arguments.output} was made with other settings: {results['settings']}. Name another file."
            )
    for name in arguments.methods:
        if name in results["methods"]:
            continue
        results["methods"][name] = run(name, arguments, training, heldout, tokenizer)
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        results["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__, "commit": commit}
        results["device"] = f"cpu, {torch.get_num_threads()} threads, {platform.machine()}"
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
