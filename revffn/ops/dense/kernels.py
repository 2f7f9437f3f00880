"""Triton kernels of a layer's dense parts; `reference.py` says what they compute.

`exp` and the division after it may differ from PyTorch's in the last bit; all other arithmetic is float32 without
fused multiply-add, so it is the reference's bit for bit. Offsets are 64-bit, launches fixed by shapes and dtypes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..streams.reference import ROWS_PER_PARTIAL, sum_partials
from ..triton_parts import pair_sums, round_to, row_sum
from .reference import TILE_CHANNELS

LAUNCH = dict(num_warps=4, enable_fp_fusion=False)
FLAT = 1024
"""Elements of a program of an elementwise kernel."""


@triton.jit
def _rows(block, N, D, ROWS: tl.constexpr, LANES: tl.constexpr):
    """ROWS whole rows of (N, D): their numbers, the columns, which elements there are, and where they lie."""
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, LANES)
    return row, cols, (row[:, None] < N) & (cols[None, :] < D), row[:, None] * D + cols[None, :]


@triton.jit
def _turn(
    x_ptr, out_ptr, c1, c2, s1, s2, lane, H, half, x_h, o_h,
    BACK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """All heads of one token, HEADS at a time."""
    kind = out_ptr.dtype.element_ty
    for start in range(0, H, HEADS):
        head = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        mask = (head < H) & (lane < half)[None, :]
        place = head * x_h + lane[None, :]
        first = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + place + half, mask=mask, other=0.0).to(tl.float32)
        if BACK:
            one, two = first * c1 + second * s2, second * c2 - first * s1
        else:
            one, two = first * c1 - second * s1, second * c2 + first * s2
        place = head * o_h + lane[None, :]
        tl.store(out_ptr + place, round_to(one, kind), mask=mask)
        tl.store(out_ptr + place + half, round_to(two, kind), mask=mask)


@triton.jit
def _rope(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, q_heads, k_heads, half,
    q_b, q_h, q_t, k_b, k_h, k_t, qo_b, qo_h, qo_t, ko_b, ko_h, ko_t, table_b,
    BACK: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One token of one sequence a program."""
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < half
    table = b * table_b + t * 2 * half + lane
    c1 = tl.load(cos_ptr + table, mask=inside, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos_ptr + table + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin_ptr + table, mask=inside, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin_ptr + table + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    q_ptr, q_out_ptr = q_ptr + b * q_b + t * q_t, q_out_ptr + b * qo_b + t * qo_t
    k_ptr, k_out_ptr = k_ptr + b * k_b + t * k_t, k_out_ptr + b * ko_b + t * ko_t
    _turn(q_ptr, q_out_ptr, c1, c2, s1, s2, lane, q_heads, half, q_h, qo_h, BACK, Q_HEADS)
    _turn(k_ptr, k_out_ptr, c1, c2, s1, s2, lane, k_heads, half, k_h, ko_h, BACK, K_HEADS)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    B, _, T, D = q.shape
    both, outs = (q, k), (torch.empty_like(q), torch.empty_like(k))
    lanes = triton.next_power_of_2(D // 2)
    heads = [max(min(triton.next_power_of_2(x.shape[1]), FLAT // lanes), 1) for x in both]
    table_b = 0 if cos.shape[0] == 1 else T * D
    strides = [n for x in (*both, *outs) for n in x.stride()[:3]]
    _rope[(T, B)](
        *both, cos, sin, *outs, q.shape[1], k.shape[1], D // 2, *strides, table_b, back, *heads, lanes, **LAUNCH
    )
    return outs


@triton.jit
def _swiglu(gate_ptr, up_ptr, out_ptr, N, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < N
    g = tl.load(gate_ptr + place, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + place, mask=mask, other=0.0).to(tl.float32)
    value = g * (1.0 / (1.0 + tl.exp(-g))) * u
    tl.store(out_ptr + place, round_to(value, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward(grad_ptr, gate_ptr, up_ptr, N, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < N
    d = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + place, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + place, mask=mask, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    value = g * s
    slope = s + value * (1.0 - s)
    kind = gate_ptr.dtype.element_ty
    tl.store(grad_ptr + place, round_to(value * u, kind), mask=mask)
    tl.store(gate_ptr + place, round_to(d * u * slope, kind), mask=mask)
    tl.store(up_ptr + place, round_to(d * value, kind), mask=mask)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    _swiglu[(triton.cdiv(gate.numel(), FLAT),)](gate, up, out, gate.numel(), FLAT, **LAUNCH)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> None:
    _swiglu_backward[(triton.cdiv(gate.numel(), FLAT),)](grad, gate, up, gate.numel(), FLAT, **LAUNCH)


@triton.jit
def _add_gated(
    routed_ptr, shared_ptr, x_ptr, weight_ptr, out_ptr, gate_ptr, N, D, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row, cols, mask, place = _rows(tl.program_id(0), N, D, ROWS, LANES)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    gate = 1.0 / (1.0 + tl.exp(-pair_sums(x * weight[None, :], ROWS, LANES)))
    tl.store(gate_ptr + row, gate, mask=row < N)
    routed = tl.load(routed_ptr + place, mask=mask, other=0.0).to(tl.float32)
    shared = tl.load(shared_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, round_to(routed + gate[:, None] * shared, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_gated_backward(
    grad_ptr, shared_ptr, weight_ptr, gate_ptr, d_shared_ptr, d_x_ptr, d_logit_ptr, N, D,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row, cols, mask, place = _rows(tl.program_id(0), N, D, ROWS, LANES)
    kind = d_x_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row, mask=row < N, other=0.0)
    d = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
    shared = tl.load(shared_ptr + place, mask=mask, other=0.0).to(tl.float32)
    d_logit = pair_sums(d * shared, ROWS, LANES) * (gate * (1.0 - gate))
    tl.store(d_logit_ptr + row, round_to(d_logit, kind), mask=row < N)
    tl.store(d_shared_ptr + place, round_to(gate[:, None] * d, kind), mask=mask)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(d_x_ptr + place, round_to(d_logit[:, None] * weight[None, :], kind), mask=mask)


def rows_and_lanes(D: int) -> tuple[int, int]:
    """Of a program that holds whole rows of D channels."""
    lanes = max(triton.next_power_of_2(D), 2)
    return max(min(4096 // lanes, 16), 1), lanes


def add_gated(routed: Tensor, shared: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    (N, D), (rows, lanes) = x.shape, rows_and_lanes(x.shape[1])
    out, gate = torch.empty_like(routed), x.new_empty(N, dtype=torch.float32)
    _add_gated[(triton.cdiv(N, rows),)](
        routed, shared, x, weight, out, gate, N, D, rows, lanes,
        num_warps=warps(rows * lanes), enable_fp_fusion=False,
    )  # fmt: skip
    return out, gate


def add_gated_backward(grad: Tensor, shared: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (N, D), (rows, lanes) = grad.shape, rows_and_lanes(grad.shape[1])
    made = torch.empty_like(grad), torch.empty_like(grad), grad.new_empty(N)
    _add_gated_backward[(triton.cdiv(N, rows),)](
        grad, shared, weight, gate, *made, N, D, rows, lanes,
        num_warps=warps(rows * lanes), enable_fp_fusion=False,
    )  # fmt: skip
    return made


@triton.jit
def _norm(
    x_ptr, weight_ptr, out_ptr, rstd_ptr, eps, inverse, N, D, ROUNDS_FIRST: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    row, cols, mask, place = _rows(tl.program_id(0), N, D, ROWS, LANES)
    kind = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    mean = pair_sums(x * x, ROWS, LANES) * inverse
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(rstd_ptr + row, rstd, mask=row < N)
    normed = x * rstd[:, None]
    if ROUNDS_FIRST:
        normed = round_to(normed, kind).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, round_to(normed * weight[None, :], kind), mask=mask)


@triton.jit
def _norm_backward(
    grad_ptr, x_ptr, weight_ptr, rstd_ptr, out_ptr, partial_ptr, inverse, N, D, ROUNDS_FIRST: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    row, cols, mask, place = _rows(block, N, D, ROWS, LANES)
    kind = out_ptr.dtype.element_ty
    rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)[:, None]
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32) * rstd
    dy = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
    dn = dy * tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    mean = pair_sums(dn * x, ROWS, LANES) * inverse
    tl.store(out_ptr + place, round_to((dn - x * mean[:, None]) * rstd, kind), mask=mask)
    if NEED_WEIGHT:
        if ROUNDS_FIRST:
            x = round_to(x, kind).to(tl.float32)
        total = pair_sums(tl.trans(dy * x), LANES, ROWS)
        tl.store(partial_ptr + block * D + cols, total, mask=cols < D)


@triton.jit
def _wide_norm_backward(
    grad_ptr, x_ptr, weight_ptr, rstd_ptr, out_ptr, partial_ptr, inverse, N, D, ROUNDS_FIRST: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The same, row after row: ROWS rows of so many channels would not fit in registers."""
    block = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, LANES)
    mask = cols < D
    kind = out_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for i in range(ROWS):
        row = block * ROWS + i
        if row < N:
            place = row * D + cols
            rstd = tl.load(rstd_ptr + row)
            x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32) * rstd
            dy = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
            dn = dy * weight
            mean = row_sum(dn * x, LANES) * inverse
            tl.store(out_ptr + place, round_to((dn - x * mean) * rstd, kind), mask=mask)
            if NEED_WEIGHT:
                total += dy * (round_to(x, kind).to(tl.float32) if ROUNDS_FIRST else x)
    if NEED_WEIGHT:
        tl.store(partial_ptr + block * D + cols, total, mask=mask)


def warps(elements: int) -> int:
    """For a program that holds a tile of this size: at most 16 elements a thread, where 512 threads are enough."""
    return min(max(elements // 512, 4), 16)


def norm(x: Tensor, weight: Tensor, eps: float, rounds_first: bool) -> tuple[Tensor, Tensor]:
    D = x.shape[-1]
    N, out, (rows, lanes) = x.numel() // D, torch.empty_like(x), rows_and_lanes(D)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    grid = (triton.cdiv(N, rows),)
    _norm[grid](
        x, weight, out, rstd, eps, 1 / D, N, D, rounds_first, rows, lanes,
        num_warps=warps(rows * lanes), enable_fp_fusion=False,
    )  # fmt: skip
    return out, rstd


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, rounds_first: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    D, rows = x.shape[-1], ROWS_PER_PARTIAL
    N, lanes, out = x.numel() // D, max(triton.next_power_of_2(D), 2), torch.empty_like(x)
    blocks = triton.cdiv(N, rows)
    partials = rstd.new_empty(blocks if need_weight else 0, D)
    kernel, held = (_wide_norm_backward, lanes) if D > TILE_CHANNELS else (_norm_backward, rows * lanes)
    kernel[(blocks,)](
        grad, x, weight, rstd, out, partials, 1 / D, N, D, rounds_first, need_weight, rows, lanes,
        num_warps=warps(held), enable_fp_fusion=False,
    )  # fmt: skip
    return out, sum_partials(partials).to(weight.dtype) if need_weight else weight.new_empty(0)
