"""Times the optimizer's kernels on the parameters of Qwen1.5-MoE, rule by rule, and what they reach of the memory.

    python benchmarks/kernels_update.py --output update.json          # on a GPU
    python benchmarks/kernels_update.py --tiny                        # on a CPU: only that it runs

First every rule is held against its PyTorch reference bit for bit, on the same device, on ragged shapes and on the
first rows of every shape that is timed; on red nothing is timed and the exit status is 1. Times are medians of CUDA
events around one parameter's whole update (sums of the gradient, norms, states, weight), updates queued one after the
other. `bytes_per_parameter` is the traffic a rule cannot avoid; the bandwidth given is that
times the parameters over the time, so a second read of the gradient that misses the L2 cache shows as less of it.

With REVFFN_KERNELS=torch on a GPU the reference is timed instead.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from revffn.ops import dispatch, update
from revffn.ops.update import reference
from revffn.optim import OptimizerInBackward

SHAPES = {"gate_up_proj": (60, 2816, 2048), "down_proj": (60, 2048, 1408), "embed_tokens": (151936, 2048)}
TINY = {"experts": (3, 40, 64), "matrix": (70, 32)}
RAGGED = {"experts": (5, 131, 328), "matrix": (4100, 67), "row": (1, 4099), "vector": (2048,)}
# Options, and bytes of traffic per bf16 parameter: gradient reads, weight read and written, states read and written.
RULES = {
    "adafactor": (dict(rule="adafactor"), 3 * 2 + 4),
    "adafactor_momentum": (dict(rule="adafactor", momentum=0.9), 3 * 2 + 4 + 4),
    "adamw": (dict(rule="adamw"), 2 * 2 + 4 + 16),
    "adamw8bit": (dict(rule="adamw8bit"), 2 * 2 + 4 + 4),
    "sgd": (dict(rule="sgd"), 2 * 2 + 4),
}


def optimizer_of(shape: tuple[int, ...], options: dict, device: str, rounding: str = "stochastic"):
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    gradient = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    parameter = torch.nn.Parameter(weight)
    optimizer = OptimizerInBackward(
        [parameter], lr=0.01, weight_decay=0.01, max_grad_norm=1.0, rounding=rounding, **options
    )
    return parameter, optimizer, gradient


@torch.no_grad()
def one_step(parameter, optimizer, gradient) -> None:
    parameter.grad = gradient
    optimizer.step_parameter(parameter)
    optimizer._stepped.clear()


class AsReference:
    """Replaces the operations of `revffn.ops.update` by their references."""

    names = "grad_squares judge factored_statistics unfactored_statistics adafactor adamw adamw8bit sgd".split()

    def __enter__(self):
        self.own = {name: getattr(update, name) for name in self.names}
        for name in self.names:
            setattr(update, name, getattr(reference, name))

    def __exit__(self, *_):
        for name, operation in self.own.items():
            setattr(update, name, operation)


def differences(shape: tuple[int, ...], options: dict, device: str, rounding: str) -> list[str]:
    """Names of tensors in which operations and references differ after three steps."""
    found = []
    for as_reference in (False, True):
        parameter, optimizer, gradient = optimizer_of(shape, options, device, rounding)
        for _ in range(3):
            if as_reference:
                with AsReference():
                    one_step(parameter, optimizer, gradient)
            else:
                one_step(parameter, optimizer, gradient)
        tensors = {n: t for n, t in optimizer.state[parameter].items() if torch.is_tensor(t)}
        found.append({"weight": parameter.detach(), **tensors})
    return [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]


def check(shapes: dict[str, tuple[int, ...]], device: str) -> list[str]:
    """What differs, one line each."""
    wrong = []
    for rule, (options, _) in RULES.items():
        for rounding in ("stochastic", "nearest", "master"):
            for name, shape in shapes.items():
                if rule == "adamw8bit" and len(shape) < 2:
                    continue
                if different := differences(shape, options, device, rounding):
                    wrong.append(f"{rule}, {rounding}, {name} {shape}: {', '.join(different)}")
    return wrong


def milliseconds(shape: tuple[int, ...], options: dict, repeats: int) -> list[float]:
    parameter, optimizer, gradient = optimizer_of(shape, options, "cuda")
    for _ in range(3):
        one_step(parameter, optimizer, gradient)
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        one_step(parameter, optimizer, gradient)
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes, correctness only; all there is on a CPU")
    parser.add_argument("--rules", default=",".join(RULES), help="which rules, comma-separated")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        parser.error("there is no CUDA device to time on; --tiny shows on a CPU that everything runs")
    chosen = arguments.rules.split(",")
    for rule in list(RULES):
        if rule not in chosen:
            del RULES[rule]
    if arguments.tiny:
        shapes = TINY
    else:
        # Full rows and several segments of them, but not all: the reference is slow.
        shapes = RAGGED | {name: (2, *s[1:]) if len(s) == 3 else (9000, s[1]) for name, s in SHAPES.items()}
    wrong = check(shapes, device)
    if wrong:
        print(*wrong, sep="\n")
        print("Kernels and references differ: nothing is timed.", file=sys.stderr)
        return 1
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "kernels": dispatch.describe(),
        "checked": {name: list(shape) for name, shape in shapes.items()},
        "times": [],
    }
    for rule, (options, num_bytes) in {} if arguments.tiny else RULES.items():
        for name, shape in SHAPES.items():
            times = milliseconds(shape, options, arguments.repeats)
            median, parameters = statistics.median(times), torch.Size(shape).numel()
            line = {
                "rule": rule,
                "parameter": name,
                "shape": list(shape),
                "median_ms": median,
                "smallest_ms": min(times),
                "largest_ms": max(times),
                "bytes_per_parameter": num_bytes,
                "gigabytes_per_second": num_bytes * parameters / median / 1e6,
                "picoseconds_per_parameter": median * 1e9 / parameters,
            }
            result["times"].append(line)
            print(
                f"{rule:20} {name:14} {median:8.3f} ms  {num_bytes:3} bytes a parameter at "
                f"{line['gigabytes_per_second']:7.0f} GB/s",
                flush=True,
            )
    print(f"equal bits on {device} ({dispatch.implementation(device)}): {', '.join(RULES)}")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
