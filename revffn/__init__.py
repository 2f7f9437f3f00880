"""revffn: fine-tune all parameters of a Mixture-of-Experts language model on one GPU, with reversible blocks."""

from .config import ReversibleConfig
from .engine.host_weights import HostWeights
from .engine.recompute import StateMismatchError
from .models.conversion import convert, coupling_parameters, export, is_reversible, reversible_report

__version__ = "0.1.0.dev0"

__all__ = [
    "HostWeights",
    "ReversibleConfig",
    "StateMismatchError",
    "convert",
    "coupling_parameters",
    "export",
    "is_reversible",
    "reversible_report",
]
