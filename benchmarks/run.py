"""One method on one workload, in a fresh process -> one JSON; or two methods in turns -> the ratio of their times.

    python benchmarks/run.py --method ours_innovation --workload cpu_float32 --out benchmarks/results
    python benchmarks/run.py --pair ours_innovation hf_checkpointing --workload cpu_float32
    python benchmarks/run.py --tests            # the tests that a recorded result rests on
    python benchmarks/run.py --list             # methods and workloads

Warm-up steps, then timed ones; nothing of this script waits for the device between them. A result is written only
from a clean git tree and after green tests. What the numbers mean: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import hashlib
import json
import os
import platform
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
from methods import METHODS, NotAvailable, OptimizerSettings, Training, start
from simulate import provenance
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from workloads import WORKLOADS, Workload

from revffn import is_reversible, reversible_report
from revffn.memory.amounts import gib
from revffn.memory.live_bytes import LiveBytes, no_garbage_collection
from revffn.memory.simulation import as_on_a_gpu, run_step, sorter

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/engine/test_reversible.py",
    "tests/engine/test_captured.py",
    "tests/engine/test_random_numbers.py",
    "tests/optim/test_optim.py",
    "tests/optim/test_broken_steps.py",
    "tests/models/test_losses.py",
    "tests/ops/test_streams.py",
    "tests/ops/test_experts.py",
    "tests/ops/test_update.py",
)
"""What a recorded result rests on: gradients and rebuilt states, updates, the loss, the fused operations."""
STAMP = ROOT / "runs" / "benchmark_tests.json"
PACKAGES = ("torch", "transformers", "triton", "peft", "lomo-optim", "galore-torch", "bitsandbytes")
RECORDED, REFUSED, FAILED = 0, 2, 1
"""Exit statuses. A method that is not available is a recorded result, one that failed is recorded and FAILED."""


def refuse(reason: str) -> NoReturn:
    print(reason, file=sys.stderr)
    sys.exit(REFUSED)


# --- tests first -----------------------------------------------------------------------------------------------------


def tested_files() -> list[Path]:
    """The whole package, kernels included, and the tests that results rest on with what they import."""
    tests = [ROOT / name for name in (*TESTS, "tests/helpers.py", "tests/conftest.py")]
    return sorted([*(ROOT / "revffn").rglob("*.py"), *filter(Path.is_file, tests)])


def tested_code() -> dict[str, str]:
    """What the tests' result depends on."""
    digest = hashlib.sha256()
    for file in tested_files():
        digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"sources_sha256": digest.hexdigest(), "device": device, **versions}


def run_tests() -> int:
    """Run the tests and remember that they were green; on a CUDA device also those that need one."""
    if green_tests():
        print(f"Green for this code already, see {STAMP.relative_to(ROOT)}.")
        return 0
    STAMP.unlink(missing_ok=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    commands = [[*pytest, *TESTS]]
    if torch.cuda.is_available():
        marked = [str(f) for f in sorted((ROOT / "tests").rglob("test_*.py")) if "@pytest.mark.gpu" in f.read_text()]
        commands.append([*pytest, "-m", "gpu", *marked])
    code = tested_code()
    for command in commands:
        status = subprocess.run(command, cwd=ROOT).returncode
        if status != 0:
            return FAILED
    STAMP.parent.mkdir(exist_ok=True)
    stamp = {**code, "commit": provenance()["git"]["commit"], "tests": list(TESTS), "date": now()}
    STAMP.write_text(json.dumps(stamp, indent=1) + "\n")
    return 0


def green_tests() -> dict[str, Any] | None:
    """The stamp of `run_tests`, if it is of this code, these versions and this kind of device."""
    if not STAMP.exists():
        return None
    stamp = json.loads(STAMP.read_text())
    return stamp if tested_code().items() <= stamp.items() else None


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# --- operations ------------------------------------------------------------------------------------------------------


def grouped_mm_flops(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """Rows are dealt to groups, so each is multiplied once, whatever the groups' sizes."""
    if len(a) == 2 and len(b) == 3:
        return 2 * a[0] * a[1] * b[2]
    if len(a) == 2 and len(b) == 2:
        return 2 * a[0] * a[1] * b[1]
    return 2 * a[-3] * a[-2] * a[-1] * b[-1] if len(b) == 3 else 2 * a[-2] * a[-1] * b[-1]


def attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def attention_backward_flops(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# What PyTorch's counter does not know, in the operations of a CPU, where fake tensors live.
MORE_FLOPS = {
    torch.ops.aten._grouped_mm: grouped_mm_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def count_step_flops(name: str, workload: Workload, settings: OptimizerSettings, num_layers: int) -> int:
    """Operations of all matrix products in one step of a model of `num_layers` layers, run on fake tensors.

    Attention counts as if it were not causal, as PyTorch's counter has it. Always in bf16: the number does not depend
    on it, and grouped_mm has fake tensors of no other dtype.
    """
    hf_config = workload.hf_config()
    hf_config.num_hidden_layers = num_layers
    if getattr(hf_config, "layer_types", None):
        hf_config.layer_types = hf_config.layer_types[:num_layers]
    with FakeTensorMode(), as_on_a_gpu():
        training = start(name, hf_config, "cpu", torch.bfloat16, settings, workload.tile_tokens, seed=None)
        ids = torch.zeros((workload.batch, workload.tokens), dtype=torch.int64)
        with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter:
            training.step({"input_ids": ids, "labels": ids})
        training.stop()
    return counter.get_total_flops()


def step_flops(name: str, workload: Workload, settings: OptimizerSettings) -> int:
    """`count_step_flops` of the whole model, counted on a few layers and one tile where that is enough.

    Inner layers do the same, so the number is linear in the depth; tiles do the same too.
    """
    name = METHODS[name].counted_as or name
    row, whole = METHODS[name], workload.hf_config().num_hidden_layers
    tile_rows = max(1, workload.tile_tokens // workload.tokens)
    tiles = 1
    if row.tiles and workload.batch % tile_rows == 0:
        tiles, workload = workload.batch // tile_rows, replace(workload, batch=tile_rows)
    period = row.layer_period
    few = next(n for n in range(3, 3 + period) if (whole - n) % period == 0)
    if whole <= few + period:
        return tiles * count_step_flops(name, workload, settings, whole)
    less, more = (count_step_flops(name, workload, settings, n) for n in (few, few + period))
    return tiles * (less + (more - less) * ((whole - few) // period))


def operations(name: str, workload: Workload, settings: OptimizerSettings) -> tuple[int | None, str | None]:
    """`step_flops`, or why they are unknown: a peer may do what fake tensors cannot, and its times stand all the
    same."""
    try:
        return step_flops(name, workload, settings), None
    except Exception as error:
        if METHODS[name].trains_everything:
            raise
        return None, one_line(error)


# --- the device ------------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Marks:
    """Points in time: events on a GPU, which the device passes in its own time, or the clock."""

    def __init__(self, device: str):
        self.device, self.points, self.cpu_seconds = device, [], []

    def mark(self) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.points.append(event)
        else:
            self.points.append(time.perf_counter())
        self.cpu_seconds.append(time.process_time())

    def between_ms(self) -> list[float]:
        pairs = list(zip(self.points, self.points[1:], strict=False))
        if self.device == "cuda":
            synchronize(self.device)
            return [a.elapsed_time(b) for a, b in pairs]
        return [1000 * (b - a) for a, b in pairs]


def matrix_flops_per_second(device: str, dtype: torch.dtype) -> float:
    """What the device reaches on one large matrix product, median of several."""
    size, repeats = (8192, 20) if device == "cuda" else (1024, 7)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize(device)
    marks = Marks(device)
    marks.mark()
    for _ in range(repeats):
        a @ b
        marks.mark()
    return 2 * size**3 / (statistics.median(marks.between_ms()) / 1000)


def device_facts(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"type": device, "num_threads": torch.get_num_threads(), "num_cpus": os.cpu_count()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return facts | {"name": properties.name, "memory_bytes": properties.total_memory}
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts["name"] = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {"name": platform.machine(), **{key: value for key, value in facts.items() if value != ""}}


# --- measuring -------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "quartiles": [quartiles[0], quartiles[2]], "all": values}


def live_bytes(training: Training, workload: Workload) -> dict[str, Any]:
    """One more step, untimed, with every live tensor counted, by part where `run_step` knows the method.

    `run_step` brings its own optimizer of the same settings. The last thing that is done with a training.
    """
    if training.method is not None:
        training.stop()
        with torch.device(workload.device):
            result = run_step(training.model, workload.batch, workload.tokens, training.method)
        return {key: result[key] for key in ("peak_bytes", "phase", "parts", "leaked_bytes")}
    model = training.model
    counter = LiveBytes(sorter(model.get_base_model() if hasattr(model, "get_base_model") else model))
    known = {"weights": (*model.parameters(), *model.buffers()), "optimizer": tuple(training.state_tensors())}
    for part, tensors in known.items():
        for tensor in tensors:
            counter.add(tensor)
            counter.tag(tensor, part)
    batch = workload.batches(1)[0]
    with no_garbage_collection(), counter:
        counter.begin("step")
        training.step(batch)
        counter.begin("after")
    return {"peak_bytes": counter.peak_bytes, "phase": "step", "parts": None, "leaked_bytes": None}


def host_peak_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(name: str, workload: Workload, settings: OptimizerSettings, warmup: int, steps: int) -> dict[str, Any]:
    """Everything a result says about speed and memory."""
    device, tokens_per_step = workload.device, workload.batch * workload.tokens
    hf_config = workload.hf_config()
    training = start(name, hf_config, device, workload.dtype, settings, workload.tile_tokens)
    batches = workload.batches(warmup + steps)
    torch.manual_seed(0)
    losses: list[Tensor] = [training.step(batch) for batch in batches[:warmup]]
    synchronize(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    marks = Marks(device)
    marks.mark()
    for batch in batches[warmup:]:
        losses.append(training.step(batch))
        marks.mark()
    times = spread(marks.between_ms())
    peaks = {"peak_allocated_bytes": None, "peak_reserved_bytes": None, "host_peak_bytes": host_peak_bytes()}
    if device == "cuda":
        peaks["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        peaks["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    result = {
        "optimizer": training.optimizer,
        "experts_implementation": getattr(training.model.config, "_experts_implementation", None),
        "num_parameters": sum(p.numel() for p in training.model.parameters()),
        "num_trainable": sum(p.numel() for p in training.model.parameters() if p.requires_grad),
        "step_time_ms": times,
        "tokens_per_second": 1000 * tokens_per_step / times["median"],
        **peaks,
        "losses": torch.stack(losses).double().tolist(),
    }
    if is_reversible(training.model):
        report = reversible_report(training.model)
        keys = ("walks", "verified_states", "mismatched_states_total", "layers")
        result["reversible"] = {key: report[key] for key in keys}
    del losses, batches
    try:
        result["live"] = live_bytes(training, workload)
    except torch.OutOfMemoryError as error:
        # Counting holds nothing, but where the timed steps just fitted a fragmented allocator may not find the room.
        result["live"] = {"peak_bytes": None, "parts": None, "reason": one_line(error)}
    del training
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    rate = matrix_flops_per_second(device, workload.dtype)
    hardware, unknown = operations(name, workload, settings)
    model = None
    if METHODS[name].trains_everything:
        model = hardware if name == "hf_plain" else step_flops("hf_plain", workload, settings)
    per_second = model and model * 1000 / times["median"]
    return result | {
        "model_flops_per_step": model,
        "hardware_flops_per_step": hardware,
        "hardware_flops_unknown": unknown,
        "matrix_flops_per_second": rate,
        "model_flops_per_second": per_second,
        "model_flops_share": per_second and per_second / rate,
        "hardware_flops_share": hardware and hardware * 1000 / times["median"] / rate,
    }


def measure_pair(names: list[str], workload: Workload, settings: OptimizerSettings, warmup: int, steps: int) -> dict:
    """Two methods in one process, a step of each in turns: what disturbs one step disturbs its neighbour too.

    The one that goes first changes from round to round (A B, B A, ...), so that neither always finds the caches the
    other left. `ratio` is that of the wall clock, first method over second, one value a round; `cpu_ratio` the same
    of the process's CPU time, which does not see what else the machine runs.
    """
    made = (workload.hf_config(), workload.device, workload.dtype, settings, workload.tile_tokens)
    trainings = [start(name, *made) for name in names]
    batches = workload.batches(warmup + steps)
    for training in trainings:
        torch.manual_seed(0)
        for batch in batches[:warmup]:
            training.step(batch)
    synchronize(workload.device)
    wall: list[list[float]] = [[], []]
    cpu: list[list[float]] = [[], []]
    for number, batch in enumerate(batches[warmup:]):
        for index in (0, 1) if number % 2 == 0 else (1, 0):
            marks = Marks(workload.device)
            marks.mark()
            trainings[index].step(batch)
            marks.mark()
            wall[index] += marks.between_ms()  # on a GPU this waits, outside what is timed
            cpu[index].append(1000 * (marks.cpu_seconds[1] - marks.cpu_seconds[0]))
    counted = [operations(name, workload, settings) for name in names]
    flops = [number for number, _ in counted]
    return {
        "step_time_ms": [spread(values) for values in wall],
        "cpu_time_ms": [spread(values) for values in cpu],
        "ratio": spread([a / b for a, b in zip(*wall, strict=True)]),
        "cpu_ratio": spread([a / b for a, b in zip(*cpu, strict=True)]),
        "hardware_flops_per_step": flops,
        "hardware_flops_unknown": [reason for _, reason in counted],
        "flops_ratio": None if None in flops else flops[0] / flops[1],
    }


# --- a result --------------------------------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")


def stopped(*_: Any) -> NoReturn:
    raise TimeoutError("stopped from outside (SIGTERM), most likely by a time limit")


def outcome(measured: Any, *args: Any) -> dict[str, Any]:
    """What was measured, or why nothing was."""
    try:
        return {"status": "ok", **measured(*args)}
    except NotAvailable as reason:
        return {"status": "skipped", "reason": str(reason)}
    except torch.OutOfMemoryError as error:
        return {"status": "out_of_memory", "reason": one_line(error)}
    except Exception as error:
        traceback.print_exc()
        return {"status": "failed", "reason": one_line(error)}


def summary(result: dict[str, Any]) -> str:
    what = result.get("method") or " / ".join(result["methods"])
    head = f"{result['workload']['name']}, {result['workload']['batch']} x {result['workload']['tokens']}, {what}: "
    if result["status"] != "ok":
        return f"{head}{result['status']}, {result['reason']}"
    if "ratio" in result:
        wall, cpu = result["ratio"], result["cpu_ratio"]
        return (
            f"{head}step time {wall['median']:.3f} ({wall['quartiles'][0]:.3f} to {wall['quartiles'][1]:.3f}), "
            f"CPU time {cpu['median']:.3f} ({cpu['quartiles'][0]:.3f} to {cpu['quartiles'][1]:.3f}), "
            f"operations {'unknown' if result['flops_ratio'] is None else format(result['flops_ratio'], '.3f')}"
        )
    times, share = result["step_time_ms"], result["model_flops_share"]
    share = "" if share is None else f", {share:.1%} of the matrix rate"
    peak = result["peak_allocated_bytes"] or result["live"]["peak_bytes"]
    return (
        f"{head}{times['median']:,.0f} ms ({times['quartiles'][0]:,.0f} to {times['quartiles'][1]:,.0f}), "
        f"{result['tokens_per_second']:,.0f} tokens/s{share}, peak {gib(peak)}, first loss {result['losses'][0]:.4f}"
    )


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return {"python": platform.python_version(), **found}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--method", help="a name of --list")
    result.add_argument("--pair", nargs=2, metavar=("A", "B"), help="two methods, a step of each in turns")
    result.add_argument("--workload", help="a name of --list")
    result.add_argument("--steps", type=int, help="timed steps; the workload's number without it")
    result.add_argument("--warmup", type=int, help="steps before them; the workload's number without it")
    result.add_argument("--batch", type=int, help="another number of sequences than the workload's")
    result.add_argument("--layers", type=int, help="another number of decoder layers than the model's")
    result.add_argument("--fit", action="store_true", help="out of memory: again with half the batch, and so on")
    result.add_argument("--rule", default="adafactor", help="of the optimizer in backward")
    result.add_argument("--lr", type=float, default=1e-5)
    result.add_argument("--step-after-backward", action="store_true", help="keep all gradients until backward ends")
    result.add_argument("--tiny", action="store_true", help="the same code at a size for a CPU and a second")
    result.add_argument(
        "--out", type=Path, help="write the JSON to this file, or into this folder if the name does not end in .json"
    )
    result.add_argument("--commit", help="what is run, where there is no git to ask")
    result.add_argument("--allow-dirty", action="store_true", help="record although the tree is not the commit's")
    result.add_argument("--allow-untested", action="store_true", help="record without green tests")
    result.add_argument("--tests", action="store_true", help="run the tests that results rest on")
    result.add_argument("--list", action="store_true", help="name the methods and workloads")
    result.add_argument(
        "--from-list", metavar="FILE", help="run the command lines of a file (-: standard input), each in a fork"
    )
    result.add_argument("--tried", type=int, nargs="*", default=[], help=argparse.SUPPRESS)  # batches that did not fit
    return result


def list_all() -> None:
    for name, row in METHODS.items():
        print(f"{name:<32} {row.description}")
    print()
    for name, workload in WORKLOADS.items():
        print(f"{name:<32} {workload.model}, {workload.batch} x {workload.tokens} tokens, {workload.device}")


def from_list(file: str) -> int:
    """Every line in a fork of this process, which pays for the imports once. For small runs on a CPU: a process that
    has used CUDA cannot be forked."""
    lines = (sys.stdin if file == "-" else Path(file).open()).read().splitlines()
    worst = RECORDED
    for line in filter(None, map(str.strip, lines)):
        sys.stdout.flush(), sys.stderr.flush()
        child = os.fork()
        if child == 0:
            status = FAILED
            try:
                status = main(shlex.split(line))
            except SystemExit as stop:
                status = stop.code
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        worst = max(worst, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), key=abs)
    return worst


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if args.list:
        list_all()
        return RECORDED
    if args.tests:
        return run_tests()
    if args.from_list:
        return from_list(args.from_list)
    names = args.pair or [args.method]
    for name in names:
        if name not in METHODS:
            refuse(f"Unknown method {name!r}. Give --method or --pair one of: {', '.join(METHODS)}.")
    if args.workload not in WORKLOADS:
        refuse(f"Unknown workload {args.workload!r}. Give --workload one of: {', '.join(WORKLOADS)}.")
    origin = provenance()
    git = origin["git"] if origin["git"]["commit"] else {"commit": args.commit, "dirty": None, "changed": []}
    tests = green_tests()
    if args.out is not None:
        unknown = git["dirty"] is None and not args.commit
        if (git["dirty"] or unknown) and not args.allow_dirty:
            what = f"{', '.join(git['changed'])} differ from the commit" if git["dirty"] else "there is no git here"
            refuse(f"Not recorded: {what}. Commit first, give --commit where there is no git, or --allow-dirty.")
        if tests is None and not args.allow_untested:
            refuse(
                f"Not recorded: no green run of {', '.join(TESTS)} on this code and these versions. "
                "Run python benchmarks/run.py --tests first, or give --allow-untested."
            )
        (args.out.parent if args.out.suffix == ".json" else args.out).mkdir(parents=True, exist_ok=True)
    workload = WORKLOADS[args.workload]
    if args.tiny:
        workload = workload.tiny()
    if args.layers:
        workload = replace(workload, overrides={**workload.overrides, "num_hidden_layers": args.layers})
    if args.batch:
        workload = replace(workload, batch=args.batch)
    if workload.device == "cuda" and not torch.cuda.is_available():
        refuse(f"Workload {args.workload!r} needs a CUDA device and there is none. Use a cpu_ workload, or --tiny.")
    settings = OptimizerSettings(rule=args.rule, lr=args.lr, in_backward=not args.step_after_backward)
    warmup = workload.warmup_steps if args.warmup is None else args.warmup
    steps = args.steps or workload.timed_steps
    signal.signal(signal.SIGTERM, stopped)  # so that a run that takes too long is a result too
    if args.pair:
        result = outcome(measure_pair, names, workload, settings, warmup, steps)
    else:
        result = outcome(measure, names[0], workload, settings, warmup, steps)
    if result["status"] == "out_of_memory" and args.fit and workload.batch > 1:
        tried = [*args.tried, workload.batch]
        print(f"{workload.batch} sequences do not fit; trying {workload.batch // 2}.", flush=True)
        kept = argv[: argv.index("--tried")] if "--tried" in argv else argv
        again = [*kept, "--batch", str(workload.batch // 2), "--tried", *map(str, tried)]
        os.execv(sys.executable, [sys.executable, str(Path(__file__).resolve()), *again])
    described = asdict(workload) | {"dtype": str(workload.dtype).removeprefix("torch."), "name": args.workload}
    result = {
        "kind": "pair" if args.pair else "run",
        **({"methods": names} if args.pair else {"method": names[0]}),
        "descriptions": [METHODS[name].description for name in names],
        "workload": described,
        "settings": asdict(settings) | {"warmup_steps": warmup, "timed_steps": steps, "tiny": args.tiny},
        "batches_out_of_memory": args.tried,
        "device": device_facts(workload.device),
        "date": now(),
        "git": git,
        "tests": tests,
        "versions": versions(),
        **result,
    }
    print(summary(result), flush=True)
    if args.out is not None:
        file = args.out
        if file.is_dir():
            kind = "-vs-".join(names) + ("_after-backward" if args.step_after_backward else "")
            device = result["device"]["name"] if workload.device == "cuda" else "cpu"
            device = "-".join(device.lower().replace("nvidia", "").split())
            file = file / f"{result['kind']}_{device}_{args.workload}_{kind}.json"
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {file}")
    return RECORDED if result["status"] in ("ok", "skipped") else FAILED


if __name__ == "__main__":
    sys.exit(main())
