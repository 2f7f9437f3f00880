"""Parameter groups, with and without weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module, weight_decay: float, parameters: Iterable[tuple[str, nn.Parameter]] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters in at most two groups: with weight decay, and without it (vectors, norms, biases).

    The second group is also not factored: an expert bias (E, out) is a stack of vectors, not a matrix.

    Args:
        model: Where the parameters come from; a tied parameter is listed once.
        weight_decay: Of the first group.
        parameters: Named parameters to use instead of all of the model's.

    Returns:
        Groups with named parameters, for `OptimizerInBackward` or any `torch.optim.Optimizer`.
    """
    decayed, plain = [], []
    for name, parameter in model.named_parameters() if parameters is None else parameters:
        if parameter.requires_grad:
            vector = parameter.dim() < 2 or "norm" in name.lower() or name.endswith("bias")
            (plain if vector else decayed).append((name, parameter))
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "factored": True},
        {"params": plain, "weight_decay": 0.0, "factored": False},
    ]
    return [group for group in groups if group["params"]]
