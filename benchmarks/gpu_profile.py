"""One training step under PyTorch's profiler, its kernels by category.

Kernels of our own go by the folder of `revffn/ops` they are in, all others by a table of names.
"""

from __future__ import annotations

import ast
import re
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

OF_FOLDER = {
    "update": "optimizer",
    "experts": "experts' glue",
    "streams": "streams",
    "anderson": "streams",
    "dense": "norms, RoPE",
}
"""What kernels in `revffn/ops/<folder>` are for."""
RULES: tuple[tuple[str, str], ...] = (
    # The first that is found in a kernel's name, unless it is one of revffn/ops (`own_kernels`).
    (r"^Mem(cpy|set)|^aten::(copy_|zero_|fill_)$", "copies"),
    (r"flash|fmha|sdpa|attention", "attention"),
    (r"cross_entropy|element_mul_kernel|nll_loss|log_?softmax|cunn_SoftMax", "loss"),
    (r"(rms|layer)_?norm|_rope|rotary", "norms, RoPE"),
    (
        r"nvjet|gemm|cublas|cutlass|xmma|splitK|gemv|^aten::(_grouped_mm|(add|b|badd)?mm)$",
        "matrix products",
    ),
    # What eager steps of the optimizer alone do; its plain arithmetic is under `other elementwise`.
    (
        r"distribution_elementwise|random_from_to|NormTwoOps|^aten::(random_|linalg_vector_norm)$",
        "optimizer",
    ),
    (
        r"swiglu|silu|[Rr]adix_?[Ss]ort|DeviceScan|[Hh]istogram|topk|bitonic|index_put"
        r"|indexing_backward|gather|scatter|softmax_warp|masked_fill.*BFloat16"
        r"|^aten::(index|sort|histc|cumsum|topk)$",
        "experts' glue",
    ),
    # The same of the eager couplings.
    (
        r"MinMaxOps|aminmax|round_kernel|shift_kernel|BitwiseXor|remainder"
        r"|^aten::(aminmax|round_)$",
        "streams",
    ),
)
RANGES = r"Optimizer\.|ProfilerStep|## |PyTorch Profiler|Command Buffer|Activity Buffer"
"""Events of the profiler that are no kernels."""
OTHER = "other elementwise"
CATEGORIES = (
    "matrix products",
    "attention",
    "experts' glue",
    "optimizer",
    "streams",
    "norms, RoPE",
    "loss",
    OTHER,
    "copies",
)


def own_kernels(folder: Path = ROOT / "revffn" / "ops") -> dict[str, str]:
    """The category of every Triton kernel under `revffn/ops`, by the kernel's name."""
    found = {}
    for file in sorted(folder.glob("*/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                "jit" in ast.unparse(d) for d in node.decorator_list
            ):
                found[node.name] = OF_FOLDER.get(file.parent.name, OTHER)
    return found


def category(kernel: str, own: dict[str, str]) -> str:
    """What a kernel is for, by its name."""
    if kernel in own:
        return own[kernel]
    return next((name for rule, name in RULES if re.search(rule, kernel)), OTHER)


def busy_us(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (start, end)."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def profile_step(training: Any, batch: dict, device: str) -> tuple[dict[str, Any], str]:
    """One step under the profiler: milliseconds by category, and the largest kernels as text."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        start = time.perf_counter()
        training.step(batch)
        if on_gpu:
            torch.cuda.synchronize()
        wall_ms = 1000 * (time.perf_counter() - start)
    # The raw events: building torch.profiler's own tables takes longer than the step.
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    own, spans = own_kernels(), []
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in profiler.profiler.kineto_results.events():
        name = event.name()
        if event.device_type() != wanted or re.match(RANGES, name):
            continue  # ranges, not kernels
        start_us, length_us = event.start_ns() / 1000, event.duration_ns() / 1000
        times[name] += length_us
        counts[name] += 1
        spans.append((start_us, start_us + length_us))
    by_category = dict.fromkeys(CATEGORIES, 0.0)
    launches = dict.fromkeys(CATEGORIES, 0)
    for name, length_us in times.items():
        by_category[category(name, own)] += length_us / 1000
        launches[category(name, own)] += counts[name]
    busy_ms = busy_us(spans) / 1000
    top = times.most_common(60)
    text = "".join(
        f"{us / 1000:10.2f} ms {counts[name]:7d}  {category(name, own):<18} {name}\n"
        for name, us in top
    )
    return {
        "wall_ms": wall_ms,
        "busy_ms": busy_ms,
        "idle_ms": max(0.0, wall_ms - busy_ms),
        "kernels_ms": sum(times.values()) / 1000,
        "num_kernels": sum(counts.values()),
        "ms": by_category,
        "launches": launches,
    }, text
