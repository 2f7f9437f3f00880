"""Operations on int32 fixed-point streams: read and norm, add an update, one move of the innovation coupling, undo it.

    check       a stream's checksum, and how near it came to int32's end
    read_norm   the value of a stream, and its RMSNorm
    add_update  now + update, on the grid
    move        s_{k+1} from s_{k-1}, s_k, what the layer added and what was predicted; packed side bits
    undo        s_{k-1} back, bit for bit
    gradients   of a move

`reference.py` defines them; `kernels.py` makes each one launch. RevFFN: https://arxiv.org/abs/2512.20920.
"""

# b = sequences of one tile, T = tokens, D = hidden size; streams are (b, T, D) int32, contiguous

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import kernel_of, probe_of, register
from . import reference
from .reference import (
    SATURATION,
    Grid,
    add_refined,
    checksum,
    dequantize,
    innovation_forward,
    innovation_inverse,
    num_packed,
    pack_bits,
    quantize,
    unpack_bits,
)

__all__ = [
    "SATURATION",
    "Grid",
    "add_refined",
    "add_update",
    "check",
    "checksum",
    "dequantize",
    "gradients",
    "innovation_forward",
    "innovation_inverse",
    "move",
    "pack_bits",
    "quantize",
    "read_norm",
    "read_norm_backward",
    "undo",
    "unpack_bits",
]

MOST_CHANNELS = 16384


def _fits(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these: contiguous, whole bytes of side bits in every row, no float64."""
    given = [t for t in tensors if t is not None and t.numel()]
    D = given[0].shape[-1]
    return (
        D % 16 == 0
        and D <= MOST_CHANNELS
        and all(t.is_contiguous() for t in given)
        and all(t.dtype in (torch.int32, torch.bfloat16, torch.float32, torch.uint8) for t in given)
    )


check = register(
    "stream_check(Tensor stream, Tensor(a!) flags) -> Tensor",
    reference.stream_check,
    lambda stream, flags: stream.new_empty((), dtype=torch.int64),
    kernel_of(__name__, "stream_check"),
    lambda stream, flags: _fits(stream),
    probe=probe_of(__name__, "stream_check"),
)
"""(stream, flags (2,) int32) -> checksum, 0-dim int64. `flags[1]` becomes the largest magnitude so far, in grid
units."""

add_update = register(
    "stream_add_update(Tensor update, Tensor now, Tensor scale, Tensor finer, Tensor(a!) flags) -> Tensor",
    reference.add_update,
    lambda update, now, scale, finer, flags: torch.empty_like(now),
    kernel_of(__name__, "add_update"),
    lambda update, now, scale, finer, flags: _fits(now, update),
    probe=probe_of(__name__, "add_update"),
)
"""round(update * scale) + (now << finer), int32: `update` (b, T, D) in the model's dtype, `scale` (D,) float32,
`finer` (D,) int32. `flags[0]` becomes 1 where an update is not finite."""

move = register(
    "innovation_move(Tensor(a!) middle, Tensor prev, Tensor cur, Tensor mlp, Tensor? predicted, Tensor? sign, "
    "Tensor past_scale, Tensor next_scale, Tensor finer, int m, int first_row, Tensor(b!) flags) -> (Tensor, Tensor)",
    reference.innovation_move,
    lambda middle, prev, cur, mlp, predicted, sign, past_scale, next_scale, finer, m, first_row, flags: (
        middle.new_empty(num_packed(middle.shape, m) if m else 0, dtype=torch.uint8),
        middle.new_empty((), dtype=torch.int64),
    ),
    kernel_of(__name__, "innovation_move"),
    lambda middle, prev, cur, mlp, predicted, sign, past_scale, next_scale, finer, m, first_row, flags: (
        sign is None and m != 3 and _fits(middle, prev, cur, mlp, predicted)
    ),
    probe=probe_of(__name__, "innovation_move"),
)
"""`middle` (s_k and the attention's result on the grid of s_{k+1}) becomes s_{k+1}:

    middle + round(mlp * next_scale) + sign * ((prev - (cur >> finer) - round(predicted * past_scale)) >> m)

Returns the m low bits of what is shifted (`pack_bits`; empty for m = 0) and the checksum of s_{k+1}, which is the part
of a longer stream that begins at token `first_row`. `flags` as in `check` and `add_update`."""

undo = register(
    "innovation_undo(Tensor(a!) out, Tensor following, Tensor cur, Tensor middle, Tensor mlp, Tensor? predicted, "
    "Tensor? sign, Tensor bits, Tensor past_scale, Tensor next_scale, Tensor finer, int m, int first_row) -> Tensor",
    reference.innovation_undo,
    lambda out, *_: out.new_empty((), dtype=torch.int64),
    kernel_of(__name__, "innovation_undo"),
    lambda out, following, cur, middle, mlp, predicted, sign, bits, past_scale, next_scale, finer, m, first_row: (
        sign is None and m != 3 and _fits(out, following, cur, middle, mlp, predicted, bits)
    ),
    probe=probe_of(__name__, "innovation_undo"),
)
"""Writes s_{k-1} into `out`, which may be `following` itself, and returns its checksum."""

gradients = register(
    "innovation_gradients(Tensor grad, Tensor grad_middle, Tensor gain, ScalarType dtype, bool has_prediction) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference.innovation_gradients,
    lambda grad, grad_middle, gain, dtype, has_prediction: (
        torch.empty_like(grad),
        torch.empty_like(grad),
        torch.empty_like(grad, dtype=dtype),
        torch.empty_like(grad, dtype=dtype) if has_prediction else grad.new_empty(0, dtype=dtype),
    ),
    kernel_of(__name__, "innovation_gradients"),
    lambda grad, grad_middle, gain, dtype, has_prediction: (
        grad.dtype == torch.float32 and _fits(grad, grad_middle) and dtype in (torch.bfloat16, torch.float32)
    ),
    probe=probe_of(__name__, "innovation_gradients"),
)
"""From the gradients of s_{k+1} and of the middle state, float32, and the coupling's gain (D,): those of s_{k-1} and
s_k (float32), of the attention's result and of the prediction (`dtype`; empty without one)."""

read_norm = register(
    "stream_read_norm(Tensor stream, Tensor step, Tensor weight, float eps, ScalarType dtype, bool rounds_first, "
    "bool want_value) -> (Tensor, Tensor, Tensor)",
    reference.read_norm,
    lambda stream, step, weight, eps, dtype, rounds_first, want_value: (
        torch.empty_like(stream, dtype=dtype) if want_value else stream.new_empty(0, dtype=dtype),
        torch.empty_like(stream, dtype=dtype),
        stream.new_empty(stream.shape[:-1], dtype=torch.promote_types(dtype, torch.float32)),
    ),
    kernel_of(__name__, "read_norm"),
    lambda stream, step, weight, eps, dtype, rounds_first, want_value: (
        _fits(stream) and dtype in (torch.bfloat16, torch.float32)
    ),
    probe=probe_of(__name__, "read_norm"),
)
"""A stream's value x = stream * step in `dtype`, its RMSNorm, and 1 / sqrt(mean(x^2) + eps) in float32, (b, T).

`rounds_first`: the normalised value is rounded to `dtype` before it is multiplied by `weight`, as Llama's norm does.
Without `want_value` the first result is empty."""

read_norm_backward = register(
    "stream_read_norm_backward(Tensor grad_normed, Tensor? grad_value, Tensor? grad_through, Tensor? grad_also, "
    "Tensor stream, Tensor step, Tensor weight, Tensor rstd, bool rounds_first, bool need_weight) -> (Tensor, Tensor)",
    reference.read_norm_backward,
    lambda grad_normed, grad_value, through, also, stream, step, weight, rstd, rounds_first, need_weight: (
        torch.empty_like(stream, dtype=rstd.dtype),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
    ),
    kernel_of(__name__, "read_norm_backward"),
    lambda grad_normed, grad_value, through, also, stream, *_: _fits(stream, grad_normed, grad_value, through, also),
    probe=probe_of(__name__, "read_norm_backward"),
)
"""The stream's gradient, float32: through the norm, plus `grad_value` (of x), `grad_through` and `grad_also` (of the
stream itself, float32); and the weight's (D,), empty unless `need_weight`."""
