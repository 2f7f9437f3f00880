"""Which implementation of the fused operations runs: chosen once per process, the same for forward and backward.

`REVFFN_KERNELS` is `auto` (Triton on CUDA where it can be imported, PyTorch otherwise), `torch` or `triton`. Triton on
a CPU needs its interpreter (`TRITON_INTERPRET=1`, set before Triton is imported): slow, for tests.

Where an operation's kernel cannot be compiled or launched at its first use, the reference takes its place for the rest
of the process, with one warning; not with `REVFFN_KERNELS=triton`. So it does where a kernel on a GPU gives another
result than the reference on a CPU for a few numbers that it is asked about first. An operation that has run by its
kernel stays with it: forward and recomputation must agree.

Operations are registered with the low-level calls of `torch.library`, so that fake tensors, dispatch modes and
profilers see each as one operation; the `custom_op` decorator would cost tens of microseconds a call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

LIBRARY = torch.library.Library("revffn", "DEF")
CHOICES = ("auto", "torch", "triton")

PROBED = ("cuda",)
"""Devices whose kernels are asked before they are trusted."""
_fallen: dict[str, str] = {}
"""Operations whose kernel failed at its first use, and the error."""


@functools.cache
def requested() -> str:
    """`REVFFN_KERNELS`, as it was when it was first asked for.

    Raises:
        ValueError: It is none of `CHOICES`.
        ImportError: It is `triton` and Triton is not installed.
    """
    choice = os.environ.get("REVFFN_KERNELS", "auto")
    if choice not in CHOICES:
        raise ValueError(f"REVFFN_KERNELS must be one of {', '.join(CHOICES)}; got {choice!r}.")
    if choice == "triton" and not has_triton():
        raise ImportError("REVFFN_KERNELS=triton needs Triton: pip install triton, or set REVFFN_KERNELS=torch.")
    return choice


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def implementation(device_type: str) -> str:
    """`triton` or `torch`: what runs on tensors of a device type."""
    choice = requested()
    if choice == "torch" or not has_triton():
        return "torch"
    if device_type == "cuda":
        return "triton"
    return "triton" if choice == "triton" and os.environ.get("TRITON_INTERPRET") == "1" else "torch"


def describe() -> dict[str, Any]:
    """For a run's record: what was asked for, what runs on the devices there are, and under `fallbacks`, if there are
    any, the operations that the reference took over so far, with the error of each."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    record: dict[str, Any] = {"requested": requested(), **{device: implementation(device) for device in devices}}
    return {**record, "fallbacks": dict(_fallen)} if _fallen else record


def _fall_back(name: str, error: Exception) -> None:
    """From now on the reference runs; raises the error instead where kernels were asked for.

    Triton compiles, loads and checks a kernel before it launches it, so a failed launch has written nothing; of what
    an operation's earlier launches write, `register` keeps copies.
    """
    if requested() == "triton" or _is_of_the_device(error):
        raise error
    text = str(error).strip().splitlines()
    _fallen[name] = f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")
    warnings.warn(
        f"The kernel of revffn::{name} does not work here; PyTorch's operations run instead, slower. {_fallen[name]}\n"
        "REVFFN_KERNELS=triton raises the error, REVFFN_KERNELS=torch avoids kernels.",
        RuntimeWarning,
        stacklevel=3,
    )


def kernel_of(package: str, name: str) -> Callable[[], Callable[..., Any]]:
    """Finds a kernel's function in an operation folder when it is first needed."""
    return lambda: getattr(importlib.import_module(f"{package}.kernels"), name)


def probe_of(package: str, name: str) -> Callable[[torch.device], list[tuple[Any, ...]]]:
    """Finds the small arguments for a kernel in an operation folder, named `name` or `name` and another word."""

    def probe(device: torch.device) -> list[tuple[Any, ...]]:
        arguments = importlib.import_module(f"{package}.probe").arguments(device)
        return [given for key, given in arguments.items() if key.split()[0] == name]

    return probe


def ask(own: Callable[..., Any], reference: Callable[..., Any], arguments: tuple[Any, ...], exact: bool) -> None:
    """Compare a kernel on a device with the reference on a CPU: results, and what is written to arguments.

    Raises:
        ArithmeticError: They differ.
    """

    def tensors(values: Any) -> list[torch.Tensor]:
        return [v for v in tree_leaves(values) if isinstance(v, torch.Tensor)]

    ours = tree_map_only(torch.Tensor, torch.clone, arguments)
    theirs = tree_map_only(torch.Tensor, lambda a: a.cpu().clone(), arguments)
    found, expected = tensors(own(*ours)) + tensors(ours), tensors(reference(*theirs)) + tensors(theirs)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        a = a.cpu()
        limit = 0.0 if exact or not b.is_floating_point() else 4 * torch.finfo(b.dtype).eps
        if (
            a.shape != b.shape
            or a.dtype != b.dtype
            or not torch.allclose(a, b, rtol=limit, atol=limit, equal_nan=True)
        ):
            raise ArithmeticError(f"asked about a few numbers it differs from its reference (tensor {i})")


def _is_of_the_device(error: Exception) -> bool:
    """No memory, or a fault such as an illegal access: no matter of this kernel."""
    return isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)) or "out of memory" in str(error)


def register(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    kernel: Callable[[], Callable[..., Any]],
    supports: Callable[..., bool] | None = None,
    early_writes: tuple[int, ...] = (),
    probe: Callable[[torch.device], list[tuple[Any, ...]]] | None = None,
    exact: bool = True,
) -> Any:
    """Define one operation of the `revffn` namespace.

    Args:
        schema: `name(Tensor x, ...) -> ...`; arguments that are written to are marked `Tensor(a!)`.
        reference: PyTorch; defines the result.
        fake: Makes the outputs' shapes and dtypes from meta tensors.
        kernel: Returns the Triton implementation; called when it is first needed, so that Triton is imported no
            earlier.
        supports: Whether the kernel takes these arguments; the reference runs where it does not. Must depend on
            shapes, dtypes and numbers only, so that forward and recomputation decide alike.
        early_writes: Places of the arguments that the kernel may write before its last launch. At the first use they
            are copied, so that the reference can start from them should a later launch fail.
        probe: Makes lists of small arguments on a device, which the kernel and the reference are asked about at the
            first use on a GPU.
        exact: Whether their answers must be the same bits, or may differ by a rounding.

    Returns:
        The operation, to be called with the schema's arguments.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    found: list[Callable[..., Any]] = []

    def first(*args: Any, **kwargs: Any) -> Any:
        before = [(args[i], args[i].clone()) for i in early_writes]
        try:
            own = kernel()
            device = next(a for a in args if isinstance(a, torch.Tensor)).device
            if probe is not None and device.type in PROBED:
                for given in probe(device):
                    ask(own, reference, given, exact)
            result = own(*args, **kwargs)
        except Exception as error:
            _fall_back(name, error)
            for tensor, copy in before:
                tensor.copy_(copy)
            return reference(*args, **kwargs)
        found.append(own)
        return result

    def run_on(device_type: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if (
                implementation(device_type) == "torch"
                or name in _fallen
                or (supports is not None and not supports(*args, **kwargs))
            ):
                return reference(*args, **kwargs)
            return (found[0] if found else first)(*args, **kwargs)

        return run

    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    LIBRARY.impl(name, run_on("cpu"), "CPU")
    LIBRARY.impl(name, run_on("cuda"), "CUDA")
    LIBRARY.impl(name, fake, "Meta")
    return getattr(torch.ops.revffn, name).default
