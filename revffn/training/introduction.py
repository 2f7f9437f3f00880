"""What a run says before it loads weights; all that `--dry-run` says."""

from __future__ import annotations

from ..memory.command import table
from .preflight import Run


def introduction(run: Run) -> list[str]:
    """What a run says before it loads weights."""
    lines = [str(source) for source in run.sources]
    lines += [
        counts.line(name, run.config.data.max_length)
        for name, counts in (("Data", run.counts["training"]), ("Held-out data", run.counts["heldout"]))
        if counts.examples
    ]
    if run.config.memory.weights == "host":
        lines.append("Weights: in host memory, two decoder layers at a time on the device")
    return lines + [str(choice) for choice in (run.tile, run.kept) if choice is not None]


def describe(run: Run) -> str:
    """The plan of a run, for `--dry-run`."""
    if run.resume.finished:
        return "\n".join(run.resume.says)
    training = run.config.training
    steps = f"{training.num_epochs:g} epochs" if training.num_steps is None else f"{training.num_steps} steps"
    lines = [*run.resume.says, *introduction(run), f"Training: {steps} of {training.batch_size} sequences"]
    if run.plan is None:
        unknown = "ddp" if run.config.parallel.strategy == "ddp" else f"model_type={run.hf_config.model_type!r}"
        lines.append(f"Memory: not predicted, the planner does not know {unknown}")
    else:
        lines += [f"Memory of the largest step, {run.plan.batch} x {run.plan.tokens} tokens:", table(run.plan, None)]
    return "\n".join([*lines, f"It would go into {run.output_dir}. Nothing has been written (--dry-run)."])
