"""How many operations a training step dispatches: needs no GPU and predicts the host's time.

    python benchmarks/dispatches.py
    python benchmarks/dispatches.py --json --out FILE

A tiny model of Qwen1.5-MoE's architecture (experts and a shared expert in every layer) trains in
bf16; counts do not depend on sizes. Its tensors are fake, and the choice of kernels is a GPU's, so
that what is counted is what a GPU's host has to issue; `--torch` counts what runs without kernels
(`REVFFN_KERNELS=torch`), where a layer's dense parts are the family's own code. Ours with
`innovation`, m = 2, the grids of the other benchmarks, in tiles. Differences leave embedding, head
and loss out:

- further tile: forward, recomputation and backward of one more tile in one layer, without an
  optimizer (four layers against three, of that two tiles against one).
- layer: what one more layer takes with one tile, adafactor in backward included (four against
  three).

`all` counts every operation that reaches the dispatcher below autograd; `launching` only those that
do more than make a view or an unfilled buffer. An operation of revffn's own counts as one: what its
PyTorch form on a CPU consists of is not looked at, since a GPU runs kernels in its place.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this tree's package, and where none is installed

import torch  # noqa: E402
from methods import METHODS, OptimizerSettings, own_optimizer, plain_model  # noqa: E402
from simulate import provenance  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from workloads import WORKLOADS  # noqa: E402

from revffn.ops import dispatch  # noqa: E402

WORKLOAD = WORKLOADS["qwen1.5_16x2048"].tiny()
METHOD = "ours_innovation_tiles"
LAYERS = 3
BUFFERS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
TOP = 60


class Dispatches(TorchDispatchMode):
    """Counts operations by name. What `revffn`'s own are made of does not come by here: the mode is
    off while one of them runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "prim":  # attributes of fake tensors
            self.counts[function] += 1
        return function(*args, **(kwargs or {}))


def launches(function: Any) -> bool:
    """Whether an operation computes something."""
    if function._schema.name.partition("::")[2] in BUFFERS:
        return False
    results = [result.alias_info for result in function._schema.returns]
    return not (results and all(alias is not None and not alias.is_write for alias in results))


def count(layers: int, tiles: int, with_optimizer: bool) -> Counter:
    """Operations of one training step, after one that warms up."""
    with FakeTensorMode():
        return count_step(layers, tiles, with_optimizer)


def count_step(layers: int, tiles: int, with_optimizer: bool) -> Counter:
    overrides = {**WORKLOAD.overrides, "num_hidden_layers": layers}
    workload = replace(WORKLOAD, batch=tiles, dtype=torch.bfloat16, overrides=overrides)
    model = plain_model(workload.hf_config(), "cpu", workload.dtype, seed=None)
    model = METHODS[METHOD].change(model, workload.tile_tokens)
    step: Callable[[dict], Any]
    if with_optimizer:
        step = own_optimizer(model, OptimizerSettings()).step
    else:

        def step(batch: dict) -> None:
            model(**batch, use_cache=False).loss.backward()
            model.zero_grad()

    first, second = workload.batches(2)
    step(first)
    with Dispatches() as counter:
        step(second)
    return counter.counts


def minus(a: Counter, b: Counter) -> Counter:
    return Counter({key: a[key] - b[key] for key in a | b if a[key] != b[key]})


def described(counts: Counter) -> dict[str, Any]:
    """Sums, and the operations that are dispatched most."""
    top = sorted(counts.items(), key=lambda item: -abs(item[1]))[:TOP]
    return {
        "all": sum(counts.values()),
        "launching": sum(number for function, number in counts.items() if launches(function)),
        "by_operation": [
            {"operation": str(function), "number": number, "launches": launches(function)}
            for function, number in top
        ],
        "other_operations": sum(counts.values()) - sum(number for _, number in top),
    }


def measured() -> dict[str, Any]:
    """Both numbers, and what surrounds them."""
    few = {
        (depth, tiles): count(depth, tiles, False)
        for depth in (LAYERS, LAYERS + 1)
        for tiles in (1, 2)
    }
    layer = minus(few[LAYERS + 1, 1], few[LAYERS, 1])
    two_tiles = minus(few[LAYERS + 1, 2], few[LAYERS, 2])
    trained = [count(depth, 1, True) for depth in (LAYERS, LAYERS + 1)]
    with_optimizer = minus(trained[1], trained[0])
    return {
        "kind": "dispatches",
        "config": {"model": WORKLOAD.model, **WORKLOAD.overrides, "layers": [LAYERS, LAYERS + 1]},
        "method": METHOD,
        **provenance(),
        "kernels": dispatch.implementation("cpu"),
        "further_tile": described(minus(two_tiles, layer)),
        "layer": described(with_optimizer),
        "layer_without_optimizer": described(layer),
        "optimizer_of_a_layer": described(minus(with_optimizer, layer)),
        "step": described(trained[1]) | {"layers": LAYERS + 1, "tiles": 1},
    }


NAMES = {
    "further_tile": "one more tile of a layer: forward, recomputation, backward",
    "layer": "one more layer, one tile, with its optimizer",
    "layer_without_optimizer": "of that without the optimizer",
    "optimizer_of_a_layer": "of that the optimizer",
}


def as_text(result: dict[str, Any]) -> str:
    lines = []
    for name, words in NAMES.items():
        lines.append(f"{words}: {result[name]['all']:,}, launching {result[name]['launching']:,}")
    for name in ("further_tile", "optimizer_of_a_layer"):
        lines += ["", f"{NAMES[name]} (v: a view or a buffer)"]
        for row in result[name]["by_operation"]:
            lines.append(f"{row['number']:>6} {' ' if row['launches'] else 'v'} {row['operation']}")
        lines.append(f"{result[name]['other_operations']:>6}   others")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the JSON")
    parser.add_argument("--torch", action="store_true", help="count what runs without kernels")
    parser.add_argument("--out", type=Path, help="write the JSON to this file")
    args = parser.parse_args()
    # The choice is made when the first operation runs. No kernel runs on fake tensors: the interpreter
    # only makes kernels the choice where there is no GPU.
    choice = {"REVFFN_KERNELS": "torch"} if args.torch else {"REVFFN_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    os.environ.update(choice)
    result = measured()
    print(json.dumps(result, indent=1) if args.json else as_text(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
