"""Couplings as pairs of pure functions, forward and inverse, on int32 fixed-point streams, and the fused operations
made of them: plain PyTorch, which defines what the kernels compute.

A stream holds `value * 2**bits` in int32; `Grid` says how many bits. Additions are done on the integers, where they
form a group: what one pass adds the other takes away bit for bit, also when a value wraps around. Reading a stream
turns it into floats for a sublayer; a sublayer's result is rounded onto the grid before it is added.

    innovation     i = s_{k-1} - s_k - P_k(s_k)            what a linear predictor P cannot say about the past
                   s_{k+1} = s_k + f_k(s_k) + sign * (i >> m)         the m low bits of i are kept aside
                   (i in grid units of s_{k-1}, the rest in those of s_{k+1}: what that grid is finer, i weighs less)
    additive       y = x + F(.)                                       both halves of cross_branch

R_k of docs/how_it_works.md is `identity + P_k`: the identity part is taken on the integers and never rounded.

Reference: RevFFN, https://arxiv.org/abs/2512.20920 (cross_branch); BDIA, https://arxiv.org/abs/2407.09093 (R =
    identity, m = 1).
"""

# B = batch, T = tokens, D = hidden size; streams are (B, T, D) or, for cross_branch, (B, T, D / 2)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sums import pairs

CHANNEL_SEED, TOKEN_SEED, ODD_FACTOR = 0x5851F42D4C957F2D, 0x2545F4914F6CDD1D, 0x1B873593CC9E2D51
# Largest magnitude that counts as safe: one bit below the end of int32.
SATURATION = 2**30


class Grid:
    """How many binary digits one state's integers have after the point: `scale` is 2**digits and `step` its inverse,
    numbers, or (D,) float32 where channels differ.

    Args:
        bits: In all channels but the wide ones.
        wide: (D,) bool, on the streams' device, the channels with `wide_bits` digits; None where there are none.
        wide_bits: Not more than `bits`; None is `bits`.
    """

    def __init__(self, bits: int, wide: Tensor | None = None, wide_bits: int | None = None):
        self.bits, self.wide_bits = bits, bits if wide_bits is None else wide_bits
        self.wide = None if bits == self.wide_bits else wide
        self.scale: float | Tensor = 2.0**bits
        self.step: float | Tensor = 2.0**-bits
        if self.wide is not None:
            self.scale = torch.full_like(wide, 2.0**bits, dtype=torch.float32).masked_fill_(wide, 2.0**wide_bits)
            self.step = self.scale.reciprocal()
        self._vectors: tuple[Tensor, Tensor] | None = None
        self._beside: dict[Any, Tensor] = {}

    def vectors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """`scale` and `step` by channel of `like` (..., D): (D,) float32 each, on its device; made once."""
        if self._vectors is None:
            self._vectors = tuple(by_channel(value, like, torch.float32) for value in (self.scale, self.step))
        return self._vectors

    def finer_by_channel(self, other: Grid, like: Tensor) -> Tensor:
        """`finer_than` by channel of `like` (..., D): (D,) int32, made once."""
        key = other.bits, other.wide_bits
        if key not in self._beside:
            self._beside[key] = by_channel(self.finer_than(other), like, torch.int32)
        return self._beside[key]

    def gain_by_channel(self, past: Grid, m: int, like: Tensor) -> Tensor:
        """2**-m, and less where this grid is finer than `past`: (D,) float32, made once."""
        key = past.bits, past.wide_bits, m
        if key not in self._beside:
            self._beside[key] = 2.0**-m * past.vectors(like)[0] * self.vectors(like)[1]
        return self._beside[key]

    def finer_than(self, other: Grid) -> int | Tensor:
        """Digits that this grid has more than `other`, by channel (D,) int32 where they differ."""
        more, wide_more = self.bits - other.bits, self.wide_bits - other.wide_bits
        wide = other.wide if self.wide is None else self.wide
        return more if wide is None or more == wide_more else torch.where(wide, wide_more, more).int()


def by_channel(value: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(dtype)
    return torch.full((like.shape[-1],), value, dtype=dtype, device=like.device)


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """Round a floating-point tensor onto the grid: int32, same shape. float64 is rounded in float64, all else in
    float32."""
    if x.dtype == torch.float64:
        return torch.round(x * grid.scale).to(torch.int32)
    # float32 and int32 are of one size: the product is made and rounded where the result will be, so that nothing
    # else is allocated.
    stream = torch.empty_like(x, dtype=torch.int32)
    value = stream.view(torch.float32)
    value.copy_(x).mul_(grid.scale).round_()
    return stream.copy_(value)


def add_refined(target: Tensor, stream: Tensor, finer: int | Tensor) -> Tensor:
    """Add, in place, a stream to one on a grid that is `finer` by so many digits, at least 0, a number or (D,) int32.
    Exact."""
    if isinstance(finer, Tensor):
        return target.add_(stream << finer)
    return target.add_(stream, alpha=2**finer)


def dequantize(stream: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The value of an int32 stream in `dtype`. Rounds where `dtype` has fewer digits than the stream."""
    # By a power of two: rounding before the product is rounding after it, where the range is that of float32.
    wide = dtype if dtype in (torch.float64, torch.bfloat16) else torch.float32
    return stream.to(wide).mul_(grid.step).to(dtype)


def pack_bits(values: Tensor, m: int) -> Tensor:
    """Pack the m low bits of every element into m/8 bytes per element.

    Args:
        values: Integers in [0, 2**m), (..., D), uint8.
        m: 1 to 4. Three bits are packed as two and one.

    Returns:
        uint8, 1-D. A byte holds channels that lie D * m / 8 apart; where D is no multiple of 8 / m, elements that lie
        as far apart in the flattened tensor, padded to whole bytes.
    """
    if m == 3:
        return torch.cat([pack_bits(values & 3, 2), pack_bits(values >> 2, 1)])
    per_byte = 8 // m
    rows = values.reshape(-1, values.shape[-1])
    if rows.shape[1] % per_byte:
        rows = rows.reshape(1, -1)
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % per_byte))
    planes = rows.view(rows.shape[0], per_byte, -1)
    packed = planes[:, 0].clone()
    for i in range(1, per_byte):
        packed |= planes[:, i] << (i * m)
    return packed.view(-1)


def unpack_bits(packed: Tensor, m: int, shape: torch.Size) -> Tensor:
    """Inverse of `pack_bits`: uint8 of `shape`."""
    numel, D = shape.numel(), shape[-1]
    if m == 3:
        split = num_packed(shape, 2)
        low, high = unpack_bits(packed[:split], 2, shape), unpack_bits(packed[split:], 1, shape)
        return low | (high << 2)
    per_byte, mask = 8 // m, (1 << m) - 1
    rows = packed.view(1 if D % per_byte else numel // D, 1, -1)
    shifts = torch.arange(0, 8, m, dtype=torch.uint8, device=packed.device).view(1, per_byte, 1)
    return ((rows >> shifts) & mask).view(-1)[:numel].view(shape)


def num_packed(shape: torch.Size, m: int) -> int:
    """Bytes that `pack_bits` returns for values of `shape`."""
    if m == 3:
        return num_packed(shape, 2) + num_packed(shape, 1)
    return -(-shape.numel() * m // 8)


def innovation_forward(
    prev: Tensor,
    cur: Tensor,
    updated: Tensor,
    predicted: Tensor | None,
    sign: Tensor | None,
    m: int,
    finer: int | Tensor = 0,
) -> tuple[Tensor, Tensor | None]:
    """One step of the innovation coupling on int32 streams of one shape (B, T, D).

        next = updated + sign * ((prev - (cur >> finer) - predicted) >> m)

    Args:
        prev, cur: s_{k-1} and s_k, each on its own grid.
        updated: s_k + f_k(s_k) on the grid of s_{k+1}.
        predicted: P_k(s_k) on the grid of s_{k-1}, or None for the identity predictor.
        sign: +1 or -1, int32, broadcastable (B, 1, 1), or None for +1.
        m: The gain is 2**-m, and less by what the grid of s_{k+1} is finer than that of s_{k-1}.
        finer: Digits that the grid of s_k has more than that of s_{k-1}, at least 0: a number or (D,) int32.

    Returns:
        (next, bits): s_{k+1}, and the packed low bits that `innovation_inverse` needs (None for m = 0).
    """
    innovation = past_difference(prev, cur, finer)
    if predicted is not None:
        innovation -= predicted
    bits = None
    if m:
        # The cast keeps the low 8 bits.
        bits = pack_bits(innovation.to(torch.uint8).bitwise_and_((1 << m) - 1), m)
        innovation >>= m
    if sign is not None:
        innovation *= sign
    return innovation.add_(updated), bits


def innovation_inverse(
    following: Tensor,
    cur: Tensor,
    updated: Tensor,
    predicted: Tensor | None,
    sign: Tensor | None,
    bits: Tensor | None,
    m: int,
    finer: int | Tensor = 0,
) -> Tensor:
    """Recover `prev` of `innovation_forward` from `following` (its `next`), bit for bit."""
    prev = following - updated
    if sign is not None:
        prev *= sign
    if m:
        prev <<= m
        prev |= unpack_bits(bits, m, prev.shape)
    prev += cur if is_zero(finer) else cur >> finer
    if predicted is not None:
        prev += predicted
    return prev


def past_difference(prev: Tensor, cur: Tensor, finer: int | Tensor) -> Tensor:
    """prev - (cur >> finer), with one allocation."""
    if is_zero(finer):
        return prev - cur
    coarse = cur >> finer
    return torch.sub(prev, coarse, out=coarse)


def is_zero(finer: int | Tensor) -> bool:
    return not isinstance(finer, Tensor) and finer == 0


def checksum(stream: Tensor, first_row: int = 0) -> Tensor:
    """64-bit checksum of an int32 stream (..., D): a 0-dim int64 tensor, on the stream's device, without
    synchronisation.

    Two neighbouring elements are one 64-bit number. Every number is weighted with an odd one that depends on its
    channels and its token, and everything is added modulo 2**64, so that the result does not depend on the order of
    summation, and no change of a single number goes unseen. The checksum of a stream is the sum of those of its
    parts, each with `first_row`, the number of tokens before it.
    """
    D = stream.shape[-1]
    rows = stream.reshape(-1, D)
    if D % 2:
        rows = torch.nn.functional.pad(rows, (0, 1))
    pairs = rows.view(torch.int64)
    # High bits are folded into low ones first: of what differs only there a product modulo 2**64 keeps little.
    mixed = pairs >> 32
    mixed ^= pairs
    mixed *= odd_numbers(pairs.shape[1], CHANNEL_SEED, stream.device)
    rows = mixed.sum(-1)
    rows ^= rows >> 32
    return (rows * odd_numbers(rows.shape[0], TOKEN_SEED, stream.device, first_row)).sum()


def odd_numbers(count: int, seed: int, device: torch.device, first: int = 0) -> Tensor:
    """int64, spread over 64 bits. Not proportional to their place: small changes in two places could cancel."""
    numbers = torch.arange(first + 1, first + count + 1, dtype=torch.int64, device=device) * seed
    numbers ^= numbers >> 31
    numbers *= ODD_FACTOR
    numbers ^= numbers >> 29
    return numbers | 1


# --- fused operations ------------------------------------------------------------------------------------------------


def note(flags: Tensor, *updates: Tensor, stream: Tensor | None = None) -> None:
    """Write into `flags` (2,) int32: [0] becomes 1 where an update is not finite, [1] the largest magnitude of a
    stream so far in grid units (~x instead of -x: it does not overflow)."""
    for update in updates:
        # One pass without a temporary; both ends are NaN where an element is.
        low, high = torch.aminmax(update)
        flags[0] |= ~(torch.isfinite(low) & torch.isfinite(high))
    if stream is not None:
        low, high = torch.aminmax(stream)
        torch.maximum(flags[1], torch.maximum(~low, high), out=flags[1])


def stream_check(stream: Tensor, flags: Tensor) -> Tensor:
    note(flags, stream=stream)
    return checksum(stream)


def add_update(update: Tensor, now: Tensor, scale: Tensor, finer: Tensor, flags: Tensor) -> Tensor:
    note(flags, update)
    return add_refined(quantize_by(update, scale), now, finer)


def quantize_by(x: Tensor, scale: Tensor) -> Tensor:
    """`quantize` with the grid's scale by channel."""
    if x.dtype == torch.float64:
        return torch.round(x * scale).to(torch.int32)
    stream = torch.empty_like(x, dtype=torch.int32)
    value = stream.view(torch.float32)
    value.copy_(x).mul_(scale).round_()
    return stream.copy_(value)


def innovation_move(
    middle: Tensor,
    prev: Tensor,
    cur: Tensor,
    mlp: Tensor,
    predicted: Tensor | None,
    sign: Tensor | None,
    past_scale: Tensor,
    next_scale: Tensor,
    finer: Tensor,
    m: int,
    first_row: int,
    flags: Tensor,
) -> tuple[Tensor, Tensor]:
    note(flags, mlp, *([] if predicted is None else [predicted]))
    updated = quantize_by(mlp, next_scale).add_(middle)
    on_grid = None if predicted is None else quantize_by(predicted, past_scale)
    following, bits = innovation_forward(prev, cur, updated, on_grid, sign, m, finer)
    middle.copy_(following)
    note(flags, stream=middle)
    return middle.new_empty(0, dtype=torch.uint8) if bits is None else bits, checksum(middle, first_row)


def innovation_undo(
    out: Tensor,
    following: Tensor,
    cur: Tensor,
    middle: Tensor,
    mlp: Tensor,
    predicted: Tensor | None,
    sign: Tensor | None,
    bits: Tensor,
    past_scale: Tensor,
    next_scale: Tensor,
    finer: Tensor,
    m: int,
    first_row: int,
) -> Tensor:
    updated = quantize_by(mlp, next_scale).add_(middle)
    on_grid = None if predicted is None else quantize_by(predicted, past_scale)
    out.copy_(innovation_inverse(following, cur, updated, on_grid, sign, bits, m, finer))
    return checksum(out, first_row)


def innovation_gradients(
    grad: Tensor, grad_middle: Tensor, gain: Tensor, dtype: torch.dtype, has_prediction: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_past = grad * gain
    grad_predicted = -grad_past.to(dtype) if has_prediction else grad.new_empty(0, dtype=dtype)
    return grad_past, grad_middle - grad_past, grad_middle.to(dtype), grad_predicted


def tree_sum(x: Tensor) -> Tensor:
    """`pairs` along the last dimension, padded to a power of two as a kernel's row is."""
    width = 1 << (x.shape[-1] - 1).bit_length()
    return pairs(x if width == x.shape[-1] else torch.nn.functional.pad(x, (0, width - x.shape[-1])))


def read_norm(
    stream: Tensor, step: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, rounds_first: bool, want_value: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    value = stream.to(wide).mul_(step).to(dtype)
    x = value.to(wide)
    # In float64 and rounded once: the float32 root of a CPU's vector library is not always the nearest.
    rstd = 1.0 / torch.sqrt((tree_sum(x * x) * (1 / x.shape[-1]) + eps).double()).to(wide)
    # Where nobody else has it, what is an operation's own is written over: fresh memory is what costs on a CPU.
    normed = torch.mul(x, rstd.unsqueeze(-1), out=None if want_value else x)
    if rounds_first:
        normed = normed.to(dtype).to(wide)
    normed = normed.mul_(weight.to(wide)).to(dtype)
    return value if want_value else value.new_empty(0), normed, rstd


ROWS_PER_PARTIAL = 16
"""Tokens whose weight gradients of a norm are added one by one, in float32, before these sums are."""


def read_norm_backward(
    grad_normed: Tensor,
    grad_value: Tensor | None,
    grad_through: Tensor | None,
    grad_also: Tensor | None,
    stream: Tensor,
    step: Tensor,
    weight: Tensor,
    rstd: Tensor,
    rounds_first: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    dtype, D = grad_normed.dtype, stream.shape[-1]
    wide = torch.promote_types(dtype, torch.float32)
    x = stream.to(wide).mul_(step).to(dtype).to(wide).mul_(rstd.unsqueeze(-1))
    dy = grad_normed.to(wide)
    dn = dy * weight.to(wide)
    products = dn * x
    mean = tree_sum(products) * (1 / D)
    grad = dn.sub_(torch.mul(x, mean.unsqueeze(-1), out=products)).mul_(rstd.unsqueeze(-1))
    for more in (grad_value, grad_through, grad_also):
        if more is not None:
            grad += more
    if not need_weight:
        return grad, weight.new_empty(0)
    products = torch.mul(dy, x.to(dtype).to(wide) if rounds_first else x, out=products).view(-1, D)
    products = torch.nn.functional.pad(products, (0, 0, 0, -products.shape[0] % ROWS_PER_PARTIAL))
    products = products.view(-1, ROWS_PER_PARTIAL, D)
    partials = products[:, 0].clone()
    for i in range(1, ROWS_PER_PARTIAL):
        partials += products[:, i]
    return grad, sum_partials(partials).to(weight.dtype)


def sum_partials(partials: Tensor) -> Tensor:
    return partials.sum(0)
