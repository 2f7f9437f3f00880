"""How a model is made reversible: keyword-only dataclasses whose field texts are the only description.

They belong to a model and travel with it in `config.json`. What belongs to a run is in `recipe.py`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

if TYPE_CHECKING:
    from .couplings import Coupling

MAX_SIDE_BITS = 4
RETIRED = ("tolerance", "num_canaries", "anchor_layers", "max_unconverged", "max_drift", "eval_coupled")
"""Settings of before, which saved models may have; they had no part in the function."""


def first(*default: Any) -> Any:
    """A field, with its default if it has one, that a newcomer needs: `--help` shows these alone."""
    return field(**dict(zip(("default",), default, strict=False)), metadata={"first": True})


def internal(make: Any) -> Any:
    """A field that recipes and command lines do not offer."""
    return field(default_factory=make, metadata={"internal": True})


@dataclass(kw_only=True)
class Grids:
    """The int32 grids that the streams live on: what `convert(calibration=...)` finds from the hidden states."""

    fraction_bits: int = 14
    """Binary digits after the point; of the first state where `grid_growth` is not 0. 14 holds magnitudes up to
    131,072."""
    grid_growth: int | None = None
    """Innovation: binary digits that the last state has more than the first; those between grow evenly. A state whose
    grid is finer by one digit than that of the state two before takes in the past with half the gain and keeps no bit
    for it: digits that the streams have to spare stand in for side bits. None: as many as calibration finds to spare,
    0 without it. A number is kept without calibration; with it there are at most so many."""
    wide_channels: list[int] = field(default_factory=list)
    """Innovation: channels with values too large for the finest grid; `wide_growth` is theirs."""
    wide_growth: int = 0
    """Innovation: `grid_growth` of `wide_channels`, not more than the others'."""

    def __post_init__(self):
        growth = self.grid_growth or 0
        if self.fraction_bits < 0:
            raise ValueError(f"fraction_bits must be at least 0, got {self.fraction_bits}.")
        if growth < 0:
            raise ValueError(f"grid_growth must be None (automatic) or at least 0, got {growth}.")
        if not 0 <= self.wide_growth <= growth:
            raise ValueError(f"wide_growth must be 0 to grid_growth, {growth}; got {self.wide_growth}.")
        if self.fraction_bits + growth > 30:
            raise ValueError(
                "fraction_bits and grid_growth must be at most 30 together (the streams are int32), got "
                f"{self.fraction_bits} and {growth}."
            )


@dataclass(kw_only=True)
class CrossBranchConfig:
    """Settings of `cross_branch` alone."""

    query_stream: Literal["left", "right"] = "left"
    """The stream that attention queries are made from. `left` is the paper's form, inverted by fixed-point iteration;
    `right` is inverted explicitly and exactly."""
    stream_maps: bool | None = None
    """Two linear maps (D x D) say what the streams carry of the embedding and what the final norm reads of them, and
    `convert(calibration=...)` fits them and the adapters. False: the streams are the halves of the hidden state, and
    the adapters start as the halves of the identity. None: True with calibration and queries from the right; with
    queries from the left the fixed point of a fitted layer does not converge (docs/experiments.md)."""
    num_iterations: int = 16
    """Queries from the left: most attention evaluations per inversion; it stops when every token has converged.
    Forward keeps what the iteration lacks: fewer of them keep more."""

    def __post_init__(self):
        choose(self, "query_stream", ("left", "right"))
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations must be at least 1, got {self.num_iterations}.")


@dataclass(kw_only=True)
class InnovationConfig:
    """What experiments have settled for `innovation` (docs/experiments.md). Other values repeat those experiments, and
    run models that were saved with them."""

    random_sign: bool = False
    """Draw the sign of the gain per sequence and layer in every training forward. False: the sign is always +1, which
    changes the pretrained function less and exported better."""
    plain_layers: int = 1
    """Number of leading layers that run without coupling, at least 1. The input of the first is the embedding; each
    one after the first stores its predecessor's input (4 bytes per element)."""
    predictor_rank: int | None = None
    """Rank of the linear map that predicts the previous state; None is full rank, 0 predicts by identity."""
    train_predictor: bool = False
    """Train the predictors with everything else. False keeps them as fitted, which costs less."""

    def __post_init__(self):
        if self.plain_layers < 1:
            raise ValueError(f"plain_layers must be at least 1, got {self.plain_layers}.")
        if self.predictor_rank is not None and self.predictor_rank < 0:
            raise ValueError(f"predictor_rank must be None (full) or at least 0, got {self.predictor_rank}.")


def accepts_as_before(translate: Callable[[type, dict[str, Any]], Iterator[str]]) -> Callable[[type], type]:
    """Let a dataclass take arguments as they were before.

    Args:
        translate: Changes the class's arguments in place into those of now, and yields a line for each change, which
            becomes a warning.
    """

    def decorate(cls: type) -> type:
        made = cls.__init__

        @functools.wraps(made)
        def __init__(self: Any, **values: Any) -> None:
            for line in translate(cls, values):
                warnings.warn(line, FutureWarning, stacklevel=2)
            made(self, **values)

        cls.__init__ = __init__
        return cls

    return decorate


def into_groups(cls: type, values: dict[str, Any]) -> Iterator[str]:
    """`query_stream="right"` to `cross_branch=CrossBranchConfig(query_stream="right")`, as it was before there were
    groups."""
    homes = home_of(cls)
    old = {name: values.pop(name) for name in list(values) if name in homes}
    for group in dict.fromkeys(homes[name] for name in old):
        given = {name: value for name, value in old.items() if homes[name] == group}
        kind = groups_of(cls)[group]
        words = f"{group}={kind.__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"
        yield f"{', '.join(given)}: in a group now. Write {words}."
        values[group] = replace(values[group], **given) if group in values else kind(**given)


@accepts_as_before(into_groups)
@dataclass(kw_only=True)
class ReversibleConfig:
    """How a model's decoder layers are made reversible. Travels with the model in `config.json`."""

    coupling: str = "innovation"
    """`innovation` keeps the pretrained function and exports to it; `cross_branch` is the RevFFN paper's; `none` is
    the plain model with each layer's input stored. See docs/how_it_works.md."""
    side_bits: int | list[int] = first(2)
    """Innovation: m, the low bits of the innovation kept per element and layer, 0 to 4; the past enters with gain
    2^-m, or less. Fewer bits keep less and export worse (docs/benchmarks.md#quality). A list gives one value per
    decoder layer."""
    offload_inputs: bool = False
    """Coupling `none`: keep the stored layer inputs in host memory."""
    tile_tokens: int | None = None
    """Run each layer over tiles of at most this many tokens (whole sequences, at least one): the working set is then
    one tile's. None: the whole batch at once. Tiles are the same in forward and recomputation."""
    kept_layers: int = 0
    """The last so many decoder layers keep what they save for backward, instead of running again there: the same bits
    and less work for as much memory as one has to spare. More than there are means all."""
    verify: Literal["raise", "report", "off"] = "raise"
    """What a failed checksum does: raise before the step ends, or only count it in `reversible_report(model)`."""
    cross_branch: CrossBranchConfig = field(default_factory=CrossBranchConfig)
    innovation: InnovationConfig = internal(InnovationConfig)
    grids: Grids = internal(Grids)

    def __post_init__(self):
        self.find_coupling()
        self.check_values()
        tile, kept = self.tile_tokens, self.kept_layers
        if tile is not None and (not isinstance(tile, int) or tile < 1):
            raise ValueError(f"tile_tokens must be None (whole batch) or a number, at least 1; got {tile!r}.")
        if not isinstance(kept, int) or kept < 0:
            raise ValueError(f"kept_layers must be a number, at least 0; got {kept!r}.")

    def check_values(self) -> None:
        """Of what is the same in a recipe."""
        choose(self, "verify", ("raise", "report", "off"))
        bits = self.side_bits if isinstance(self.side_bits, list) else [self.side_bits]
        if not bits or any(not isinstance(m, int) or not 0 <= m <= MAX_SIDE_BITS for m in bits):
            raise ValueError(
                f"side_bits must be 0 to {MAX_SIDE_BITS}, or a list of those, one per layer; got {self.side_bits!r}."
            )

    def find_coupling(self) -> Coupling:
        """The object that `coupling` names.

        Raises:
            ValueError: There is none of that name.
        """
        from .couplings import find  # they are built on this module

        return find(self.coupling)

    def resolve(self, calibrated: bool) -> ReversibleConfig:
        """With values for what depends on whether the model is calibrated."""
        return self.find_coupling().resolve(self, calibrated)

    def side_bits_of(self, layer: int) -> int:
        """m of one decoder layer."""
        return self.side_bits[layer] if isinstance(self.side_bits, list) else self.side_bits

    def fraction_bits_of(self, state: int, num_layers: int, wide: bool = False) -> int:
        """Binary digits of state 0 (the embedding) to `num_layers`; of the wide channels or the others."""
        growth = (self.grids.wide_growth if wide else self.grids.grid_growth or 0) if self.grids_grow else 0
        return self.grids.fraction_bits + growth * state // num_layers

    @property
    def grids_grow(self) -> bool:
        return self.find_coupling().grids_grow

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ReversibleConfig:
        """From what `to_dict` made, also before settings were put into groups.

        Raises:
            ValueError: A setting is unknown, or has a value that is not accepted.
        """
        groups, homes = groups_of(cls), home_of(cls)
        known, inside = {f.name for f in fields(cls)}, {group: dict(values.get(group) or {}) for group in groups}
        flat = {name: value for name, value in values.items() if name not in groups and name not in RETIRED}
        for name in [name for name in flat if name in homes]:
            inside[homes[name]][name] = flat.pop(name)
        unknown = sorted(set(flat) - known)
        for group, made in groups.items():
            unknown += [f"{group}.{name}" for name in sorted(set(inside[group]) - {f.name for f in fields(made)})]
        if unknown:
            raise ValueError(f"Unknown reversible settings {unknown}. Accepted: {', '.join(sorted(known))}.")
        return cls(**flat, **{group: made(**inside[group]) for group, made in groups.items()})


def groups_of(config: type) -> dict[str, type]:
    """The fields of a dataclass that are dataclasses themselves."""
    hints = get_type_hints(config)
    return {f.name: hints[f.name] for f in fields(config) if is_dataclass(hints[f.name])}


def offered(config: type, prefix: str = "") -> Iterator[tuple[str, Any, type, Field]]:
    """Name, type, dataclass and field of everything that recipes and command lines offer; fields of groups have the
    group's name and a point in front."""
    hints, groups = get_type_hints(config), groups_of(config)
    for found in fields(config):
        if found.metadata.get("internal"):
            continue
        if found.name in groups:
            yield from offered(groups[found.name], f"{prefix}{found.name}.")
        else:
            yield prefix + found.name, hints[found.name], config, found


def home_of(config: type) -> dict[str, str]:
    """The group of every field of a group."""
    return {f.name: group for group, made in groups_of(config).items() for f in fields(made)}


def choose(config: Any, name: str, accepted: tuple) -> None:
    """Raise a ValueError if a field has none of the accepted values."""
    if getattr(config, name) not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {getattr(config, name)!r}.")
