"""A run is one process: started as several, each of them would train and write the same thing."""

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


def check_one_process(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to be one of several processes.

    Raises:
        InputError: Names the variable that says so.
    """
    slurm = next((name for name in SLURM if name in environment), None)
    for name in (*SIZES, *((slurm,) if slurm else ())):
        refuse(environment, name, most=1)
    for name in RANKS:
        refuse(environment, name, most=0)


def refuse(environment: Mapping[str, str], name: str, most: int) -> None:
    try:
        value = int(environment.get(name, most))
    except ValueError:
        return
    if value > most:
        raise InputError(
            f"{name}={value}: started as one of several processes, but a run is one process on one GPU. Start it "
            f"without torchrun, accelerate, mpirun or srun, or as one task; if nothing started it, unset {name}."
        )
