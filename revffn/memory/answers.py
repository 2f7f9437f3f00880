"""What the planner answers: plain numbers, without torch, so that they can be kept and shown at once."""

# B = batch, T = tokens

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .amounts import gib

ACCEPTED_ERROR = 0.03
"""Of a predicted peak against the simulated one."""
USUAL_TILE = 2048
"""Tokens of a tile where more are no faster (a CPU) or are not the question: fewer take hardly less."""


OF_RANKS = ("gathered", "exchange")
"""Parts that one GPU has nothing of."""


@dataclass(kw_only=True)
class Plan:
    """What one way of training takes."""

    label: str
    batch: int
    tokens: int
    num_parameters: int
    num_trainable: int
    parts: dict[str, int]
    """Bytes of tensors per part at the peak; see `live_bytes.PARTS`."""
    phase: str
    """Where in the step the peak is."""
    reserve_bytes: int
    """On a GPU, outside tensors."""
    host_bytes: int
    """Host memory beside a GPU."""
    gpus: int = 1
    """Ranks that share the work: the bytes are of one of them, the batch is of all together."""
    second_part_bytes: int | None = None
    """ep: what a rank takes more that receives twice its even part of the rows."""
    largest_batch: int | None = None
    """That fits `gpu_bytes` with this length; 0 if none does, None if not asked."""
    longest_sequence: int | None = None
    """That fits `gpu_bytes` alone, one on each rank."""
    alternatives: list[Plan] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        """Of tensors: what `torch.cuda.max_memory_allocated` measures."""
        return sum(self.parts.values())

    @property
    def total_bytes(self) -> int:
        """Device memory with the reserve."""
        return self.peak_bytes + self.reserve_bytes

    def as_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values |= {"peak_bytes": self.peak_bytes, "total_bytes": self.total_bytes}
        return values | {"alternatives": [plan.as_dict() for plan in self.alternatives]}


@dataclass(frozen=True)
class TileChoice:
    """What `tile_tokens: auto` came to."""

    tile_tokens: int | None
    reason: str

    def __str__(self) -> str:
        size = "the whole batch" if self.tile_tokens is None else f"{self.tile_tokens:,} tokens"
        return f"Tiles: {size} ({self.reason})"


@dataclass(frozen=True)
class KeptChoice:
    """What `kept_layers: auto` came to."""

    kept_layers: int
    num_layers: int
    reason: str

    def __str__(self) -> str:
        return f"Kept layers: {self.kept_layers} of {self.num_layers} ({self.reason})"


@dataclass(frozen=True)
class Change:
    """Something that makes a run fit."""

    settings: dict[str, Any]
    """New values by the name of the setting: batch, tokens, tile_tokens, kept_layers, side_bits, optimizer, rounding,
    coupling, weights, gpus, parallel."""
    text: str
    """The same for people."""
    total_bytes: int
    """Device memory after the change, with the reserve."""

    def __str__(self) -> str:
        return f"{self.text} ({gib(self.total_bytes)})"


@dataclass(frozen=True)
class Traffic:
    """What a step with weights in host memory copies, and from how many tokens on that hides behind computing."""

    to_device_bytes: int
    to_host_bytes: int
    break_even_tokens: int
    """Per step."""


@dataclass(frozen=True, kw_only=True)
class Wire:
    """What a rank sends to the others in a step, and receives of them; see wire.py."""

    strategy: str
    gathers: int
    """Bytes of parameters."""
    reductions: int
    """Of gradients."""
    rows: int
    """On the way to experts and back."""
    tokens: int
    """Of the step, of one rank."""
    break_even_tokens: int | None
    """Per step and rank: with fewer, ep sends less than fsdp. None where experts cannot be divided."""
    seconds: float | None
    """That sending takes at least over the link that was asked about; None if none was."""
    hidden_tokens: int | None
    """Per step and rank: from so many on, computing takes longer than sending. None if never, or not asked."""

    @property
    def num_bytes(self) -> int:
        return self.gathers + self.reductions + self.rows


@dataclass(frozen=True)
class Comparison:
    """One prediction and the full simulated step beside it."""

    predicted: dict[str, int]
    simulated: dict[str, int]
    seconds: float
    """That the simulation took."""

    @property
    def relative_error(self) -> float:
        """Of the peak; positive if too much was predicted."""
        return sum(self.predicted.values()) / sum(self.simulated.values()) - 1

    @property
    def problem(self) -> str | None:
        """What is wrong, if the peaks differ by more than `ACCEPTED_ERROR`."""
        if abs(self.relative_error) <= ACCEPTED_ERROR:
            return None
        return (
            f"the predicted peak is off by {self.relative_error:+.1%}, accepted is {ACCEPTED_ERROR:.0%}. Trust the "
            "simulated one, and report this with the command that shows it."
        )

    def as_dict(self) -> dict[str, Any]:
        both = {"predicted": self.predicted, "simulated": self.simulated}
        return both | {"relative_error": self.relative_error, "seconds": self.seconds}

    def table(self) -> str:
        """Part by part. A peak that is flat may be found in another moment of the step: then single parts differ."""
        lines = [f"{'':<24}{'predicted':>12}{'simulated':>12}{'error':>9}"]
        there = [name for name in self.predicted if name not in OF_RANKS or self.simulated[name]]
        rows = [(name.replace("_", " "), self.predicted[name], self.simulated[name]) for name in there]
        rows.append(("peak", sum(self.predicted.values()), sum(self.simulated.values())))
        for name, predicted, simulated in rows:
            error = f"{predicted / simulated - 1:+.2%}" if simulated else "" if not predicted else "new"
            lines.append(f"{name:<24}{gib(predicted):>12}{gib(simulated):>12}{error:>9}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """All that `revffn plan` says without simulating the whole step."""

    plan: Plan
    tile: TileChoice | None
    """None if the question named a size."""
    kept: KeptChoice | None
    """None if the question named a number."""
    changes: list[Change]
    """That would make a run fit which does not."""
    traffic: Traffic | None
    """Of weights in host memory."""
    wire: list[Wire]
    """Of several ranks; the strategy that was asked about first."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Answer:
        def plan(values: dict[str, Any]) -> Plan:
            return Plan(**values | {"alternatives": [plan(other) for other in values["alternatives"]]})

        return cls(
            plan=plan(values["plan"]),
            tile=values["tile"] and TileChoice(**values["tile"]),
            kept=values["kept"] and KeptChoice(**values["kept"]),
            changes=[Change(**change) for change in values["changes"]],
            traffic=values["traffic"] and Traffic(**values["traffic"]),
            wire=[Wire(**way) for way in values["wire"]],
        )
