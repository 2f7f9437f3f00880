"""The chosen experts of every token: out_t = sum over k of W_down (weight_tk * act(gate) * up) of expert index_tk.

The arrangement is SonicMoE's with PyTorch's grouped products (Guo et al., https://arxiv.org/abs/2512.14080): choices
are sorted by expert, rows gathered, and the routing weight is applied before the down projection, so that neither the
weighted rows nor the unweighted ones are kept: backward needs the input, the routing and the up projection's result.
No sum is made by atomics: every output has one writer and a fixed order, and nothing waits for the device (bf16 on
CUDA; other dtypes take a loop over experts that reads the groups' sizes).

transformers multiplies by the weight behind the down projection: the same function, rounded elsewhere.
"""

# T = tokens, K = experts per token, S = T * K rows sorted by expert, E = experts,
# D = hidden size, I = an expert's width

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import kernel_of, probe_of, register
from . import reference


@dataclass(frozen=True)
class Gate:
    """How an expert's two halves are joined."""

    kind: str = "silu"
    """`silu`, `gelu`, `gelu_tanh` (activation(gate) * up), or `clamped` (gpt-oss): gate * sigmoid(alpha * gate) *
    (up + 1), gate at most `limit` and up within it."""
    alpha: float = 1.0
    limit: float = math.inf
    interleaved: bool = False
    """Gate and up are the even and odd columns instead of the first and second half."""

    def arguments(self) -> tuple[str, float, float, bool]:
        return self.kind, self.alpha, self.limit, self.interleaved


class GradientSum:
    """The gradient of one expert parameter summed over its uses.

    A sum of products of bf16 is kept in 24 of float32's bits, three bytes an element: a sign, an exponent and 16
    binary digits, 8 more than bf16 has. The last product is added in the memory of the sum's first 16 bits, which then
    are the gradient. Other gradients are added in float32 (float64 for float64 parameters).

    Args:
        num_uses: Gradients that will come. With one there is nothing to sum and nothing is kept.
    """

    def __init__(self, num_uses: int):
        self.num_uses, self.seen = num_uses, 0
        self.total: Tensor | tuple[Tensor, Tensor] | None = None

    def add_product(self, a: Tensor, b: Tensor, offs: Tensor) -> Tensor | None:
        """Take a^T b of every expert's rows (bf16), which is not rounded before it is added; with the last use, return
        the sum rounded once to bf16."""
        self.seen += 1
        if self.num_uses == 1:
            self.seen = 0
            return grouped_mm_weight(a, b, offs)
        begins, ends = self.total is None, self.seen == self.num_uses
        if begins:
            shape = (offs.shape[0], a.shape[1], b.shape[1])
            self.total = a.new_empty(shape), a.new_empty(shape, dtype=torch.uint8)
        high, low = self.total
        add_product_to_sum(a, b, offs, high, low, begins, ends)
        if not ends:
            return None
        self.total, self.seen = None, 0
        return high

    def add(self, grad: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Take one use's gradient, which is overwritten; with the last, return their sum rounded once to `dtype`."""
        self.seen += 1
        if self.seen < self.num_uses:
            if self.total is None:
                self.total = reference.wide(grad)
            else:
                add_to_sum(self.total, grad)
            return None
        total, self.total, self.seen = self.total, None, 0
        if total is not None:
            finish_sum(total, grad)
        return grad.to(dtype)


# --- operations ------------------------------------------------------------------------------------------------------


def _supports(*args: Any) -> bool:
    tensors = [x for x in args if isinstance(x, Tensor)]
    return all(
        x.is_contiguous() and (not x.is_floating_point() or x.dtype in (torch.float32, torch.bfloat16))
        for x in tensors
    )


def _supports_sum(total: Tensor, grad: Tensor) -> bool:
    return _supports(total, grad) and total.dtype == torch.float32


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_sort(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = index.numel()
    return (
        index.new_empty(n, dtype=torch.int32),
        index.new_empty(index.shape, dtype=torch.int32),
        index.new_empty(num_experts, dtype=torch.int32),
        index.new_empty(n, dtype=reference.index_dtype(num_experts)),
    )


_GATE = "str kind, float alpha, float limit, bool interleaved"

expert_sort = register(
    "expert_sort(Tensor index, int num_experts) -> (Tensor order, Tensor place, Tensor offs, Tensor expert)",
    reference.expert_sort,
    _fake_sort,
    kernel_of(__name__, "expert_sort"),
)
expert_gather = register(
    "expert_gather(Tensor x, Tensor place) -> Tensor",
    reference.expert_gather,
    lambda x, place: x.new_empty(place.numel(), x.shape[1]),
    kernel_of(__name__, "expert_gather"),
    _supports,
)
expert_gate = register(
    "expert_gate(Tensor gate_up, Tensor? bias, Tensor? expert, Tensor weight, Tensor order, " + _GATE + ") -> Tensor",
    reference.expert_gate,
    lambda gate_up, *_: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
    kernel_of(__name__, "expert_gate"),
    _supports,
)
expert_gate_backward = register(
    "expert_gate_backward(Tensor(a!) d_act, Tensor gate_up, Tensor(b!) d_gate_up, Tensor? bias, Tensor? expert, "
    "Tensor weight, Tensor order, " + _GATE + ", bool rounds) -> Tensor",
    reference.expert_gate_backward,
    lambda d, gate_up, out, bias, expert, weight, *more: (
        torch.empty_like(weight) if more[-1] else weight.new_empty(weight.shape, dtype=_wide_dtype(d))
    ),
    kernel_of(__name__, "expert_gate_backward"),
    _supports,
)
expert_combine = register(
    "expert_combine(Tensor rows, Tensor place, Tensor? bias, Tensor? expert, Tensor? weight) -> Tensor",
    reference.expert_combine,
    lambda rows, place, *_: rows.new_empty(place.shape[0], rows.shape[1]),
    kernel_of(__name__, "expert_combine"),
    _supports,
)
expert_row_sums = register(
    "expert_row_sums(Tensor rows, Tensor? weight, Tensor? order, Tensor offs) -> Tensor",
    reference.expert_row_sums,
    lambda rows, weight, order, offs: rows.new_empty(offs.shape[0], rows.shape[1], dtype=_wide_dtype(rows)),
    kernel_of(__name__, "expert_row_sums"),
    _supports,
)
expert_row_dots = register(
    "expert_row_dots(Tensor rows, Tensor bias, Tensor expert, Tensor order, Tensor(a!) total) -> ()",
    reference.expert_row_dots,
    lambda *_: None,
    kernel_of(__name__, "expert_row_dots"),
    _supports,
)
add_to_sum = register(
    "add_to_sum(Tensor(a!) total, Tensor grad) -> ()",
    reference.add_to_sum,
    lambda *_: None,
    kernel_of(__name__, "add_to_sum"),
    _supports_sum,
)
finish_sum = register(
    "finish_sum(Tensor(a!) total, Tensor(b!) grad) -> ()",
    reference.finish_sum,
    lambda *_: None,
    kernel_of(__name__, "finish_sum"),
    _supports_sum,
)
add_product_to_sum = register(
    "add_product_to_sum(Tensor a, Tensor b, Tensor offs, Tensor(a!) high, Tensor(b!) low, bool begins, bool ends) "
    "-> ()",
    reference.add_product_to_sum,
    lambda *_: None,
    kernel_of(__name__, "add_product_to_sum"),
    _supports,
    probe=probe_of(__name__, "add_product_to_sum"),
)
_looped_mm = register(
    "grouped_mm(Tensor x, Tensor weight, Tensor offs) -> Tensor",
    reference.grouped_mm,
    lambda x, weight, offs: x.new_empty(x.shape[0], weight.shape[2]),
    lambda: reference.grouped_mm,
)
_looped_mm_weight = register(
    "grouped_mm_weight(Tensor a, Tensor b, Tensor offs) -> Tensor",
    reference.grouped_mm_weight,
    lambda a, b, offs: a.new_empty(offs.shape[0], a.shape[1], b.shape[1]),
    lambda: reference.grouped_mm_weight,
)


@register_flop_formula(torch.ops.revffn.grouped_mm)
def _flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[2]


@register_flop_formula([torch.ops.revffn.grouped_mm_weight, torch.ops.revffn.add_product_to_sum])
def _weight_flops(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * math.prod(a) * b[1]


def _has_product(a: Tensor, *sizes: int) -> bool:
    """Whether PyTorch's grouped product takes these: bf16, rows of whole 16 bytes."""
    return a.dtype == torch.bfloat16 and all(size % 8 == 0 for size in sizes)


def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """(S, M) times (E, M, N) -> (S, N): each expert's rows times its matrix."""
    if _has_product(x, *weight.shape[1:]):
        return torch.nn.functional.grouped_mm(x, weight, offs=offs)
    return _looped_mm(x, weight, offs)


def grouped_mm_weight(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """(S, M), (S, N) -> (E, M, N): a^T b of each expert's rows; zero where there are none."""
    if _has_product(a, a.shape[1], b.shape[1]):
        return torch.nn.functional.grouped_mm(a.t(), b, offs=offs)
    return _looped_mm_weight(a, b, offs)


# --- all of it -------------------------------------------------------------------------------------------------------

NAMES = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
"""Keys of `sums`: a parameter's name in transformers."""


class Experts(Function):
    @staticmethod
    def forward(
        ctx,
        x,
        index,
        weight,
        gate_up,
        down,
        gate_up_bias,
        down_bias,
        gate: Gate,
        transposed: bool,
        sums,
    ):
        order, place, offs, expert = expert_sort(index, gate_up.shape[0])
        expert = None if gate_up_bias is None and down_bias is None else expert
        up_matrix, down_matrix = (w if transposed else w.transpose(1, 2) for w in (gate_up, down))
        product = grouped_mm(expert_gather(x, place), up_matrix, offs)
        act = expert_gate(product, gate_up_bias, expert, weight, order, *gate.arguments())
        rows = grouped_mm(act, down_matrix, offs)
        ctx.save_for_backward(x, weight, gate_up, down, gate_up_bias, down_bias, product, order, place, offs, expert)
        ctx.gate, ctx.transposed, ctx.sums = gate, transposed, sums
        return expert_combine(rows, place, down_bias, expert, None if down_bias is None else weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (
            x, weight, gate_up, down, gate_up_bias, down_bias, product, order, place, offs, expert,
        ) = ctx.saved_tensors  # fmt: skip
        needed = dict(zip(("x", "index", "weight", *NAMES), ctx.needs_input_grad, strict=False))
        found: dict[str, Tensor | None] = {}

        def give(name: str, gradient: Tensor, dtype: torch.dtype) -> None:
            """At once, so that no gradient waits for the next."""
            its = None if ctx.sums is None else ctx.sums.get(name)
            found[name] = gradient.to(dtype) if its is None else its.add(gradient, dtype)

        def give_product(name: str, inputs: Tensor, outputs: Tensor, dtype: torch.dtype) -> None:
            """`give` of a matrix's gradient."""
            pair = (inputs, outputs) if ctx.transposed else (outputs, inputs)
            its = None if ctx.sums is None else ctx.sums.get(name)
            if its is None or not _has_product(inputs, inputs.shape[1], outputs.shape[1]):
                give(name, grouped_mm_weight(*pair, offs), dtype)
            else:
                found[name] = its.add_product(*pair, offs)

        grad_rows = expert_gather(grad.contiguous(), place)
        act = grouped_mm(grad_rows, down.transpose(1, 2) if ctx.transposed else down, offs)
        # In the engine what was saved is served once and belongs to this call.
        grad_product = torch.empty_like(product) if ctx.sums is None else product
        grad_weight = expert_gate_backward(
            act, product, grad_product, gate_up_bias, expert, weight, order, *ctx.gate.arguments(), down_bias is None
        )
        del product
        if down_bias is not None:
            if needed["weight"]:
                expert_row_dots(grad_rows, down_bias, expert, order, grad_weight)
            if needed["down_proj_bias"]:
                give(
                    "down_proj_bias",
                    expert_row_sums(grad_rows, weight, order, offs),
                    down_bias.dtype,
                )
        if needed["down_proj"]:
            give_product("down_proj", act, grad_rows, down.dtype)
        del grad_rows, act
        if gate_up_bias is not None and needed["gate_up_proj_bias"]:
            give(
                "gate_up_proj_bias",
                expert_row_sums(grad_product, None, None, offs),
                gate_up_bias.dtype,
            )
        if needed["gate_up_proj"]:
            rows = expert_gather(x, place)
            give_product("gate_up_proj", rows, grad_product, gate_up.dtype)
            del rows
        grad_x = None
        if needed["x"]:
            rows = grouped_mm(grad_product, gate_up.transpose(1, 2) if ctx.transposed else gate_up, offs)
            del grad_product
            grad_x = expert_combine(rows, place, None, None, None)
        grad_weight = grad_weight.to(weight.dtype) if needed["weight"] else None
        return (grad_x, None, grad_weight, *(found.get(name) for name in NAMES), None, None, None)


def experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate: Gate = Gate(),  # noqa: B008
    transposed: bool = False,
    sums: dict[str, GradientSum] | None = None,
) -> Tensor:
    """What the chosen experts make of every token, summed with the routing weights: (T, D).

    Args:
        x: (T, D), in the dtype of the experts or converted to it; the result has the dtype of `x`.
        index: (T, K), integers 0 to E - 1.
        weight: (T, K), routing weights of any floating-point dtype.
        gate_up: (E, 2 I, D); (E, D, 2 I) if `transposed`.
        down: (E, D, I); (E, I, D) if `transposed`.
        gate_up_bias: (E, 2 I).
        down_bias: (E, D).
        gate: How gate and up are joined.
        transposed: Whether matrices are stored as (inputs, outputs).
        sums: For callers that use the same experts several times in one backward pass: by the names of `NAMES`, what
            adds a parameter's gradients up, and returns None to autograd but for the last. Who gives it states also
            that backward runs once on what forward saved, and may write over that.
    """
    if x.shape[0] == 0:
        return torch.zeros_like(x)
    out = Experts.apply(
        x.to(gate_up.dtype).contiguous(), index.contiguous(), weight.contiguous(), gate_up, down, gate_up_bias,
        down_bias, gate, transposed, sums,
    )  # fmt: skip
    return out.to(x.dtype)


__all__ = ["NAMES", "Gate", "GradientSum", "experts"]
