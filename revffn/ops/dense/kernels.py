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
def _rope(
    x_ptr, cos_ptr, sin_ptr, out_ptr, H, T, half, x_b, x_h, x_t, o_b, o_h, o_t, table_b,
    BACK: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One token of one sequence a program; HEADS heads at a time."""
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < half
    table = b * table_b + t * 2 * half + lane
    c1 = tl.load(cos_ptr + table, mask=inside, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos_ptr + table + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin_ptr + table, mask=inside, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin_ptr + table + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    kind = out_ptr.dtype.element_ty
    for start in range(0, H, HEADS):
        head = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        mask = (head < H) & inside[None, :]
        place = b * x_b + head * x_h + t * x_t + lane[None, :]
        first = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + place + half, mask=mask, other=0.0).to(tl.float32)
        if BACK:
            one, two = first * c1 + second * s2, second * c2 - first * s1
        else:
            one, two = first * c1 - second * s1, second * c2 + first * s2
        place = b * o_b + head * o_h + t * o_t + lane[None, :]
        tl.store(out_ptr + place, round_to(one, kind), mask=mask)
        tl.store(out_ptr + place + half, round_to(two, kind), mask=mask)


def rope(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    B, H, T, D = x.shape
    out = torch.empty_like(x)
    lanes = triton.next_power_of_2(D // 2)
    heads = max(min(triton.next_power_of_2(H), FLAT // lanes), 1)
    table_b = 0 if cos.shape[0] == 1 else T * D
    _rope[(T, B)](
        x, cos, sin, out, H, T, D // 2, *x.stride()[:3], *out.stride()[:3], table_b, back, heads, lanes, **LAUNCH
    )
    return out


@triton.jit
def _swiglu(gate_ptr, up_ptr, out_ptr, N, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < N
    g = tl.load(gate_ptr + place, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + place, mask=mask, other=0.0).to(tl.float32)
    value = g * (1.0 / (1.0 + tl.exp(-g))) * u
    tl.store(out_ptr + place, round_to(value, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward(grad_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, N, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < N
    d = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + place, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + place, mask=mask, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    value = g * s
    slope = s + value * (1.0 - s)
    kind = d_gate_ptr.dtype.element_ty
    tl.store(d_gate_ptr + place, round_to(d * u * slope, kind), mask=mask)
    tl.store(d_up_ptr + place, round_to(d * value, kind), mask=mask)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    _swiglu[(triton.cdiv(gate.numel(), FLAT),)](gate, up, out, gate.numel(), FLAT, **LAUNCH)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    grid = (triton.cdiv(gate.numel(), FLAT),)
    _swiglu_backward[grid](grad, gate, up, d_gate, d_up, gate.numel(), FLAT, **LAUNCH)
    return d_gate, d_up


@triton.jit
def _norm(
    x_ptr, weight_ptr, out_ptr, rstd_ptr, eps, inverse, N, D, ROUNDS_FIRST: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, LANES)
    mask = (row[:, None] < N) & (cols[None, :] < D)
    place = row[:, None] * D + cols[None, :]
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
    row = block * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, LANES)
    mask = (row[:, None] < N) & (cols[None, :] < D)
    place = row[:, None] * D + cols[None, :]
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
    N, lanes = x.numel() // D, max(triton.next_power_of_2(D), 2)
    rows, out = max(min(4096 // lanes, 16), 1), torch.empty_like(x)
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
