"""What every kernel is asked on a GPU before it is trusted, asked in Triton's interpreter; run by test_dispatch.py."""

import importlib

import torch

from revffn.ops import dispatch

INEXACT = ("swiglu", "swiglu_backward", "add_gated")
"""The interpreter's exp is NumPy's."""

for folder in ("streams", "anderson", "dense", "update"):
    kernels, reference, probe = (
        importlib.import_module(f"revffn.ops.{folder}.{part}") for part in ("kernels", "reference", "probe")
    )
    for name, arguments in probe.arguments(torch.device("cpu")).items():
        kernel, expected = (getattr(module, name.split()[0]) for module in (kernels, reference))
        dispatch.ask(kernel, expected, arguments, exact=name not in INEXACT)
        print(f"{folder} {name}: equal")
