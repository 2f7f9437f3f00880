"""The Triton kernels of the optimizer give the reference's bits, on ragged shapes, in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so all comparisons run in one process of their own. It shows
indexing, masks, orders of summation, noise and float32 arithmetic. test_kernels_compile.py reads off the compiled code
that the same arithmetic reaches a GPU; benchmarks/kernels_update.py repeats the comparison there.

Run: pytest tests/ops/test_update_kernels.py (needs triton)
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ADAFACTOR = [(5,), (1, 37), (3, 9, 20), (70, 67)]
# name: options of the optimizer, weights, rounding, shapes
CASES = {
    "adafactor": (dict(rule="adafactor", weight_decay=0.1), "bfloat16", "stochastic", ADAFACTOR),
    "adafactor, float32": (dict(rule="adafactor"), "float32", "stochastic", [(7,), (2, 9, 20)]),
    "adafactor, master": (dict(rule="adafactor"), "bfloat16", "master", [(7,), (2, 9, 20)]),
    "adafactor, nearest": (dict(rule="adafactor", weight_decay=0.1), "bfloat16", "nearest", [(2, 9, 20)]),
    "adafactor, momentum": (dict(rule="adafactor", momentum=0.9), "bfloat16", "stochastic", [(7,), (2, 9, 20)]),
    "adafactor, momentum, float32": (dict(rule="adafactor", momentum=0.9), "float32", "stochastic", [(2, 9, 20)]),
    "adafactor, no clipping": (dict(rule="adafactor", clip_threshold=None), "bfloat16", "nearest", [(7,), (2, 9, 20)]),
    "adamw": (dict(rule="adamw", weight_decay=0.1), "bfloat16", "stochastic", [(5,), (3, 9, 20), (35, 67)]),
    "adamw, float32": (dict(rule="adamw", weight_decay=0.1), "float32", "stochastic", [(2, 9, 20)]),
    "adamw, master": (dict(rule="adamw"), "bfloat16", "master", [(2, 9, 20)]),
    "adamw8bit": (dict(rule="adamw8bit", weight_decay=0.1), "bfloat16", "stochastic", [(3, 11, 64)]),
    "adamw8bit, float32": (dict(rule="adamw8bit"), "float32", "nearest", [(11, 96)]),
    "adamw8bit, master": (dict(rule="adamw8bit"), "bfloat16", "master", [(11, 96)]),
    "sgd": (dict(rule="sgd", weight_decay=0.1), "bfloat16", "stochastic", [(5,), (2, 9, 20), (5, 64)]),
    "sgd, momentum": (dict(rule="sgd", momentum=0.9), "bfloat16", "stochastic", [(2, 9, 20)]),
    "sgd, momentum, float32": (dict(rule="sgd", momentum=0.9), "float32", "nearest", [(2, 9, 20)]),
}
BAD = ["adafactor, momentum", "adamw", "adamw8bit", "sgd, momentum"]
# A constant of the kernels that is wrong, and the case that must notice.
MUTATIONS = {
    "LANES": (32, "adafactor, float32"),
    "ROW_LANES": (16, "adafactor, float32"),
    "SLOTS": (4, "adamw"),
    "ROW_BLOCK": (64, "adafactor, float32"),  # changes nothing: shows that equality is not by chance
}


def step(options, dtype, rounding, shapes, bad=False):
    """Weights, states and sums of squares after one step from a state that is not zero.

    bad: The first parameter's gradient holds NaN at its end.
    """
    from revffn.optim import OptimizerInBackward

    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, dtype)
    weights = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    optimizer = OptimizerInBackward(
        weights, lr=0.02, max_grad_norm=50.0, rounding=rounding, seed=11, chunk_bytes=4000, **options
    )
    found = []
    for i, weight in enumerate(weights):
        state = optimizer.state_of(weight)
        for name in sorted(state):
            if torch.is_tensor(state[name]):
                if state[name].dtype == torch.uint8:
                    state[name].random_(0, 256, generator=generator)
                else:
                    state[name].uniform_(0.5, 1.5, generator=generator)
                found.append(state[name])
        state["step"] = 3
        # Sizes from 0.1 to 10, so that an order of summation shows.
        spread = 10 ** (2 * torch.rand(weight.shape, generator=generator) - 1)
        weight.grad = (torch.randn(weight.shape, generator=generator) * spread).to(dtype)
        if bad and i == 0:
            weight.grad.view(-1)[-1] = float("nan")
        before = [t.clone() for t in (weight.detach(), *found)]
        with torch.no_grad():
            optimizer.step_parameter(weight)
        if bad:
            assert all(map(same, before, [weight.detach(), *found]))
    return [w.detach() for w in weights] + found + list(optimizer._stepped.values())


def both(*args, **options):
    """`step` by the reference and by the kernels."""
    from revffn.ops import dispatch

    found = []
    for choice in ("torch", "triton"):
        dispatch.implementation.cache_clear()
        dispatch.requested.cache_clear()
        os.environ["REVFFN_KERNELS"] = choice
        assert dispatch.implementation("cpu") == choice
        found.append(step(*args, **options))
    return found


def same(a, b):
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


def compare():
    """Prints one line for every comparison."""
    torch.set_num_threads(1)
    from revffn.ops import update
    from revffn.ops.update import kernels, reference

    # Several programs of every kind on shapes that the interpreter gets through in time.
    kernels.TILE, reference.SEGMENT, kernels.FLAT, kernels.AVERAGES, update.QUANTISED_FROM = 128, 64, 2, 64, 1

    def tell(name, *args, **options):
        equal = all(map(same, *both(*args, **options)))
        print(f"{name}: {'equal' if equal else 'different'}", flush=True)

    for name, case in CASES.items():
        tell(name, *case)
    for name in BAD:
        rule, dtype, rounding, _ = CASES[name]
        tell(f"{name}, not finite", rule, dtype, rounding, [(2, 9, 32)] * 2, bad=True)
    for constant, (value, name) in MUTATIONS.items():
        right = getattr(kernels, constant)
        setattr(kernels, constant, value)
        tell(f"{constant} = {value}", *CASES[name][:3], [(70, 67)])
        setattr(kernels, constant, right)


@pytest.fixture(scope="module")
def lines():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("optional package triton; ends when it is installed")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    return dict(line.rsplit(": ", 1) for line in run.stdout.splitlines() if ": " in line)


@pytest.mark.parametrize("name", [*CASES, *(f"{name}, not finite" for name in BAD)])
def test_kernels_give_the_references_bits(lines, name):
    assert lines[name] == "equal"


@pytest.mark.parametrize("constant", MUTATIONS)
def test_a_wrong_kernel_is_noticed(lines, constant):
    expected = "equal" if constant == "ROW_BLOCK" else "different"
    assert lines[f"{constant} = {MUTATIONS[constant][0]}"] == expected


def test_importing_revffn_does_not_import_the_kernels():
    """Triton itself may be there: torch.distributed.tensor imports it where it is installed."""
    code = "import sys, revffn.optim; sys.exit('revffn.ops.update.kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


if __name__ == "__main__":
    compare()
