"""Kernels of the optimizer's sums: squares of a gradient, adafactor's averages, norms; each in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_parts import pair_sums


@triton.jit
def _where_live(mask, keep):
    """`mask` while `keep` is not 0. Of floats, because the interpreter cannot broadcast a scalar condition."""
    return mask & (tl.zeros(mask.shape, tl.float32) + keep != 0.0)


@triton.jit
def _inverse_root(x):
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def _squares_of_rows(
    g_ptr, row_ptr, part_ptr, s, start, R, C, blocks, FACTORED: tl.constexpr, BR: tl.constexpr, LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BR)
    lane = tl.arange(0, LANES)
    inside = start + row < R
    ptr = g_ptr + (s * R + start) * C
    total = tl.zeros((BR, LANES), tl.float32)
    for c in range(0, C, LANES * UNROLL):
        for u in tl.static_range(UNROLL):
            col = c + u * LANES + lane
            mask = inside[:, None] & (col < C)[None, :]
            g = tl.load(ptr + (row[:, None] * C + col[None, :]), mask=mask, other=0.0).to(tl.float32)
            total += g * g
    sums = pair_sums(total, BR, LANES)
    if FACTORED:
        tl.store(row_ptr + s * R + start + row, sums, mask=inside)
    one = tl.arange(0, 1)
    part = pair_sums(tl.reshape(sums, (1, BR)), 1, BR)
    tl.store(part_ptr + s * blocks + start // BR + one, part, mask=start + one < R)


@triton.jit
def _squares_of_columns(
    g_ptr, col_ptr, s, segment, first_col, R, C, segments, SEGMENT: tl.constexpr, BC: tl.constexpr,
    ROW_LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    col = first_col + tl.arange(0, BC)
    lane = tl.arange(0, ROW_LANES)
    first = segment * SEGMENT
    end = tl.minimum(first + SEGMENT, R)
    ptr = g_ptr + (s * R + first) * C
    total = tl.zeros((ROW_LANES, BC), tl.float32)
    for r in range(first, end, ROW_LANES * UNROLL):
        for u in tl.static_range(UNROLL):
            row = u * ROW_LANES + lane
            mask = (r + row < end)[:, None] & (col < C)[None, :]
            g = tl.load(ptr + (row[:, None] * C + col[None, :]), mask=mask, other=0.0).to(tl.float32)
            total += g * g
        ptr += ROW_LANES * UNROLL * C
    sums = pair_sums(tl.trans(total), BC, ROW_LANES)
    tl.store(col_ptr + (s * segments + segment) * C + col, sums, mask=col < C)


@triton.jit
def _squares(
    g_ptr, row_ptr, part_ptr, col_ptr, R, C, blocks, segments, row_programs, col_programs, SEGMENT: tl.constexpr,
    FACTORED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, LANES: tl.constexpr, ROW_LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Sums of squares of rows and of columns. Programs of both kinds take turns, one segment of rows of one matrix
    after the other, so that the second read of an element comes from the L2 cache.

    part (S, blocks) gets the sums of BR rows each.
    """
    pid = tl.program_id(0)
    per_segment = row_programs + col_programs
    k = pid % per_segment
    segment = (pid // per_segment) % segments
    s = (pid // per_segment // segments).to(tl.int64)
    if k < row_programs:
        start = segment * SEGMENT + k * BR
        _squares_of_rows(g_ptr, row_ptr, part_ptr, s, start, R, C, blocks, FACTORED, BR, LANES, UNROLL)
    else:
        first_col = (k - row_programs) * BC
        _squares_of_columns(g_ptr, col_ptr, s, segment, first_col, R, C, segments, SEGMENT, BC, ROW_LANES, UNROLL)


@triton.jit
def _add_pairs(x_ptr, out_ptr, N, blocks, BLOCK: tl.constexpr):
    """(S, N) to (S, blocks): sums of BLOCK neighbours each."""
    pid = tl.program_id(0)
    s = (pid // blocks).to(tl.int64)
    i = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + s * N + i, mask=i < N, other=0.0)
    tl.store(out_ptr + pid + tl.arange(0, 1), pair_sums(tl.reshape(x, (1, BLOCK)), 1, BLOCK))


@triton.jit
def _add_all(x_ptr, out_ptr, S, N, BS: tl.constexpr, BN: tl.constexpr):
    """(S, N) to one number: neighbours in N, then in S."""
    s = tl.arange(0, BS)
    i = tl.arange(0, BN)
    mask = (s < S)[:, None] & (i < N)[None, :]
    x = tl.load(x_ptr + s[:, None] * N + i[None, :], mask=mask, other=0.0)
    total = pair_sums(tl.reshape(pair_sums(x, BS, BN), (1, BS)), 1, BS)
    tl.store(out_ptr + tl.arange(0, 1), total)


@triton.jit
def _judge(square_ptr, keep_ptr, kept_ptr, scale_ptr, max_grad_norm, known, CLIP: tl.constexpr):
    one = tl.arange(0, 1)
    square = tl.load(square_ptr + one)
    finite = tl.abs(square) < float("inf")
    tl.store(kept_ptr + one, tl.where(finite, tl.load(keep_ptr + one), 0.0))
    scale = tl.full((1,), 1.0, tl.float32)
    if CLIP:
        norm = tl.sqrt_rn(tl.where(finite, square, 1.0))
        top = tl.zeros((1,), tl.float32) + max_grad_norm
        scale = tl.where(finite, tl.div_rn(top, tl.maximum(norm, known)), scale)
    tl.store(scale_ptr + one, scale)


@triton.jit
def _column_averages(
    cols_ptr, col_ptr, mean_ptr, root_ptr, s, keep, scale, new, eps, floor, per_row, per_col, C, segments,
    BC: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BC)
    mask = i < C
    live = _where_live(mask, keep)
    sums = tl.zeros((BC,), tl.float32)
    for segment in range(segments):
        sums += tl.load(cols_ptr + (s * segments + segment) * C + i, mask=mask, other=0.0)
    old = tl.load(col_ptr + s * C + i, mask=mask, other=0.0)
    value = old + (sums * scale * scale * per_col + eps - old) * new
    value = tl.where(live, value, old)
    tl.store(col_ptr + s * C + i, value, mask=live)
    tl.store(root_ptr + s * C + i, _inverse_root(tl.maximum(value, floor)), mask=mask)
    total = pair_sums(tl.reshape(tl.where(mask, value, 0.0), (1, BC)), 1, BC)
    tl.store(mean_ptr + s + tl.arange(0, 1), tl.maximum(total * per_row, floor))


@triton.jit
def _row_averages(rows_ptr, row_ptr, first, keep, scale, new, eps, per_row, SR, BLOCK: tl.constexpr):
    j = first + tl.arange(0, BLOCK)
    inside = j < SR
    sums = tl.load(rows_ptr + j, mask=inside, other=0.0)
    old = tl.load(row_ptr + j, mask=inside, other=0.0)
    value = old + (sums * scale * scale * per_row + eps - old) * new
    tl.store(row_ptr + j, value, mask=_where_live(inside, keep))


@triton.jit
def _averages(
    rows_ptr, cols_ptr, row_ptr, col_ptr, mean_ptr, root_ptr, keep_ptr, scale_ptr, new, eps, floor, per_row, per_col,
    S, SR, C, segments, BLOCK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Moving averages: the first S programs take a matrix's columns, the others BLOCK rows each."""
    pid = tl.program_id(0)
    keep = tl.load(keep_ptr)
    scale = tl.load(scale_ptr)
    if pid < S:
        _column_averages(
            cols_ptr, col_ptr, mean_ptr, root_ptr, pid.to(tl.int64), keep, scale, new, eps, floor, per_row, per_col, C,
            segments, BC,
        )  # fmt: skip
    else:
        first = (pid - S).to(tl.int64) * BLOCK
        _row_averages(rows_ptr, row_ptr, first, keep, scale, new, eps, per_row, SR, BLOCK)


@triton.jit
def _norms(
    g_ptr, average_ptr, row_ptr, mean_ptr, root_ptr, part_ptr, keep_ptr, scale_ptr, new, eps, floor, R, C, blocks,
    FACTORED: tl.constexpr, BR: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Sums of squares of the updates of BR rows each: part (S, blocks). Moves `average` if not FACTORED."""
    pid = tl.program_id(0)
    block = pid % blocks
    s = (pid // blocks).to(tl.int64)
    start = block * BR
    row = tl.arange(0, BR)
    lane = tl.arange(0, LANES)
    inside = start + row < R
    keep = tl.load(keep_ptr)
    scale = tl.load(scale_ptr)
    place = (s * R + start) * C
    if FACTORED:
        value = tl.load(row_ptr + s * R + start + row, mask=inside, other=1.0)
        row_root = _inverse_root(tl.div_rn(tl.maximum(value, floor), tl.load(mean_ptr + s)))
    total = tl.zeros((BR, LANES), tl.float32)
    for c in range(0, C, LANES * UNROLL):
        for u in tl.static_range(UNROLL):
            col = c + u * LANES + lane
            mask = inside[:, None] & (col < C)[None, :]
            offset = place + (row[:, None] * C + col[None, :])
            update = tl.load(g_ptr + offset, mask=mask, other=0.0).to(tl.float32) * scale
            if FACTORED:
                root = tl.load(root_ptr + s * C + col, mask=col < C, other=0.0)
                update = update * row_root[:, None] * root[None, :]
            else:
                old = tl.load(average_ptr + offset, mask=mask, other=1.0)
                value = old + (update * update + eps - old) * new
                tl.store(average_ptr + offset, value, mask=_where_live(mask, keep))
                update = _inverse_root(tl.maximum(value, floor)) * update
            total += update * update
    part = pair_sums(tl.reshape(pair_sums(total, BR, LANES), (1, BR)), 1, BR)
    tl.store(part_ptr + pid + tl.arange(0, 1), part)
