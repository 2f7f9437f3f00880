"""The choice of kernels: what is asked for, what is imported, and what takes over where a kernel does not work.

Run: pytest tests/ops/test_dispatch.py
"""

import contextlib
import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from interpreter import interpret, needs_triton

from revffn.ops import dispatch

ROOT = Path(__file__).parents[2]
numbers = itertools.count()


ALONE = "import sys, types; sys.modules['revffn'] = p = types.ModuleType('revffn'); p.__path__ = ['revffn']\n"
"""Of the library only what is imported by name."""


def python(code: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("REVFFN_KERNELS", "TRITON_INTERPRET")}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)


class Kernel:
    """Stands for a kernel that fails with `error` at the uses of `failures`, counted from 1."""

    def __init__(self, error: Exception | None, *failures: int):
        self.error, self.failures, self.uses = error, failures, 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.uses += 1
        if self.uses in self.failures:
            raise self.error
        return x + 1


@pytest.fixture
def chosen(monkeypatch):
    """Sets what was asked for; kernels run on the CPU, and no operation has fallen back."""

    def choose(choice: str) -> None:
        monkeypatch.setattr(dispatch, "requested", lambda: choice)

    monkeypatch.setattr(dispatch, "implementation", lambda device: "triton")
    monkeypatch.setattr(dispatch, "_fallen", {})
    choose("auto")
    return choose


def operation(kernel: Kernel, supports=None):
    """(Its operation, whose reference gives x - 1; its name.)"""
    name = f"test_dispatch_{next(numbers)}"
    schema = f"{name}(Tensor x) -> Tensor"
    run = dispatch.register(schema, lambda x: x - 1, torch.empty_like, lambda: kernel, supports)
    return run, name


X, KERNEL, REFERENCE = torch.zeros(2), torch.ones(2), -torch.ones(2)


def test_a_kernel_that_fails_at_its_first_use_is_replaced_for_good_with_one_warning(chosen):
    kernel = Kernel(RuntimeError("cannot find ptxas\nand more"), 1)
    run, name = operation(kernel)
    with pytest.warns(RuntimeWarning, match=f"revffn::{name}.*RuntimeError: cannot find ptxas") as caught:
        assert torch.equal(run(X), REFERENCE)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(X), REFERENCE)
    assert kernel.uses == 1
    assert dispatch.describe()["fallbacks"] == {name: "RuntimeError: cannot find ptxas"}
    other, _ = operation(Kernel(None))
    assert torch.equal(other(X), KERNEL), "operations fall back one by one"


def test_a_kernel_that_cannot_be_imported_is_replaced(chosen):
    def missing():
        raise ImportError("libcuda.so")

    name = f"test_dispatch_{next(numbers)}"
    run = dispatch.register(f"{name}(Tensor x) -> Tensor", lambda x: x - 1, torch.empty_like, missing)
    with pytest.warns(RuntimeWarning, match="ImportError: libcuda.so"):
        assert torch.equal(run(X), REFERENCE)


def test_an_operation_that_ran_by_its_kernel_raises(chosen):
    run, name = operation(Kernel(RuntimeError("later"), 2))
    assert torch.equal(run(X), KERNEL)
    with pytest.raises(RuntimeError, match="later"):
        run(X)
    assert torch.equal(run(X), KERNEL)
    assert "fallbacks" not in dispatch.describe()


def test_arguments_that_the_kernel_does_not_take_do_not_count_as_a_use(chosen):
    run, _ = operation(Kernel(RuntimeError("first"), 1), supports=lambda x: x.dtype == torch.float32)
    assert run(X.double()).dtype == torch.float64
    with pytest.warns(RuntimeWarning):
        run(X)


def test_kernels_that_were_asked_for_raise(chosen):
    chosen("triton")
    run, _ = operation(Kernel(RuntimeError("cannot find ptxas"), 1))
    with pytest.raises(RuntimeError, match="cannot find ptxas"):
        run(X)
    assert not dispatch._fallen


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_no_memory_and_faults_of_the_device_are_raised(chosen, error):
    run, _ = operation(Kernel(error, 1))
    with pytest.raises(type(error)):
        run(X)
    assert not dispatch._fallen
    assert torch.equal(run(X), KERNEL)


def test_the_reference_starts_from_what_early_launches_overwrote(chosen):
    def kernel(x):
        x.add_(100)
        raise RuntimeError("the second launch")

    name = f"test_dispatch_{next(numbers)}"
    schema = f"{name}(Tensor(a!) x) -> ()"
    run = dispatch.register(schema, lambda x: x.add_(1) and None, lambda x: None, lambda: kernel, early_writes=(0,))
    x = torch.zeros(1)
    with pytest.warns(RuntimeWarning, match="the second launch"):
        run(x)
    assert x == 1


def test_an_unknown_choice_is_refused():
    done = python(ALONE + "from revffn.ops import dispatch; dispatch.describe()", REVFFN_KERNELS="cuda")
    assert done.returncode == 1
    assert "REVFFN_KERNELS must be one of auto, torch, triton; got 'cuda'" in done.stderr


def test_triton_that_is_asked_for_and_missing_is_an_error():
    hide = ALONE + "import importlib.util as u; f = u.find_spec\n"
    hide += "u.find_spec = lambda name, *a: None if name == 'triton' else f(name, *a)\n"
    code = hide + "from revffn.ops import dispatch; print(dispatch.describe()['cpu'])"
    done = python(code, REVFFN_KERNELS="triton")
    assert done.returncode == 1 and "REVFFN_KERNELS=triton needs Triton: pip install triton" in done.stderr
    done = python(code)
    assert done.returncode == 0 and done.stdout.strip() == "torch", done.stderr


def test_kernels_are_not_imported_with_the_library():
    """Triton itself may be there: torch.distributed and torchao import it where it is installed."""
    code = """
import sys, revffn, revffn.ops.dense, revffn.ops.experts, revffn.ops.streams, revffn.ops.update
print([name for name in sys.modules if name.startswith('revffn') and name.endswith(('kernels', 'triton_parts'))])
"""
    done = python(code)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr


# --- asked before they are trusted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("right", [True, False])
def test_a_kernel_that_gives_other_numbers_is_replaced(chosen, monkeypatch, right):
    monkeypatch.setattr(dispatch, "PROBED", ("cpu",))
    kernel, name = Kernel(None), f"test_dispatch_{next(numbers)}"

    def reference(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if right or x.numel() == 2 else x + 1.0001

    schema = f"{name}(Tensor x) -> Tensor"
    run = dispatch.register(
        schema, reference, torch.empty_like, lambda: kernel, probe=lambda device: [(torch.zeros(5, device=device),)]
    )
    with contextlib.nullcontext() if right else pytest.warns(RuntimeWarning, match="differs from its reference"):
        assert torch.equal(run(X), KERNEL)
    assert torch.equal(run(X), KERNEL)
    assert kernel.uses == (3 if right else 1), "asked once, and used where it was right"


def test_what_is_written_counts():
    def wrong(x: torch.Tensor) -> None:
        x[0] = 3.0

    with pytest.raises(ArithmeticError):
        dispatch.ask(wrong, lambda x: None, (torch.zeros(2),), exact=True)
    given = torch.zeros(2)
    dispatch.ask(wrong, wrong, (given,), exact=True)
    assert torch.equal(given, torch.zeros(2)), "the arguments are copied"


@needs_triton
def test_every_kernel_can_be_asked():
    done = interpret("probes.py")
    assert done.returncode == 0 and done.stdout.count("equal") == 36, done.stdout + done.stderr
