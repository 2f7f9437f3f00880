"""The experts' Triton kernels give the reference's result, in Triton's interpreter, on tiny ragged shapes.

One process of its own runs this file (Triton reads TRITON_INTERPRET when it is imported): every case once with the
kernels as they are, and once with each of `BREAKS`, which must be noticed. float32 and bf16 results are compared bit
for bit. For that the reference takes `exp` from NumPy as the interpreter does; PyTorch's, and a GPU's, may differ in
the last bit. `erf` is compared within a few units in the last place.
"""

# Lambdas are called at once.
# ruff: noqa: B023
from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

# What is broken on purpose in the kernels' text, and the operation that must be noticed to be wrong.
BREAKS = {
    "row stride": ("gather", "out_ptr + row * D + cols", "out_ptr + row * (D - 1) + cols"),
    "order of k": ("combine", "total = total + term", "total = total"),
    "bias of another expert": ("combine", "bias_ptr + expert * D", "bias_ptr + (expert ^ 1) * D"),
    "row mask": ("gate", "inside[:, None] & (cols < I)[None, :]", "(rows < S - 1)[:, None] & (cols < I)[None, :]"),
    "column mask": ("gate_backward", "& (cols < I)[None, :]", "& (cols < I - 1)[None, :]"),
    "clamped gradient": ("gate_backward", "(up_in > limit) | (up_in < -limit)", "up_in > limit"),
    "weight of another choice": ("gate", "weight_ptr + choice", "weight_ptr + rows"),
    "first row of an expert": ("row_sums", "mask=expert > 0", "mask=expert > 1"),
    "order of lanes": (
        "row_dots",
        "before + pair_sums(total, ROWS, LANES)",
        "before + pair_sums(tl.reshape(tl.permute(tl.reshape(total, (ROWS, 2, LANES // 2)), (0, 2, 1)), "
        "(ROWS, LANES)), ROWS, LANES)",
    ),
    "end of a sum": ("sum", "mask = at < N", "mask = at < N - 1"),
    "end of an expert's rows": ("products", "inside = (k < end - start)[:, None]", "inside = (k < BK)[:, None]"),
    "what was there": ("products", "if not BEGINS:", "if BEGINS:"),
    "column of blocks": ("products", "right, m, n + BN, M, N", "right, m, n, M, N"),
    "low bits": ("products", "tl.store(low_ptr + at, low, mask=mask)", "tl.store(low_ptr + at, low ^ 1, mask=mask)"),
    "one rounding at the end": ("products", "bf16_bits(part) >> 16", "part.to(tl.int32, bitcast=True) >> 16"),
    "rounding": ("sum", "round_to(total, grad_ptr.dtype.element_ty)", "total.to(grad_ptr.dtype.element_ty)"),
}  # fmt: skip


class Stop(Exception):
    pass


def cases(reference, kernels, only: str | None = None) -> dict[str, bool]:
    """Whether each operation's kernel gives the reference's bits. With `only`, up to that operation's first wrong
    bit."""
    same: dict[str, bool] = {}

    def compare(name: str, run, bits: bool = True) -> None:
        """`run(module)` -> tensors."""
        if only not in (None, name):
            return
        pairs = zip(run(kernels), run(reference), strict=True)
        for a, b in pairs:
            assert a.dtype == b.dtype and a.shape == b.shape
            rtol = 1e-5 if a.itemsize == 4 else 1e-2
            good = torch.equal(a, b) if bits else torch.allclose(a, b, rtol=rtol, atol=1e-5)
            same[name] = same.get(name, True) and good
            if only and not good:
                raise Stop

    T, K, E, D, I = 5, 3, 5, 72, 21  # noqa: E741
    torch.manual_seed(0)
    index = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)])
    index[index == 1] = 4  # nobody chooses expert 1
    order, place, offs, expert = reference.expert_sort(index, E)

    def dots(module):
        total = torch.full((T, K), 0.5)
        module.expert_row_dots(rows, bias, expert, order, total)
        return (total,)

    def gate_backward(module, in_place: bool):
        taken, given = d.clone(), gate_up.clone()
        out = given if in_place else torch.zeros_like(given)
        return module.expert_gate_backward(taken, given, out, *args, in_place), taken, out

    def sums(module):
        added, finished = total.clone(), grad.clone()
        module.add_to_sum(added, grad)
        module.finish_sum(total.clone(), finished)
        assert finished.isnan().sum() == 1
        return added.nan_to_num(12345.0), finished.nan_to_num(12345.0)

    def products(module):
        made = []
        for begins, last in ((True, False), (False, False), (False, True)):
            high, low = start_high.clone(), start_low.clone()
            module.add_product_to_sum(*pair, ends, high, low, begins, last)
            made.append(high.float() if last else reference.join_24(high, low))
        assert module is not reference or all(found.isnan().any() for found in made[1:])
        return [found.nan_to_num(12345.0, 1e39, -1e39) for found in made]

    # Whole numbers: their sums are the same in every order; the interpreter's products know no bf16. Rows behind the
    # last expert's belong to nobody.
    pair = [torch.randint(-8, 9, (80, n)).half() for n in (40, 72)]
    ends, start = torch.tensor([20, 20, 23, 60, 60], dtype=torch.int32), torch.randn(5, 40, 72) * 100
    start[0, 3, 5], start[3, 7, 2], start[4, 1, 1] = float("nan"), float("inf"), torch.finfo(torch.float32).max
    start_high, start_low = torch.empty_like(start, dtype=torch.bfloat16), torch.empty_like(start, dtype=torch.uint8)
    reference.split_24(start, start_high, start_low)

    try:
        compare("products", products)
        for number, dtype in enumerate((torch.float32, torch.bfloat16)):
            draw = lambda *shape, d=dtype: torch.randn(shape).to(d)  # noqa: E731
            x, rows, bias = draw(T, D), draw(T * K, D), draw(E, D)
            weights = draw(T, K), torch.randn(T, K)
            compare("gather", lambda m: (m.expert_gather(x, place),))
            compare("combine", lambda m: (m.expert_combine(rows, place, None, None, None),))
            compare("combine", lambda m: (m.expert_combine(rows, place, bias, expert, weights[0]),))
            compare("row_sums", lambda m: (m.expert_row_sums(rows, None, None, offs),))
            compare("row_sums", lambda m: (m.expert_row_sums(rows, weights[1], order, offs),))
            compare("row_dots", dots)
            for kind, alpha, limit, interleaved, biased in (
                ("silu", 1.0, float("inf"), False, False),
                ("clamped", 1.702, 1.0, True, True),
                ("silu", 1.0, float("inf"), True, False),
                ("gelu", 1.0, float("inf"), False, False),
                ("gelu_tanh", 1.0, float("inf"), False, True),
            ):
                gate_up, d, number = draw(T * K, 2 * I), draw(T * K, I), number + 1
                given = (draw(E, 2 * I), expert) if biased else (None, None)
                args = (*given, weights[number % 2], order, kind, alpha, limit, interleaved)
                compare("gate", lambda m: (m.expert_gate(gate_up, *args),), kind != "gelu")
                compare("gate_backward", lambda m: gate_backward(m, number % 2 == 0), kind != "gelu")
                if kind == "silu":
                    compare("gate_backward", lambda m: gate_backward(m, number % 2 == 1))
            total, grad = torch.randn(300), draw(300)
            grad[7] = float("nan")
            compare("sum", sums)
    except Stop:
        pass
    return same


def main() -> None:
    import numpy as np

    from revffn.ops.experts import kernels, reference

    def sigmoid(x: torch.Tensor) -> torch.Tensor:
        with np.errstate(over="ignore"):
            return torch.from_numpy(1.0 / (1.0 + np.exp(-x.numpy())))

    reference.sigmoid = sigmoid
    reference.COLUMN_LANES = 16
    text = Path(kernels.__file__).read_text()

    def loaded(source: str, folder: str, number: int):
        file = Path(folder) / f"kernels_{number}.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location(f"revffn.ops.experts.kernels_{number}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        # So that tiny shapes have several blocks.
        module.TILE, module.COLUMN_LANES, module.SUM_BLOCK = 64, 16, 128
        module.PRODUCT_BLOCKS = {0: (16, 16, 16)}
        return module

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        results[""] = cases(reference, loaded(text, folder, 0))
        for number, (name, (operation, old, new)) in enumerate(BREAKS.items()):
            assert old in text, name
            results[name] = cases(reference, loaded(text.replace(old, new), folder, number + 1), operation)
    print(json.dumps(results))


@pytest.fixture(scope="module")
def results():
    pytest.importorskip("triton")
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "REVFFN_KERNELS": "triton",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "operation", ["gather", "combine", "gate", "gate_backward", "row_sums", "row_dots", "sum", "products"]
)
def test_kernel_gives_the_reference(results, operation):
    assert results[""][operation]


@pytest.mark.parametrize("name", BREAKS)
def test_broken_kernel_is_noticed(results, name):
    assert not results[name][BREAKS[name][0]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
