"""The iteration that cross_branch's left stream comes back by, and the bits that make it exact, on their own."""

import pytest
import torch

from revffn.couplings.cross_branch.fixed_point import (
    WHOLE,
    WIDTHS,
    lack_of,
    low_bits,
    made_good,
    solve,
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
    assert found.iterations == len(calls) < 60
    assert (found.x - x).abs().max() <= 2 + 2 * strength / (1 - strength)
    assert found.contraction <= max(strength, 0.1)
    again = solve(function, y, GRID, 2.0, found.iterations, look=False)
    assert torch.equal(again.x, found.x), "as many evaluations, unseen, end at the same place"


def test_acceleration_takes_fewer_evaluations():
    function, _, y, _ = linear(0.95)
    plain, two, many = (solve(function, y, GRID, 2.0, 400, depth=depth).iterations for depth in (1, 2, 8))
    assert many < two < plain


def test_what_does_not_contract_is_kept():
    function, x, y, calls = linear(3.0)
    found = solve(function, y, GRID, 2.0, 6)
    assert found.iterations == len(calls) == 6
    lack = lack_of(found.x, x)
    assert lack.width == WHOLE and torch.equal(lack.tensors[0], x)


def test_not_looking_takes_all_evaluations():
    function, _, y, calls = linear(0.1)
    solve(function, y, GRID, 2.0, 9, look=False, depth=2)
    assert len(calls) == 9


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


NUM_ROWS = 40


def off_by(errors: dict[int, int]):
    """A solution (4, 10, H) that is off by so much in one element of some tokens, and x."""
    numbers = torch.Generator().manual_seed(2)
    x = torch.randint(-(2**31), 2**31 - 1, (4, NUM_ROWS // 4, H), generator=numbers).to(torch.int32)
    found = x.clone()
    for token, error in errors.items():
        found.view(-1, H)[token, token % H] += error
    return found, x


@pytest.mark.parametrize(
    "errors, width, rows",
    [
        ({}, 4, []),
        ({0: 7, 5: -7}, 4, []),
        ({0: 8}, 4, [0]),  # one row is less than another four bits of all
        ({k: 8 for k in range(20)}, 8, []),
        ({**{k: 100 for k in range(20)}, 39: 2**30}, 8, [39]),
        ({k: -30_000 for k in range(30)}, 16, []),
        ({**{k: 30_000 for k in range(30)}, 31: -(2**31), 32: 2**20}, 16, [31, 32]),
        ({k: 2**20 for k in range(36)}, WHOLE, []),
    ],
)
def test_the_least_is_kept(errors, width, rows):
    found, x = off_by(errors)
    before = x.clone()
    lack = lack_of(found, x)
    assert (lack.width, lack.num_rows) == (width, len(rows))
    if width == WHOLE:
        return
    assert lack.tensors[1].tolist() == rows
    assert torch.equal(made_good(found, width, lack.tensors), before) and torch.equal(x, before)
    size = sum(t.numel() * t.element_size() for t in lack.tensors)
    assert size == NUM_ROWS * H * width // 8 + len(rows) * (8 + 4 * H) < 4 * NUM_ROWS * H


def test_a_width_that_is_given_is_taken():
    found, x = off_by({3: 2**20})
    lack = lack_of(found, x, 8)
    assert (lack.width, lack.num_rows) == (8, 0) and not torch.equal(made_good(found, 8, lack.tensors), x)
