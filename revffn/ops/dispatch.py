"""Which implementation of the fused operations runs: chosen once per process, the same for forward and backward.

`REVFFN_KERNELS` is `auto` (Triton on CUDA where it can be imported, PyTorch otherwise), `torch` or `triton`. Triton on
a CPU needs its interpreter (`TRITON_INTERPRET=1`, set before Triton is imported): slow, for tests.

Operations are registered with the low-level calls of `torch.library`, so that fake tensors, dispatch modes and
profilers see each as one operation; the `custom_op` decorator would cost tens of microseconds a call.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("revffn", "DEF")
CHOICES = ("auto", "torch", "triton")


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


def describe() -> dict[str, str]:
    """For a run's record: what was asked for, and what runs on the devices there are."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {"requested": requested(), **{device: implementation(device) for device in devices}}


def register(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    kernel: Callable[[], Callable[..., Any]],
    supports: Callable[..., bool] | None = None,
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

    Returns:
        The operation, to be called with the schema's arguments.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    found: list[Callable[..., Any]] = []

    def run_on(device_type: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if implementation(device_type) == "torch" or (supports is not None and not supports(*args, **kwargs)):
                return reference(*args, **kwargs)
            if not found:
                found.append(kernel())
            return found[0](*args, **kwargs)

        return run

    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    LIBRARY.impl(name, run_on("cpu"), "CPU")
    LIBRARY.impl(name, run_on("cuda"), "CUDA")
    LIBRARY.impl(name, fake, "Meta")
    return getattr(torch.ops.revffn, name).default
