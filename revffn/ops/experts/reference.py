"""The experts' operations in plain PyTorch: the truth in tests, the path on a CPU, the fallback.

What is rounded to the model's dtype, and where: the results of products; the weighted activation; the gradient of
the products' results; the combined output. Everything inside one operation is float32 (float64 for float64 tensors)
and is rounded once. Gradients of biases leave their operations unrounded, and so do those of routing weights where
more is added to them.

Every sum has a fixed order. Sums over many elements run in *lanes* (element i goes to lane i modulo their number, in
ascending order), and the lanes are added in pairs of neighbours until one is left.
"""

# T = tokens, K = experts per token, S = T * K rows sorted by expert, E = experts,
# D = hidden size, I = an expert's width

from __future__ import annotations

import torch
from torch import Tensor

from ..sums import pairs

COLUMN_LANES = 256
"""Sums along a row: the gradient of a routing weight."""
ROW_LANES = 16
"""Sums over an expert's rows: the gradients of biases."""


def index_dtype(num_choices: int) -> torch.dtype:
    """Smallest integer type that holds indices 0 to `num_choices - 1`."""
    if num_choices <= 256:
        return torch.uint8
    return torch.int16 if num_choices <= 32768 else torch.int32


def wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def lanes_for(size: int, most: int) -> int:
    """The power of two that holds `size`, at least 16 and at most `most`."""
    return min(max(1 << (size - 1).bit_length(), 16), most)


def lane_sums(x: Tensor, lanes: int) -> Tensor:
    """Sum over the last dimension in the order that the module's text states: (..., N) -> (...)."""
    total = x.new_zeros(*x.shape[:-1], lanes)
    for block in x.split(lanes, -1):
        total[..., : block.shape[-1]] += block
    return pairs(total)


# --- arrangement -----------------------------------------------------------------------------------------------------


def expert_sort(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Group the T * K choices by expert, in the order of tokens within an expert.

    Args:
        index: (T, K), any integer type, 0 to E - 1.
        num_experts: E.

    Returns:
        order (S,) int32: row s of the sorted arrangement is choice order[s] = t * K + k. place (T, K) int32: its
        inverse. offs (E,) int32: the rows of expert e end before offs[e]. expert (S,): the rows' experts, in the
        smallest integer type.
    """
    keys = index.reshape(-1).to(index_dtype(num_experts))
    expert, order = torch.sort(keys, stable=True)
    place = torch.empty(keys.shape, dtype=torch.int32, device=index.device)
    place[order] = torch.arange(keys.numel(), dtype=torch.int32, device=index.device)
    experts = torch.arange(num_experts, device=index.device).to(keys.dtype)
    offs = torch.searchsorted(expert, experts, right=True, out_int32=True)
    return order.to(torch.int32), place.view(index.shape), offs, expert


def expert_gather(x: Tensor, place: Tensor) -> Tensor:
    """(T, D) -> (S, D): row place[t, k] is x[t]."""
    out = x.new_empty(place.numel(), x.shape[1])
    for rows in place.long().unbind(1):
        out[rows] = x
    return out


def expert_combine(
    rows: Tensor, place: Tensor, bias: Tensor | None, expert: Tensor | None, weight: Tensor | None
) -> Tensor:
    """(S, D) -> (T, D): the sum of a token's rows in the order of k; with `bias` (E, D), plus weight * bias each."""
    total = None
    for k, at in enumerate(place.long().unbind(1)):
        term = wide(rows[at])
        if bias is not None:
            term = term + wide(weight[:, k, None]) * wide(bias[expert[at].long()])
        total = term if total is None else total.add_(term)
    return total.to(rows.dtype)


# --- activation ------------------------------------------------------------------------------------------------------


# On a CPU fresh memory costs more than the arithmetic: what is an operation's own is written over.


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)). PyTorch's own gives other last bits at the end of a tensor than in it."""
    return torch.neg(x).exp_().add_(1.0).reciprocal_()


def activation(gate: Tensor, kind: str, alpha: float, want_slope: bool) -> tuple[Tensor, Tensor | None]:
    """The activation of the gate, and its derivative where that is wanted."""
    if kind in ("silu", "clamped"):
        s = sigmoid(gate * alpha)
        value = gate * s
        return value, torch.sub(1.0, s).mul_(value).mul_(alpha).add_(s) if want_slope else None
    if kind == "gelu":
        cdf = 0.5 * (1.0 + torch.erf(gate * 0.7071067811865476))
        return gate * cdf, cdf + gate * torch.exp(-0.5 * gate * gate) * 0.3989422804014327
    if kind == "gelu_tanh":
        s = sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
        return gate * s, s + gate * s * (1.0 - s) * slope
    raise ValueError(f"No gate of kind {kind!r}; known: silu, gelu, gelu_tanh, clamped.")


def halves(gate_up: Tensor, bias: Tensor | None, expert: Tensor | None, interleaved: bool) -> tuple[Tensor, Tensor]:
    x = wide(gate_up)
    if bias is not None:
        x = x + wide(bias[expert.long()])
    return (x[:, ::2], x[:, 1::2]) if interleaved else x.chunk(2, dim=-1)


def row_weights(weight: Tensor, order: Tensor) -> Tensor:
    return wide(weight.reshape(-1)[order.long()])[:, None]


def expert_gate(
    gate_up: Tensor, bias: Tensor | None, expert: Tensor | None, weight: Tensor, order: Tensor,
    kind: str, alpha: float, limit: float, interleaved: bool,
) -> Tensor:  # fmt: skip
    """(S, 2 I) -> (S, I): weight * activation(gate) * up, of gate and up with their biases.

    `clamped` (gpt-oss): gate at most `limit`, up within `limit` on both sides, activation(gate) = gate *
    sigmoid(alpha * gate), times (up + 1).
    """
    gate, up = halves(gate_up, bias, expert, interleaved)
    if kind == "clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1.0
    act, _ = activation(gate, kind, alpha, want_slope=False)
    return act.mul_(up).mul_(row_weights(weight, order)).to(gate_up.dtype)


def expert_gate_backward(
    d_act: Tensor, gate_up: Tensor, d_gate_up: Tensor, bias: Tensor | None, expert: Tensor | None,
    weight: Tensor, order: Tensor, kind: str, alpha: float, limit: float, interleaved: bool, rounds: bool,
) -> Tensor:  # fmt: skip
    """The gradient of `expert_gate`.

    Args:
        d_act: (S, I), the gradient of its result; holds the result itself afterwards.
        gate_up: (S, 2 I).
        d_gate_up: (S, 2 I), written; may be `gate_up` itself.

    Returns:
        The gradient of the routing weights (T, K): in their dtype if `rounds`, otherwise float32.
    """
    gate_in, up_in = halves(gate_up, bias, expert, interleaved)
    gate, up = gate_in, up_in
    if kind == "clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1.0
    value, slope = activation(gate, kind, alpha, want_slope=True)
    act, d, w = value * up, wide(d_act), row_weights(weight, order)
    product = d * act
    d_weight = torch.empty(weight.numel(), dtype=act.dtype, device=act.device)
    d_weight[order.long()] = lane_sums(product, lanes_for(act.shape[1], COLUMN_LANES))
    d.mul_(w)
    d_gate, d_up = slope.mul_(torch.mul(d, up, out=product)), value.mul_(d)
    if kind == "clamped":
        d_gate = torch.where(gate_in > limit, 0.0, d_gate)
        d_up = torch.where((up_in > limit) | (up_in < -limit), 0.0, d_up)
    d_act.copy_(act.mul_(w))
    to = (d_gate_up[:, ::2], d_gate_up[:, 1::2]) if interleaved else d_gate_up.chunk(2, dim=-1)
    to[0].copy_(d_gate)
    to[1].copy_(d_up)
    return d_weight.view(weight.shape).to(weight.dtype if rounds else d_weight.dtype)


# --- biases ----------------------------------------------------------------------------------------------------------


def expert_row_sums(rows: Tensor, weight: Tensor | None, order: Tensor | None, offs: Tensor) -> Tensor:
    """(S, C) -> (E, C), float32: the sum of each expert's rows, times their routing weights if given."""
    x = wide(rows)
    if weight is not None:
        x = x * row_weights(weight, order)
    out = x.new_zeros(offs.shape[0], x.shape[1])
    start = 0
    for e, end in enumerate(offs.tolist()):
        if end > start:
            out[e] = lane_sums(x[start:end].T, ROW_LANES)
        start = end
    return out


def expert_row_dots(rows: Tensor, bias: Tensor, expert: Tensor, order: Tensor, total: Tensor) -> None:
    """total[t, k] += rows[s] . bias[expert of s], with s the row of choice (t, k); rows (S, D), total (T, K)."""
    dots = lane_sums(wide(rows) * wide(bias[expert.long()]), lanes_for(rows.shape[1], COLUMN_LANES))
    total.view(-1)[order.long()] += dots


# --- products --------------------------------------------------------------------------------------------------------


def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """(S, M) times (E, M, N) -> (S, N): each expert's rows times its matrix."""
    out = x.new_empty(x.shape[0], weight.shape[2])
    start = 0
    for e, end in enumerate(offs.tolist()):
        if end > start:
            # Into a given tensor: autocast leaves such products alone.
            torch.mm(x[start:end], weight[e], out=out[start:end])
        start = end
    return out


def grouped_mm_weight(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """(S, M), (S, N) -> (E, M, N): a^T b of each expert's rows; zero where there are none."""
    out = a.new_empty(offs.shape[0], a.shape[1], b.shape[1])
    start = 0
    for e, end in enumerate(offs.tolist()):
        if end > start:
            torch.mm(a[start:end].T, b[start:end], out=out[e])
        else:
            out[e].zero_()
        start = end
    return out


def split_24(x: Tensor, high: Tensor, low: Tensor) -> None:
    """float32 `x` -> its first 16 bits in bf16 `high` and the next 8 in uint8 `low`, rounded to nearest even.

    NaN stays NaN.
    """
    bits = x.view(torch.int32)
    rounded = (bits >> 8).bitwise_and_(1).add_(0x7F).add_(bits)
    bits = torch.where(x.isnan(), bits | 0x400000, rounded)
    high.view(torch.int16).copy_(bits >> 16)
    low.copy_((bits >> 8).bitwise_and_(0xFF))


def join_24(high: Tensor, low: Tensor) -> Tensor:
    """What `split_24` has split, in float32."""
    bits = high.view(torch.int16).to(torch.int32) << 16
    return bits.bitwise_or_(low.to(torch.int32) << 8).view(torch.float32)


def add_product_to_sum(
    a: Tensor, b: Tensor, offs: Tensor, high: Tensor, low: Tensor, begins: bool, ends: bool
) -> None:
    """sum += a^T b of each expert's rows: products and the addition in float32, the sum kept in its first 24 bits.

    Args:
        a, b: (S, M), (S, N) bf16.
        high, low: The sum, as `split_24` splits it: (E, M, N) bf16 and uint8.
        begins: There is no sum yet.
        ends: The sum is not kept, but rounded to bf16, once, into `high`.
    """
    start = 0
    for e, end in enumerate(offs.tolist()):
        total = torch.zeros_like(high[e], dtype=torch.float32) if begins else join_24(high[e], low[e])
        if end > start:
            left, right = a[start:end].T, b[start:end]
            total += torch.mm(left, right, out_dtype=torch.float32) if a.is_cuda else left.float() @ right.float()
        if ends:
            high[e].copy_(total)
        else:
            split_24(total, high[e], low[e])
        start = end


# --- sums over tiles -------------------------------------------------------------------------------------------------


def add_to_sum(total: Tensor, grad: Tensor) -> None:
    """total += grad, in the precision of `total`."""
    total.add_(grad)


def finish_sum(total: Tensor, grad: Tensor) -> None:
    """grad = total + grad, added in the precision of `total` and rounded once; `total` is used up."""
    grad.copy_(total.add_(grad))
