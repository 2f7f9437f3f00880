"""One full-size training step on fake tensors: the bytes alive at its peak, by part.

    python benchmarks/simulate.py --model qwen1.5-moe-a2.7b --batch 16 --tokens 2048 \\
        --coupling innovation --side-bits 2 --optimizer adafactor --json

Needs no GPU, no weights and a minute or a few (the more tiles, the longer). Every parameter is updated, which is
checked. With `--json` the last line of the output is one JSON object; `--out FILE` also writes it to a file. For
comparison `--method checkpointing`, transformers with our loss and optimizer in backward; with `--full-logits
--step-after-backward` as `Trainer` does it.
"""

import argparse
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import revffn
from revffn import ReversibleConfig
from revffn.memory.amounts import gib
from revffn.memory.simulation import METHODS, Method, simulate_step
from revffn.models.known import load_config

ROOT = Path(__file__).resolve().parent.parent


def git_state() -> dict:
    """The commit that is run, and whether the package or the benchmarks' code differ from it; nothing where the
    package is another tree's."""

    def git(*words: str) -> str:
        return subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, check=True).stdout.rstrip()

    try:
        if Path(revffn.__file__).resolve().parent.parent != ROOT:
            raise OSError(f"revffn is {revffn.__file__}")
        changed = git("status", "--porcelain", "--", "revffn", "benchmarks/*.py").splitlines()
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed), "changed": [line[3:] for line in changed]}
    except (OSError, subprocess.CalledProcessError):
        # An installed copy, or no git.
        return {"commit": None, "dirty": None, "changed": []}


def provenance() -> dict:
    """What a result file says about the code that made it."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"git": git_state(), "versions": {"python": platform.python_version(), **packages}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a name that `revffn plan` knows, a folder, or a hub name")
    parser.add_argument("--batch", type=int, required=True, help="sequences")
    parser.add_argument("--tokens", type=int, required=True, help="tokens per sequence")
    parser.add_argument("--layers", type=int, help="simulate only so many decoder layers")
    parser.add_argument("--method", choices=METHODS, default="reversible")
    parser.add_argument("--coupling", choices=("innovation", "cross_branch", "none"), default="innovation")
    parser.add_argument("--side-bits", type=int, default=2)
    parser.add_argument("--tile-tokens", type=int, default=2048, help="0: the whole batch at once")
    parser.add_argument("--kept-layers", type=int, default=0, help="the last so many that do not run again")
    parser.add_argument("--optimizer", choices=("adafactor", "adamw", "adamw8bit", "sgd"), default="adafactor")
    parser.add_argument("--rounding", choices=("stochastic", "nearest", "master"), default="stochastic")
    parser.add_argument(
        "--step-after-backward", action="store_true", help="keep all gradients until backward has ended"
    )
    parser.add_argument("--weights", choices=("device", "host"), default="device")
    parser.add_argument("--full-logits", action="store_true", help="no linear cross-entropy")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    args = parser.parse_args()

    at_start = provenance()
    hf_config = load_config(args.model, **({"num_hidden_layers": args.layers} if args.layers else {}))
    reversible = None
    if args.method == "reversible":
        settings = dict(coupling=args.coupling, side_bits=args.side_bits, kept_layers=args.kept_layers)
        settings["tile_tokens"] = args.tile_tokens or None
        reversible = ReversibleConfig.from_dict(settings)
    method = Method(
        name=args.method,
        reversible=reversible,
        optimizer=args.optimizer,
        rounding=args.rounding,
        optimizer_in_backward=not args.step_after_backward,
        linear_cross_entropy=not args.full_logits,
        weights=args.weights,
    )
    result = simulate_step(hf_config, args.batch, args.tokens, method)
    print(f"{args.model}, {args.batch} x {args.tokens} tokens, {result['num_parameters']:,} parameters, {args.method}")
    print(f"peak {gib(result['peak_bytes'])} in {result['phase']}, {gib(result['after_bytes'])} after the step")
    for part, size in result["parts"].items():
        print(f"  {part:<22} {gib(size):>12}")
    print("largest tensors at the peak:")
    for group in result["largest"]:
        print(
            f"  {gib(group['bytes']):>12}  {group['count']} x {group['dtype']} {tuple(group['shape'])}, "
            f"{group['part']}, made by {group['operation']}"
        )
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    settings.pop("json"), settings.pop("out")
    result |= {"settings": settings, **at_start}
    line = json.dumps(result)
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(line)
    sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
