"""Triton kernels of the optimizer's operations: the bits of `reference.py`, whose names and arguments they share.

What makes the bits equal: the reference's orders of summation (lanes, then neighbours, by sums of two); no fused
multiply-add (`enable_fp_fusion=False`); IEEE division and roots; bf16 stored through integers; noise by the element.
Nothing is added with atomics, no choice is timed, and block sizes are constants: those below change no bit.

Offsets of a matrix and of a tile's first row are int64, those within a tile int32. Numbers come as float32 arguments.
What depends on the device's values (clipping, finite or not) is read there, so nothing waits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .kernels_sums import _add_all, _add_pairs, _averages, _inverse_root, _judge, _norms, _squares, _where_live
from .reference import LANES, MOMENTUM, ROUNDS, ROW_LANES, SLOTS, SMALLEST, WEIGHTS, shape_of

ROW_BLOCK = 32
"""Rows of a program that sums rows."""
COLUMN_BLOCK = 64
"""Columns of a program that sums columns: 128 bytes of bf16."""
TILE = 1024
"""Counters of noise of a program that writes weights, eight elements each; elements, for adamw8bit."""
UNROLL = 4
FLAT = 8192
"""Numbers that one program sums."""
AVERAGES = 1024

_ROUNDS = tl.constexpr(ROUNDS)
_SLOTS = tl.constexpr(SLOTS)
_WEIGHTS = tl.constexpr(WEIGHTS)
_MOMENTUM = tl.constexpr(MOMENTUM)


# --- parts -----------------------------------------------------------------------------------------------------------


@triton.jit
def _bits(key, stream: tl.constexpr, counter):
    """The four words of noise of int64 counters."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low ^ low
    return tl.philox(key, low, high, zero + stream, zero, _ROUNDS)


@triton.jit
def _half(w0, w1, w2, w3, slot: tl.constexpr):
    """16 bits of a slot, as int32."""
    word = w0 if slot < 2 else (w1 if slot < 4 else (w2 if slot < 6 else w3))
    if slot % 2 == 1:
        word = word >> 16
    return (word & 0xFFFF).to(tl.int32)


@triton.jit
def _to_bf16(x, noise, STOCHASTIC: tl.constexpr):
    """float32 to bf16 through integers: the interpreter truncates where a GPU rounds."""
    bits = x.to(tl.int32, bitcast=True)
    if STOCHASTIC:
        bits = bits + noise
    else:
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x == x, bits, 0x7FC00000)
    return (bits & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)


# --- writing ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["key", "first_row"])
def _apply(
    w_ptr, master_ptr, g_ptr, m_ptr, v_ptr, row_ptr, mean_ptr, root_ptr, squares_ptr, keep_ptr, scale_ptr, key,
    first_row, R, C, Q, row_blocks, q_blocks, rate, decay, new1, new2, inverse, eps, RULE: tl.constexpr,
    CLIP: tl.constexpr, AVERAGED: tl.constexpr, DECAY: tl.constexpr, MASTER: tl.constexpr, BF16: tl.constexpr,
    STOCHASTIC: tl.constexpr, BR: tl.constexpr, BQ: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The rest of every rule but adamw8bit's: state, direction, weight, rounding, of BR rows and BQ lanes of counters.

    inverse: adafactor: 1 / largest norm; adamw: correction. eps: adafactor: floor. new1: momentum of sgd.
    """
    Q = Q * UNIT  # A multiple of 8, so that a thread takes neighbouring lanes as a vector.
    pid = tl.program_id(0)
    lane = (pid % q_blocks) * BQ + tl.arange(0, BQ)
    start = (pid // q_blocks) % row_blocks * BR
    s = (pid // q_blocks // row_blocks).to(tl.int64)
    row = tl.arange(0, BR)
    inside = start + row < R
    keep = tl.load(keep_ptr)
    scale = tl.load(scale_ptr)
    place = (s * R + start) * C
    factor = 1.0
    if CLIP:
        factor = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(tl.load(squares_ptr + s)) * inverse, 1.0))
    if RULE == "factored":
        value = tl.load(row_ptr + s * R + start + row, mask=inside, other=1.0)
        row_root = _inverse_root(tl.div_rn(tl.maximum(value, eps), tl.load(mean_ptr + s)))
    if STOCHASTIC:
        counter = (first_row + s * R + start + row).to(tl.int64)[:, None] * Q + lane[None, :]
        if BF16:
            w0, w1, w2, w3 = _bits(key, _WEIGHTS, counter)
        if AVERAGED:
            m0, m1, m2, m3 = _bits(key, _MOMENTUM, counter)
    for slot in tl.static_range(_SLOTS):
        col = slot * Q + lane
        mask = inside[:, None] & ((lane < Q) & (col < C))[None, :]
        live = _where_live(mask, keep)
        offset = place + (row[:, None] * C + col[None, :])
        update = tl.load(g_ptr + offset, mask=mask, other=0.0).to(tl.float32) * scale
        if RULE == "factored":
            root = tl.load(root_ptr + s * C + col, mask=col < C, other=0.0)
            update = update * row_root[:, None] * root[None, :]
        if RULE == "unfactored":
            value = tl.load(v_ptr + offset, mask=mask, other=1.0)
            update = update * _inverse_root(tl.maximum(value, eps))
        if AVERAGED:
            kept = tl.load(m_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            update = (update * factor - kept) * new1 + kept
            bits = 0
            if STOCHASTIC:
                bits = _half(m0, m1, m2, m3, slot)
            tl.store(m_ptr + offset, _to_bf16(update, bits, STOCHASTIC), mask=live)
        if RULE == "adamw":
            value = tl.load(v_ptr + offset, mask=mask, other=1.0)
            value = (update * update - value) * new2 + value
            tl.store(v_ptr + offset, value, mask=live)
            kept = tl.load(m_ptr + offset, mask=mask, other=0.0)
            kept = (update - kept) * new1 + kept
            tl.store(m_ptr + offset, kept, mask=live)
            update = tl.div_rn(kept, tl.sqrt_rn(value) * inverse + eps)
        if RULE == "sgd_momentum":
            update = update + tl.load(m_ptr + offset, mask=mask, other=0.0) * new1
            tl.store(m_ptr + offset, update, mask=live)
        if CLIP and not AVERAGED:
            step = update * (factor * rate)
        else:
            step = update * rate
        if MASTER:
            old = tl.load(master_ptr + offset, mask=mask, other=0.0)
        else:
            old = tl.load(w_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if DECAY:
            step = step + old * decay
        weight = old - step
        if MASTER:
            tl.store(master_ptr + offset, weight, mask=live)
        if BF16:
            bits = 0
            if STOCHASTIC:
                bits = _half(w0, w1, w2, w3, slot)
            tl.store(w_ptr + offset, _to_bf16(weight, bits, STOCHASTIC), mask=live)
        else:
            tl.store(w_ptr + offset, weight, mask=live)


@triton.jit
def _decode(code_ptr, scale, book_ptr, mask):
    code = tl.load(code_ptr, mask=mask, other=0).to(tl.int32)
    return tl.load(book_ptr + code) * scale[:, None]


@triton.jit
def _encode(x, code_ptr, scale_ptr, midpoint_ptr, live, live_block):
    """Codes of blocks (BN, B), one scale each: the number of midpoints that are not above x / largest."""
    largest = tl.maximum(tl.max(tl.abs(x), 1), 1e-12)
    x = tl.div_rn(x, tl.broadcast_to(largest[:, None], x.shape))
    code = tl.zeros(x.shape, tl.int32)
    for i in tl.static_range(8):
        after = code + (128 >> i)
        code = tl.where(tl.load(midpoint_ptr + after - 1) <= x, after, code)
    tl.store(code_ptr, code.to(tl.uint8), mask=live)
    tl.store(scale_ptr, largest, mask=live_block)


@triton.jit(do_not_specialize=["key", "first_row"])
def _apply_8bit(
    w_ptr, master_ptr, g_ptr, m_ptr, m_scale_ptr, v_ptr, v_scale_ptr, book_ptr, keep_ptr, scale_ptr, key, first_row,
    num, per_row, Q, rate, decay, new1, new2, correction, eps, DECAY: tl.constexpr, MASTER: tl.constexpr,
    BF16: tl.constexpr, STOCHASTIC: tl.constexpr, BN: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """adamw8bit of BN blocks of B columns: `num` blocks in all, `per_row` in a row."""
    block = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    lane = tl.arange(0, B)
    inside = block < num
    keep = tl.load(keep_ptr)
    offset = block[:, None] * B + lane[None, :]
    mask = inside[:, None] & (lane < B)[None, :]
    live, live_block = _where_live(mask, keep), _where_live(inside, keep)
    g = tl.load(g_ptr + offset, mask=mask, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    root = _decode(v_ptr + offset, tl.load(v_scale_ptr + block, mask=inside, other=0.0), book_ptr + 512, mask)
    value = root * root
    root = tl.sqrt_rn(value + (g * g - value) * new2)
    _encode(root, v_ptr + offset, v_scale_ptr + block, book_ptr + 768, live, live_block)
    m = _decode(m_ptr + offset, tl.load(m_scale_ptr + block, mask=inside, other=0.0), book_ptr, mask)
    m = m + (g - m) * new1
    _encode(m, m_ptr + offset, m_scale_ptr + block, book_ptr + 256, live, live_block)
    step = tl.div_rn(m, root * correction + eps) * rate
    if MASTER:
        old = tl.load(master_ptr + offset, mask=mask, other=0.0)
    else:
        old = tl.load(w_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if DECAY:
        step = step + old * decay
    weight = old - step
    if MASTER:
        tl.store(master_ptr + offset, weight, mask=live)
    if BF16:
        bits = 0
        if STOCHASTIC:
            # Blocks of codes and slots of noise do not share borders, so every element makes its own four words.
            row = block // per_row
            col = ((block - row * per_row) * B).to(tl.int32)[:, None] + lane[None, :]
            slot = col // Q
            counter = (first_row + row)[:, None] * Q + (col - slot * Q)
            w0, w1, w2, w3 = _bits(key, _WEIGHTS, counter)
            word = tl.where(slot < 4, tl.where(slot < 2, w0, w1), tl.where(slot < 6, w2, w3))
            bits = (tl.where(slot % 2 == 1, word >> 16, word) & 0xFFFF).to(tl.int32)
        tl.store(w_ptr + offset, _to_bf16(weight, bits, STOCHASTIC), mask=live)
    else:
        tl.store(w_ptr + offset, weight, mask=live)


# --- launches --------------------------------------------------------------------------------------------------------


def _launch(kernel, programs: int, tensor: Tensor, *args, num_warps: int = 4, **constants) -> None:
    """Start `programs` programs on the device of `tensor`, which is the first argument."""
    if not programs:
        return
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            kernel[(programs,)](tensor, *args, **constants, num_warps=num_warps, enable_fp_fusion=False)
    else:
        kernel[(programs,)](tensor, *args, **constants, num_warps=num_warps, enable_fp_fusion=False)


def _power(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))


def _sum_by_pairs(x: Tensor) -> Tensor:
    """(S, N) to (S,)."""
    S, N = x.shape
    while N > 1:
        block = min(_power(N), FLAT)
        blocks = triton.cdiv(N, block)
        out = x.new_empty(S, blocks)
        _launch(_add_pairs, S * blocks, x, out, N, blocks, BLOCK=block, num_warps=8 if block > 1024 else 4)
        x, N = out, blocks
    return x.view(S) if N else x.new_zeros(S)


def grad_squares(grad: Tensor, factored: bool, chunk_bytes: int) -> tuple[Tensor, Tensor, Tensor]:
    S, R, C = shape_of(grad)
    segment, blocks = reference.SEGMENT, triton.cdiv(R, ROW_BLOCK)
    segments = max(triton.cdiv(R, segment), 1)
    rows = grad.new_empty((S, R) if factored else (0,), dtype=torch.float32)
    cols = grad.new_empty((S, segments, C) if factored else (0,), dtype=torch.float32)
    if not grad.numel():
        return rows.new_zeros(()), rows, cols.zero_()
    parts = rows.new_empty(S, blocks)
    row_programs = triton.cdiv(min(segment, R), ROW_BLOCK)
    col_programs = triton.cdiv(C, COLUMN_BLOCK) if factored else 0
    _launch(
        _squares, S * segments * (row_programs + col_programs), grad, rows, parts, cols, R, C, blocks, segments,
        row_programs, col_programs, SEGMENT=segment, FACTORED=factored, BR=ROW_BLOCK, BC=COLUMN_BLOCK, LANES=LANES,
        ROW_LANES=ROW_LANES, UNROLL=UNROLL,
    )  # fmt: skip
    if _power(S) * _power(blocks) <= FLAT:
        square = rows.new_empty(())
        _launch(_add_all, 1, parts, square, S, blocks, BS=_power(S), BN=_power(blocks), num_warps=8)
    else:
        square = _sum_by_pairs(_sum_by_pairs(parts).view(1, S)).view(())
    return square, rows, cols


def judge(square: Tensor, keep: Tensor, max_grad_norm: float, past_norm: float) -> tuple[Tensor, Tensor]:
    kept, scale = torch.empty_like(keep), torch.empty_like(square)
    known = max(past_norm, max_grad_norm)
    _launch(_judge, 1, square, keep, kept, scale, max_grad_norm, known, CLIP=max_grad_norm > 0, num_warps=1)
    return kept, scale


def factored_statistics(
    grad: Tensor, rows: Tensor, cols: Tensor, row: Tensor, col: Tensor, keep: Tensor, scale: Tensor, new: float,
    eps: float, num_rows: int, norms: bool, chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    S, R, C = shape_of(grad)
    floor, segments, block = max(eps, SMALLEST), cols.shape[1], _power(C)
    mean, col_root = cols.new_empty(S), cols.new_empty(S, C)
    _launch(
        _averages, S + triton.cdiv(S * R, AVERAGES), rows, cols, row, col, mean, col_root, keep, scale, new, eps,
        floor, 1 / C, 1 / num_rows, S, S * R, C, segments, BLOCK=AVERAGES, BC=block,
        num_warps=16 if block > 4096 else 4,
    )  # fmt: skip
    squares = _update_squares(grad, row, row, mean, col_root, keep, scale, new, eps, True) if norms else mean
    return mean, col_root, squares if norms else torch.zeros_like(mean)


def unfactored_statistics(
    grad: Tensor, average: Tensor, keep: Tensor, scale: Tensor, new: float, eps: float, norms: bool, chunk_bytes: int
) -> Tensor:
    squares = _update_squares(grad, average, average, average, average, keep, scale, new, eps, False)
    return squares if norms else torch.zeros_like(squares)


def _update_squares(grad, average, row, mean, col_root, keep, scale, new, eps, factored) -> Tensor:
    S, R, C = shape_of(grad)
    blocks = triton.cdiv(R, ROW_BLOCK)
    parts = keep.new_empty(S, blocks)
    _launch(
        _norms, S * blocks, grad, average, row, mean, col_root, parts, keep, scale, new, eps, max(eps, SMALLEST), R, C,
        blocks, FACTORED=factored, BR=ROW_BLOCK, LANES=LANES, UNROLL=UNROLL, num_warps=4 if factored else 8,
    )  # fmt: skip
    return _sum_by_pairs(parts)


def _write(
    rule, weight, master, grad, m, v, factors, masks, rate, decay, numbers, clip, averaged, stochastic, key, first_row
) -> None:
    S, R, C = shape_of(grad)
    Q = triton.cdiv(C, SLOTS)
    unit = 8 if Q % 8 == 0 else 1
    BQ = min(_power(Q), 128, TILE)
    BR = max(TILE // BQ, 1)
    row_blocks, q_blocks, bf16 = triton.cdiv(R, BR), triton.cdiv(Q, BQ), weight.dtype == torch.bfloat16
    dummy = masks[0]
    pointers = (dummy if t is None else t for t in (master, grad, m, v, *factors))
    _launch(
        _apply, S * row_blocks * q_blocks, weight, *pointers, *masks, key, first_row, R, C, Q // unit, row_blocks,
        q_blocks, rate, decay, *numbers, RULE=rule, CLIP=clip, AVERAGED=averaged, DECAY=decay != 0,
        MASTER=master is not None, BF16=bf16, STOCHASTIC=stochastic and (bf16 or averaged), BR=BR, BQ=BQ, UNIT=unit,
    )  # fmt: skip


def adafactor(
    weight: Tensor, master: Tensor | None, momentum: Tensor | None, grad: Tensor, row: Tensor | None,
    mean: Tensor | None, col_root: Tensor | None, average: Tensor | None, squares: Tensor, keep: Tensor, scale: Tensor,
    lr: float, decay: float, largest: float, new_momentum: float, eps: float, stochastic: bool, key: int,
    first_row: int, chunk_bytes: int,
) -> None:  # fmt: skip
    rule = "unfactored" if row is None else "factored"
    numbers = new_momentum, 0.0, 1 / largest if largest else 0.0, max(eps, SMALLEST)
    factors, clip, averaged = (row, mean, col_root, squares), largest != 0, momentum is not None
    _write(
        rule, weight, master, grad, momentum, average, factors, (keep, scale), lr, decay, numbers, clip, averaged,
        stochastic, key, first_row,
    )  # fmt: skip


def adamw(
    weight: Tensor, master: Tensor | None, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, keep: Tensor,
    scale: Tensor, rate: float, decay: float, new1: float, new2: float, correction: float, eps: float,
    stochastic: bool, key: int, first_row: int, chunk_bytes: int,
) -> None:  # fmt: skip
    numbers = new1, new2, correction, eps
    _write(
        "adamw", weight, master, grad, exp_avg, exp_avg_sq, (None,) * 4, (keep, scale), rate, decay, numbers, False,
        False, stochastic, key, first_row,
    )  # fmt: skip


def sgd(
    weight: Tensor, master: Tensor | None, buffer: Tensor | None, grad: Tensor, keep: Tensor, scale: Tensor, lr: float,
    decay: float, momentum: float, stochastic: bool, key: int, first_row: int, chunk_bytes: int,
) -> None:  # fmt: skip
    rule, numbers = "sgd" if buffer is None else "sgd_momentum", (momentum, 0.0, 0.0, 0.0)
    _write(
        rule, weight, master, grad, buffer, None, (None,) * 4, (keep, scale), lr, decay, numbers, False, False,
        stochastic, key, first_row,
    )  # fmt: skip


def adamw8bit(
    weight: Tensor, master: Tensor | None, exp_avg: Tensor, exp_avg_scale: Tensor, exp_avg_root: Tensor,
    exp_avg_root_scale: Tensor, grad: Tensor, books: Tensor, keep: Tensor, scale: Tensor, rate: float, decay: float,
    new1: float, new2: float, correction: float, eps: float, stochastic: bool, key: int, first_row: int,
    chunk_bytes: int,
) -> None:  # fmt: skip
    C, num = grad.shape[-1], exp_avg_scale.numel()
    per_row = exp_avg_scale.shape[-1]
    B, bf16 = C // per_row, weight.dtype == torch.bfloat16
    BN = max(TILE // B, 1)
    _launch(
        _apply_8bit, triton.cdiv(num, BN), weight, weight if master is None else master, grad, exp_avg, exp_avg_scale,
        exp_avg_root, exp_avg_root_scale, books, keep, scale, key, first_row, num, per_row, triton.cdiv(C, SLOTS),
        rate, decay, new1, new2, correction, eps, DECAY=decay != 0, MASTER=master is not None, BF16=bf16,
        STOCHASTIC=stochastic and bf16, BN=BN, B=B,
    )  # fmt: skip
