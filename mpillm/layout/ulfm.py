"""Going on after the death of a rank, where MPI can: User-Level Failure Mitigation (Bland et al. 2013, IJHPCA 27(3)), of Open MPI 5.

A call that needs a dead rank raises; other ranks may be waiting for the one that got the error. So who sees an error revokes every
communicator of the run, which wakes all, and all meet in a shrink of the world.
"""

import os

from . import comm

COMMAND = "mpirun --with-ft ulfm"


def enabled(environ=os.environ):
    """Whether this job was started with fault tolerance."""
    return environ.get("OMPI_MCA_mpi_ft_enable", "0").lower() in ("1", "true", "yes")


def is_failure(error):
    """Whether an exception tells that a rank died, or that another rank has seen it."""
    from mpi4py import MPI
    if not isinstance(error, MPI.Exception):
        return False
    return error.Get_error_class() in (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED)


def survivors(world):
    """The group of the ranks of `world` that live; wakes all of them first. Collective over those."""
    from mpi4py import MPI
    for group in list(comm.GROUPS):
        try:
            group.handle.Revoke()
        except MPI.Exception:       # a communicator that was freed
            pass
    comm.GROUPS.clear()
    return comm.Group(world.handle.Shrink(), "world")


def regroup(alive, ranks):
    """The group of the members `ranks` of `alive`, which becomes the world of this process; None for the other members, which leave. Collective."""
    handle = alive.handle.Split(0 if alive.rank in ranks else 1, alive.rank)
    if alive.rank not in ranks:
        comm.set_world(comm.Solo())
        return None
    group = comm.Group(handle, "world") if len(ranks) > 1 else comm.Solo()
    comm.set_world(group)
    return group
