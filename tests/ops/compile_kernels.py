"""Compiles the Triton kernels for GPUs that are not there, launched by the library's own functions.

A driver that names a GPU and launches nothing takes the place of Triton's, and the functions get meta tensors: their
Python runs as it would on a GPU, and each launch compiles what that GPU would run, down to machine code.

python tests/ops/compile_kernels.py                          all cases, H100 and A100
python tests/ops/compile_kernels.py --only 'vector|bf16' --arch 90 --ptx /tmp/ptx
python tests/ops/compile_kernels.py --short                  the cases of the fast test

One line a kernel: registers, bytes of spills, shared memory, bytes of the widest vectors that are loaded and stored,
and what must not be in it (`problems`). Works with Triton 3.6 to 3.9. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

BF16, F32, INT = torch.bfloat16, torch.float32, torch.int32
SHARED = {90: 227 << 10, 80: 163 << 10}
"""Bytes of shared memory that one program can have."""

SPILLS = 16
"""Bytes: the assembler may spill a register or two of far fewer than there are, where that lets more programs run."""

MODELS = {
    "qwen2_moe": dict(D=2048, E=60, I=1408, K=4, V=151936),
    "qwen3_moe": dict(D=2048, E=128, I=768, K=8, V=151936),
    "gpt_oss": dict(D=2880, E=32, I=2880, K=4, V=201088),
    "mixtral": dict(D=4096, E=8, I=14336, K=2, V=32000),
    "ragged": dict(D=80, E=5, I=23, K=3, V=77),
}
TOKENS = {"ragged": 7}
MAY_BE_UNALIGNED = ("qwen2_moe", "ragged")
"""Models that are compiled with unaligned tensors too. Those are rare: views that begin anywhere."""
USES_APPROXIMATIONS = {"_gate", "_gate_backward", "_swiglu", "_swiglu_backward", "_add_gated"}
"""Kernels with `exp`, whose last bit the references leave open, and so that of the division after it."""


# --- a GPU that is not there -----------------------------------------------------------------------------------------


class Driver:
    """What `triton.runtime.driver.active` is asked for by a launch."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), 0, 0, 0, 1024),
            unload_module=lambda _: None,
            get_device_properties=lambda _: {"max_shared_mem": SHARED[arch]},
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return lambda *args: None


def record_launches(found: dict[str, Any]) -> None:
    """Keep every kernel that is launched, under its name and its hash."""
    compiled = triton.compiler.CompiledKernel
    run = compiled.run.fget

    def launched(self: Any) -> Callable[..., Any]:
        found.setdefault(f"{self.name} {self.hash}", self)
        return run(self)

    compiled.run = property(launched)


# --- what was compiled -----------------------------------------------------------------------------------------------


def resources(kernel: Any) -> dict[str, int]:
    """Registers, and bytes of the stack: the kernels have no arrays, so only spilled registers lie there."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
    return {"registers": int(used["REG"]), "spills": int(used["STACK"]) + int(used["LOCAL"])}


def widest(ptx: str, what: str) -> int:
    """Bytes of the widest vector of a thread that is moved to or from global memory."""
    found = re.findall(rf"{what}\.global(?:\.[\w:]+?)*?(?:\.v(\d))?\.[bfus](\d+) ", ptx)
    return max((int(n or 1) * int(bits) // 8 for n, bits in found), default=0)


def problems(name: str, ptx: str, row: dict[str, Any]) -> list[str]:
    """What the kernel's text must not have."""
    found = []
    if row["spills"] > SPILLS or ".local" in ptx:
        found.append(f"{row['spills']} bytes of spilled registers")
    if row["shared"] > SHARED[row["arch"]]:
        found.append(f"{row['shared']} bytes of shared memory")
    forbidden = {r"\bfma\.\w+(\.ftz)?\.f32": "fused multiply-add"}
    # `floor` of a denormal is 0 or -0 instead of -1: rounded to an integer it is 0 all the same.
    forbidden[r"(?<!cvt\.rmi)\.ftz\."] = "flushed denormals"
    forbidden |= {r"\bdiv\.(full|approx)": "inexact division", r"\b(sqrt|rsqrt|rcp)\.approx": "inexact root"}
    for pattern, what in forbidden.items():
        if re.search(pattern, ptx) and name not in USES_APPROXIMATIONS:
            found.append(what)
    if name in USES_APPROXIMATIONS and "erf" not in row["case"] and re.search(r"\bfma\.rn\.f32", ptx):
        found.append("fused multiply-add")
    return found


# --- cases -----------------------------------------------------------------------------------------------------------


def make(*shape: int, dtype: torch.dtype, shift: int) -> Tensor:
    """A meta tensor that lies `shift` elements behind an aligned address."""
    size = 1
    for n in shape:
        size *= n
    return torch.empty(size + shift, dtype=dtype, device="meta")[shift:].view(shape)


def kernels_of(family: str) -> ModuleType:
    """The module of kernels, without the rest of the library, whose imports take longer than many a compilation."""
    if "revffn" not in sys.modules:
        package = sys.modules["revffn"] = ModuleType("revffn")
        package.__path__ = [str(Path(__file__).parents[2] / "revffn")]
    return import_module(f"revffn.ops.{family}.kernels")


def expert_cases(model: str, dtype: torch.dtype, shift: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    from revffn.ops.experts import kernels
    from revffn.ops.experts.reference import index_dtype

    D, E, I, K = (MODELS[model][n] for n in "DEIK")  # noqa: E741
    T = TOKENS.get(model, 8192)
    S, new = T * K, partial(make, shift=shift)
    biased = model in ("gpt_oss", "ragged")
    x, rows = new(T, D, dtype=dtype), new(S, D, dtype=dtype)
    place, order, offs = new(T, K, dtype=INT), new(S, dtype=INT), new(E, dtype=INT)
    expert = new(S, dtype=index_dtype(E)) if biased else None
    up_bias, down_bias = (new(E, n, dtype=dtype) if biased else None for n in (2 * I, D))
    product, act = new(S, 2 * I, dtype=dtype), new(S, I, dtype=dtype)
    total = new(T, K, dtype=F32)
    gates = {"ragged": ("silu", "gelu", "gelu_tanh"), "gpt_oss": ("clamped",)}.get(model, ("silu",))
    yield "gather", lambda: kernels.expert_gather(x, place)
    yield "combine", lambda: kernels.expert_combine(rows, place, None, None, None)
    for kind in gates:
        gate = (kind, 1.702, 7.0, True) if kind == "clamped" else (kind, 1.0, float("inf"), False)
        name = "gate erf" if kind == "gelu" else f"gate {kind}"
        for weights in {F32, dtype}:
            weight = new(T, K, dtype=weights)
            given = up_bias, expert, weight, order, *gate
            yield name, partial(kernels.expert_gate, product, *given)
            for rounds in (False, True):
                yield f"{name} backward", partial(kernels.expert_gate_backward, act, product, product, *given, rounds)
    if biased:
        weight = new(T, K, dtype=dtype)
        yield "combine, bias", lambda: kernels.expert_combine(rows, place, down_bias, expert, weight)
        yield "row sums, weighted", lambda: kernels.expert_row_sums(rows, weight, order, offs)
        yield "row sums", lambda: kernels.expert_row_sums(product, None, None, offs)
        yield "row dots", lambda: kernels.expert_row_dots(rows, down_bias, expert, order, total)
    for C, R in ((2 * I, D), (D, I)):
        grad = new(E, C, R, dtype=dtype)
        yield "sum", partial(kernels.add_to_sum, new(E, C, R, dtype=F32), grad)
        yield "sum, last", partial(kernels.finish_sum, new(E, C, R, dtype=F32), grad)
        if dtype == BF16 and not shift and C % 8 == R % 8 == 0:  # as PyTorch's grouped product asks for
            pair = new(S, C, dtype=dtype), new(S, R, dtype=dtype), offs
            total = new(E, C, R, dtype=BF16), new(E, C, R, dtype=torch.uint8)
            for place in ((True, False), (False, False), (False, True)):
                yield "products", partial(kernels.add_product_to_sum, *pair, *total, *place)


def stream_cases(model: str, dtype: torch.dtype, shift: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    from revffn.ops.streams import kernels

    D, T = MODELS[model]["D"], TOKENS.get(model, 4096)
    new = partial(make, shift=shift)
    x, update, wide = (new(1, T, D, dtype=t) for t in (INT, dtype, F32))
    scale, finer, flags, weight = (new(n, dtype=t) for n, t in ((D, F32), (D, INT), (2, INT), (D, dtype)))
    rstd = new(1, T, dtype=F32)
    yield "check", lambda: kernels.stream_check(x, flags)
    yield "add update", lambda: kernels.add_update(update, x, scale, finer, flags)
    for m, predicted, first in ((0, None, 0), (1, update, 1), (2, update, 4096), (4, None, 3)):
        rest = scale, scale, finer, m, first
        bits = new(T * D * m // 8, dtype=torch.uint8)
        yield f"move, m={m}", partial(kernels.innovation_move, x, x, x, update, predicted, None, *rest, flags)
        yield f"undo, m={m}", partial(kernels.innovation_undo, x, x, x, x, update, predicted, None, bits, *rest)
    for predicted in (False, True):
        yield "gradients", partial(kernels.innovation_gradients, wide, wide, scale, dtype, predicted)
    for first in (False, True):
        for also in (False, True):
            given = x, scale, weight, 1e-6, dtype, first, also
            yield "norm", partial(kernels.read_norm, *given)
            more = update if also else None, None if first else wide, wide if also else None
            given = update, *more, x, scale, weight, rstd, first, also
            yield "norm backward", partial(kernels.read_norm_backward, *given)


def anderson_cases(model: str, dtype: torch.dtype, shift: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    from revffn.ops.anderson import kernels

    H, T = MODELS[model]["D"] // 2, TOKENS.get(model, 4096)
    new = partial(make, shift=shift)
    update, x, step = (new(1, T, H, dtype=t) for t in (dtype, INT, F32))
    scale, settled = new(H, dtype=F32), new(1, T, dtype=torch.bool)
    for m in range(kernels.DEPTH + 1):
        products = new(1, T, m + 1, m + 1, dtype=F32)
        yield f"move, m={m}", partial(kernels.anderson_move, update, x, x, scale, [step] * m)
        yield f"combine, m={m}", partial(kernels.anderson_combine, x, products, settled, [x] * m)


def dense_cases(model: str, dtype: torch.dtype, shift: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    from revffn.ops.dense import kernels
    from revffn.ops.dense.reference import TILE_CHANNELS

    T, head, D = TOKENS.get(model, 4096), {"gpt_oss": 64, "ragged": 6}.get(model, 128), MODELS[model]["D"]
    new = partial(make, shift=shift)
    cos, up = new(1, T, head, dtype=dtype), new(T, MODELS[model]["I"] * 4, dtype=dtype)
    for heads in (1, 4, 32):
        x, k = new(2, T, heads, head, dtype=dtype), new(2, 4, T, head, dtype=dtype)
        for back in (False, True):
            yield "rope", partial(kernels.rope, x.transpose(1, 2), k, cos, cos, back)
            yield "rope", partial(kernels.rope, x.view(2, heads, T, head), k, cos, cos, back)
        for rows in (x, *(new(T, wide, dtype=dtype) for wide in (TILE_CHANNELS, D))):
            weight, rstd = new(rows.shape[-1], dtype=dtype), new(*rows.shape[:-1], dtype=F32)
            for first in (False, True):
                yield "norm", partial(kernels.norm, rows, weight, 1e-6, first)
                yield "norm backward", partial(kernels.norm_backward, rows, rows, weight, rstd, first, heads > 1)
    yield "swiglu", lambda: kernels.swiglu(up, up)
    yield "swiglu backward", lambda: kernels.swiglu_backward(up, up, up)
    rows, weight, gate = (new(*shape, dtype=t) for shape, t in (((T, D), dtype), ((1, D), dtype), ((T,), F32)))
    yield "add gated", lambda: kernels.add_gated(rows, rows, rows, weight)
    yield "add gated backward", lambda: kernels.add_gated_backward(rows, rows, weight, gate)


def parameter_shapes(model: str) -> dict[str, tuple[int, ...]]:
    D, E, I, V = (MODELS[model][n] for n in "DEIV")  # noqa: E741
    return {
        "vector": (D,),
        "router": (E, D),
        "projection": (D, D),
        "embedding": (V, D),
        "up": (E, 2 * I, D),
        "down": (E, D, I),
    }


def update_cases(model: str, dtype: torch.dtype, shift: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    from revffn.ops.update import block_size, kernels

    new, chunk = partial(make, shift=shift), 64 << 20
    keep, scale, square = (new(dtype=F32) for _ in range(3))
    masks = keep, scale
    yield "judge", lambda: kernels.judge(square, keep, 1.0, 0.5)
    yield "judge", lambda: kernels.judge(square, keep, 0.0, 0.5)
    for place, shape in parameter_shapes(model).items():
        S, R, C = kernels.shape_of(new(*shape, dtype=dtype))
        grad = weight = new(*shape, dtype=dtype)
        wide, averaged = new(*shape, dtype=F32), new(*shape, dtype=BF16)
        squares, row, factor = new(S, dtype=F32), new(S, R, dtype=F32), new(S, C, dtype=F32)
        cols = new(S, max(triton.cdiv(R, 4096), 1), C, dtype=F32)
        factored = len(shape) > 1
        for wanted in {False, factored}:
            yield f"{place}: squares", partial(kernels.grad_squares, grad, wanted, chunk)
        for norms in (False, True):
            if factored:
                given = grad, row, cols, row, factor, *masks, 0.1, 1e-30, R, norms, chunk
                yield f"{place}: averages", partial(kernels.factored_statistics, *given)
            given = grad, wide, *masks, 0.1, 1e-30, norms, chunk
            yield f"{place}: averages, unfactored", partial(kernels.unfactored_statistics, *given)
        for master, decay, rule, *rounding in update_kinds(place, dtype):
            master = wide if master else None
            rounding.append(chunk)
            if rule.startswith("adafactor"):
                factors = (row, squares, factor, None) if factored else (None, None, None, wide)
                largest, momentum = 0.0 if "unclipped" in rule else 1e3, averaged if "momentum" in rule else None
                given = *factors, squares, *masks, 1e-3, decay, largest, 0.1, 1e-30
                yield f"{place}: {rule}", partial(kernels.adafactor, weight, master, momentum, grad, *given, *rounding)
            numbers = 1e-3, decay, 0.1, 0.01, 1.5, 1e-8
            if rule == "adamw":
                given = weight, master, wide, wide, grad, *masks, *numbers
                yield f"{place}: {rule}", partial(kernels.adamw, *given, *rounding)
            block = block_size(weight)
            if rule == "adamw8bit" and block:
                codes = new(*shape, dtype=torch.uint8)
                scales, books = new(*shape[:-1], C // block, dtype=F32), new(4, 256, dtype=F32)
                given = weight, master, codes, scales, codes, scales, grad, books, *masks, *numbers
                yield f"{place}: {rule}", partial(kernels.adamw8bit, *given, *rounding)
            if rule.startswith("sgd"):
                buffer = wide if "momentum" in rule else None
                given = weight, master, buffer, grad, *masks, 1e-3, decay, 0.9
                yield f"{place}: {rule}", partial(kernels.sgd, *given, *rounding)


RULES = (
    "adafactor", "adafactor, momentum", "adafactor, unclipped", "adafactor, unclipped, momentum", "adamw", "adamw8bit",
    "sgd", "sgd, momentum",
)  # fmt: skip


def update_kinds(place: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """(master, decay, rule, stochastic, key, first row): all for one parameter, the usual ones for the others."""
    for rule in RULES:
        yield False, 0.0, rule, True, 2**63 + 5, 0
        if place == "up":
            yield False, 1e-3, rule, False, 7, 2**33
            if dtype == BF16:
                yield False, 1e-3, rule, True, 2**40, 1
                yield True, 1e-3, rule, False, 2**40, 0


FAMILIES = {
    "experts": expert_cases,
    "streams": stream_cases,
    "anderson": anderson_cases,
    "dense": dense_cases,
    "update": update_cases,
}

Job = tuple[int, str, str, torch.dtype, int]


def jobs(arches: list[int]) -> Iterator[tuple[str, Job]]:
    for arch in arches:
        for family in FAMILIES:
            for model in MODELS:
                for dtype in (BF16, F32):
                    for shift in (0, 1) if model in MAY_BE_UNALIGNED else (0,):
                        aligned = "" if shift == 0 else ", unaligned"
                        name = f"sm_{arch} {family} {model} {str(dtype)[6:]}{aligned}"
                        yield name, (arch, family, model, dtype, shift)


def short(job: str, case: str) -> bool:
    """What the fast test compiles: every kernel, what differs most between models, and sizes that are 1."""
    if not re.fullmatch(r"sm_90 \w+ gpt_oss bfloat16", job):
        return False
    usual = r"judge|down: (squares|averages|adafactor$|adamw)|vector: (squares|averages|adafactor$)"
    return "update" not in job or re.match(usual, case) is not None


def kernel_names(module: ModuleType) -> set[str]:
    """Kernels that a module launches: its Triton functions that no other of them calls."""
    functions = {n: f for n, f in vars(module).items() if isinstance(f, triton.JITFunction)}
    called = {n for n in functions for f in functions.values() if re.search(rf"(?<!def ){n}\(", f.src)}
    return set(functions) - called


def launched_kernels() -> set[str]:
    return {n for family in FAMILIES for n in kernel_names(kernels_of(family))}


def compile_job(name: str, job: Job, only: str, is_short: bool, ptx: str) -> list[dict[str, Any]]:
    """All kernels that a job's cases launch."""
    arch, family, model, dtype, shift = job
    kernels_of(family)
    triton.runtime.driver.set_active(Driver(arch))
    found: dict[str, Any] = {}
    rows, seen = [], set()
    original = triton.compiler.CompiledKernel.run
    record_launches(found)
    try:
        for case, call in FAMILIES[family](model, dtype, shift):
            if not re.search(only, f"{name} {case}") or is_short and not short(name, case):
                continue
            began = time.perf_counter()
            try:
                call()
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                rows.append({"kernel": case, "case": f"{name} {case}", "arch": arch, "problems": [text]})
                show(rows[-1])
                continue
            for key in sorted(found.keys() - seen):
                seen.add(key)
                kernel = found[key]
                row = {"kernel": kernel.name, "case": f"{name} {case}", "arch": arch, **resources(kernel)}
                text = kernel.asm["ptx"]
                row |= {
                    "warps": kernel.metadata.num_warps,
                    "shared": kernel.metadata.shared,
                    "load": widest(text, "ld"),
                    "store": widest(text, "st"),
                    "lines": text.count(";"),
                    "hash": kernel.hash,
                    "seconds": round(time.perf_counter() - began, 1),
                }
                row["problems"] = problems(kernel.name, text, row)
                if kernel.metadata.enable_fp_fusion:
                    row["problems"].append("compiled with fused multiply-add")
                rows.append(row)
                show(row)
                if ptx:
                    stem = re.sub(r"\W+", "_", f"{kernel.name} {row['case']}")
                    Path(ptx, f"{stem}_{kernel.hash[:6]}.ptx").write_text(text)
                    Path(ptx, f"{stem}_{kernel.hash[:6]}.cubin").write_bytes(kernel.asm["cubin"])
    finally:
        triton.compiler.CompiledKernel.run = original
        for function in functions_of(family):
            function.device_caches.clear()
    return rows


def functions_of(family: str) -> list[Any]:
    return [f for _, f in inspect.getmembers(kernels_of(family)) if isinstance(f, triton.JITFunction)]


SHOWN = ("registers", "spills", "shared", "load", "store", "lines", "warps", "seconds")


def show(row: dict[str, Any]) -> None:
    numbers = (f"{k} {row[k]}" for k in SHOWN if k in row)
    print(f"{row['kernel']:24} {row['case']}: {', '.join([*numbers, *row['problems']])}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", default=[90, 80], help="compute capability: 90 or 80")
    parser.add_argument("--only", default="", help="regular expression of cases")
    parser.add_argument("--short", action="store_true", help="a subset that has every kernel")
    parser.add_argument("--ptx", default="", help="folder for the kernels' texts")
    parser.add_argument("--json", help="file for all rows")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if args.ptx:
        Path(args.ptx).mkdir(parents=True, exist_ok=True)
    chosen = list(jobs(args.arch))
    rows, done = [], set()
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(compile_job, *job, args.only, args.short, args.ptx) for job in chosen]
        for future in waiting:
            for row in future.result():
                if row.get("hash") not in done:
                    done.add(row.get("hash"))
                    rows.append(row)
    missing = launched_kernels() - {row["kernel"] for row in rows}
    report = {
        "triton": triton.__version__,
        "missing": sorted(missing),
        "problems": [row for row in rows if row["problems"]],
        "rows": rows,
    }
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
    print(f"Triton {triton.__version__}: {len(rows)} kernels, {len(report['problems'])} with problems", flush=True)
    if missing:
        print(f"Not compiled: {', '.join(sorted(missing))}")
    sys.exit(bool(report["problems"]))


if __name__ == "__main__":
    main()
