"""What a launcher says about several processes, before any of them imports torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..recipe import InputError

SIZES = (
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "MPI_LOCALNRANKS",
)
"""What torchrun, accelerate and the MPI launchers say of how many processes there are."""
RANKS = ("RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
"""And of which one this is."""
SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
"""Of the step, and of the whole job: the first that is set counts."""
RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What PyTorch needs to know: torchrun and accelerate launch say all of it."""


OF_ACCELERATE = (
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_MIXED_PRECISION",
)
"""What accelerate's config file says of things that a recipe says."""


def check_launch(strategy: str | None, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to be one of several processes that nobody told to work together, or that cannot find each other.

    Args:
        strategy: `parallel.strategy` of the run; None is one process.

    Raises:
        InputError: Names the variable that says so.
    """
    if is_launched(environment):
        if strategy is None:
            several = {name: most for name, most in (("WORLD_SIZE", 1), ("RANK", 0))}
            for name, most in several.items():
                refuse(environment, name, most, "Say how they are to share the work (parallel.strategy: fsdp)")
        return
    slurm = next((name for name in SLURM if name in environment), None)
    say = "Start them with torchrun or accelerate launch, and set parallel.strategy: fsdp"
    for name in (*SIZES, *((slurm,) if slurm else ())):
        refuse(environment, name, 1, say)
    for name in RANKS:
        refuse(environment, name, 0, say)


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is one of the processes that torchrun or accelerate launch started; there may be one only."""
    return all(name in environment for name in RENDEZVOUS)


def number_of_processes(environment: Mapping[str, str] = os.environ) -> int:
    """That were started together."""
    return int(environment["WORLD_SIZE"]) if is_launched(environment) else 1


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process speaks for all."""
    return not is_launched(environment) or environment["RANK"] == "0"


def refuse(environment: Mapping[str, str], name: str, most: int, say: str) -> None:
    try:
        value = int(environment.get(name, most))
    except ValueError:
        return
    if value > most:
        raise InputError(
            f"{name}={value}: started as one of several processes, each of which would do the whole run. {say}; or "
            f"start one alone. If nothing started it, unset {name}."
        )
