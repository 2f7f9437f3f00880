"""Couplings as pairs of pure functions, forward and inverse, on int32 fixed-point streams.

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

import torch
from torch import Tensor

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

    def finer_than(self, other: Grid) -> int | Tensor:
        """Digits that this grid has more than `other`, by channel (D,) int32 where they differ."""
        more, wide_more = self.bits - other.bits, self.wide_bits - other.wide_bits
        wide = other.wide if self.wide is None else self.wide
        return more if wide is None or more == wide_more else torch.where(wide, wide_more, more).int()


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
        values: Integers in [0, 2**m), any shape, uint8.
        m: 1 to 4. Three bits are packed as two and one.

    Returns:
        uint8, 1-D, `ceil(numel / 4) ...` rounded up to whole bytes per plane.
    """
    if m == 3:
        return torch.cat([pack_bits(values & 3, 2), pack_bits(values >> 2, 1)])
    per_byte = 8 // m
    flat = values.reshape(-1)
    if flat.numel() % per_byte:
        flat = torch.nn.functional.pad(flat, (0, per_byte - flat.numel() % per_byte))
    planes = flat.view(per_byte, -1)
    packed = planes[0].clone()
    for i in range(1, per_byte):
        packed |= planes[i] << (i * m)
    return packed


def unpack_bits(packed: Tensor, m: int, shape: torch.Size) -> Tensor:
    """Inverse of `pack_bits`: uint8 of `shape`."""
    numel = shape.numel()
    if m == 3:
        split = -(-numel // 4)
        low, high = unpack_bits(packed[:split], 2, shape), unpack_bits(packed[split:], 1, shape)
        return low | (high << 2)
    mask = (1 << m) - 1
    return torch.cat([(packed >> (i * m)) & mask for i in range(8 // m)])[:numel].view(shape)


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


def checksum(stream: Tensor) -> Tensor:
    """64-bit checksum of an int32 stream (..., D): a 0-dim int64 tensor, on the stream's device, without
    synchronisation.

    Two neighbouring elements are one 64-bit number. Every number is weighted with an odd one that depends on its
    channels and its token, and everything is added modulo 2**64, so that the result does not depend on the order of
    summation, and no change of a single number goes unseen.
    """
    D = stream.shape[-1]
    rows = stream.reshape(-1, D)
    if D % 2:
        rows = torch.nn.functional.pad(rows, (0, 1))
    pairs = rows.view(torch.int64)
    # High bits are folded into low ones first: of what differs only there a product modulo 2**64 keeps little.
    mixed = pairs >> 32
    mixed ^= pairs
    mixed *= odd_numbers(pairs.shape[1], 0x5851F42D4C957F2D, stream.device)
    rows = mixed.sum(-1)
    rows ^= rows >> 32
    return (rows * odd_numbers(rows.shape[0], 0x2545F4914F6CDD1D, stream.device)).sum()


def odd_numbers(count: int, seed: int, device: torch.device) -> Tensor:
    """int64, spread over 64 bits. Not proportional to their place: small changes in two places could cancel."""
    numbers = torch.arange(1, count + 1, dtype=torch.int64, device=device) * seed
    numbers ^= numbers >> 31
    numbers *= 0x1B873593CC9E2D51
    numbers ^= numbers >> 29
    return numbers | 1
