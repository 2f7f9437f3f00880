"""Step time, memory and kernels of ours and its rivals on one 80 GB GPU, in 15 minutes.

    python benchmarks/gpu_suite.py --out FOLDER --commit HASH --budget 840
    python benchmarks/gpu_suite.py --list            # rows, most telling first, with their seconds
    python benchmarks/gpu_suite.py --only 'innovation|hf_same'
    python benchmarks/gpu_suite.py --dry-run         # the same code at tiny sizes on a CPU

One JSON a row, written at once. Rows that share a choice of kernels (`REVFFN_KERNELS`) run in one
process, the worker. A row that has a record is left out, unless `--again`. A row that takes too
long, kills its worker or leaves the device unusable is recorded as failed, and another worker goes
on with the rest. Needs no network and no trl, datasets or tyro.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # where the package is not installed

from gpu_profile import profile_step  # noqa: E402
from gpu_rows import ARMS, BY_NAME, ROWS, Arm, Row  # noqa: E402

GIB = 2**30
START_S = 15
"""What a worker needs before its first row."""
AGAIN = 75
"""Exit status of a worker that wants another in its place."""

# --- the worker ----------------------------------------------------------------------------------


class TooLong(Exception):
    """The row's limit."""


class Unusable(Exception):
    """This process should measure no more."""


def choose_experts(arm: Arm) -> str | None:
    """`experts_implementation` for the model's config.

    Raises:
        NotAvailable: It is not registered.
    """
    from methods import NotAvailable
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    with contextlib.suppress(ImportError):
        import revffn.engine.experts  # noqa: F401  (registers it)
    if arm.experts == "own":
        return "revffn" if "revffn" in ALL_EXPERTS_FUNCTIONS else None
    if arm.experts is not None and arm.experts not in ALL_EXPERTS_FUNCTIONS:
        raise NotAvailable(
            f'needs experts_implementation="{arm.experts}", which is not registered; there are '
            f"{', '.join(ALL_EXPERTS_FUNCTIONS)}"
        )
    return arm.experts


def forget(model: Any) -> None:
    """transformers 5.17 keeps every model in this table; later versions keep names."""
    from transformers.utils import output_capturing

    table = output_capturing._CAN_RECORD_REGISTRY
    for part in (model, getattr(model, "model", None)):
        if part is not None and any(key is part for key in table):
            del table[part]


def measure(row: Row, tiny: bool, profile: bool, record: dict[str, Any], write: Any) -> None:
    """Fill in `record`; it is written before the profile, which may fail without harm to it."""
    import torch
    from methods import OptimizerSettings, start
    from workloads import WORKLOADS, replace

    import revffn

    arm, workload = ARMS[row.arm], WORKLOADS[row.workload]
    if row.batch:
        workload = replace(workload, batch=row.batch)
    tile = row.tile
    if tiny:
        workload, tile = workload.tiny(), tile and 16
    device = workload.device
    on_gpu = device == "cuda"
    hf_config = workload.hf_config()
    experts = choose_experts(arm)
    if experts is not None:
        hf_config._experts_implementation = experts
    cap = row.cap_gib if on_gpu else None
    begun = time.perf_counter()
    if cap:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap * GIB / total)
    training = None
    try:
        training = start(
            row_method(row), hf_config, device, workload.dtype, OptimizerSettings(), tile, kept_layers=row.kept
        )
        batches = workload.batches(1 + row.steps)
        torch.manual_seed(0)

        def synchronize() -> None:
            if on_gpu:
                torch.cuda.synchronize()

        synchronize()
        record["setup_s"] = time.perf_counter() - begun
        begun = time.perf_counter()
        losses = [training.step(batches[0])]
        synchronize()
        record["warmup_s"] = time.perf_counter() - begun
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        times, issued = [], []
        for batch in batches[1:]:
            if on_gpu:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
            begun = time.perf_counter()
            losses.append(training.step(batch))
            issued.append(1000 * (time.perf_counter() - begun))
            if on_gpu:
                last.record()
                synchronize()
                times.append(first.elapsed_time(last))
            else:
                times.append(issued[-1])
        median = statistics.median(times)
        record |= {
            "experts_implementation": getattr(
                training.model.config, "_experts_implementation", None
            ),
            "attention_implementation": getattr(
                training.model.config, "_attn_implementation", None
            ),
            "optimizer": training.optimizer,
            "num_parameters": sum(p.numel() for p in training.model.parameters()),
            "step_time_ms": {"median": median, "all": times},
            "issue_time_ms": {"median": statistics.median(issued), "all": issued},
            "tokens_per_second": 1000 * workload.batch * workload.tokens / median,
            "peak_allocated_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            "peak_reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
            "losses": [float(loss) for loss in losses],
        }
        if revffn.is_reversible(training.model):
            report = revffn.reversible_report(training.model)
            keys = ("walks", "verified_states", "mismatched_states_total")
            record["reversible"] = {key: report.get(key) for key in keys}
        record["status"] = "ok"
        if profile and row.profile:
            write(record)
            try:
                record["profile"], text = profile_step(training, batches[-1], device)
                record["profile"]["top"] = text.splitlines()
            except (RuntimeError, AttributeError) as error:  # the number above stands
                traceback.print_exc()
                record["profile_failed"] = f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        if training is not None:
            forget(training.model)
            with contextlib.suppress(Exception):
                training.stop()
        if cap:
            torch.cuda.set_per_process_memory_fraction(1.0)


def row_method(row: Row) -> str:
    return ARMS[row.arm].method


def left_bytes() -> int:
    """What is allocated on the device when nothing should be."""
    import torch

    gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def run_row(
    row: Row, args: argparse.Namespace, write: Any, facts: dict[str, Any]
) -> dict[str, Any]:
    """The row's record, whatever happens.

    Raises:
        Unusable: The record is written, and the next row needs another process.
    """
    import torch
    from methods import NotAvailable

    import revffn.ops.dispatch as dispatch

    record: dict[str, Any] = head(row, args) | facts | {"kernels": dispatch.describe()}
    broken = row.arm.endswith("_host")  # pinned memory stays with its process

    def too_long(*_: Any) -> NoReturn:
        raise TooLong(f"took more than {row.limit_seconds} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(row.limit_seconds)
    # Where Python does not come to look at the alarm, the process ends; the supervisor records it.
    faulthandler.dump_traceback_later(row.limit_seconds + 20, exit=True)
    try:
        measure(row, args.dry_run, not args.no_profile, record, write)
    except (NotAvailable, ImportError) as reason:
        record |= {"status": "skipped", "reason": str(reason).strip()}
    except torch.OutOfMemoryError as error:
        record |= {"status": "out_of_memory", "reason": one_line(error)}
    except TooLong as error:
        broken = True
        record |= {"status": "failed", "reason": str(error)}
        traceback.print_exc()
    except Exception as error:
        broken |= "CUDA" in str(error) or isinstance(error, torch.AcceleratorError)
        record |= {"status": "failed", "reason": one_line(error)}
        traceback.print_exc()
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    try:
        record["left_bytes"] = left_bytes()
    except Exception as error:
        broken, record["left_bytes"] = True, None
        record["warning"] = f"the device answers no more: {one_line(error)}"
    if (record["left_bytes"] or 0) > GIB:
        broken = True
        record["warning"] = f"{record['left_bytes'] / GIB:.1f} GiB are left after the row"
    write(record)
    if broken:
        raise Unusable
    return record


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}".rstrip(": ")


def work(names: list[str], args: argparse.Namespace) -> int:
    """Run rows in this process, while the budget lasts."""
    import torch
    from run import device_facts, versions

    device = "cpu" if args.dry_run else "cuda"
    found = versions()
    with contextlib.suppress(ImportError):
        from importlib.metadata import version

        found["liger-kernel"] = version("liger-kernel")
    found |= {"cuda": torch.version.cuda} if torch.version.cuda else {}
    facts = {"device": device_facts(device), "versions": found}
    if device == "cuda":
        torch.zeros(1, device="cuda")
    for name in names:
        row = BY_NAME[name]
        if time.time() + row.seconds > args.ends:
            print(f"{name}: not started, {args.ends - time.time():.0f} s are left", flush=True)
            continue
        file = record_file(row, args.out)
        write_json(file, head(row, args) | {"status": "running"})
        try:
            record = run_row(row, args, lambda record, file=file: write_json(file, record), facts)
        except Unusable:
            print(summary(json.loads(file.read_text())), flush=True)
            return AGAIN
        print(summary(record), flush=True)
    return 0


# --- records -------------------------------------------------------------------------------------


def record_file(row: Row, out: Path) -> Path:
    return out / f"gpu_{row.name}.json"


def head(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    arm = ARMS[row.arm]
    return {
        "kind": "gpu",
        "name": row.name,
        "row": asdict(row)
        | {"description": arm.words, "method": arm.method, "kernels": arm.kernels},
        "tiny": args.dry_run,
        "commit": args.commit,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
    }


def write_json(file: Path, record: dict[str, Any]) -> None:
    """Whole or not at all: the process may be ended at any time."""
    profile = record.get("profile")
    if profile and "top" in profile:
        record = record | {"profile": {k: v for k, v in profile.items() if k != "top"}}
        file.with_suffix(".kernels.txt").write_text("\n".join(profile["top"]) + "\n")
    part = file.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(file)


def recorded(row: Row, args: argparse.Namespace) -> bool:
    file = record_file(row, args.out)
    if not file.exists():
        return False
    record = json.loads(file.read_text())
    return record["status"] != "running" and record["tiny"] == args.dry_run


def summary(record: dict[str, Any]) -> str:
    if record["status"] != "ok":
        return f"{record['name']}: {record['status']}, {record.get('reason')}"
    time_ms, issue = record["step_time_ms"]["median"], record["issue_time_ms"]["median"]
    words = [
        f"{time_ms:,.0f} ms ({issue:,.0f} to issue)",
        f"{record['tokens_per_second']:,.0f} tokens/s",
    ]
    if record["peak_allocated_bytes"]:
        words.append(f"peak {record['peak_allocated_bytes'] / GIB:.1f} GiB")
    if "reversible" in record:
        found = record["reversible"]
        words.append(
            f"{found['mismatched_states_total']} of {found['verified_states']} states differ"
        )
    words += [
        record["experts_implementation"] or "",
        f"losses {', '.join(f'{x:.4f}' for x in record['losses'][:2])}",
    ]
    if "warning" in record:
        words.append(f"WARNING {record['warning']}")
    if "profile" in record:
        found = record["profile"]
        parts = [f"{name} {ms:.0f}" for name, ms in found["ms"].items() if ms >= 0.5]
        words.append(f"profile, ms: {', '.join(parts)}, idle {found['idle_ms']:.0f}")
    return f"{record['name']}: {'; '.join(filter(None, words))}"


# --- the supervisor ------------------------------------------------------------------------------


def runs_of(names: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Rows in their order, in stretches of one choice of kernels."""
    stretch: list[str] = []
    for name in names:
        kernels = ARMS[BY_NAME[name].arm].kernels
        if stretch and ARMS[BY_NAME[stretch[0]].arm].kernels != kernels:
            yield ARMS[BY_NAME[stretch[0]].arm].kernels, stretch
            stretch = []
        stretch.append(name)
    if stretch:
        yield ARMS[BY_NAME[stretch[0]].arm].kernels, stretch


def supervise(names: list[str], args: argparse.Namespace) -> bool:
    """Workers for all rows, one at a time; False if one could not begin."""
    for kernels, stretch in runs_of(names):
        left = stretch
        while left:
            shortest = min(BY_NAME[name].seconds for name in left)
            if time.time() + START_S * (not args.dry_run) + shortest > args.ends:
                print(
                    f"{', '.join(left)}: not started, {args.ends - time.time():.0f} s are left",
                    flush=True,
                )
                break
            command = [sys.executable, str(Path(__file__).resolve()), "--out", str(args.out)]
            command += ["--ends", str(args.ends), "--commit", args.commit]
            command += ["--dry-run"] * args.dry_run + ["--no-profile"] * args.no_profile
            for name in left:
                command += ["--row", name]
            environment = os.environ | {"REVFFN_KERNELS": kernels}
            if args.dry_run:
                environment["CUDA_VISIBLE_DEVICES"] = ""
            status = subprocess.run(command, env=environment).returncode
            running = [name for name in left if state(name, args.out) == "running"]
            for name in running:  # its worker was killed, or killed itself
                file = record_file(BY_NAME[name], args.out)
                reason = f"the process ended with status {status}"
                reason += ", most likely at its limit of time" if status == 1 else ""
                write_json(
                    file, json.loads(file.read_text()) | {"status": "failed", "reason": reason}
                )
                print(f"{name}: failed, {reason}", flush=True)
            if status == 0:
                break
            done = [
                i for i, name in enumerate(left) if state(name, args.out, args.begun) is not None
            ]
            if not done:
                print(
                    f"No row was begun and the process ended with status {status}.", file=sys.stderr
                )
                return False
            left = left[max(done) + 1 :]
    return True


def state(name: str, out: Path, since: float = 0.0) -> str | None:
    """The status in a row's record, if it was written since then."""
    file = record_file(BY_NAME[name], out)
    if not file.exists() or file.stat().st_mtime < since:
        return None
    return json.loads(file.read_text())["status"]


def commit_here() -> str:
    try:
        command = ("git", "-C", str(ROOT), "rev-parse", "HEAD")
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "gpu",
        help="folder of records",
    )
    parser.add_argument("--commit", default=None, help="what is run, where there is no git to ask")
    parser.add_argument(
        "--budget", type=float, default=840, help="seconds; no row starts that would pass them"
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="only rows whose name has it")
    parser.add_argument("--again", action="store_true", help="also rows that have a record")
    parser.add_argument("--no-profile", action="store_true", help="leave out the profiled steps")
    parser.add_argument("--list", action="store_true", help="name the rows")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument(
        "--row", action="append", default=[], metavar="NAME", help="this row in this process"
    )
    parser.add_argument("--ends", type=float, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.begun = time.time()
    args.ends = args.ends or args.begun + args.budget
    args.commit = commit_here() if args.commit is None else args.commit
    args.out.mkdir(parents=True, exist_ok=True)
    if args.row:
        unknown = [name for name in args.row if name not in BY_NAME]
        if unknown:
            parser.error(f"unknown row {unknown[0]!r}; --list names them")
        chosen = {ARMS[BY_NAME[name].arm].kernels for name in args.row}
        if len(chosen) > 1:
            parser.error("--row takes rows of one choice of kernels; --only takes any")
        os.environ["REVFFN_KERNELS"] = chosen.pop()
        return work(args.row, args)
    rows = [row for row in ROWS if re.search(args.only, row.name)]
    if not rows:
        parser.error(f"no row matches {args.only!r}; --list names them")
    if args.list:
        for row in rows:
            words = ARMS[row.arm].words + ", profiled" * row.profile
            print(f"{row.name:<55} {row.seconds:>4} s  {words}")
        print(f"{len(rows)} rows, {sum(row.seconds for row in rows)} s expected")
        return 0
    names = [row.name for row in rows if args.again or not recorded(row, args)]
    begun = supervise(names, args)
    states = Counter(state(row.name, args.out) or "not run" for row in rows)
    words = ", ".join(f"{number} {status}" for status, number in states.most_common())
    print(f"{time.time() - args.begun:.0f} s; of {len(rows)} rows: {words}.")
    return int(bool(states["failed"]) or not begun)


if __name__ == "__main__":
    sys.exit(main())
