"""The optimizer that steps in backward.

groups.py       parameter groups, with and without weight decay
rules.py        what each rule does to one parameter, by the operations of ops/update
in_backward.py  when a parameter steps, clipping, what is kept and saved
"""

from .groups import parameter_groups
from .in_backward import NonFiniteGradientError, OptimizerInBackward

__all__ = ["NonFiniteGradientError", "OptimizerInBackward", "parameter_groups"]
