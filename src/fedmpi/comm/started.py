"""What the launcher's environment variables say: how many ranks it started, which one this is, which of its node."""

from __future__ import annotations

import os

# Variables of launchers. Batch scripts set FEDMPI_RANKS. A launcher inside another's job comes first: inside mpirun's
# ranks, SLURM's variables describe mpirun's daemons.
SIZES = (
    "FEDMPI_RANKS",
    "OMPI_COMM_WORLD_SIZE",  # Open MPI's mpirun
    "PMI_SIZE",  # Hydra: MPICH, Intel MPI; srun --mpi=pmi2; PALS
    "MV2_COMM_WORLD_SIZE",  # MVAPICH
    "JSM_NAMESPACE_SIZE",  # jsrun
    "FLUX_JOB_SIZE",  # flux run
    "SLURM_STEP_NUM_TASKS",  # srun
)
RANKS = (
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "PALS_RANKID",
    "MV2_COMM_WORLD_RANK",
    "JSM_NAMESPACE_RANK",
    "FLUX_TASK_RANK",
    "PMIX_RANK",  # prterun, which gives no size; srun --mpi=pmix
    "SLURM_PROCID",
)
LOCAL_RANKS = (
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",  # Hydra: MPICH, Intel MPI, MVAPICH 3
    "PALS_LOCAL_RANKID",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "JSM_NAMESPACE_LOCAL_RANK",
    "FLUX_TASK_LOCAL_ID",
    "PMIX_LOCAL_RANK",  # of sites' wrappers around prterun, which gives none itself
    "SLURM_LOCALID",
)


def launched() -> int:
    """Number of ranks that the launcher says it started; 0 if it does not say."""
    return next((int(value) for name in SIZES if (value := os.environ.get(name, "")).isdigit()), 0)


def launched_rank() -> int:
    """The rank that the launcher says this process is; 0 if it does not say."""
    return next((int(value) for name in RANKS if (value := os.environ.get(name, "")).isdigit()), 0)


def is_first() -> bool:
    """Whether this process is the one of the job that reports errors when MPI cannot be used: rank 0 by the launcher.
    Where it gives no number of ranks, rank 1, too: rank 0 does not know that others are missing in its world."""
    return launched_rank() <= (0 if launched() or "PMIX_RANK" not in os.environ else 1)


def local_rank() -> tuple[str, int] | None:
    """The launcher's variable and what it says: which of its node's ranks this process is. None without a launcher, or
    if it does not say."""
    return next(((name, int(value)) for name in LOCAL_RANKS if (value := os.environ.get(name, "")).isdigit()), None)
