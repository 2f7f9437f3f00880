"""The iteration that cross_branch's left stream comes back by, and the bits that make it exact, on their own."""

import pytest
import torch

from revffn.couplings.cross_branch.fixed_point import (
    MARGIN,
    WIDTHS,
    choose_canaries,
    covering,
    low_bits,
    settle,
    solve,
    width_for,
    with_low_bits,
)
from revffn.ops.streams import Grid, quantize

GRID = Grid(10)
H = 24


def linear(strength: float, seed: int = 0):
    """F(x) = a linear map with eigenvalues up to `strength`, and tokens (2, 5, H) with x and y = x + F(x)."""
    numbers = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(H, H, generator=numbers, dtype=torch.float64))
    matrix = (basis * torch.linspace(-strength, strength, H, dtype=torch.float64)) @ basis.T
    calls = []

    def function(x):
        calls.append(x)
        return (x.double() / 2**10) @ matrix.T

    x = torch.randint(-(2**20), 2**20, (2, 5, H), generator=numbers, dtype=torch.int32)
    y = x + quantize(function(x), GRID)
    calls.clear()
    return function, x, y, calls


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.9])
def test_a_contraction_is_solved(strength):
    function, x, y, calls = linear(strength)
    found = solve(function, y, GRID, 2.0, 100)
    assert found.iterations == len(calls) < 60 and found.unconverged == 0
    assert (found.x - x).abs().max() <= 2 + 2 * strength / (1 - strength)
    assert found.contraction <= max(strength, 0.1)
    settled = settle(function, found.x, y, GRID, 500)
    assert (settled - x).abs().max() <= 1 + strength / (1 - strength) / 2  # half a unit is what F is rounded by


def test_acceleration_takes_fewer_evaluations():
    function, _, y, _ = linear(0.95)
    plain, two, many = (solve(function, y, GRID, 2.0, 400, depth=depth).iterations for depth in (1, 2, 8))
    assert many < two < plain


def test_what_does_not_contract_is_said():
    function, x, y, calls = linear(3.0)
    found = solve(function, y, GRID, 2.0, 6)
    assert found.iterations == len(calls) == 6 and found.unconverged > 0.5
    assert width_for(int((found.x - x).abs().max())) is None


@pytest.mark.parametrize("most, evaluations", [(9, 4), (3, 3)])
def test_not_looking_fills_the_memory(most, evaluations):
    function, _, y, calls = linear(0.1)
    solve(function, y, GRID, 2.0, most, look=False, depth=2)
    assert len(calls) == evaluations


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("channels", [8, 7])
def test_low_bits_make_an_error_good(width, channels):
    numbers = torch.Generator().manual_seed(1)
    x = torch.randint(-(2**31), 2**31 - 1, (3, 5, channels), generator=numbers).to(torch.int32)
    x[0, 0, :4] = torch.tensor([0, -1, 2**31 - 1, -(2**31)], dtype=torch.int64).to(torch.int32)
    kept, half = low_bits(x, width), 1 << (width - 1)
    assert kept.numel() * kept.element_size() == -(-x.numel() * width // 8)
    for error in (0, 1, -1, half - 1, -half + 1):
        assert torch.equal(with_low_bits(x + error, kept, width), x)
    assert not torch.equal(with_low_bits(x + 2 * half, kept, width), x)


def test_widths_leave_a_margin():
    for width in WIDTHS:
        most = (1 << (width - 1)) // MARGIN
        assert width_for(most) == width and width_for(most + 1) != width
    assert width_for(0) == WIDTHS[0] and width_for(2**20) is None


@pytest.mark.parametrize("count, shape", [(6, (3, 2)), (2, (2, 1)), (1, (1, 1)), (1000, (3, 11))])
def test_canaries_are_spread(count, shape):
    stream = torch.arange(3 * 11 * 2).view(3, 11, 2)
    canaries = choose_canaries(stream, count)
    found = canaries.of(stream)
    assert found.shape == (*shape, 2)
    assert torch.equal(found.flatten(0, 1), stream.view(-1, 2)[canaries.rows(11)])
    assert choose_canaries(stream, 0) is None


def test_covering():
    tokens = torch.zeros(3, 4, dtype=torch.bool)
    tokens[0, 1] = tokens[2, 3] = True
    found = covering(tokens)
    assert found.sequences.tolist() == [0, 2] and found.positions.tolist() == [1, 3]
    stream = torch.zeros(3, 4)
    found.put(stream, torch.ones(2, 2))
    assert stream.sum() == 4 and found.of(stream).sum() == 4
