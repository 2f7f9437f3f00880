"""The optimizer's update of one parameter: sums of the gradient, then one or two operations that do the rest in place.

    square, rows, cols = grad_squares(grad, factored, chunk_bytes)
    keep, scale = judge(square, keep, max_grad_norm, past_norm)
    mean, col_root, squares = factored_statistics(...)         # adafactor, or
    squares = unfactored_statistics(...)
    adafactor(...)                                             # or adamw(...), adamw8bit(...), sgd(...)

`reference.py` defines all results bit for bit, orders of summation and the noise of stochastic rounding included, and
runs where there is no Triton; `kernels.py` gives the same bits in few launches (adamw8bit too), reading bf16 gradients
and weights with at most 10 bytes of traffic per parameter for adafactor, of which one more read of the gradient comes
from the L2 cache. `optim/in_backward.py` says what the rules are and which papers they come from.

Parameters, gradients and states of the parameter's shape have any number of dimensions: below two one matrix of one
column, above three all leading ones together are S matrices (S, R, C). bf16 and float32 parameters are computed in
float32 and float64 ones (never by a kernel) in float64, "wide" below. Arguments of all operations:

    weight: The parameter, changed in place. master: its wide copy, for bf16 weights rounded from that; or None.
    grad: Its gradient; not changed.
    keep: 0-dimensional float32 on the device. 0: some gradient was not finite, nothing is written.
    scale: 0-dimensional, wide, on the device: what the gradient is multiplied by to clip the global norm.
    lr, rate: Learning rate, and the same times adamw's correction 1 / (1 - beta1^step).
    decay: Learning rate times weight decay.
    new, new1, new2: Weight of the newest value in a moving average, 1 - beta.
    correction: 1 / sqrt(1 - beta2^step).
    stochastic, key, first_row: bf16 values are rounded by noise of this key; `first_row` is the number of the
        parameter's rows (of all its matrices) that lie before this shard.
    chunk_bytes: Of one temporary of the reference; a kernel has none as large as a part of the parameter. It does not
        change a bit.

An operation of a dtype, layout or size that the kernels do not take runs the reference; none of them raises of itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from .. import dispatch
from . import reference
from .reference import matrices, shape_of, stochastic_round, sum_segments, wide_dtype

__all__ = [
    "adafactor",
    "adamw",
    "adamw8bit",
    "block_size",
    "factored_statistics",
    "grad_squares",
    "is_observed",
    "judge",
    "make_code_books",
    "matrices",
    "sgd",
    "shape_of",
    "stochastic_round",
    "sum_segments",
    "unfactored_statistics",
    "wide_dtype",
]

QUANTISED_FROM = 4096
"""adamw8bit keeps parameters with fewer elements, and vectors, in float32."""
TEMPORARIES = 4
"""Chunks in float32 that the reference of an operation holds at a time."""
MAX_COLUMNS = 1 << 14
"""One program of a kernel holds a factored matrix's column averages."""


def _supports(*args: Any) -> bool:
    """Dtypes and layouts that the kernels take."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    return all(t.dtype in (torch.bfloat16, torch.float32, torch.uint8) and t.is_contiguous() for t in tensors)


def _supports_factored(grad: Tensor, *args: Any) -> bool:
    return _supports(grad, *args) and grad.shape[-1] <= MAX_COLUMNS


def is_observed(tensor: Tensor) -> bool:
    """On fake tensors and in dispatch modes somebody counts memory, and sees nothing of an operation's inside."""
    return isinstance(tensor, FakeTensor) or torch._C._len_torch_dispatch_stack() > 0


def _room_of_reference(args: tuple[Any, ...], supports: Callable[..., bool]) -> Tensor | None:
    """Memory like the reference's temporaries, to be seen; None where a kernel would run, which has none."""
    largest = max((a for a in args if isinstance(a, Tensor)), key=Tensor.numel)
    if dispatch.implementation(largest.device.type) == "triton" and supports(*args):
        return None
    shape = shape_of(largest)
    chunk = next(reference.chunks(shape, args[-1]), None) if isinstance(args[-1], int) else None
    if chunk is None:
        return None
    num = shape[2] * math.prod(s.stop - s.start for s in chunk)
    return torch.empty(TEMPORARIES, num, dtype=wide_dtype(largest), device=largest.device)


def _operation(
    schema: str,
    fake: Callable[..., Any],
    supports: Callable[..., bool] = _supports,
    early_writes: tuple[int, ...] = (),
) -> Callable[..., Any]:
    name = schema[: schema.index("(")]
    own: Callable[..., Any] = getattr(reference, name)
    kernel, probe = dispatch.kernel_of(__name__, name), dispatch.probe_of(__name__, name)
    operation = dispatch.register(f"update_{schema}", own, fake, kernel, supports, early_writes, probe)

    def call(*args: Any) -> Any:
        room = _room_of_reference(args, supports) if is_observed(args[0]) else None
        result = operation(*args)
        del room
        return result

    call.__name__ = call.__qualname__ = name
    return call


def _fake_squares(grad: Tensor, factored: bool, chunk_bytes: int) -> tuple[Tensor, Tensor, Tensor]:
    (S, R, C), wide = shape_of(grad), wide_dtype(grad)
    segments = max(-(-R // reference.SEGMENT), 1)
    shapes = (), (S, R) if factored else (0,), (S, segments, C) if factored else (0,)
    square, rows, cols = (grad.new_empty(shape, dtype=wide) for shape in shapes)
    return square, rows, cols


def _fake_judge(square: Tensor, keep: Tensor, max_grad_norm: float, past_norm: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(keep), torch.empty_like(square)


def _fake_factored(grad: Tensor, rows: Tensor, cols: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    S, C = cols.shape[0], cols.shape[2]
    return cols.new_empty(S), cols.new_empty(S, C), cols.new_empty(S)


def _fake_unfactored(grad: Tensor, average: Tensor, *args: Any) -> Tensor:
    return average.new_empty(shape_of(grad)[0])


def _nothing(*args: Any) -> None:
    return None


grad_squares = _operation(
    "grad_squares(Tensor grad, bool factored, int chunk_bytes) -> (Tensor, Tensor, Tensor)", _fake_squares
)
"""Sums of squares of a gradient, wide: of all (0-dimensional); and, if `factored`, of its rows (S, R) and of its
columns in segments of 4096 rows (S, segments, C), which `sum_segments` adds. Empty where not factored."""

judge = _operation(
    "judge(Tensor square, Tensor keep, float max_grad_norm, float past_norm) -> (Tensor, Tensor)", _fake_judge
)
"""`keep`, or 0 if `square` is not finite; and min(1, max_grad_norm / max(past_norm, sqrt(square))), 1 for
max_grad_norm = 0. Both 0-dimensional, new tensors."""

factored_statistics = _operation(
    "factored_statistics(Tensor grad, Tensor rows, Tensor cols, Tensor(a!) row, Tensor(b!) col, Tensor keep, "
    "Tensor scale, float new, float eps, int num_rows, bool norms, int chunk_bytes) -> (Tensor, Tensor, Tensor)",
    _fake_factored,
    _supports_factored,
    early_writes=(3, 4),
)
"""Adafactor's moving averages row (S, R) and col (S, C) of squared gradients (wide, in place), from sums over C
columns and `num_rows` rows (more than R on shards). Returns mean(col) (S,), 1 / sqrt(col) (S, C) and, if `norms`, the
sums of squares of the updates g / sqrt(row col / mean) before clipping (S,).

Reference: Shazeer and Stern, Adafactor, https://arxiv.org/abs/1804.04235"""

unfactored_statistics = _operation(
    "unfactored_statistics(Tensor grad, Tensor(a!) average, Tensor keep, Tensor scale, float new, float eps, "
    "bool norms, int chunk_bytes) -> Tensor",
    _fake_unfactored,
    early_writes=(1,),
)
"""The same for a moving average (wide, in place) of the parameter's shape: sums of squares (S,) of g /
sqrt(average)."""

_RULE = "Tensor keep, Tensor scale, float {rate}, float decay, {more}, bool stochastic, int key, int first_row, "
_RULE += "int chunk_bytes) -> ()"

adafactor = _operation(
    "adafactor(Tensor(a!) weight, Tensor(b!)? master, Tensor(c!)? momentum, Tensor grad, Tensor? row, Tensor? mean, "
    "Tensor? col_root, Tensor? average, Tensor squares, "
    + _RULE.format(rate="lr", more="float largest, float new_momentum, float eps"),
    _nothing,
)
"""Applies adafactor's update: clipped per matrix to the norm `largest` (0 does not clip) by `squares`, averaged in
`momentum` (bf16, rounded like the weight) if there is one. Either `average` or `row`, `mean`, `col_root` are given."""

_ADAMW = _RULE.format(rate="rate", more="float new1, float new2, float correction, float eps")

adamw = _operation(
    "adamw(Tensor(a!) weight, Tensor(b!)? master, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor grad, " + _ADAMW,
    _nothing,
)
"""exp_avg, exp_avg_sq: wide, of the parameter's shape.

Reference: Loshchilov and Hutter, Decoupled Weight Decay Regularization, https://arxiv.org/abs/1711.05101"""

adamw8bit = _operation(
    "adamw8bit(Tensor(a!) weight, Tensor(b!)? master, Tensor(c!) exp_avg, Tensor(d!) exp_avg_scale, "
    "Tensor(e!) exp_avg_root, Tensor(f!) exp_avg_root_scale, Tensor grad, Tensor books, " + _ADAMW,
    _nothing,
)
"""exp_avg and exp_avg_root (the root of the squares' average): uint8 codes into `books` of the parameter's shape;
their scales: wide, one for each `block_size` columns; books: `make_code_books`.

Reference: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, https://arxiv.org/abs/2110.02861"""

sgd = _operation(
    "sgd(Tensor(a!) weight, Tensor(b!)? master, Tensor(c!)? buffer, Tensor grad, "
    + _RULE.format(rate="lr", more="float momentum"),
    _nothing,
)
"""buffer: wide, of the parameter's shape; buffer = momentum * buffer + gradient. None: plain gradient descent."""


# --- 8 bits ----------------------------------------------------------------------------------------------------------


def make_code_books(device: torch.device) -> Tensor:
    """The 256 numbers that codes stand for and the 255 midpoints of them, for exp_avg and for exp_avg_root.

    Returns:
        (4, 256) float32: signed numbers, their midpoints, unsigned numbers, their midpoints; ends of midpoints unused.

    Raises:
        ImportError: torchao, whose format this is, is not installed.
    """
    try:
        from torchao.optim.quant_utils import create_dynamic_map
    except ImportError as error:
        raise ImportError("rule='adamw8bit' needs torchao: pip install torchao, or use rule='adafactor'.") from error
    with unset_fake_temporarily():  # torchao reads numbers off a tensor, which a fake one has not
        books = create_dynamic_map(signed=True), create_dynamic_map(signed=False)
    lines = [line for book in books for line in (book, [*((a + b) / 2 for a, b in pairwise(book)), math.inf])]
    return torch.tensor(lines, dtype=torch.float32, device=device)


def block_size(parameter: Tensor) -> int:
    """Elements that share a scale: the largest power of two up to 256 that divides a row; 0 keeps float32."""
    block = math.gcd(parameter.shape[-1], 256) if parameter.dim() > 1 else 0
    return block if block >= 32 and parameter.numel() >= QUANTISED_FROM else 0
