"""What the optimizer's fused operations compute, in plain PyTorch: arithmetic, roundings and orders of summation.

Every step is one separately rounded IEEE operation (+, -, *, /, square root) in float32, or float64 for float64
parameters, so that a kernel which makes the same steps gives the same bits. Numbers enter as float32; nothing is
divided by a number, because PyTorch would multiply by its reciprocal on some devices.

**Orders of summation**, fixed whatever the chunks:

    pairs         neighbours are added, then neighbours of the sums, and so on; a missing last neighbour is zero
    row sums      64 lanes: column j goes to lane j % 64, columns of a lane in sequence; then pairs of lanes
    column sums   segments of 4096 rows; in each 32 lanes: row i goes to lane i % 32, rows of a lane in sequence; then
                  pairs of lanes; then segments in sequence
    whole matrix  pairs of its row sums; several matrices: pairs of those

**Noise.** 16 bits for each element from Philox 4x32 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC
2011, https://doi.org/10.1145/2063384.2063405) with 7 rounds, the fewest that pass BigCrush there. A parameter is rows
i (all matrices' rows counted through, over all shards) of C columns. With Q = ceil(C / 8), column j has slot j // Q
and lane j % Q. Counter words: low and high half of i Q + lane, the stream (0 weights, 1 adafactor's momentum), 0. The
64-bit key is a hash of seed, parameter and step. Slot s takes the low (s even) or high 16 bits of word s // 2.

All functions see a parameter as matrices (S, R, C), walk it in chunks of about `chunk_bytes` of float32, and write
nothing where `keep` is 0. They never wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..sums import pairs

# S = matrices of a parameter (E for experts, 1 for a matrix or a vector), R = rows, C = columns

LANES = 64
ROW_LANES = 32
SEGMENT = 4096
SLOTS = 8
ROUNDS = 7
WEIGHTS, MOMENTUM = 0, 1
"""Streams of noise."""
SMALLEST = 2.0**-126
"""The smallest normal float32: floor of averages that are still zero because their first gradient was not finite."""

Chunk = tuple[slice, slice]


# --- shapes and orders -----------------------------------------------------------------------------------------------


def matrices(tensor: Tensor) -> Tensor:
    """A parameter as (S, R, C), a view. A vector is a matrix of one column, so that its shards are shards of rows."""
    if tensor.dim() < 2:
        return tensor.view(1, tensor.numel(), 1)
    return tensor.unsqueeze(0) if tensor.dim() == 2 else tensor.flatten(0, -3) if tensor.dim() > 3 else tensor


def shape_of(tensor: Tensor) -> tuple[int, int, int]:
    """The shape of `matrices(tensor)`."""
    if tensor.dim() < 2:
        return 1, tensor.numel(), 1
    return math.prod(tensor.shape[:-2]), tensor.shape[-2], tensor.shape[-1]


def chunks(shape: tuple[int, int, int], chunk_bytes: int) -> Iterator[Chunk]:
    """Slices (of S, of R) that cover a parameter: several whole matrices each, or rows of one in multiples of 32."""
    S, R, C = shape
    if not S * R * C:
        return
    limit = max(chunk_bytes // 4, 1)
    if R * C <= limit:
        num = max(limit // (R * C), 1)
        yield from ((slice(s, min(s + num, S)), slice(0, R)) for s in range(0, S, num))
    else:
        num = max(limit // C // ROW_LANES, 1) * ROW_LANES
        yield from ((slice(s, s + 1), slice(r, min(r + num, R))) for s in range(S) for r in range(0, R, num))


def wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def lane_sums(x: Tensor) -> Tensor:
    """Sums along the last dimension in the order of row sums."""
    C = x.shape[-1]
    total = x[..., :LANES]
    if C > LANES:
        total = total.clone()
        for start in range(LANES, C, LANES):
            part = x[..., start : start + LANES]
            total[..., : part.shape[-1]] += part
    return pairs(total)


def root_(x: Tensor) -> Tensor:
    """Square root in place, correctly rounded. `x` must be contiguous."""
    if x.dtype != torch.float32 or x.is_cuda:
        return x.sqrt_()
    # torch.sqrt of float32 on CPUs is MKL's, whose last bit is wrong for one number in seven.
    for part in x.view(-1).split(1 << 16):
        part.copy_(part.double().sqrt_())
    return x


# --- sums of the gradient ------------------------------------------------------------------------------------------


def grad_squares(grad: Tensor, factored: bool, chunk_bytes: int) -> tuple[Tensor, Tensor, Tensor]:
    grad, wide = matrices(grad), wide_dtype(grad)
    S, R, C = grad.shape
    rows_SR = torch.zeros(S, R, dtype=wide, device=grad.device)
    shape = (S, max(-(-R // SEGMENT), 1), C) if factored else (0,)
    cols = torch.zeros(shape, dtype=wide, device=grad.device)
    lanes = None
    for chunk in chunks(grad.shape, chunk_bytes):
        square = grad[chunk].to(wide, copy=True).square_()
        rows_SR[chunk] = lane_sums(square)
        r = chunk[1]
        for start in range(r.start, r.stop, ROW_LANES) if factored else ():
            if start % SEGMENT == 0:
                lanes = square.new_zeros(square.shape[0], ROW_LANES, C)
            block = square[:, start - r.start : start - r.start + ROW_LANES]
            lanes[:, : block.shape[1]] += block
            if (start + ROW_LANES) % SEGMENT == 0 or start + ROW_LANES >= R:
                cols[chunk[0], start // SEGMENT] = pairs(lanes, -2)
        del square
    return pairs(pairs(rows_SR)), rows_SR if factored else rows_SR.new_zeros(0), cols


def sum_segments(cols: Tensor) -> Tensor:
    """Column sums (S, C) of the sums per segment (S, segments, C)."""
    total = cols[:, 0].clone()
    for segment in range(1, cols.shape[1]):
        total += cols[:, segment]
    return total


def judge(square: Tensor, keep: Tensor, max_grad_norm: float, past_norm: float) -> tuple[Tensor, Tensor]:
    finite = torch.isfinite(square)
    keep = torch.where(finite, keep, 0.0)
    scale = torch.ones_like(square)
    if max_grad_norm:
        known = torch.full_like(square, max(past_norm, max_grad_norm))
        clipped = torch.full_like(square, max_grad_norm) / torch.maximum(root_(square.clone()), known)
        scale = torch.where(finite, clipped, scale)
    return keep, scale


# --- noise and rounding ----------------------------------------------------------------------------------------------

_MASK = (1 << 32) - 1


def philox(counter: list[Tensor], key: int, rounds: int = ROUNDS) -> list[Tensor]:
    """Philox 4x32: four words (int64, overwritten; below 2^32) of a counter to four words of noise.

    The second and fourth word come back with rubbish above their 32 bits.
    """
    # Products wrap modulo 2^64, so their halves are right although int64 has a sign.
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, key >> 32 & _MASK
    high = torch.empty_like(c0)
    for _ in range(rounds):
        p0, p1 = c0.mul_(0xD2511F53), c2.mul_(0xCD9E8D57)
        torch.bitwise_right_shift(p1, 32, out=high)
        c0 = c1.bitwise_xor_(high).bitwise_xor_(k0).bitwise_and_(_MASK)
        torch.bitwise_right_shift(p0, 32, out=high)
        c2 = c3.bitwise_xor_(high).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = p1, p0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def noise(
    key: int, stream: int, first_row: int, num_rows: int, C: int, device: torch.device, block: int = 1 << 15
) -> Tensor:
    """16 random bits of every element of `num_rows` rows from `first_row` on, (num_rows, C) int32.

    `block` bounds the temporaries (numbers of 8 bytes, five at a time) and changes nothing.
    """
    Q = -(-C // SLOTS)
    out = torch.empty(num_rows, C, dtype=torch.int32, device=device)
    num = max(block // Q, 1)
    for start in range(0, num_rows, num):
        end = min(start + num, num_rows)
        low = torch.arange((first_row + start) * Q, (first_row + end) * Q, device=device)
        high = low >> 32
        low &= _MASK
        words = philox([low, high, torch.full_like(low, stream), torch.zeros_like(low)], key)
        del low, high
        bits = torch.empty(end - start, SLOTS, Q, dtype=torch.int32, device=device)
        for i, word in enumerate(words):
            halves = word.view(torch.int16).view(end - start, Q, 4)
            bits[:, 2 * i].copy_(halves[..., 0])
            bits[:, 2 * i + 1].copy_(halves[..., 1])
        out[start:end] = bits.view(end - start, SLOTS * Q)[:, :C].bitwise_and_(0xFFFF)
        del words, bits, word, halves
    return out


def stochastic_round(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to bf16, up or down with probabilities that make the mean exact. `x` and `bits` are overwritten.

    16 random bits (int32, below 2^16) are added to the 16 that bf16 lacks, and what carries over stays. A value that
    bf16 holds exactly does not move.
    """
    return bits.add_(x.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


class Rounding:
    """How one parameter's float32 values become bf16: by noise of its elements, or to the nearest."""

    def __init__(self, stochastic: bool, key: int, first_row: int, R: int, chunk_bytes: int):
        self.stochastic, self.key, self.first_row, self.R = stochastic, key, first_row, R
        self.block = max(chunk_bytes // 64, 1024)

    def __call__(self, value: Tensor, chunk: Chunk, stream: int) -> Tensor:
        """bf16 of a chunk (n, rows, C), which is overwritten."""
        if not self.stochastic or value.dtype == torch.float64:
            return value.to(torch.bfloat16)
        n, rows, C = value.shape
        row = self.first_row + chunk[0].start * self.R + chunk[1].start
        # What fits into a CPU's cache is fastest there; on a GPU every piece costs some ninety launches.
        block = min(self.block, 1 << 15) if value.device.type == "cpu" else self.block
        bits = noise(self.key, stream, row, n * rows, C, value.device, block).view(value.shape)
        return stochastic_round(value, bits)


def read(grad: Tensor, chunk: Chunk, scale: Tensor) -> Tensor:
    """A copy of a chunk of the gradient in float32, clipped by the global norm."""
    return grad[chunk].to(scale.dtype, copy=True).mul_(scale)


def write(
    weight: Tensor, master: Tensor | None, chunk: Chunk, step: Tensor, decay: float, live: Tensor, rounding: Rounding
) -> None:
    """weight -= step + decay * weight, where `live`; `step` is overwritten."""
    old = (weight if master is None else master)[chunk].to(step.dtype)
    if decay:
        step += old * decay
    new = torch.sub(old, step, out=step)
    if master is not None:
        torch.where(live, new, old, out=new)
        master[chunk] = new
        weight[chunk] = torch.where(live, new.to(weight.dtype), weight[chunk])
    elif weight.dtype == step.dtype:
        weight[chunk] = torch.where(live, new, old)
    else:
        del old
        weight[chunk] = torch.where(live, rounding(new, chunk, WEIGHTS), weight[chunk])


def move(average: Tensor, value: Tensor, new: float, live: Tensor) -> Tensor:
    """average += new * (value - average), where `live`; `value` is overwritten. Returns the average."""
    value.sub_(average).mul_(new).add_(average)
    return average.copy_(torch.where(live, value, average))


# --- adafactor -------------------------------------------------------------------------------------------------------


def row_roots(row: Tensor, mean: Tensor, floor: float) -> Tensor:
    """1 / sqrt(row / mean), (S, R, 1)."""
    return root_(row.clamp_min(floor) / mean.unsqueeze(-1)).reciprocal_().unsqueeze(-1)


def factored_statistics(
    grad: Tensor,
    rows: Tensor,
    cols: Tensor,
    row: Tensor,
    col: Tensor,
    keep: Tensor,
    scale: Tensor,
    new: float,
    eps: float,
    num_rows: int,
    norms: bool,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, live, floor = matrices(grad), keep != 0, max(eps, SMALLEST)
    S, R, C = grad.shape
    row, col = row.view(S, R), col.view(S, C)
    for average, sums, num in ((row, rows.clone(), C), (col, sum_segments(cols), num_rows)):
        move(average, sums.mul_(scale).mul_(scale).mul_(1 / num).add_(eps), new, live)
    # v_ij = row_i col_j / mean(row), and mean(row) = mean(col), which every shard knows.
    mean = pairs(col).mul(1 / C).clamp_min_(floor)
    col_root = root_(col.clamp_min(floor)).reciprocal_()
    squares = torch.zeros_like(mean)
    if norms:
        row_root = row_roots(row, mean, floor)
        sums = torch.zeros_like(row)
        for chunk in chunks(grad.shape, chunk_bytes):
            update = read(grad, chunk, scale).mul_(row_root[chunk]).mul_(col_root[chunk[0]].unsqueeze(-2))
            sums[chunk] = lane_sums(update.square_())
            del update
        squares = pairs(sums)
    return mean, col_root, squares


def unfactored_statistics(
    grad: Tensor,
    average: Tensor,
    keep: Tensor,
    scale: Tensor,
    new: float,
    eps: float,
    norms: bool,
    chunk_bytes: int,
) -> Tensor:
    grad, average, live, floor = matrices(grad), matrices(average), keep != 0, max(eps, SMALLEST)
    sums = torch.zeros(grad.shape[:2], dtype=scale.dtype, device=grad.device)
    for chunk in chunks(grad.shape, chunk_bytes):
        value = read(grad, chunk, scale).square_().add_(eps)
        move(average[chunk], value, new, live)
        del value
        if norms:
            root = root_(average[chunk].clamp_min(floor)).reciprocal_()
            sums[chunk] = lane_sums(root.mul_(read(grad, chunk, scale)).square_())
            del root
    return pairs(sums)


def adafactor(
    weight: Tensor,
    master: Tensor | None,
    momentum: Tensor | None,
    grad: Tensor,
    row: Tensor | None,
    mean: Tensor | None,
    col_root: Tensor | None,
    average: Tensor | None,
    squares: Tensor,
    keep: Tensor,
    scale: Tensor,
    lr: float,
    decay: float,
    largest: float,
    new_momentum: float,
    eps: float,
    stochastic: bool,
    key: int,
    first_row: int,
    chunk_bytes: int,
) -> None:
    weight, grad, live, floor = matrices(weight), matrices(grad), keep != 0, max(eps, SMALLEST)
    S, R, C = grad.shape
    master, momentum, average = (None if t is None else matrices(t) for t in (master, momentum, average))
    rounding = Rounding(stochastic, key, first_row, R, chunk_bytes)
    row_root = None if row is None else row_roots(row.view(S, R), mean, floor)
    factor_S11 = torch.ones_like(squares).view(S, 1, 1)
    if largest:
        factor_S11 = root_(squares.clone()).mul_(1 / largest).clamp_min_(1.0).reciprocal_().view(S, 1, 1)
    rate_S11 = factor_S11 * lr
    for chunk in chunks(grad.shape, chunk_bytes):
        update = read(grad, chunk, scale)
        if average is None:
            update.mul_(row_root[chunk]).mul_(col_root[chunk[0]].unsqueeze(-2))
        else:
            update.mul_(root_(average[chunk].clamp_min(floor)).reciprocal_())
        if momentum is None:
            update.mul_(rate_S11[chunk[0]])
        else:
            # Of updates without the learning rate, so that a schedule acts at once; rounded as the weights are.
            kept = momentum[chunk].to(update.dtype)
            update.mul_(factor_S11[chunk[0]]).sub_(kept).mul_(new_momentum).add_(kept)
            del kept
            momentum[chunk] = torch.where(live, rounding(update.clone(), chunk, MOMENTUM), momentum[chunk])
            update.mul_(lr)
        write(weight, master, chunk, update, decay, live, rounding)
        del update


# --- the others ------------------------------------------------------------------------------------------------------


def adamw(
    weight: Tensor,
    master: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    keep: Tensor,
    scale: Tensor,
    rate: float,
    decay: float,
    new1: float,
    new2: float,
    correction: float,
    eps: float,
    stochastic: bool,
    key: int,
    first_row: int,
    chunk_bytes: int,
) -> None:
    weight, grad, live = matrices(weight), matrices(grad), keep != 0
    m, v, master = matrices(exp_avg), matrices(exp_avg_sq), None if master is None else matrices(master)
    rounding = Rounding(stochastic, key, first_row, grad.shape[1], chunk_bytes)
    for chunk in chunks(grad.shape, chunk_bytes):
        g = read(grad, chunk, scale)
        root = root_(move(v[chunk], g.square(), new2, live).clone()).mul_(correction).add_(eps)
        update = move(m[chunk], g, new1, live).div(root).mul_(rate)
        del g, root
        write(weight, master, chunk, update, decay, live, rounding)
        del update


def adamw8bit(
    weight: Tensor,
    master: Tensor | None,
    exp_avg: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_root: Tensor,
    exp_avg_root_scale: Tensor,
    grad: Tensor,
    books: Tensor,
    keep: Tensor,
    scale: Tensor,
    rate: float,
    decay: float,
    new1: float,
    new2: float,
    correction: float,
    eps: float,
    stochastic: bool,
    key: int,
    first_row: int,
    chunk_bytes: int,
) -> None:
    weight, grad, live = matrices(weight), matrices(grad), keep != 0
    master = None if master is None else matrices(master)
    states = [matrices(t) for t in (exp_avg, exp_avg_scale, exp_avg_root, exp_avg_root_scale)]
    rounding = Rounding(stochastic, key, first_row, grad.shape[1], chunk_bytes)
    for chunk in chunks(grad.shape, chunk_bytes):
        g = read(grad, chunk, scale)
        root = _dequantise(*states[2:], chunk, books[2])
        root.square_()
        root_(root.add_(g.square().sub_(root).mul_(new2)))
        # The root, not the square, has the range that 8 bits can hold: v of an element 2000 times smaller than the
        # largest of its block would become 0 while its m does not, and m / eps is no update.
        _quantise(*states[2:], chunk, root, books[3, :255], live)
        m = _dequantise(*states[:2], chunk, books[0])
        m.add_(g.sub_(m).mul_(new1))
        del g
        _quantise(*states[:2], chunk, m, books[1, :255], live)
        update = m.div_(root.mul_(correction).add_(eps)).mul_(rate)
        del m, root
        write(weight, master, chunk, update, decay, live, rounding)
        del update


def _dequantise(codes: Tensor, scales: Tensor, chunk: Chunk, book: Tensor) -> Tensor:
    scale = scales[chunk]
    values = book[codes[chunk].int()]
    values.view(*scale.shape, -1).mul_(scale.unsqueeze(-1))
    return values


def _quantise(codes: Tensor, scales: Tensor, chunk: Chunk, value: Tensor, midpoints: Tensor, live: Tensor) -> None:
    codes, scales = codes[chunk], scales[chunk]
    blocks = value.view(*scales.shape, -1)
    largest = torch.linalg.vector_norm(blocks, math.inf, dim=-1).clamp_min_(1e-12)
    new = torch.bucketize(blocks / largest.unsqueeze(-1), midpoints, out_int32=True, right=True)
    codes.copy_(torch.where(live, new.view(codes.shape).to(torch.uint8), codes))
    scales.copy_(torch.where(live, largest, scales))


def sgd(
    weight: Tensor,
    master: Tensor | None,
    buffer: Tensor | None,
    grad: Tensor,
    keep: Tensor,
    scale: Tensor,
    lr: float,
    decay: float,
    momentum: float,
    stochastic: bool,
    key: int,
    first_row: int,
    chunk_bytes: int,
) -> None:
    weight, grad, live = matrices(weight), matrices(grad), keep != 0
    buffer, master = (None if t is None else matrices(t) for t in (buffer, master))
    rounding = Rounding(stochastic, key, first_row, grad.shape[1], chunk_bytes)
    for chunk in chunks(grad.shape, chunk_bytes):
        update = read(grad, chunk, scale)
        if buffer is not None:
            update += buffer[chunk] * momentum
            buffer[chunk] = torch.where(live, update, buffer[chunk])
        write(weight, master, chunk, update.mul_(lr), decay, live, rounding)
        del update
