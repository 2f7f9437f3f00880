"""Early stopping and the best checkpoint: both go by the held-out losses in the trainer's `log_history`.

Every checkpoint has that history, so that a run which is resumed decides as it would have without the interruption.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..data.tokens import Row
from ..recipe import InputError, RunConfig
from .checkpoint import checkpoints, step_of, wrong_with


def check_heldout(config: RunConfig, rows: list[Row]) -> None:
    """Refuse to go by a held-out loss that nothing is held out for.

    Raises:
        InputError: Names the setting.
    """
    training, evaluation = config.training, config.evaluation
    asked = "evaluation.patience" if evaluation.patience else "training.load_best_model_at_end"
    if (evaluation.patience or training.load_best_model_at_end) and not rows:
        raise InputError(f"{asked} goes by the held-out loss, and no example is held out. Set data.heldout above 0.")


def heldout_losses(log_history: list[dict[str, Any]]) -> dict[int, float]:
    """Step -> held-out loss in nats per response token, in the order of the steps."""
    return {entry["step"]: entry["eval_loss"] for entry in log_history if "eval_loss" in entry}


def lowest(losses: dict[int, float]) -> int | None:
    """The first step with the lowest loss; None if no loss is finite."""
    finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=finite.__getitem__, default=None)


def evaluations_since_lowest(losses: dict[int, float]) -> int:
    """How many came after the lowest loss; all, if none is finite."""
    return sum(step > (lowest(losses) or 0) for step in losses)


def is_exhausted(patience: int | None, losses: dict[int, float]) -> bool:
    """Whether that many evaluations, or more, have brought no lower loss."""
    return patience is not None and evaluations_since_lowest(losses) >= patience


def best_checkpoint(folder: Path, losses: dict[int, float], *, contents: bool = False) -> Path | None:
    """Of a stage's complete checkpoints that with the lowest held-out loss, the first of equals.

    Args:
        contents: See `checkpoint.wrong_with`.
    """
    found = {step_of(path): path for path in checkpoints(folder) if wrong_with(path, contents=contents) is None}
    return found.get(lowest({step: loss for step, loss in losses.items() if step in found}))
