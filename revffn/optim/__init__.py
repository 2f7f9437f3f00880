"""The optimizer that steps in backward.

in_backward.py  when a parameter steps, clipping, what is kept; the rules' states and their updates (ops/update)
"""

from .in_backward import NonFiniteGradientError, OptimizerInBackward, parameter_groups

__all__ = ["NonFiniteGradientError", "OptimizerInBackward", "parameter_groups"]
