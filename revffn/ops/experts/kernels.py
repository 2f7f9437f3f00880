"""Triton kernels of the experts' operations; `reference.py` defines what they compute.

No atomics, no tuning: every launch is fixed by shapes and dtypes, and every output has one writer. Row offsets are
int64: S * 2 I passes 2^31 at sizes in use. `exp` and divisions may differ from PyTorch's in the last bit, and products
add in an order of their own; all other arithmetic is float32 without fused multiply-add, so it is the reference's bit
for bit. The products are PyTorch's but where a gradient is added up over tiles.
"""

# T = tokens, K = experts per token, S = T * K rows sorted by expert, E = experts,
# D = hidden size, I = an expert's width

# ruff: noqa: E741
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_parts import bf16_bits, join_24, pair_sums, round_to, split_24
from . import reference
from .reference import COLUMN_LANES, ROW_LANES, lanes_for

KINDS = {"silu": 0, "clamped": 1, "gelu": 2, "gelu_tanh": 3}
LAUNCH = dict(num_warps=4, enable_fp_fusion=False)
TILE = 1024
"""Elements of a program's tile: eight or more for each of its threads, so that no element has two of them."""


def most_shared_memory(device: torch.device) -> int:
    """Bytes that one program may have."""
    if triton.knobs.runtime.interpret:
        return 0
    return triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]


# --- arrangement -----------------------------------------------------------------------------------------------------


@triton.jit
def _gather(x_ptr, place_ptr, out_ptr, D, K: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    x = tl.load(x_ptr + t * D + cols, mask=mask)
    for k in tl.static_range(K):
        row = tl.load(place_ptr + t * K + k).to(tl.int64)
        tl.store(out_ptr + row * D + cols, x, mask=mask)


def expert_gather(x: Tensor, place: Tensor) -> Tensor:
    (T, K), D = place.shape, x.shape[1]
    out = x.new_empty(T * K, D)
    block = lanes_for(D, TILE)
    _gather[(T, triton.cdiv(D, block))](x, place, out, D, K, block, **LAUNCH)
    return out


@triton.jit
def _combine(
    rows_ptr, place_ptr, bias_ptr, expert_ptr, weight_ptr, out_ptr, D,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    for k in tl.static_range(K):
        row = tl.load(place_ptr + t * K + k).to(tl.int64)
        term = tl.load(rows_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            expert = tl.load(expert_ptr + row).to(tl.int64)
            weight = tl.load(weight_ptr + t * K + k).to(tl.float32)
            bias = tl.load(bias_ptr + expert * D + cols, mask=mask, other=0.0).to(tl.float32)
            term = term + weight * bias
        if k == 0:
            total = term
        else:
            total = total + term
    tl.store(out_ptr + t * D + cols, round_to(total, out_ptr.dtype.element_ty), mask=mask)


def expert_combine(
    rows: Tensor, place: Tensor, bias: Tensor | None, expert: Tensor | None, weight: Tensor | None
) -> Tensor:
    (T, K), D = place.shape, rows.shape[1]
    out = rows.new_empty(T, D)
    block, has_bias = lanes_for(D, TILE), bias is not None
    given = (bias, expert, weight) if has_bias else (rows, place, rows)  # not read
    grid = (T, triton.cdiv(D, block))
    _combine[grid](rows, place, *given, out, D, K, has_bias, block, **LAUNCH)
    return out


# --- activation ------------------------------------------------------------------------------------------------------


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _activation(gate, alpha, KIND: tl.constexpr):
    """The activation of the gate, and its derivative."""
    if KIND <= 1:
        s = _sigmoid(gate * alpha)
        value = gate * s
        slope = s + value * (1.0 - s) * alpha
    elif KIND == 2:
        s = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        value = gate * s
        slope = s + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    else:
        s = _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        value = gate * s
        slope = s + value * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * gate * gate))
    return value, slope


@triton.jit
def _load_halves(
    gate_up_ptr, bias_ptr, rows, experts, start, inside, I,
    HAS_BIAS: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Gate and up of LANES columns from `start` on in float32, biases added."""
    row = gate_up_ptr + rows[:, None] * (2 * I)
    if HAS_BIAS:
        bias = bias_ptr + experts[:, None] * (2 * I)
    if INTERLEAVED:
        # As one piece, so that a thread reads neighbours.
        at = 2 * start + tl.arange(0, 2 * LANES)[None, :]
        mask = inside[:, None] & (at < 2 * I)
        both = tl.load(row + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            both += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(both, (ROWS, LANES, 2)))
    else:
        at = start + tl.arange(0, LANES)[None, :]
        mask = inside[:, None] & (at < I)
        gate = tl.load(row + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(row + I + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            gate += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
            up += tl.load(bias + I + at, mask=mask, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _store_halves(
    gate_up_ptr, gate, up, rows, start, inside, I,
    INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = gate_up_ptr + rows[:, None] * (2 * I)
    if INTERLEAVED:
        at = 2 * start + tl.arange(0, 2 * LANES)[None, :]
        both = tl.reshape(tl.join(gate, up), (ROWS, 2 * LANES))
        tl.store(row + at, both, mask=inside[:, None] & (at < 2 * I))
    else:
        at = start + tl.arange(0, LANES)[None, :]
        mask = inside[:, None] & (at < I)
        tl.store(row + at, gate, mask=mask)
        tl.store(row + I + at, up, mask=mask)


@triton.jit
def _gate(
    gate_up_ptr, bias_ptr, expert_ptr, weight_ptr, order_ptr, out_ptr, S, I, alpha, limit,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < S
    choice = tl.load(order_ptr + rows, mask=inside, other=0)
    weight = tl.load(weight_ptr + choice, mask=inside, other=0.0).to(tl.float32)
    experts = rows
    if HAS_BIAS:
        experts = tl.load(expert_ptr + rows, mask=inside, other=0).to(tl.int64)
    for start in range(0, I, LANES):
        cols = start + tl.arange(0, LANES)
        mask = inside[:, None] & (cols < I)[None, :]
        gate, up = _load_halves(
            gate_up_ptr, bias_ptr, rows, experts, start, inside, I, HAS_BIAS, INTERLEAVED, ROWS, LANES
        )
        if KIND == 1:
            gate = tl.where(gate > limit, limit, gate)
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
        value, _ = _activation(gate, alpha, KIND)
        out = round_to(value * up * weight[:, None], out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * I + cols[None, :], out, mask=mask)


@triton.jit
def _gate_backward(
    d_ptr, gate_up_ptr, d_gate_up_ptr, bias_ptr, expert_ptr, weight_ptr, order_ptr, d_weight_ptr,
    S, I, alpha, limit,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < S
    choice = tl.load(order_ptr + rows, mask=inside, other=0)
    weight = tl.load(weight_ptr + choice, mask=inside, other=0.0).to(tl.float32)
    experts = rows
    if HAS_BIAS:
        experts = tl.load(expert_ptr + rows, mask=inside, other=0).to(tl.int64)
    total = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, I, LANES):
        cols = start + tl.arange(0, LANES)
        mask = inside[:, None] & (cols < I)[None, :]
        gate_in, up_in = _load_halves(
            gate_up_ptr, bias_ptr, rows, experts, start, inside, I, HAS_BIAS, INTERLEAVED, ROWS, LANES
        )
        gate, up = gate_in, up_in
        if KIND == 1:
            gate = tl.where(gate > limit, limit, gate)
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
        value, slope = _activation(gate, alpha, KIND)
        act = value * up
        at = d_ptr + rows[:, None] * I + cols[None, :]
        d = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        # Of the columns past the end `act` is finite and `d` zero.
        total += d * act
        d = d * weight[:, None]
        d_gate, d_up = d * up * slope, d * value
        if KIND == 1:
            d_gate = tl.where(gate_in > limit, 0.0, d_gate)
            d_up = tl.where((up_in > limit) | (up_in < -limit), 0.0, d_up)
        tl.store(at, round_to(act * weight[:, None], d_ptr.dtype.element_ty), mask=mask)
        kind: tl.constexpr = d_gate_up_ptr.dtype.element_ty
        d_gate, d_up = round_to(d_gate, kind), round_to(d_up, kind)
        _store_halves(d_gate_up_ptr, d_gate, d_up, rows, start, inside, I, INTERLEAVED, ROWS, LANES)
    d_weight = round_to(pair_sums(total, ROWS, LANES), d_weight_ptr.dtype.element_ty)
    tl.store(d_weight_ptr + choice, d_weight, mask=inside)


def expert_gate(
    gate_up: Tensor, bias: Tensor | None, expert: Tensor | None, weight: Tensor, order: Tensor,
    kind: str, alpha: float, limit: float, interleaved: bool,
) -> Tensor:  # fmt: skip
    S, I = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(S, I)
    lanes = lanes_for(I, COLUMN_LANES)
    rows, has_bias = TILE // lanes, bias is not None
    given = (bias, expert) if has_bias else (gate_up, order)  # not read
    _gate[(triton.cdiv(S, rows),)](
        gate_up, *given, weight, order, out, S, I, alpha, limit,
        KINDS[kind], has_bias, interleaved, rows, lanes, **LAUNCH,
    )  # fmt: skip
    return out


def expert_gate_backward(
    d_act: Tensor, gate_up: Tensor, d_gate_up: Tensor, bias: Tensor | None, expert: Tensor | None,
    weight: Tensor, order: Tensor, kind: str, alpha: float, limit: float, interleaved: bool, rounds: bool,
) -> Tensor:  # fmt: skip
    S, I = d_act.shape
    d_weight = torch.empty_like(weight, dtype=weight.dtype if rounds else torch.float32)
    lanes, has_bias = lanes_for(I, COLUMN_LANES), bias is not None
    rows = TILE // lanes
    if has_bias and I % 8:  # nothing is read in vectors then, and the addresses of as many rows fill the registers
        rows //= 2
    given = (bias, expert) if has_bias else (gate_up, order)  # not read
    _gate_backward[(triton.cdiv(S, rows),)](
        d_act, gate_up, d_gate_up, *given, weight, order, d_weight, S, I, alpha, limit,
        KINDS[kind], has_bias, interleaved, rows, lanes, **LAUNCH,
    )  # fmt: skip
    return d_weight


# --- biases ----------------------------------------------------------------------------------------------------------


@triton.jit
def _row_sums(
    rows_ptr, weight_ptr, order_ptr, offs_ptr, out_ptr, C,
    WEIGHTED: tl.constexpr, COLS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One expert and one block of columns a program; lanes are rows."""
    expert = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    begin = tl.load(offs_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offs_ptr + expert)
    total = tl.zeros((COLS, LANES), tl.float32)
    for start in range(begin, end, LANES):
        rows = (start + tl.arange(0, LANES)).to(tl.int64)
        inside = rows < end
        mask = (cols < C)[:, None] & inside[None, :]
        x = tl.load(rows_ptr + rows[None, :] * C + cols[:, None], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            choice = tl.load(order_ptr + rows, mask=inside, other=0)
            weight = tl.load(weight_ptr + choice, mask=inside, other=0.0).to(tl.float32)
            x = x * weight[None, :]
        total += x
    tl.store(out_ptr + expert * C + cols, pair_sums(total, COLS, LANES), mask=cols < C)


def expert_row_sums(rows: Tensor, weight: Tensor | None, order: Tensor | None, offs: Tensor) -> Tensor:
    E, C = offs.shape[0], rows.shape[1]
    out = torch.empty(E, C, dtype=torch.float32, device=rows.device)
    cols, weighted = TILE // ROW_LANES, weight is not None
    given = (weight, order) if weighted else (rows, offs)  # not read
    _row_sums[(E, triton.cdiv(C, cols))](rows, *given, offs, out, C, weighted, cols, ROW_LANES, **LAUNCH)
    return out


@triton.jit
def _row_dots(
    rows_ptr, bias_ptr, expert_ptr, order_ptr, total_ptr, S, D,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < S
    experts = tl.load(expert_ptr + rows, mask=inside, other=0).to(tl.int64)
    total = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, D, LANES):
        cols = start + tl.arange(0, LANES)
        mask = inside[:, None] & (cols < D)[None, :]
        x = tl.load(rows_ptr + rows[:, None] * D + cols[None, :], mask=mask, other=0.0)
        bias = tl.load(bias_ptr + experts[:, None] * D + cols[None, :], mask=mask, other=0.0)
        total += x.to(tl.float32) * bias.to(tl.float32)
    at = total_ptr + tl.load(order_ptr + rows, mask=inside, other=0)
    before = tl.load(at, mask=inside, other=0.0)
    tl.store(at, before + pair_sums(total, ROWS, LANES), mask=inside)


def expert_row_dots(rows: Tensor, bias: Tensor, expert: Tensor, order: Tensor, total: Tensor) -> None:
    S, D = rows.shape
    lanes = lanes_for(D, COLUMN_LANES)
    num_rows = TILE // lanes
    _row_dots[(triton.cdiv(S, num_rows),)](rows, bias, expert, order, total, S, D, num_rows, lanes, **LAUNCH)


# --- sums over tiles -------------------------------------------------------------------------------------------------

PRODUCT_BLOCKS = {200 << 10: (128, 128, 64), 0: (128, 64, 32)}
"""By the shared memory that there must be: rows and half the columns of one program's part of an expert's gradient,
and tokens of one step of its sum."""


@triton.jit
def _add_part(high_ptr, low_ptr, part, m, n, M, N, BEGINS: tl.constexpr, ENDS: tl.constexpr):
    at = m[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    if not BEGINS:
        part += join_24(tl.load(high_ptr + at, mask=mask, other=0), tl.load(low_ptr + at, mask=mask, other=0))
    if ENDS:
        tl.store(high_ptr + at, (bf16_bits(part) >> 16).to(tl.int16), mask=mask)
    else:
        high, low = split_24(part)
        tl.store(high_ptr + at, high, mask=mask)
        tl.store(low_ptr + at, low, mask=mask)


@triton.jit
def _products(
    a_ptr, b_ptr, offs_ptr, high_ptr, low_ptr, M, N,
    BEGINS: tl.constexpr, ENDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One expert's BM rows and 2 BN columns a program: as two halves, so that the sum of one is in registers while
    what it is added to is read."""
    expert = tl.program_id(1)
    m = tl.program_id(0) // tl.cdiv(N, 2 * BN) * BM + tl.arange(0, BM)
    n = tl.program_id(0) % tl.cdiv(N, 2 * BN) * (2 * BN) + tl.arange(0, BN)
    begin = tl.load(offs_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offs_ptr + expert)
    # Distances within one expert's matrix and within BK rows are less than 2^31.
    high_ptr += expert.to(tl.int64) * M * N
    low_ptr += expert.to(tl.int64) * M * N
    a_ptr += begin.to(tl.int64) * M
    b_ptr += begin.to(tl.int64) * N
    k = tl.arange(0, BK)
    left = tl.zeros((BM, BN), tl.float32)
    right = tl.zeros((BM, BN), tl.float32)
    for start in range(begin, end, BK):
        inside = (k < end - start)[:, None]
        a = tl.load(a_ptr + k[:, None] * M + m[None, :], mask=inside & (m < M)[None, :], other=0.0)
        a = tl.trans(a)
        at = b_ptr + k[:, None] * N + n[None, :]
        left = tl.dot(a, tl.load(at, mask=inside & (n < N)[None, :], other=0.0), left)
        right = tl.dot(a, tl.load(at + BN, mask=inside & (n + BN < N)[None, :], other=0.0), right)
        a_ptr += BK * M
        b_ptr += BK * N
    _add_part(high_ptr, low_ptr, left, m, n, M, N, BEGINS, ENDS)
    _add_part(high_ptr, low_ptr, right, m, n + BN, M, N, BEGINS, ENDS)


def add_product_to_sum(
    a: Tensor, b: Tensor, offs: Tensor, high: Tensor, low: Tensor, begins: bool, ends: bool
) -> None:
    E, M, N = high.shape
    BM, BN, BK = next(block for least, block in PRODUCT_BLOCKS.items() if most_shared_memory(a.device) >= least)
    grid = (triton.cdiv(M, BM) * triton.cdiv(N, 2 * BN), E)
    _products[grid](
        a, b, offs, high.view(torch.int16), low, M, N, begins, ends, BM, BN, BK,
        num_warps=8, num_stages=4, enable_fp_fusion=False,
    )  # fmt: skip


SUM_BLOCK = 2048


@triton.jit
def _add_to_sum(total_ptr, grad_ptr, N, FINISH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N
    total = tl.load(total_ptr + at, mask=mask, other=0.0)
    total += tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if FINISH:
        tl.store(grad_ptr + at, round_to(total, grad_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(total_ptr + at, total, mask=mask)


def add_to_sum(total: Tensor, grad: Tensor) -> None:
    grid = (triton.cdiv(grad.numel(), SUM_BLOCK),)
    _add_to_sum[grid](total, grad, grad.numel(), False, SUM_BLOCK, **LAUNCH)


def finish_sum(total: Tensor, grad: Tensor) -> None:
    grid = (triton.cdiv(grad.numel(), SUM_BLOCK),)
    _add_to_sum[grid](total, grad, grad.numel(), True, SUM_BLOCK, **LAUNCH)


expert_sort = reference.expert_sort
