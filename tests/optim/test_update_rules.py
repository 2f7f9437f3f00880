"""The update rules equal their references, on chunks of any size; rounding.

Run: pytest tests/optim/test_update_rules.py (adamw8bit needs torchao)
"""

import pytest
import torch
from helpers import LiveBytes, build, rules
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from revffn.ops.update import make_code_books
from revffn.ops.update.reference import noise, stochastic_round
from revffn.optim import OptimizerInBackward

# --- the rules ---------------------------------------------------------------------------------------------------


class Shapes(nn.Module):
    """Every shape that occurs: vector, one-row and ordinary matrices, experts, a scalar."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        shapes = [(37,), (1, 40), (24, 40), (5, 12, 20), ()]
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(s).to(dtype)) for s in shapes)

    def forward(self, step=0, scale=1.0):
        """A loss whose gradients are random, different in every step."""
        generator = torch.Generator().manual_seed(step)
        draw = [torch.randn(w.shape, generator=generator).to(w.dtype) for w in self.weights]
        return scale * sum((w * d).sum() for w, d in zip(self.weights, draw, strict=True))


def run_shapes(optimizer, model, num_steps=5, scale=lambda step: 1.0):
    for step in range(num_steps):
        model(step, scale(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_close(model, reference, rtol=1e-5, atol=1e-6):
    for a, b in zip(model.weights, reference.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torch_sgd(momentum):
    model, reference = Shapes(), Shapes()
    run_shapes(OptimizerInBackward(model.parameters(), rule="sgd", lr=0.1, momentum=momentum), model)
    run_shapes(torch.optim.SGD(reference.parameters(), lr=0.1, momentum=momentum), reference)
    assert_close(model, reference)


def test_adamw_is_torch_adamw():
    model, reference = Shapes(), Shapes()
    run_shapes(OptimizerInBackward(model.parameters(), rule="adamw", lr=0.01, weight_decay=0.1), model)
    run_shapes(torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.1), reference)
    assert_close(model, reference)


def test_adamw8bit_follows_adamw():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.zeros(64, 256)) for _ in range(2)]
    optimizers = [build(rule, [w], lr=1e-3) for rule, w in zip(("adamw8bit", "adamw"), weights, strict=True)]
    # Elements a million times smaller than their block's largest: eight bits must not turn them into large updates.
    spread = torch.logspace(0, -6, 256)
    for step in range(20):
        gradient = torch.randn(64, 256, generator=torch.Generator().manual_seed(step)) * spread
        for weight, optimizer in zip(weights, optimizers, strict=True):
            (weight * gradient).sum().backward()
            optimizer.step()
    state = optimizers[0].state[weights[0]]
    assert state["exp_avg"].dtype == state["exp_avg_root"].dtype == torch.uint8
    error = (weights[0] - weights[1])[:, :128].norm() / weights[1][:, :128].norm()
    assert error < 0.1  # observed 0.03
    assert weights[0].abs().max() < 3 * weights[1].abs().max()


def adafactor_by_hand(weight, gradients, lr, weight_decay):
    """One matrix or vector, float64, straight from the paper."""
    w, row, col, v = weight.double().clone(), 0.0, 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        g, beta = g.double(), 1 - t**-0.8
        square = g * g + 1e-30
        if g.dim() == 2:
            row = beta * row + (1 - beta) * square.mean(1)
            col = beta * col + (1 - beta) * square.mean(0)
            v = torch.outer(row, col) / row.mean()
        else:
            v = beta * v + (1 - beta) * square
        u = g / v.sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item())
        w = w - lr * (u + weight_decay * w)
    return w


def test_adafactor_by_hand():
    model, reference = Shapes(), Shapes()

    # Gradients that grow, so that updates are clipped; expert 3 gets none in the first steps.
    def scale(step):
        return 4.0**step

    gradients = []
    for step in range(5):
        model.zero_grad()
        model(step, scale(step)).backward()
        gradients.append([w.grad.clone() for w in model.weights])
    model.zero_grad()
    optimizer = OptimizerInBackward(model.parameters(), rule="adafactor", lr=0.01, weight_decay=0.1)
    run_shapes(optimizer, model, scale=scale)
    for i, weight in enumerate(reference.weights):
        own = [g[i] for g in gradients]
        if weight.dim() == 3:
            experts = range(weight.shape[0])
            expected = torch.stack([adafactor_by_hand(weight[e], [g[e] for g in own], 0.01, 0.1) for e in experts])
        else:
            expected = adafactor_by_hand(weight, own, 0.01, 0.1)
        torch.testing.assert_close(model.weights[i].double(), expected, rtol=1e-5, atol=1e-6)


def test_experts_do_not_disturb_each_other():
    """A spike in one expert leaves the updates of the others as they are; an expert without tokens stays."""
    weights = [nn.Parameter(torch.ones(4, 8, 16)) for _ in range(2)]
    for weight, spike in zip(weights, (1.0, 1e4), strict=True):
        optimizer = OptimizerInBackward([weight], lr=0.1)
        for step in range(3):
            gradient = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(step))
            gradient[0] *= spike if step == 2 else 1.0
            gradient[3] = 0
            (weight * gradient).sum().backward()
            optimizer.step()
    assert torch.equal(weights[0][1:], weights[1][1:])
    assert torch.equal(weights[0][3], torch.ones(8, 16))
    assert not torch.equal(weights[0][0], weights[1][0])


def test_momentum_is_kept_in_bf16_and_follows_the_schedule():
    weight = nn.Parameter(torch.zeros(8, 16))
    optimizer = OptimizerInBackward([weight], lr=0.1, momentum=0.5, rounding="nearest", clip_threshold=None)
    update = torch.ones(8, 16)  # g / sqrt(g^2)
    for lr, expected in ((0.1, 0.05), (0.0, 0.05), (1.0, 0.05 + 0.875)):
        optimizer.param_groups[0]["lr"] = lr
        (weight * update).sum().backward()
        optimizer.step()
        torch.testing.assert_close(weight.detach(), -expected * update)
    assert optimizer.state[weight]["exp_avg"].dtype == torch.bfloat16


@rules
@pytest.mark.parametrize("chunk_bytes", [4, 1000, 4000])
def test_chunks_do_not_change_the_update(rule, chunk_bytes):
    torch.manual_seed(0)
    models = [Shapes(), Shapes()]
    for model, size in zip(models, (2**20, chunk_bytes), strict=True):
        run_shapes(
            build(rule, model.parameters(), chunk_bytes=size, rounding="nearest"), model, scale=lambda s: 4.0**s
        )
    assert_close(*models)


@rules
def test_a_chunk_bounds_the_memory(rule):
    """On fake tensors: temporaries stay within six chunks; after a step only weights and state are alive."""
    chunk_bytes = 2**18
    with FakeTensorMode():
        shapes = [(3, 256, 512), (40, 32, 128), (2000, 128), (2048,)]
        weights = [nn.Parameter(torch.empty(shape, dtype=torch.bfloat16)) for shape in shapes]
        optimizer = build(rule, weights, chunk_bytes=chunk_bytes, max_grad_norm=1.0, weight_decay=0.1)
        if rule == "adamw8bit":
            optimizer._code_books[weights[0].device] = make_code_books(weights[0].device)
        with LiveBytes() as memory:
            for tensor in (*weights, *optimizer._code_books.values()):
                memory.add(tensor)
            for step in range(2):
                for weight in weights:
                    # The gradient as autograd hands it over; steps 1 and 2 differ in that the state exists.
                    start = memory.live
                    weight.grad = torch.empty_like(weight)
                    held = memory.live - start
                    memory.peak = memory.live
                    optimizer._step_in_backward(weight)
                    state = sum(
                        t.untyped_storage().nbytes() for t in optimizer.state[weight].values() if torch.is_tensor(t)
                    )
                    new_state = state if step == 0 else 0
                    assert memory.peak - start - held - new_state <= 6 * chunk_bytes
                    assert abs(memory.live - start - new_state) < 4096
                optimizer.step()
    assert optimizer.grad_norm is None


# --- rounding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.0 + 2**-10, -(1.0 + 3 * 2**-10), 0.02 + 1e-5, -3e-30, 2.0 - 2**-12])
def test_stochastic_rounding_is_unbiased(value):
    repeats = 100_000
    x = torch.full((repeats,), value)
    bits = noise(123, 0, 0, repeats, 1, x.device).view(repeats)
    rounded = stochastic_round(x.clone(), bits).double()
    neighbours = rounded.unique()
    assert len(neighbours) == 2 and neighbours[0] < x[0].double() < neighbours[1]
    gap = neighbours[1] - neighbours[0]
    share = (x[0].double() - neighbours[0]) / gap
    error = rounded.mean() - x[0].double()
    assert abs(error) < 4 * gap * (share * (1 - share) / repeats).sqrt()


def test_stochastic_rounding_leaves_bf16_values_alone():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(stochastic_round(x.float(), noise(123, 0, 0, 1, 10_000, x.device).view(-1)), x)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "master"])
def test_a_small_learning_rate(rounding):
    """200 steps of 1e-5 on weights of 0.02 (spacing 1.2e-4): stochastic and master arrive, nearest stalls."""
    weight = nn.Parameter(torch.full((64, 64), 0.02, dtype=torch.bfloat16))
    start = weight.detach().double().mean()
    optimizer = OptimizerInBackward([weight], lr=1e-5, rounding=rounding)
    for _ in range(200):
        weight.float().sum().backward()
        optimizer.step()
    moved = (start - weight.detach().double().mean()).item()
    if rounding == "nearest":
        assert moved == 0
    else:
        # master: to the nearest bf16. stochastic: standard deviation of the mean below 1e-5.
        assert abs(moved - 200 * 1e-5) < (6.2e-5 if rounding == "master" else 4e-5)
    if rounding == "master":
        assert optimizer.state[weight]["master"].dtype == torch.float32
