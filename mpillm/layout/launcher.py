"""Whether a launcher started this process, and what it tells before MPI is there. Standard library only.

MPI is initialised only where a launcher started several ranks: some login nodes abort in MPI_Init.
"""

import os
import re
import sys

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
    if size is None and environ.get("PMIX_NAMESPACE", "").startswith("slurm.pmix."):
        size = first_number(["SLURM_STEP_NUM_TASKS"], environ)     # srun counts its ranks itself; prterun below it has another namespace
    if size is None:
        return step_of_srun(environ) or first_number(RANK_VARIABLES, environ) is not None
    return size > 1


def started(environ=os.environ):
    """(number of processes that the launcher started, its name), as far as it tells; (1, "") without one."""
    for name, variables in (("mpirun of Open MPI", ["OMPI_COMM_WORLD_SIZE"]), ("mpiexec of MVAPICH", ["MV2_COMM_WORLD_SIZE"]), ("flux", ["FLUX_JOB_SIZE"])):
        if first_number(variables, environ):
            return first_number(variables, environ), name
    if step_of_srun(environ):
        return first_number(["SLURM_STEP_NUM_TASKS"], environ), "srun"
    return first_number(["PMI_SIZE"], environ) or 1, "mpiexec"


def fault_tolerant(environ=os.environ):
    """Whether this job was started with fault tolerance (ulfm.py)."""
    return environ.get("OMPI_MCA_mpi_ft_enable", "0").lower() in ("1", "true", "yes")


def short_library(version):
    """The name of an MPI library as MPI_Get_library_version has it, on one line: "Open MPI v5.0.11"."""
    line = " ".join(version.replace("\0", "").split("\n")[0].split(",")[0].split())
    return re.sub(r"^MPI VERSION ?: ?| Version:| version(?= \d)| \(ANL base.*", "", line)[:60]


def right_launcher(version, beside=os.path.dirname(sys.executable)):
    """How ranks of an MPI library are started, in words.

    Parameters
    ----------
    version : str
        As MPI_Get_library_version has it.
    beside : str
        Where an MPI from a wheel has its mpirun and mpiexec.
    """
    name = version.upper()
    if "CRAY" in name:
        return "srun --mpi=cray_shasta"
    if "INTEL" in name:
        return "its own mpiexec.hydra, or srun --mpi=pmi2 with I_MPI_PMI_LIBRARY set"
    program, kind = ("mpirun", "pmix") if "OPEN MPI" in name else ("mpiexec", "pmi2")
    own = os.path.join(beside, program)
    return f"srun --mpi={kind} or its own {program}" + f" ({own})" * os.path.exists(own)


def loaded_libraries():
    """Files that are mapped into this process; "" where there is no /proc."""
    try:
        with open("/proc/self/maps") as file:
            return "\n".join(line.split()[-1].rpartition("/")[2] for line in file)
    except OSError:
        return ""


def cannot_join(version, environ=os.environ, libraries=""):
    """Whether the ranks of an MPI library surely do not find each other under the launcher, asked before MPI_Init.

    Most libraries then make each process a job of its own, with banners of their own; MPICH 5 aborts.

    Parameters
    ----------
    version : str
        As MPI_Get_library_version has it.
    libraries : str
        Names of the libraries that are loaded: an MPICH may have been built for PMIx.
    """
    pmix = "PMIX_NAMESPACE" in environ
    open_mpi = re.match(r"Open MPI v(\d+)", version)
    if open_mpi:
        return int(open_mpi[1]) >= 5 and not pmix       # older ones may know PMI-1 and PMI-2 too
    other = any(name in environ for name in ("PMI_FD", "PMI_PORT", "PMI_RANK"))
    return version.startswith("MPICH Version") and pmix and not other and bool(libraries) and "pmix" not in (libraries + version).lower()


def lone_rank(version, environ=os.environ):
    """The error line where a launcher started several processes of which each would be a job of its own."""
    count, name = started(environ)
    return (f"{count} processes were started by {name}, but MPI cannot join them into one job: mpi4py uses {short_library(version)}, "
            f"whose ranks are started by {right_launcher(version)}; `srun --mpi=list` shows what a Slurm has")


def ends_on_terminate(environ=os.environ):
    """Whether the launcher kills so soon after SIGTERM that nothing can be saved: Open MPI's mpirun (0.25 to 1 s)."""
    return "OMPI_COMM_WORLD_SIZE" in environ
