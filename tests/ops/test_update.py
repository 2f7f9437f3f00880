"""The optimizer's operations in PyTorch: noise, orders of summation, and bits that neither chunks nor shards change.

tests/optim/test_update_rules.py holds the rules against float64 and torch.optim; test_update_kernels.py the kernels
against what is here.

Run: pytest tests/ops/test_update.py (adamw8bit needs torchao)
"""

import numpy as np
import pytest
import torch
from helpers import RULES, LiveBytes, build, rules
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from revffn.ops import update
from revffn.ops.update import reference

SHAPES = [(37,), (1, 40), (70, 150), (5, 12, 20), (3, 64, 32), (131, 3), (2, 3, 5, 7), ()]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def same(a, b):
    """Equal bits, NaN and signs of zero included."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def wild(shape, seed=0, dtype=torch.float32):
    """Numbers from 1e-3 to 1e3, so that another order of summation gives other bits."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (6 * torch.rand(shape, generator=generator) - 3)
    return (torch.randn(shape, generator=generator) * size).to(dtype)


# --- noise -----------------------------------------------------------------------------------------------------------

PI = 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344
ONES = (0xFFFFFFFF,) * 4


@pytest.mark.parametrize(
    "rounds, counter, key, expected",
    [
        (10, (0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, ONES, ONES[:2], "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (10, PI, (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
        (7, (0,) * 4, (0, 0), "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, ONES, ONES[:2], "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (7, PI, (0xA4093822, 0x299F31D0), "4dfccaba 190a87f0 c47362ba b6b5242a"),
    ],
)
def test_philox_is_random123s(rounds, counter, key, expected):
    """Known answers of the authors' library, examples/kat_vectors."""
    words = reference.philox([torch.tensor([c]) for c in counter], key[0] | key[1] << 32, rounds)
    assert " ".join(f"{int(word) & 0xFFFFFFFF:08x}" for word in words) == expected


def philox_by_hand(counter, key, rounds=7):
    c, (k0, k1), mask = list(counter), key, (1 << 32) - 1
    for _ in range(rounds):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k0, b & mask, (a >> 32) ^ c[3] ^ k1, a & mask]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c


@pytest.mark.parametrize("first_row", [0, 5, 2**32 - 1])
@pytest.mark.parametrize("C", [1, 7, 8, 20])
def test_noise_of_an_element(C, first_row):
    key, stream, Q = 0x0123456789ABCDEF, 1, -(-C // 8)
    bits = reference.noise(key, stream, first_row, 3, C, torch.device("cpu"))
    for row in range(3):
        for col in range(C):
            slot, lane = divmod(col, Q)
            place = (first_row + row) * Q + lane
            words = philox_by_hand((place % 2**32, place >> 32, stream, 0), (key % 2**32, key >> 32))
            assert bits[row, col] == words[slot // 2] >> 16 * (slot % 2) & 0xFFFF
    again = [reference.noise(key, stream, first_row + row, 1, C, torch.device("cpu"), block=1) for row in range(3)]
    assert torch.equal(bits, torch.cat(again))


def test_noise_is_uniform_and_unlike():
    bits = reference.noise(7, 0, 0, 500, 300, torch.device("cpu")).double() / 2**16
    assert abs(bits.mean() - 0.5) < 4 / (12 * bits.numel()) ** 0.5
    assert abs(bits.var() - 1 / 12) < 0.001
    others = (7, 1, 0), (8, 0, 0), (7, 0, 1)
    for key, stream, first_row in others:
        other = reference.noise(key, stream, first_row, 500, 300, torch.device("cpu")).double() / 2**16
        assert abs(torch.corrcoef(torch.stack([bits.flatten(), other.flatten()]))[0, 1]) < 0.012


# --- orders of summation ---------------------------------------------------------------------------------------------


def add_pairs(numbers):
    while len(numbers) > 1:
        numbers = [sum(numbers[i : i + 2], np.float32(0)) for i in range(0, len(numbers), 2)]
    return numbers[0]


def in_lanes(numbers, lanes):
    totals = [np.float32(0)] * lanes
    for i, number in enumerate(numbers):
        totals[i % lanes] += number
    return add_pairs(totals)


@pytest.mark.parametrize("shape", [(3, 9, 20), (2, 70, 150), (1, 1, 5), (1, 4100, 3)], ids=str)
def test_sums_are_in_the_order_that_is_promised(shape):
    grad = wild(shape)
    square, rows, cols = update.grad_squares(grad, True, 2**20)
    squares = grad.numpy() ** 2
    expected = np.array([[in_lanes(row, 64) for row in matrix] for matrix in squares])
    assert np.array_equal(rows.numpy(), expected)
    assert square.item() == add_pairs([add_pairs(list(matrix)) for matrix in expected])
    for matrix, found in zip(squares, cols.numpy(), strict=True):
        assert len(found) == -(-shape[1] // 4096)
        for i, segment in enumerate(found):
            part = matrix[4096 * i : 4096 * (i + 1)]
            assert np.array_equal(segment, [in_lanes(column, 32) for column in part.T])
    total = update.sum_segments(cols).numpy()
    assert np.allclose(total, squares.astype(np.float64).sum(1), rtol=1e-5)
    if shape[1] > 4096:
        assert np.array_equal(total[0], cols[0, 0].numpy() + cols[0, 1].numpy())
        assert not np.array_equal(total, squares.sum(1))  # other orders are seen


def test_roots_are_correctly_rounded():
    x = wild((200, 301)).abs_()
    assert torch.equal(reference.root_(x.clone()), torch.from_numpy(np.sqrt(x.double().numpy()).astype(np.float32)))


# --- what must not change a bit ------------------------------------------------------------------------------------


def train(rule, shapes=SHAPES, num_steps=3, dtype=torch.bfloat16, **options):
    """Weights and states of parameters of many shapes."""
    weights = [nn.Parameter(wild(shape, dtype=dtype)) for shape in shapes]
    optimizer = build(rule, weights, max_grad_norm=3.0, weight_decay=0.1, **options)
    for step in range(num_steps):
        for i, weight in enumerate(weights):
            weight.grad = wild(weight.shape, seed=97 * step + i + 1, dtype=dtype)
        optimizer.step()
    found = [w.detach() for w in weights]
    return found + [v for w in weights for _, v in sorted(optimizer.state[w].items()) if torch.is_tensor(v)]


@rules
@pytest.mark.parametrize("rounding", ["stochastic", "master"])
def test_chunks_do_not_change_a_bit(rule, rounding, monkeypatch):
    monkeypatch.setattr(reference, "SEGMENT", 64)
    monkeypatch.setattr(update, "QUANTISED_FROM", 1)
    whole = train(rule, rounding=rounding)
    for chunk_bytes in (4, 1000, 4000):
        assert all(map(same, whole, train(rule, rounding=rounding, chunk_bytes=chunk_bytes)))
    assert not all(map(same, whole, train(rule, rounding=rounding, lr=0.7)))


def masks():
    return torch.ones(()), torch.full((), 0.75)


def rounding(first_row, chunk_bytes=2**20):
    return True, 0x1234567890ABCDEF, first_row, chunk_bytes


def adafactor_step(weight, grad, first_row):
    state = torch.full(weight.shape[:-1], 0.5), torch.full((*weight.shape[:-2], weight.shape[-1]), 0.5)
    momentum = torch.zeros_like(weight)
    S, R, C = weight.shape
    _, rows, cols = update.grad_squares(grad, True, 2**20)
    numbers = 0.3, 1e-30, R, True, 2**20
    mean, root, squares = update.factored_statistics(grad, rows, cols, *state, *masks(), *numbers)
    update.adafactor(
        weight, None, momentum, grad, state[0], mean, root, None, squares, *masks(), 0.1, 0.01, (R * C) ** 0.5, 0.2,
        1e-30, *rounding(first_row),
    )  # fmt: skip
    return [weight, momentum, *state]


def adamw_step(weight, grad, first_row):
    m, v = torch.zeros(weight.shape), torch.zeros(weight.shape)
    update.adamw(weight, None, m, v, grad, *masks(), 0.1, 0.01, 0.1, 0.001, 30.0, 1e-8, *rounding(first_row))
    return [weight, m, v]


def sgd_step(weight, grad, first_row):
    buffer = torch.zeros(weight.shape)
    update.sgd(weight, None, buffer, grad, *masks(), 0.1, 0.01, 0.9, *rounding(first_row))
    return [weight, buffer]


@pytest.mark.parametrize("step", [adafactor_step, adamw_step, sgd_step])
def test_shards_are_the_whole(step):
    shape = (5, 12, 20)
    weight, grad = wild(shape, dtype=torch.bfloat16), wild(shape, seed=1, dtype=torch.bfloat16)
    whole = step(weight.clone(), grad, 0)
    shards = [step(weight[a:b].clone(), grad[a:b], 12 * a) for a, b in ((0, 2), (2, 5))]
    assert all(same(a, torch.cat(parts)) for a, parts in zip(whole, zip(*shards, strict=True), strict=True))
    assert not same(step(weight[2:].clone(), grad[2:], 0)[0], shards[1][0])  # first_row acts


def test_rows_of_a_matrix_on_shards():
    weight, grad = wild((24, 20), dtype=torch.bfloat16), wild((24, 20), seed=1, dtype=torch.bfloat16)
    whole = adamw_step(weight.clone(), grad, 0)[0]
    parts = [adamw_step(weight[a:b].clone(), grad[a:b], a)[0] for a, b in ((0, 7), (7, 7), (7, 24))]
    assert same(whole, torch.cat(parts))


@rules
def test_float32_follows_float64(rule):
    """One step from equal weights with equal gradients."""
    shapes = [(24, 40), (5, 12, 20), (37,)]
    truth, ours = (train(rule, shapes, 1, dtype)[: len(shapes)] for dtype in (torch.float64, torch.float32))
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6 * b.abs().max().item())


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("square, kept", [(4.0, 1.0), (float("nan"), 0.0), (float("inf"), 0.0)])
@pytest.mark.parametrize("before", [0.0, 1.0])
def test_judge(square, kept, before):
    keep, scale = update.judge(torch.tensor(square), torch.tensor(before), 1.0, 0.5)
    assert keep == kept * before and scale == (0.5 if square == 4 else 1.0)
    assert update.judge(torch.tensor(4.0), torch.ones(()), 0.0, 0.0)[1] == 1
    assert update.judge(torch.tensor(4.0), torch.ones(()), 1.0, 8.0)[1] == 0.125
    assert update.judge(torch.tensor(0.25), torch.ones(()), 1.0, 0.5)[1] == 1


@rules
@pytest.mark.parametrize("kind", ["stochastic", "master", "float32"])
def test_every_bit_stays_after_a_bad_gradient(rule, kind, monkeypatch):
    """Weights and states hold NaN and -0, which an addition of zero would change."""
    monkeypatch.setattr(update, "QUANTISED_FROM", 1)
    dtype, rounding = (torch.float32, "nearest") if kind == "float32" else (torch.bfloat16, kind)
    weights = [nn.Parameter(wild(s, dtype=dtype)) for s in ((5,), (3, 12, 32), (24, 64))]
    optimizer = build(rule, weights, rounding=rounding, weight_decay=0.1)
    for weight in weights:
        weight.grad = wild(weight.shape, dtype=dtype)
    optimizer.step()
    with torch.no_grad():
        tensors = [v for w in weights for v in (w, *optimizer.state[w].values()) if torch.is_tensor(v)]
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.view(-1)[0], tensor.view(-1)[1] = float("nan"), -0.0
        before = [t.clone() for t in tensors]
        for weight in weights:
            weight.grad = torch.full_like(weight, float("inf"))
            optimizer.step_parameter(weight)
    assert all(map(same, before, tensors))


# --- operations ------------------------------------------------------------------------------------------------------


@rules
def test_few_operations_for_a_parameter(rule, monkeypatch):
    monkeypatch.setattr(update, "QUANTISED_FROM", 1)
    for shape in [(64, 64), (3, 8, 32), (5,)]:
        weight = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
        optimizer = build(rule, [weight], max_grad_norm=1.0, weight_decay=0.1)
        for _ in range(2):  # the first step makes the state
            weight.grad = torch.ones_like(weight)
            seen = []

            class Count(TorchDispatchMode):
                def __torch_dispatch__(self, func, types, args=(), kwargs=None, seen=seen):
                    seen.append(str(func))
                    return func(*args, **(kwargs or {}))

            with Count(), torch.no_grad():
                optimizer.step_parameter(weight)
            optimizer.step()
        assert len(seen) <= 8, seen
        assert sum(name.startswith("revffn.update_") for name in seen) >= 3


def outputs(factored):
    grad = torch.randn(3, 70, 20)
    square, rows, cols = update.grad_squares(grad, factored, 2**20)
    keep, scale = update.judge(square, torch.ones(()), 1.0, 0.0)
    found = [square, rows, cols, keep, scale]
    if factored:
        state = torch.ones(3, 70), torch.ones(3, 20)
        found += update.factored_statistics(grad, rows, cols, *state, keep, scale, 0.5, 1e-30, 70, True, 2**20)
    else:
        state = torch.ones(3, 70, 20)
        found.append(update.unfactored_statistics(grad, state, keep, scale, 0.5, 1e-30, True, 2**20))
    return found


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_fake_outputs_are_like_real_ones(factored, implementation, monkeypatch):
    """`triton`: what the operations' own fakes say; `torch`: the reference runs on fake tensors."""
    real = outputs(factored)
    monkeypatch.setattr(update.dispatch, "implementation", lambda device: implementation)
    with FakeTensorMode():
        fake = outputs(factored)
    for a, b in zip(real, fake, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()


@pytest.mark.parametrize("rule", [*RULES, "unfactored"])
@pytest.mark.parametrize("rounding", ["stochastic", "master"])
@pytest.mark.parametrize("shape", [(3, 256, 512), (4000, 64)], ids=str)
def test_fake_tensors_show_the_references_memory(rule, rounding, shape, monkeypatch):
    """A simulation sees as many temporaries as the reference holds, and none where kernels run."""
    chunk_bytes, peaks = 2**18, {}
    own = {name: getattr(update, name) for name in update.__all__ if hasattr(reference, name)}
    for kind in ("shown", "reference", "triton"):
        for name, operation in own.items():
            monkeypatch.setattr(update, name, getattr(reference, name) if kind == "reference" else operation)
        implementation = "triton" if kind == "triton" else "torch"
        monkeypatch.setattr(update.dispatch, "implementation", lambda device, choice=implementation: choice)
        with FakeTensorMode():
            weight = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16))
            group = {"params": [weight], "factored": rule != "unfactored", "weight_decay": 0.1}
            optimizer = build(
                "adafactor" if rule == "unfactored" else rule, [group], rounding=rounding, chunk_bytes=chunk_bytes
            )
            for _ in range(2):
                weight.grad = torch.empty_like(weight)
                with LiveBytes() as memory, torch.no_grad():
                    for tensor in (weight, weight.grad, *optimizer._code_books.values()):
                        memory.add(tensor)
                    for tensor in optimizer.state[weight].values():
                        if torch.is_tensor(tensor):
                            memory.add(tensor)
                    start = memory.peak = memory.live
                    optimizer.step_parameter(weight)
                optimizer._stepped.clear()
        peaks[kind] = (memory.peak - start) / chunk_bytes
    assert 0.45 * peaks["shown"] <= peaks["reference"] <= peaks["shown"] + 0.15
    assert peaks["triton"] < 0.15


@rules
def test_kernels_need_little_memory(rule, monkeypatch):
    """Beside the state, half a percent of the largest parameter of Qwen1.5-MoE's layers."""
    monkeypatch.setattr(update.dispatch, "implementation", lambda device: "triton")
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(60, 2816, 2048, dtype=torch.bfloat16))
        optimizer = build(rule, [weight])
        optimizer.state_of(weight)
        weight.grad = torch.empty_like(weight)
        with LiveBytes() as memory, torch.no_grad():
            for tensor in (weight, weight.grad, *optimizer.state[weight].values()):
                if torch.is_tensor(tensor):
                    memory.add(tensor)
            start = memory.live
            optimizer.step_parameter(weight)
        assert memory.peak - start < 0.005 * weight.nbytes


def test_autograd_sees_that_the_weight_changed():
    for rule in RULES:
        weight = nn.Parameter(torch.ones(64, 64))
        optimizer = build(rule, [weight])
        loss = (weight * weight).sum()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
