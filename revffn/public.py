"""The public names, docs/api.md: all of them are in `revffn` itself."""

from .config import CrossBranchConfig, ReversibleConfig
from .couplings import Coupling, StreamCoupling
from .couplings import register as register_coupling
from .engine.host_weights import HostWeights
from .engine.recompute import StateMismatchError
from .memory.plan import plan
from .models.architectures import Architecture
from .models.conversion import (
    convert,
    coupling_parameters,
    export,
    is_reversible,
    register_architecture,
    reversible_report,
)
from .models.losses import linear_cross_entropy, use_linear_cross_entropy
from .optim import NonFiniteGradientError, OptimizerInBackward, parameter_groups

__all__ = [
    "Architecture",
    "Coupling",
    "CrossBranchConfig",
    "HostWeights",
    "NonFiniteGradientError",
    "OptimizerInBackward",
    "ReversibleConfig",
    "StateMismatchError",
    "StreamCoupling",
    "convert",
    "coupling_parameters",
    "export",
    "is_reversible",
    "linear_cross_entropy",
    "parameter_groups",
    "plan",
    "register_architecture",
    "register_coupling",
    "reversible_report",
    "use_linear_cross_entropy",
]
