"""Triton kernels of the operations on streams; `reference.py` says what they compute, to the bit.

One token a program: a row of D channels fits in registers. Offsets are 64-bit. Nothing is autotuned, no float is
added atomically: forward and recomputation give the same bits. Integers (a checksum's rows, flags) may be added in any
order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_parts import not_finite, round_to, row_sum, to_int
from . import reference
from .reference import CHANNEL_SEED, ODD_FACTOR, ROWS_PER_PARTIAL, TOKEN_SEED

SEED = tl.constexpr(TOKEN_SEED)
FACTOR = tl.constexpr(ODD_FACTOR)
LAUNCH = {"enable_fp_fusion": False}


@triton.jit
def _mixed(x, odd_ptr, start, N: tl.constexpr, limit):
    """Of N neighbouring elements that begin at channel `start`: the sum of pairs, folded and weighted, int64."""
    low, high = tl.split(tl.reshape(x, (N // 2, 2)))
    pair = start // 2 + tl.arange(0, N // 2)
    odd = tl.load(odd_ptr + pair, mask=pair < limit // 2, other=0)
    both = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return tl.sum((both ^ (both >> 32)) * odd, 0)


@triton.jit
def _row_check(total, row):
    """A row's part of the checksum."""
    number = (row + 1) * SEED
    number ^= number >> 31
    number *= FACTOR
    number ^= number >> 29
    total ^= total >> 32
    return total * (number | 1)


@triton.jit
def _largest(flags_ptr, x):
    big = tl.max(x ^ (x >> 31), 0)
    if big > tl.load(flags_ptr + 1):
        tl.atomic_max(flags_ptr + 1, big)


@triton.jit
def _stream_check(x_ptr, odd_ptr, sum_ptr, flags_ptr, D, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BD)
    x = tl.load(x_ptr + row * D + cols, mask=cols < D, other=0)
    tl.store(sum_ptr + row, _row_check(_mixed(x, odd_ptr, 0, BD, D), row))
    _largest(flags_ptr, x)


@triton.jit
def _add_update(update_ptr, now_ptr, scale_ptr, finer_ptr, out_ptr, flags_ptr, D, BD: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * D
    cols = tl.arange(0, BD)
    mask = cols < D
    update = tl.load(update_ptr + place + cols, mask=mask, other=0.0).to(tl.float32)
    now = tl.load(now_ptr + place + cols, mask=mask, other=0)
    scale = tl.load(scale_ptr + cols, mask=mask, other=1.0)
    finer = tl.load(finer_ptr + cols, mask=mask, other=0)
    tl.store(out_ptr + place + cols, to_int(update * scale) + (now << finer), mask=mask)
    if tl.max(not_finite(update), 0) != 0:
        tl.atomic_or(flags_ptr, 1)


@triton.jit
def _innovation_move(
    middle_ptr, prev_ptr, cur_ptr, mlp_ptr, pred_ptr, past_scale_ptr, next_scale_ptr, finer_ptr, odd_ptr,
    bits_ptr, sum_ptr, flags_ptr, first_row, D, M: tl.constexpr, PARTS: tl.constexpr, HAS_PRED: tl.constexpr,
    BQ: tl.constexpr,
):  # fmt: skip
    """PARTS slices of D / PARTS channels, whose bits share bytes."""
    row = tl.program_id(0).to(tl.int64)
    width = D // PARTS
    lane = tl.arange(0, BQ)
    mask = lane < width
    packed = tl.zeros((BQ,), tl.int32)
    total = tl.zeros((), tl.int64)
    bad = tl.zeros((BQ,), tl.int32)
    big = tl.zeros((BQ,), tl.int32)
    for q in tl.static_range(PARTS):
        cols = q * width + lane
        place = row * D + cols
        prev = tl.load(prev_ptr + place, mask=mask, other=0)
        cur = tl.load(cur_ptr + place, mask=mask, other=0)
        mlp = tl.load(mlp_ptr + place, mask=mask, other=0.0).to(tl.float32)
        next_scale = tl.load(next_scale_ptr + cols, mask=mask, other=1.0)
        finer = tl.load(finer_ptr + cols, mask=mask, other=0)
        bad |= not_finite(mlp)
        innovation = prev - (cur >> finer)
        if HAS_PRED:
            pred = tl.load(pred_ptr + place, mask=mask, other=0.0).to(tl.float32)
            past_scale = tl.load(past_scale_ptr + cols, mask=mask, other=1.0)
            bad |= not_finite(pred)
            innovation -= to_int(pred * past_scale)
        packed |= (innovation & ((1 << M) - 1)) << (q * M)
        middle = tl.load(middle_ptr + place, mask=mask, other=0)
        following = middle + to_int(mlp * next_scale) + (innovation >> M)
        tl.store(middle_ptr + place, following, mask=mask)
        following = tl.where(mask, following, 0)
        total += _mixed_slice(following, odd_ptr, q * width, width, BQ)
        big = tl.maximum(big, following ^ (following >> 31))
    if M > 0:
        tl.store(bits_ptr + row * width + lane, packed.to(tl.uint8), mask=mask)
    tl.store(sum_ptr + row, _row_check(total, first_row + row))
    largest = tl.max(big, 0)
    if largest > tl.load(flags_ptr + 1):
        tl.atomic_max(flags_ptr + 1, largest)
    if tl.max(bad, 0) != 0:
        tl.atomic_or(flags_ptr, 1)


@triton.jit
def _mixed_slice(x, odd_ptr, start, width, N: tl.constexpr):
    """`_mixed` of a slice of `width` channels; x is 0 beyond it."""
    low, high = tl.split(tl.reshape(x, (N // 2, 2)))
    pair = tl.arange(0, N // 2)
    odd = tl.load(odd_ptr + start // 2 + pair, mask=pair < width // 2, other=0)
    both = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return tl.sum((both ^ (both >> 32)) * odd, 0)


@triton.jit
def _innovation_undo(
    out_ptr, following_ptr, cur_ptr, middle_ptr, mlp_ptr, pred_ptr, bits_ptr, past_scale_ptr, next_scale_ptr,
    finer_ptr, odd_ptr, sum_ptr, first_row, D, M: tl.constexpr, PARTS: tl.constexpr, HAS_PRED: tl.constexpr,
    BQ: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    width = D // PARTS
    lane = tl.arange(0, BQ)
    mask = lane < width
    total = tl.zeros((), tl.int64)
    packed = tl.zeros((BQ,), tl.int32)
    if M > 0:
        packed = tl.load(bits_ptr + row * width + lane, mask=mask, other=0).to(tl.int32)
    for q in tl.static_range(PARTS):
        cols = q * width + lane
        place = row * D + cols
        following = tl.load(following_ptr + place, mask=mask, other=0)
        cur = tl.load(cur_ptr + place, mask=mask, other=0)
        middle = tl.load(middle_ptr + place, mask=mask, other=0)
        mlp = tl.load(mlp_ptr + place, mask=mask, other=0.0).to(tl.float32)
        next_scale = tl.load(next_scale_ptr + cols, mask=mask, other=1.0)
        finer = tl.load(finer_ptr + cols, mask=mask, other=0)
        prev = (following - middle - to_int(mlp * next_scale)) << M
        prev |= (packed >> (q * M)) & ((1 << M) - 1)
        prev += cur >> finer
        if HAS_PRED:
            pred = tl.load(pred_ptr + place, mask=mask, other=0.0).to(tl.float32)
            past_scale = tl.load(past_scale_ptr + cols, mask=mask, other=1.0)
            prev += to_int(pred * past_scale)
        tl.store(out_ptr + place, prev, mask=mask)
        total += _mixed_slice(tl.where(mask, prev, 0), odd_ptr, q * width, width, BQ)
    tl.store(sum_ptr + row, _row_check(total, first_row + row))


@triton.jit
def _innovation_gradients(
    grad_ptr, middle_ptr, gain_ptr, past_ptr, now_ptr, attn_ptr, pred_ptr, D, HAS_PRED: tl.constexpr, BD: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * D
    cols = tl.arange(0, BD)
    mask = cols < D
    middle = tl.load(middle_ptr + place + cols, mask=mask, other=0.0)
    past = tl.load(grad_ptr + place + cols, mask=mask, other=0.0) * tl.load(gain_ptr + cols, mask=mask, other=0.0)
    kind = attn_ptr.dtype.element_ty
    tl.store(past_ptr + place + cols, past, mask=mask)
    tl.store(now_ptr + place + cols, middle - past, mask=mask)
    tl.store(attn_ptr + place + cols, round_to(middle, kind), mask=mask)
    if HAS_PRED:
        tl.store(pred_ptr + place + cols, round_to(-past, kind), mask=mask)


@triton.jit
def _read_norm(
    stream_ptr, step_ptr, weight_ptr, value_ptr, normed_ptr, rstd_ptr, eps, inverse, D, ROUNDS_FIRST: tl.constexpr,
    WANT_VALUE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BD)
    mask = cols < D
    kind = normed_ptr.dtype.element_ty
    x = tl.load(stream_ptr + row * D + cols, mask=mask, other=0).to(tl.float32)
    x = round_to(x * tl.load(step_ptr + cols, mask=mask, other=0.0), kind).to(tl.float32)
    if WANT_VALUE:
        tl.store(value_ptr + row * D + cols, x.to(kind), mask=mask)
    mean = row_sum(x * x, BD) * inverse
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(rstd_ptr + row, rstd)
    normed = x * rstd
    if ROUNDS_FIRST:
        normed = round_to(normed, kind).to(tl.float32)
    normed = normed * tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row * D + cols, round_to(normed, kind), mask=mask)


@triton.jit
def _read_norm_backward(
    grad_ptr, value_ptr, through_ptr, also_ptr, stream_ptr, step_ptr, weight_ptr, rstd_ptr, out_ptr, partial_ptr,
    inverse, T, D,
    ROUNDS_FIRST: tl.constexpr, HAS_VALUE: tl.constexpr, HAS_THROUGH: tl.constexpr, HAS_ALSO: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BD)
    mask = cols < D
    kind = grad_ptr.dtype.element_ty
    step = tl.load(step_ptr + cols, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros((BD,), tl.float32)
    for i in range(ROWS):
        row = block * ROWS + i
        if row < T:
            place = row * D + cols
            x = round_to(tl.load(stream_ptr + place, mask=mask, other=0).to(tl.float32) * step, kind).to(tl.float32)
            rstd = tl.load(rstd_ptr + row)
            x *= rstd
            dy = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
            dn = dy * weight
            mean = row_sum(dn * x, BD) * inverse
            grad = (dn - x * mean) * rstd
            if HAS_VALUE:
                grad += tl.load(value_ptr + place, mask=mask, other=0.0).to(tl.float32)
            if HAS_THROUGH:
                grad += tl.load(through_ptr + place, mask=mask, other=0.0)
            if HAS_ALSO:
                grad += tl.load(also_ptr + place, mask=mask, other=0.0)
            tl.store(out_ptr + place, grad, mask=mask)
            if NEED_WEIGHT:
                total += dy * (round_to(x, kind).to(tl.float32) if ROUNDS_FIRST else x)
    if NEED_WEIGHT:
        tl.store(partial_ptr + block * D + cols, total, mask=mask)


# --- launches --------------------------------------------------------------------------------------------------------

_odd: dict[tuple[int, torch.device], Tensor] = {}


def odd_of_channels(D: int, device: torch.device) -> Tensor:
    """The checksum's weights, (D / 2,) int64, made once."""
    if (D, device) not in _odd:
        _odd[D, device] = reference.odd_numbers(D // 2, CHANNEL_SEED, device)
    return _odd[D, device]


def num_rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def warps(width: int) -> int:
    return 4 if width <= 2048 else 8 if width <= 8192 else 16


def stream_check(stream: Tensor, flags: Tensor) -> Tensor:
    T, D = num_rows(stream), stream.shape[-1]
    BD, rows = triton.next_power_of_2(D), stream.new_empty(num_rows(stream), dtype=torch.int64)
    _stream_check[(T,)](stream, odd_of_channels(D, stream.device), rows, flags, D, BD, num_warps=warps(BD), **LAUNCH)
    return rows.sum()


def add_update(update: Tensor, now: Tensor, scale: Tensor, finer: Tensor, flags: Tensor) -> Tensor:
    T, D = num_rows(now), now.shape[-1]
    BD, out = triton.next_power_of_2(D), torch.empty_like(now)
    _add_update[(T,)](update, now, scale, finer, out, flags, D, BD, num_warps=warps(BD), **LAUNCH)
    return out


def innovation_move(
    middle, prev, cur, mlp, predicted, sign, past_scale, next_scale, finer, m, first_row, flags
) -> tuple[Tensor, Tensor]:
    T, D = num_rows(middle), middle.shape[-1]
    parts = 8 // m if m else 1
    BQ = triton.next_power_of_2(D // parts)
    bits = middle.new_empty(T * D * m // 8, dtype=torch.uint8)
    rows = middle.new_empty(T, dtype=torch.int64)
    _innovation_move[(T,)](
        middle, prev, cur, mlp, predicted, past_scale, next_scale, finer, odd_of_channels(D, middle.device), bits,
        rows, flags, first_row, D, m, parts, predicted is not None, BQ, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return bits, rows.sum()


def innovation_undo(
    out, following, cur, middle, mlp, predicted, sign, bits, past_scale, next_scale, finer, m, first_row
) -> Tensor:
    T, D = num_rows(out), out.shape[-1]
    parts = 8 // m if m else 1
    BQ = triton.next_power_of_2(D // parts)
    rows = out.new_empty(T, dtype=torch.int64)
    _innovation_undo[(T,)](
        out, following, cur, middle, mlp, predicted, bits, past_scale, next_scale, finer,
        odd_of_channels(D, out.device), rows, first_row, D, m, parts, predicted is not None, BQ, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return rows.sum()


def innovation_gradients(grad, grad_middle, gain, dtype, has_prediction) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, D = num_rows(grad), grad.shape[-1]
    BD = triton.next_power_of_2(D)
    past, now = torch.empty_like(grad), torch.empty_like(grad)
    attn = torch.empty_like(grad, dtype=dtype)
    predicted = torch.empty_like(attn) if has_prediction else attn.new_empty(0)
    _innovation_gradients[(T,)](
        grad, grad_middle, gain, past, now, attn, predicted, D, has_prediction, BD, num_warps=warps(BD), **LAUNCH
    )
    return past, now, attn, predicted


def read_norm(stream, step, weight, eps, dtype, rounds_first, want_value) -> tuple[Tensor, Tensor, Tensor]:
    T, D = num_rows(stream), stream.shape[-1]
    BD = triton.next_power_of_2(D)
    normed = torch.empty_like(stream, dtype=dtype)
    value = torch.empty_like(normed) if want_value else normed.new_empty(0)
    rstd = stream.new_empty(stream.shape[:-1], dtype=torch.float32)
    _read_norm[(T,)](
        stream, step, weight, value, normed, rstd, eps, 1 / D, D, rounds_first, want_value, BD,
        num_warps=warps(BD), **LAUNCH,
    )  # fmt: skip
    return value, normed, rstd


def read_norm_backward(
    grad_normed, grad_value, grad_through, grad_also, stream, step, weight, rstd, rounds_first, need_weight
) -> tuple[Tensor, Tensor]:
    T, D = num_rows(stream), stream.shape[-1]
    BD, blocks = triton.next_power_of_2(D), triton.cdiv(T, ROWS_PER_PARTIAL)
    out = torch.empty_like(stream, dtype=torch.float32)
    partials = out.new_empty(blocks if need_weight else 0, D)
    _read_norm_backward[(blocks,)](
        grad_normed, grad_value, grad_through, grad_also, stream, step, weight, rstd, out, partials, 1 / D, T, D,
        rounds_first, *(given is not None for given in (grad_value, grad_through, grad_also)), need_weight,
        ROWS_PER_PARTIAL, BD,
        num_warps=warps(BD), **LAUNCH,
    )  # fmt: skip
    if not need_weight:
        return out, weight.new_empty(0)
    return out, reference.sum_partials(partials).to(weight.dtype)
