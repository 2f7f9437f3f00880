"""What makes a layer reversible: one object a coupling, found by name.

base.py        what every coupling answers
observe.py     what they share where calibration looks at the plain model
stored.py      none: the plain layer, its input stored
innovation/    the pretrained function, made invertible by what is kept of the past
cross_branch/  the RevFFN paper's two half-width streams
"""

from __future__ import annotations

from .base import Added, Coupling, StreamCoupling
from .cross_branch import CrossBranch
from .innovation import Innovation
from .stored import Stored

COUPLINGS: dict[str, Coupling] = {}
"""By name."""


def register(coupling: Coupling) -> Coupling:
    """Make a coupling known to `ReversibleConfig(coupling=name)`; one of the same name is replaced."""
    COUPLINGS[coupling.name] = coupling
    return coupling


def find(name: str) -> Coupling:
    """The coupling of a name.

    Raises:
        ValueError: There is none; the message lists those there are.
    """
    if name not in COUPLINGS:
        raise ValueError(f"coupling must be one of {', '.join(map(repr, COUPLINGS))}, got {name!r}.")
    return COUPLINGS[name]


for _coupling in (Innovation(), CrossBranch(), Stored()):
    register(_coupling)

__all__ = ["COUPLINGS", "Added", "Coupling", "StreamCoupling", "find", "register"]
