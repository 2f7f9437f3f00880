"""The fused experts against transformers' grouped_mm experts: the same function first, then milliseconds.

Before anything is timed, at each model's true size: result and gradients within bf16 rounding of the family's own
code (the error against its float32 twin is at most 1.5 times the family's), an expert without tokens, and twice the
same bits, also where backward writes over what forward saved. On a CPU only with --tiny, where times mean nothing.

    python benchmarks/kernels_experts.py --output experts.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from revffn.ops import dispatch
from revffn.ops.experts import (
    Gate,
    GradientSum,
    expert_combine,
    expert_gate,
    expert_gate_backward,
    expert_gather,
    expert_sort,
    experts,
    grouped_mm,
    grouped_mm_weight,
)

MODELS = {  # experts, experts per token, hidden size, experts' width
    "Qwen1.5-MoE-A2.7B": (60, 4, 2048, 1408),
    "Qwen3-30B-A3B": (128, 8, 2048, 768),
}
TINY = {"tiny": (8, 2, 64, 32)}
TOKENS = (2048, 8192, 32768)
CHECKED_TOKENS = 4096
NAMES = ("out", "x", "weight", "gate_up", "down")


class Problem:
    """Random experts in bf16 and tokens for them; nobody chooses expert 1."""

    def __init__(self, shape: tuple[int, int, int, int], tokens: int, device: torch.device):
        E, K, D, I = shape  # noqa: E741
        generator = torch.Generator(device).manual_seed(0)

        def draw(*sizes: int, scale: float = 1.0) -> Tensor:
            made = torch.randn(sizes, generator=generator, device=device, dtype=torch.bfloat16)
            return made.mul_(scale).requires_grad_()

        self.x, self.gate_up, self.down = draw(tokens, D), draw(E, 2 * I, D, scale=D**-0.5), draw(E, D, I, scale=0.02)
        self.grad = draw(tokens, D).detach()
        scores = torch.rand(tokens, E, generator=generator, device=device)
        scores[:, 1] = -1.0
        top = scores.topk(K)
        self.index = top.indices
        self.weight = (top.values / top.values.sum(-1, keepdim=True)).to(torch.bfloat16).requires_grad_()
        config = Qwen3MoeConfig(num_experts=E, num_experts_per_tok=K, hidden_size=D, moe_intermediate_size=I)
        with torch.device("meta"):
            self.family = Qwen3MoeExperts(config)
        self.family.num_experts, self.family.config = E, config

    def leaves(self) -> list[Tensor]:
        return [self.x, self.weight, self.gate_up, self.down]

    def ours(self, sums: dict[str, GradientSum] | None = None) -> Tensor:
        return experts(self.x, self.index, self.weight, self.gate_up, self.down, sums=sums)

    def theirs(self) -> Tensor:
        for name, weight in (("gate_up_proj", self.gate_up), ("down_proj", self.down)):
            self.family._parameters.pop(name, None)
            setattr(self.family, name, weight)
        return grouped_mm_experts_forward(self.family, self.x, self.index, self.weight)

    def exact(self) -> tuple[Tensor, list[Tensor]]:
        """In float32, one expert after the other."""
        x, weight = (t.detach().float().requires_grad_() for t in (self.x, self.weight))
        out = torch.zeros_like(x)
        matrices = []
        for e in range(self.gate_up.shape[0]):
            token, k = (self.index == e).nonzero(as_tuple=True)
            both, down = (w[e].detach().float().requires_grad_() for w in (self.gate_up, self.down))
            gate, up = (x[token] @ both.T).chunk(2, -1)
            rows = (torch.nn.functional.silu(gate) * up) @ down.T
            out = out.index_add(0, token, rows * weight[token, k, None])
            matrices.append((both, down))
        leaves = [x, weight, *(m for pair in matrices for m in pair)]
        found = torch.autograd.grad(out, leaves, self.grad.float(), allow_unused=True)
        stacked = [torch.stack(found[2 + i :: 2]) for i in range(2)]
        return out.detach(), [found[0], found[1], *stacked]


def outcome(run: Callable[[], Tensor], problem: Problem) -> list[Tensor]:
    out = run()
    return [out.detach(), *torch.autograd.grad(out, problem.leaves(), problem.grad)]


def check(shape: tuple[int, int, int, int], tokens: int, device: torch.device) -> dict[str, float]:
    """Errors of ours, relative to the family's.

    Raises:
        AssertionError: Ours are larger than they may be, or two runs differ.
    """
    problem = Problem(shape, tokens, device)
    ours, theirs = outcome(problem.ours, problem), outcome(problem.theirs, problem)
    for again in (outcome(problem.ours, problem), outcome(lambda: problem.ours(sums={}), problem)):
        for name, a, b in zip(NAMES, ours, again, strict=True):
            assert torch.equal(a, b), f"{name}: two runs differ"
    out, found = problem.exact()
    ratios = {}
    for name, true, a, b in zip(NAMES, [out, *found], ours, theirs, strict=True):
        error, their_error = (float((g.float() - true).norm() / true.norm()) for g in (a, b))
        assert error <= 1.5 * their_error + 1e-3, f"{name}: error {error:.2e}, the family's {their_error:.2e}"
        ratios[name] = error / their_error
    for name, gradient in zip(NAMES[3:], ours[3:], strict=True):
        assert not gradient[1].any(), f"{name}: a gradient for an expert without tokens"
    return ratios


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of one call, the device waited for."""
    times = []
    for number in range(repeats + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def host_milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call, not waiting for the device: what the host needs."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(5):
        run()
    took = 1e3 * (time.perf_counter() - start) / 5
    if device.type == "cuda":
        torch.cuda.synchronize()
    return took


def measure(shape: tuple[int, int, int, int], tokens: int, device: torch.device, repeats: int) -> dict[str, float]:
    problem = Problem(shape, tokens, device)
    E = shape[0]

    def step(run: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(run(), problem.leaves(), problem.grad)

    found = {}
    engine = lambda: problem.ours(sums={})  # noqa: E731
    for name, run in (("ours", problem.ours), ("ours, saved overwritten", engine), ("grouped_mm", problem.theirs)):
        with torch.no_grad():
            found[f"forward, {name}"] = milliseconds(run, device, repeats)
        found[f"forward and backward, {name}"] = milliseconds(step(run), device, repeats)
        found[f"host, forward and backward, {name}"] = host_milliseconds(step(run), device)
    with torch.no_grad():
        order, place, offs, expert = expert_sort(problem.index, E)
        rows, grad = expert_gather(problem.x, place), expert_gather(problem.grad, place)
        gate_up, down = problem.gate_up, problem.down
        product = grouped_mm(rows, gate_up.transpose(1, 2), offs)
        gate = (None, None, problem.weight, order, *Gate().arguments())
        act = expert_gate(product, *gate)
        halves, halves_down = (
            (torch.zeros_like(matrix), torch.zeros_like(matrix, dtype=torch.uint8)) for matrix in (gate_up, down)
        )
        total = torch.zeros_like(gate_up, dtype=torch.float32)
        weights, add_product = torch.zeros_like(gate_up), torch.ops.revffn.add_product_to_sum
        parts = {
            "product up": lambda: grouped_mm(rows, gate_up.transpose(1, 2), offs),
            "product down": lambda: grouped_mm(act, down.transpose(1, 2), offs),
            "product d act": lambda: grouped_mm(grad, down, offs),
            "product d rows": lambda: grouped_mm(product, gate_up, offs),
            "product d down": lambda: grouped_mm_weight(grad, act, offs),
            "product d up": lambda: grouped_mm_weight(product, rows, offs),
            "d down, added to its sum": lambda: add_product(grad, act, offs, *halves_down, False, False),
            "d up, added to its sum": lambda: add_product(product, rows, offs, *halves, False, False),
            "d up, added to its sum and rounded": lambda: add_product(product, rows, offs, *halves, False, True),
            "sort": lambda: expert_sort(problem.index, E),
            "gather": lambda: expert_gather(problem.x, place),
            "gate": lambda: expert_gate(product, *gate),
            "gate backward": lambda: expert_gate_backward(act, product, product, *gate, True),
            "combine": lambda: expert_combine(rows, place, None, None, None),
            "add to sum (gate_up)": lambda: torch.ops.revffn.add_to_sum(total, weights),
            "finish sum (gate_up)": lambda: torch.ops.revffn.finish_sum(total, weights),
        }
        for name, run in parts.items():
            found[name] = milliseconds(run, device, repeats)
    products = [found[name] for name in parts if name.startswith("product")]
    found["products of forward"], found["products of forward and backward"] = sum(products[:2]), sum(products)
    return found


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too: shows that the script runs")
    args = parser.parse_args(words)
    if not torch.cuda.is_available() and not args.tiny:
        parser.error("needs a CUDA device; --tiny runs anywhere")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = TINY if args.tiny else {name: MODELS[name] for name in args.models}
    record = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "kernels": dispatch.describe(),
        "models": {},
    }
    for name, shape in models.items():
        tokens = [64] if args.tiny else args.tokens
        row = {"shape (E, K, D, I)": shape, "error, relative to grouped_mm's": check(
            shape, 64 if args.tiny else CHECKED_TOKENS, device
        )}  # fmt: skip
        print(name, "agrees:", json.dumps(row["error, relative to grouped_mm's"]), flush=True)
        row["milliseconds"] = {}
        for count in tokens:
            row["milliseconds"][count] = found = measure(shape, count, device, args.repeats)
            print(name, count, json.dumps({key: round(value, 3) for key, value in found.items()}), flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        record["models"][name] = row
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
