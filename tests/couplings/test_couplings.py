"""Couplings are undone bit for bit, side bits are packed without loss, and the checksum sees every change."""

from __future__ import annotations

import itertools

import pytest
import torch

from revffn.ops.streams import (
    Grid,
    add_refined,
    checksum,
    dequantize,
    innovation_forward,
    innovation_inverse,
    pack_bits,
    quantize,
    unpack_bits,
)

INT32 = torch.iinfo(torch.int32)
SHAPES = [(1, 1, 1), (1, 1, 5), (2, 63, 7), (1, 127, 32), (3, 8, 12)]
EXTREMES = [INT32.min, INT32.min + 1, INT32.max, INT32.max - 1, -1, 0, 1, 2**30, -(2**30)]


def random_stream(shape, bits: int = 31) -> torch.Tensor:
    return torch.randint(-(2**bits), 2**bits, shape, dtype=torch.int64).to(torch.int32)


def signs(batch: int) -> list[torch.Tensor | None]:
    mixed = torch.tensor([1, -1] * batch, dtype=torch.int32)[:batch].view(-1, 1, 1)
    return [None, mixed, -mixed]


# --- innovation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [10, 24, 31], ids=lambda b: f"2^{b}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("m", range(5))
def test_innovation_is_undone_bit_for_bit(m, shape, bits):
    """Small values, large ones, and values all over int32, where every addition wraps around."""
    prev, cur, updated, predicted = (random_stream(shape, bits) for _ in range(4))
    by_channel = torch.randint(0, 9, shape[-1:], dtype=torch.int32)
    for sign, prediction, finer in itertools.product(signs(shape[0]), (None, predicted), (0, 3, by_channel)):
        copies = [x.clone() for x in (prev, cur, updated)]
        following, packed = innovation_forward(prev, cur, updated, prediction, sign, m, finer)
        assert (packed is None) == (m == 0) and following.dtype == torch.int32
        back = innovation_inverse(following, cur, updated, prediction, sign, packed, m, finer)
        assert torch.equal(back, copies[0])
        assert all(torch.equal(x, y) for x, y in zip((prev, cur, updated), copies, strict=True)), "inputs were changed"


@pytest.mark.parametrize("m", range(5))
@pytest.mark.parametrize("with_prediction", [False, True])
def test_innovation_at_the_ends_of_int32(m, with_prediction):
    """Every combination of extreme values, both signs."""
    grid = torch.tensor(list(itertools.product(EXTREMES, repeat=4)), dtype=torch.int64).to(torch.int32)
    prev, cur, updated, predicted = (column.reshape(1, 9, -1).contiguous() for column in grid.T)
    for sign in signs(1):
        prediction = predicted if with_prediction else None
        following, packed = innovation_forward(prev, cur, updated, prediction, sign, m)
        assert torch.equal(innovation_inverse(following, cur, updated, prediction, sign, packed, m), prev)


@pytest.mark.parametrize("finer", [0, 2, torch.tensor([0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.int32)], ids=str)
@pytest.mark.parametrize("m", range(5))
def test_innovation_is_the_documented_function(m, finer):
    """Against exact integers, without wrap-around."""
    shape = (2, 5, 8)
    prev, cur, updated, predicted = (random_stream(shape, 20) for _ in range(4))
    sign = torch.tensor([1, -1], dtype=torch.int32).view(2, 1, 1)
    following, _ = innovation_forward(prev, cur, updated, predicted, sign, m, finer)
    wide = [x.long() for x in (prev, cur, updated, predicted)]
    coarse = torch.floor(wide[1].double() / 2.0**finer).long()
    expected = wide[2] + sign * torch.div(wide[0] - coarse - wide[3], 2**m, rounding_mode="floor")
    assert torch.equal(following.long(), expected)


@pytest.mark.parametrize("m", range(1, 5))
def test_every_side_bit_matters(m):
    """One flipped bit in the stack changes exactly one element of the past."""
    prev, cur, updated = (random_stream((1, 3, 16), 20) for _ in range(3))
    following, packed = innovation_forward(prev, cur, updated, None, None, m)
    changed = []
    for byte, bit in itertools.product(range(len(packed)), range(8)):
        disturbed = packed.clone()
        disturbed[byte] ^= 1 << bit
        back = innovation_inverse(following, cur, updated, None, None, disturbed, m)
        changed.append(int((back != prev).sum()))
    assert changed.count(1) == 3 * 16 * m
    assert set(changed) <= {0, 1}


def test_depth():
    """Sixty steps forth and back, m = 4, with wrap-around in most of them."""
    states = [random_stream((2, 9, 16)), random_stream((2, 9, 16))]
    updates = [random_stream((2, 9, 16)) for _ in range(60)]
    kept = []
    for update in updates:
        sign = 2 * torch.randint(0, 2, (2, 1, 1), dtype=torch.int32) - 1
        following, packed = innovation_forward(states[-2], states[-1], states[-1] + update, None, sign, 4)
        states.append(following)
        kept.append((sign, packed))
    prev, cur = states[-2], states[-1]
    for step in reversed(range(60)):
        sign, packed = kept[step]
        prev, cur = innovation_inverse(cur, prev, prev + updates[step], None, sign, packed, 4), prev
        assert torch.equal(prev, states[step])


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 2), (1, 1, 3), (1, 1, 4), (1, 1, 7), (1, 1, 8), (1, 1, 9)], ids=str)
@pytest.mark.parametrize("m", range(1, 5))
def test_packing_loses_nothing(m, shape):
    values = torch.randint(0, 2**m, shape, dtype=torch.uint8)
    original = values.clone()
    packed = pack_bits(values, m)
    assert packed.dtype == torch.uint8 and packed.dim() == 1
    assert torch.equal(unpack_bits(packed, m, values.shape), original) and torch.equal(values, original)
    n = values.numel()
    assert len(packed) == {1: -(-n // 8), 2: -(-n // 4), 3: -(-n // 4) - (-n // 8), 4: -(-n // 2)}[m]


@pytest.mark.parametrize("m", range(1, 5))
def test_packing_of_a_view(m):
    """A slice of tokens is not contiguous."""
    values = torch.randint(0, 2**m, (2, 10, 6), dtype=torch.uint8)[:, 3:8]
    assert torch.equal(unpack_bits(pack_bits(values, m), m, values.shape), values)


# --- the grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_quantize_rounds_to_the_nearest(dtype):
    x = torch.randn(1000).mul(50).to(dtype)
    stream = quantize(x, Grid(14))
    assert stream.dtype == torch.int32
    assert (stream.double() * 2.0**-14 - x.double()).abs().max() <= 2.0**-15
    back = dequantize(stream, Grid(14), dtype)
    assert back.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert ((back.double() - x.double()).abs() <= 2.0**-15 + eps * x.double().abs()).all()


def test_values_on_the_grid_survive():
    stream = random_stream((4, 5, 6), 23)
    assert torch.equal(quantize(dequantize(stream, Grid(14), torch.float32), Grid(14)), stream)
    stream = random_stream((4, 5, 6), 31)
    assert torch.equal(quantize(dequantize(stream, Grid(14), torch.float64), Grid(14)), stream)


def test_dequantize_is_reproducible_beyond_float32():
    """Values with more digits than float32 has round, always the same way."""
    stream = random_stream((4, 5, 6), 31)
    first, again = (dequantize(x, Grid(14), torch.bfloat16) for x in (stream, stream.clone()))
    assert torch.equal(first, again)


# --- grids -----------------------------------------------------------------------------------------------------------


def test_a_grid_with_wide_channels_is_two_grids():
    wide = torch.tensor([True, False, False, True, False])
    grid, coarse = Grid(14, wide, 9), Grid(12, wide, 9)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(3, 4, 5).mul(50).to(dtype)
        stream = quantize(x, grid)
        assert torch.equal(stream[..., wide], quantize(x[..., wide], Grid(9)))
        assert torch.equal(stream[..., ~wide], quantize(x[..., ~wide], Grid(14)))
        back = dequantize(stream, grid, dtype)
        assert back.dtype == dtype and torch.equal(back[..., wide], dequantize(stream[..., wide], Grid(9), dtype))
        assert torch.equal(back[..., ~wide], dequantize(stream[..., ~wide], Grid(14), dtype))
    assert grid.finer_than(coarse).tolist() == [0, 2, 2, 0, 2] and grid.finer_than(grid) == 0
    assert Grid(14).finer_than(Grid(12)) == 2
    # The same value, on the finer grid.
    stream = random_stream((3, 4, 5), 20)
    refined = add_refined(torch.zeros_like(stream), stream, grid.finer_than(coarse))
    assert torch.equal(dequantize(refined, grid, torch.float64), dequantize(stream, coarse, torch.float64))


# --- checksum --------------------------------------------------------------------------------------------------------


def test_checksum_sees_every_single_bit():
    stream = random_stream((2, 3, 5))
    true = checksum(stream)
    assert true.dtype == torch.int64 and true.dim() == 0
    for element, bit in itertools.product(range(stream.numel()), range(32)):
        flipped = stream.clone()
        flipped.view(-1)[element] ^= torch.tensor(1 << bit if bit < 31 else INT32.min, dtype=torch.int32)
        assert checksum(flipped) != true, (element, bit)


@pytest.mark.parametrize("amount", [1, 2, 3, 2**8, 2**16, 2**24, 2**30])
def test_checksum_sees_two_changes_that_cancel_in_a_sum(amount):
    """One element up and another down, for every pair of channels in a token and of tokens in a channel."""
    stream = random_stream((1, 6, 12), 20)
    true = checksum(stream)
    for i, j in itertools.permutations(range(12), 2):
        changed = stream.clone()
        changed[0, 2, i] += amount
        changed[0, 2, j] -= amount
        assert checksum(changed) != true, ("channels", i, j)
    for i, j in itertools.permutations(range(6), 2):
        changed = stream.clone()
        changed[0, i, 7] += amount
        changed[0, j, 7] -= amount
        assert checksum(changed) != true, ("tokens", i, j)


def test_checksum_sees_two_flipped_sign_bits():
    """The highest bit in two channels of one token: products modulo 2**32 alone would cancel half of the time."""
    stream = random_stream((1, 4, 12))
    true = checksum(stream)
    missed = 0
    for i, j in itertools.combinations(range(12), 2):
        changed = stream.clone()
        changed[0, 1, i] ^= INT32.min
        changed[0, 1, j] ^= INT32.min
        missed += int(checksum(changed) == true)
    assert missed == 0


@pytest.mark.parametrize("places", [(0, 2, 4), (1, 3, 5), (0, 1, 2), (4, 6, 8)], ids=str)
@pytest.mark.parametrize("pattern", [(1, -2, 1), (2, -4, 2)], ids=str)
def test_checksum_sees_second_differences(places, pattern):
    """Weights that grow linearly with the position would let these cancel."""
    stream = random_stream((1, 12, 12), 20)
    true = checksum(stream)
    across_channels, across_tokens = stream.clone(), stream.clone()
    for place, amount in zip(places, pattern, strict=True):
        across_channels[0, 3, place] += amount
        across_tokens[0, place, 3] += amount
    assert checksum(across_channels) != true
    assert checksum(across_tokens) != true


def test_checksum_sees_order():
    stream = random_stream((2, 7, 12))
    true = checksum(stream)
    for dim, size in ((0, 2), (1, 7), (2, 12)):
        for i, j in itertools.combinations(range(size), 2):
            order = list(range(size))
            order[i], order[j] = j, i
            assert checksum(stream.index_select(dim, torch.tensor(order))) != true, (dim, i, j)


def test_checksum_does_not_depend_on_the_order_of_summation():
    """Exact integers: by hand, by threads, from a view, all the same number."""
    stream = random_stream((3, 40, 64))
    true = checksum(stream)
    assert checksum(stream.reshape(1, 120, 64)) == true
    assert checksum(stream.transpose(0, 1).contiguous().transpose(0, 1)) == true
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert checksum(stream) == true
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
def test_checksum_is_the_same_on_a_gpu():
    stream = random_stream((3, 400, 256))
    assert checksum(stream.cuda()).cpu() == checksum(stream)


def test_random_disturbances_are_all_seen():
    """Ten thousand draws of a few small changes anywhere: not one collision."""
    stream = random_stream((1, 16, 32), 20)
    true = checksum(stream)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10_000):
        n = int(torch.randint(1, 5, (), generator=generator))
        where = torch.randperm(512, generator=generator)[:n]
        amount = torch.randint(1, 4, (n,), generator=generator, dtype=torch.int32)
        amount *= 2 * torch.randint(0, 2, (n,), generator=generator, dtype=torch.int32) - 1
        changed = stream.clone()
        changed.view(-1)[where] += amount
        assert checksum(changed) != true, (where, amount)
