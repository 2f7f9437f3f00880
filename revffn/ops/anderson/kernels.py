"""Triton kernels of Anderson's acceleration; `reference.py` says what they compute.

One token a program: a row of H channels fits in registers. The sums over channels alone have an order of their own,
the same at every launch. Offsets are 64-bit; nothing is autotuned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..streams.kernels import LAUNCH, num_rows
from ..triton_parts import not_finite, to_int
from .reference import DEPTH, FARTHEST, LEAST, RIDGE

RIDGE_, LEAST_, FARTHEST_ = tl.constexpr(RIDGE), tl.constexpr(LEAST), tl.constexpr(FARTHEST)


@triton.jit
def _put(out_ptr, i: tl.constexpr, j: tl.constexpr, a, b, ROWS: tl.constexpr):
    product = tl.sum(a * b, 0)
    tl.store(out_ptr + (i * ROWS + j), product)
    if i != j:
        tl.store(out_ptr + (j * ROWS + i), product)


@triton.jit
def _anderson_move(
    update_ptr, x_ptr, y_ptr, scale_ptr, s0_ptr, s1_ptr, s2_ptr, s3_ptr, s4_ptr, following_ptr, step_ptr, largest_ptr,
    products_ptr, H, PAST: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BH)
    mask, at = cols < H, row * H + cols
    update = tl.load(update_ptr + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + cols, mask=mask, other=1.0)
    following = tl.load(y_ptr + at, mask=mask, other=0) - to_int(update * scale)
    step = (following - tl.load(x_ptr + at, mask=mask, other=0)).to(tl.float32)
    tl.store(following_ptr + at, following, mask=mask)
    tl.store(step_ptr + at, step, mask=mask)
    tl.store(largest_ptr + row, tl.max(tl.abs(step), 0))
    ROWS: tl.constexpr = PAST + 1
    out = products_ptr + row * (ROWS * ROWS)
    _put(out, PAST, PAST, step, step, ROWS)
    if PAST > 0:
        d0 = step - tl.load(s0_ptr + at, mask=mask, other=0.0)
        _put(out, 0, 0, d0, d0, ROWS)
        _put(out, 0, PAST, d0, step, ROWS)
    if PAST > 1:
        d1 = step - tl.load(s1_ptr + at, mask=mask, other=0.0)
        _put(out, 1, 0, d1, d0, ROWS)
        _put(out, 1, 1, d1, d1, ROWS)
        _put(out, 1, PAST, d1, step, ROWS)
    if PAST > 2:
        d2 = step - tl.load(s2_ptr + at, mask=mask, other=0.0)
        _put(out, 2, 0, d2, d0, ROWS)
        _put(out, 2, 1, d2, d1, ROWS)
        _put(out, 2, 2, d2, d2, ROWS)
        _put(out, 2, PAST, d2, step, ROWS)
    if PAST > 3:
        d3 = step - tl.load(s3_ptr + at, mask=mask, other=0.0)
        _put(out, 3, 0, d3, d0, ROWS)
        _put(out, 3, 1, d3, d1, ROWS)
        _put(out, 3, 2, d3, d2, ROWS)
        _put(out, 3, 3, d3, d3, ROWS)
        _put(out, 3, PAST, d3, step, ROWS)
    if PAST > 4:
        d4 = step - tl.load(s4_ptr + at, mask=mask, other=0.0)
        _put(out, 4, 0, d4, d0, ROWS)
        _put(out, 4, 1, d4, d1, ROWS)
        _put(out, 4, 2, d4, d2, ROWS)
        _put(out, 4, 3, d4, d3, ROWS)
        _put(out, 4, 4, d4, d4, ROWS)
        _put(out, 4, PAST, d4, step, ROWS)


@triton.jit
def _of(products_ptr, i: tl.constexpr, j: tl.constexpr, PAST: tl.constexpr):
    """A product, 0 where there are fewer past iterations."""
    if i < PAST:
        value = tl.load(products_ptr + (i * (PAST + 1) + j))
    else:
        value = 0.0
    return value


@triton.jit
def _pivot(diagonal, least):
    return tl.where(diagonal > least, diagonal, tl.where(diagonal == diagonal, least, diagonal))


@triton.jit
def _ridged(diagonal):
    return diagonal * (1.0 + RIDGE_) + LEAST_


@triton.jit
def _anderson_combine(
    following_ptr, products_ptr, settled_ptr, v0_ptr, v1_ptr, v2_ptr, v3_ptr, v4_ptr, out_ptr, H, PAST: tl.constexpr,
    BH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BH)
    mask, at = cols < H, row * H + cols
    a = products_ptr + row * ((PAST + 1) * (PAST + 1))
    # L D L^T of five rows, those that are not there being 0: l is L, r a row of L D, p the pivots, w the right side.
    d = _ridged(_of(a, 0, 0, PAST))
    p0 = _pivot(d, d * RIDGE_)
    w0 = _of(a, 0, PAST, PAST)

    r0 = _of(a, 1, 0, PAST)
    d = _ridged(_of(a, 1, 1, PAST))
    least = d * RIDGE_
    w1 = _of(a, 1, PAST, PAST)
    l10 = tl.div_rn(r0, p0)
    d = d - r0 * l10
    w1 = w1 - l10 * w0
    p1 = _pivot(d, least)

    r0 = _of(a, 2, 0, PAST)
    r1 = _of(a, 2, 1, PAST) - r0 * l10
    d = _ridged(_of(a, 2, 2, PAST))
    least = d * RIDGE_
    w2 = _of(a, 2, PAST, PAST)
    l20 = tl.div_rn(r0, p0)
    d = d - r0 * l20
    w2 = w2 - l20 * w0
    l21 = tl.div_rn(r1, p1)
    d = d - r1 * l21
    w2 = w2 - l21 * w1
    p2 = _pivot(d, least)

    r0 = _of(a, 3, 0, PAST)
    r1 = _of(a, 3, 1, PAST) - r0 * l10
    r2 = _of(a, 3, 2, PAST) - r0 * l20 - r1 * l21
    d = _ridged(_of(a, 3, 3, PAST))
    least = d * RIDGE_
    w3 = _of(a, 3, PAST, PAST)
    l30 = tl.div_rn(r0, p0)
    d = d - r0 * l30
    w3 = w3 - l30 * w0
    l31 = tl.div_rn(r1, p1)
    d = d - r1 * l31
    w3 = w3 - l31 * w1
    l32 = tl.div_rn(r2, p2)
    d = d - r2 * l32
    w3 = w3 - l32 * w2
    p3 = _pivot(d, least)

    r0 = _of(a, 4, 0, PAST)
    r1 = _of(a, 4, 1, PAST) - r0 * l10
    r2 = _of(a, 4, 2, PAST) - r0 * l20 - r1 * l21
    r3 = _of(a, 4, 3, PAST) - r0 * l30 - r1 * l31 - r2 * l32
    d = _ridged(_of(a, 4, 4, PAST))
    least = d * RIDGE_
    w4 = _of(a, 4, PAST, PAST)
    l40 = tl.div_rn(r0, p0)
    d = d - r0 * l40
    w4 = w4 - l40 * w0
    l41 = tl.div_rn(r1, p1)
    d = d - r1 * l41
    w4 = w4 - l41 * w1
    l42 = tl.div_rn(r2, p2)
    d = d - r2 * l42
    w4 = w4 - l42 * w2
    l43 = tl.div_rn(r3, p3)
    d = d - r3 * l43
    w4 = w4 - l43 * w3
    p4 = _pivot(d, least)

    w4 = tl.div_rn(w4, p4)
    w3 = tl.div_rn(w3, p3) - l43 * w4
    w2 = tl.div_rn(w2, p2) - l32 * w3 - l42 * w4
    w1 = tl.div_rn(w1, p1) - l21 * w2 - l31 * w3 - l41 * w4
    w0 = tl.div_rn(w0, p0) - l10 * w1 - l20 * w2 - l30 * w3 - l40 * w4

    following = tl.load(following_ptr + at, mask=mask, other=0)
    change = (following - tl.load(v0_ptr + at, mask=mask, other=0)).to(tl.float32) * w0
    if PAST > 1:
        change += (following - tl.load(v1_ptr + at, mask=mask, other=0)).to(tl.float32) * w1
    if PAST > 2:
        change += (following - tl.load(v2_ptr + at, mask=mask, other=0)).to(tl.float32) * w2
    if PAST > 3:
        change += (following - tl.load(v3_ptr + at, mask=mask, other=0)).to(tl.float32) * w3
    if PAST > 4:
        change += (following - tl.load(v4_ptr + at, mask=mask, other=0)).to(tl.float32) * w4
    change = tl.where(not_finite(change) != 0, 0.0, change)
    change = tl.minimum(tl.maximum(change, -FARTHEST_), FARTHEST_)
    settled = tl.load(settled_ptr + row).to(tl.int32)
    tl.store(out_ptr + at, tl.where(settled != 0, following, following - to_int(change)), mask=mask)


# --- launches --------------------------------------------------------------------------------------------------------


def warps(width: int) -> int:
    return 4 if width <= 1024 else 8 if width <= 4096 else 16


def five(tensors: list[Tensor], other: Tensor) -> list[Tensor]:
    return [*tensors, *[other] * (DEPTH - len(tensors))]


def anderson_move(
    update: Tensor, x: Tensor, y: Tensor, scale: Tensor, steps: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    H, rows = y.shape[-1], len(steps) + 1
    BH = triton.next_power_of_2(H)
    following, step = torch.empty_like(y), torch.empty_like(y, dtype=torch.float32)
    largest, products = step.new_empty(y.shape[:-1]), step.new_empty(*y.shape[:-1], rows, rows)
    _anderson_move[(num_rows(y),)](
        update, x, y, scale, *five(steps, step), following, step, largest, products, H, len(steps), BH,
        num_warps=warps(BH), **LAUNCH,
    )  # fmt: skip
    return following, step, largest, products


def anderson_combine(following: Tensor, products: Tensor, settled: Tensor, values: list[Tensor]) -> Tensor:
    H = following.shape[-1]
    BH, out = triton.next_power_of_2(H), torch.empty_like(following)
    _anderson_combine[(num_rows(following),)](
        following, products, settled, *five(values, following), out, H, len(values), BH, num_warps=warps(BH), **LAUNCH
    )
    return out
