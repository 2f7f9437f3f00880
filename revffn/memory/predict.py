"""What a training step takes: the bytes of a run, part by part, before it is started and without its weights.

What `measure.py` finds in every phase of a step is extended to the real batch and length,

    peak = max over phases [ weights + optimizer + gradients alive + sum over layers of what they keep + the phase's
    own tensors ]

which is linear in each of them within a phase (attention that makes its scores is quadratic in the length, and
treated so). Two or three small steps of a few seconds each do, whatever the size. docs/memory.md goes through the
terms, benchmarks/planner.py compares with full simulated steps.

Not counted are bytes outside tensors; `RESERVE_BYTES` stands for them. `plan.py` asks the questions.
"""

# B = batch, T = tokens, L = decoder layers

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedConfig

from ..models.losses import chunk_size
from .answers import Plan
from .live_bytes import PARTS
from .measure import Depth, Phases, count, measure
from .simulation import Method

RESERVE_BYTES = 2**30
"""On a GPU: CUDA context and loaded kernels (about half a GiB), workspaces of the matrix libraries, what the
allocator rounds up."""
HOST_BYTES = 4 * 2**30
"""In host memory: Python with torch and the CUDA libraries, and the part of a weight file being read."""
SMALL_STEP_TOKENS = 8192
"""A step of at most so many tokens is measured as it is; larger ones are extended from two of about that size."""
POINTS_OF_BATCH, POINTS_OF_LENGTH = [2, 4], [4096, 8192, 12288]
"""Where a step is measured that is not walked in tiles."""


# --- extended: any batch, any length ---------------------------------------------------------------------------------


def rows_per_tile(method: Method, tokens: int) -> int | None:
    """Sequences of one tile; None where the batch is not tiled."""
    tile = method.reversible.tile_tokens if method.reversible else None
    return None if tile is None else max(1, tile // tokens)


def fewest_tiles(hf_config: PreTrainedConfig, tokens_per_tile: int) -> int:
    """From so many tiles on a step is linear in their number: a first, an inner and a last one, and not fewer tokens
    than a chunk of the loss, which grows up to its size."""
    return max(3, math.ceil(chunk_size(2**40, hf_config.get_text_config().vocab_size) / tokens_per_tile))


def sample_batches(hf_config: PreTrainedConfig, method: Method, batch: int, tokens: int) -> list[int]:
    """Batch sizes whose measurements say what `batch` takes: itself if the step is small."""
    rows = rows_per_tile(method, tokens)
    unit = max(1, SMALL_STEP_TOKENS // (2 * tokens)) if rows is None else rows
    first = fewest_tiles(hf_config, unit * tokens)
    points = [first * unit, (first + 1) * unit]
    # Full logits come in one piece, whatever their size.
    return [batch] if batch <= points[1] or (rows is None and not method.linear_cross_entropy) else points


def sample_tokens(hf_config: PreTrainedConfig, method: Method, tokens: int) -> list[int]:
    """The same for the length."""
    tile = method.reversible.tile_tokens if method.reversible else None
    tile_or_step = tile or SMALL_STEP_TOKENS
    unit = fewest_tiles(hf_config, tile_or_step) * tile_or_step
    if tokens <= 2 * unit or (tile is None and not method.linear_cross_entropy):
        return [tokens]
    return [unit, 2 * unit] + [3 * unit] * is_quadratic(hf_config, method)


def is_quadratic(hf_config: PreTrainedConfig, method: Method) -> bool:
    """Does a step make something of the square of the length?"""
    # transformers may make a mask for a sliding window whether or not a layer reads it; a reversible walk does not.
    mask = method.name != "reversible" and getattr(hf_config, "sliding_window", None) is not None
    return mask or count(hf_config, method).makes_scores


def interpolate(points: list[int], x: int) -> list[float]:
    """Lagrange weights: the value at x of the polynomial through values at `points`."""
    return [math.prod((x - q) / (p - q) for q in points if q != p) for p in points]


def extend(
    hf_config: PreTrainedConfig, method: Method, batches: list[int], lengths: list[int], batch: int, tokens: int
) -> Phases:
    """Phases at (batch, tokens) from measurements on a grid of batch sizes and lengths."""
    grid = [
        (measure(hf_config, method, b, t), weight_b * weight_t)
        for b, weight_b in zip(batches, interpolate(batches, batch), strict=True)
        for t, weight_t in zip(lengths, interpolate(lengths, tokens), strict=True)
    ]
    out = {}
    for phase in grid[0][0]:
        if not all(phase in phases for phases, _ in grid):
            continue
        parts = {part: round(sum(weight * phases[phase][part] for phases, weight in grid)) for part in PARTS}
        total = max(0, sum(parts.values()))
        # The peaks of one phase may be at different moments. The sum of their parts is right: what one part lacks, the
        # working set has; what they have too much, all of them.
        parts = {part: max(0, size) for part, size in parts.items()}
        parts["working_set"] = max(0, parts["working_set"] + total - sum(parts.values()))
        found = sum(parts.values())
        if found > total:
            parts = {part: size * total // found for part, size in parts.items()}
        out[phase] = parts
    return out


def with_padding(hf_config: PreTrainedConfig, method: Method, phases: Phases, batch: int, tokens: int) -> Phases:
    """With what attention in a kept layer saves besides where there is padding: PyTorch makes numbers of the mask in
    every layer (B x T x T), and transformers repeats keys and values for each head."""
    kept = Depth.of(hf_config, method).kept
    if kept == 0 or count(hf_config, method).makes_scores:
        return phases
    heads = hf_config.num_attention_heads
    repeated = heads - (getattr(hf_config, "num_key_value_heads", None) or heads)
    head_size = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    more = kept * batch * tokens * (tokens + 2 * repeated * head_size) * method.dtype.itemsize
    phases = {name: dict(parts) for name, parts in phases.items()}
    for name, parts in phases.items():
        if name.split(" ")[0] not in ("embedding", "middle", "bottom", "optimizer"):
            parts["stored_activations"] += more
    return phases


def worst_phase(phases: Phases) -> str:
    return max(phases, key=lambda phase: sum(phases[phase].values()))


# --- the plan --------------------------------------------------------------------------------------------------------


Change = Callable[[Phases, int, int], tuple[Phases, int]]


class Predictor:
    """One way to train one model.

    Args:
        change: Turns the measured phases of (batch, tokens) into those of a way that is not measured itself, and says
            how many bytes go to the host.
    """

    def __init__(self, label: str, hf_config: PreTrainedConfig, method: Method, change: Change | None = None):
        self.label, self.hf_config, self.change = label, hf_config, change
        # Padding makes no difference to what is measured.
        self.padded, self.method = method.padded, replace(method, padded=False)

    def finish(self, phases: Phases, batch: int, tokens: int) -> tuple[Phases, int]:
        if self.padded:
            phases = with_padding(self.hf_config, self.method, phases, batch, tokens)
        return (phases, 0) if self.change is None else self.change(phases, batch, tokens)

    def phases(self, batch: int, tokens: int) -> tuple[Phases, int]:
        batches = sample_batches(self.hf_config, self.method, batch, tokens)
        lengths = sample_tokens(self.hf_config, self.method, tokens)
        return self.finish(extend(self.hf_config, self.method, batches, lengths, batch, tokens), batch, tokens)

    def least(self) -> int:
        """Bytes that no batch is too small for, known without measuring anything."""
        counts = count(self.hf_config, self.method)
        return counts.weight_bytes + counts.optimizer_bytes

    def peak(self, batch: int, tokens: int) -> int:
        phases, _ = self.phases(batch, tokens)
        return sum(phases[worst_phase(phases)].values())

    def plan(self, batch: int, tokens: int) -> Plan:
        phases, offloaded = self.phases(batch, tokens)
        phase = worst_phase(phases)
        counts = count(self.hf_config, self.method)
        return Plan(
            label=self.label,
            batch=batch,
            tokens=tokens,
            num_parameters=counts.num_parameters,
            num_trainable=counts.num_trainable,
            parts=phases[phase],
            phase=phase,
            reserve_bytes=RESERVE_BYTES,
            host_bytes=HOST_BYTES + offloaded + counts.host_bytes,
        )

    def largest_batch(self, tokens: int, budget: int) -> int:
        """Largest B whose peak is within `budget`, 0 if none."""
        if self.least() > budget:
            return 0
        first = sample_batches(self.hf_config, self.method, 2**40, tokens)
        if len(first) == 1:
            first = POINTS_OF_BATCH
        lengths = sample_tokens(self.hf_config, self.method, tokens)

        def fits(batch: int) -> bool:
            if batch < first[0]:
                return self.peak(batch, tokens) <= budget
            phases, _ = self.finish(extend(self.hf_config, self.method, first, lengths, batch, tokens), batch, tokens)
            return sum(phases[worst_phase(phases)].values()) <= budget

        return largest(fits, first[0])

    def longest_sequence(self, budget: int) -> int:
        """Largest T of a single sequence whose peak is within `budget`, 0 if none."""
        if self.least() > budget:
            return 0
        points = sample_tokens(self.hf_config, self.method, 2**40)
        if len(points) == 1:
            points = POINTS_OF_LENGTH if is_quadratic(self.hf_config, self.method) else POINTS_OF_LENGTH[:2]

        def fits(tokens: int) -> bool:
            phases, _ = self.finish(extend(self.hf_config, self.method, [1], points, 1, tokens), 1, tokens)
            return sum(phases[worst_phase(phases)].values()) <= budget

        return largest(fits, points[0])


def largest(fits: Callable[[int], bool], first: int) -> int:
    """Largest number for which a condition holds that fails from some number on; `first` is tried first."""
    low, high = 0, first
    while fits(high):
        low, high = high, 2 * high
        if high > 2**40:
            return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
