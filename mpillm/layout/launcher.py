"""Whether a launcher started this process, and what it tells before MPI is there. Standard library only.

MPI is initialised only where a launcher started several ranks: some login nodes abort in MPI_Init.
"""

import os

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PALS_RANKID", "MV2_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "FLUX_TASK_RANK")
LOCAL_SIZE_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PALS_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "FLUX_JOB_SIZE")


def first_number(names, environ):
    """The first of the variables that is set to a whole number, else None."""
    for name in names:
        if environ.get(name, "").isdigit():
            return int(environ[name])
    return None


def step_of_srun(environ=os.environ):
    """Whether srun started this process as one of several tasks (a batch script itself is no such task)."""
    return (first_number(["SLURM_STEP_NUM_TASKS"], environ) or 1) > 1


def rank(environ=os.environ):
    """This process's rank as its launcher counts; 0 without a launcher."""
    found = first_number(RANK_VARIABLES, environ)
    if found is None and step_of_srun(environ):
        found = first_number(["SLURM_PROCID"], environ)
    return found or 0


def launched(environ=os.environ):
    """Whether a launcher may have started several ranks; MPI is not initialised otherwise."""
    size = first_number(SIZE_VARIABLES, environ)
    if size is None:
        return step_of_srun(environ) or first_number(RANK_VARIABLES, environ) is not None
    return size > 1


def ends_on_terminate(environ=os.environ):
    """Whether the launcher kills so soon after SIGTERM that nothing can be saved: Open MPI's mpirun (0.25 to 1 s)."""
    return "OMPI_COMM_WORLD_SIZE" in environ
