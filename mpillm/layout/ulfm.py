"""Going on after the death of a rank, where MPI can: User-Level Failure Mitigation (Bland et al. 2013, IJHPCA 27(3)), of Open MPI 5.

A call that needs a dead rank raises; other ranks may be waiting for the one that got the error. So who sees an error revokes every
communicator of the run, which wakes all, and all meet in an agreement (`meet`), which no death disturbs. It also tells whether a rank
wants the job to end: MPI_Abort does not end one of four ranks or more that was started with fault tolerance (seen with 5.0.11).
Those that are left after a death then shrink the world. They end without MPI_Finalize, which waits for the dead at times (3 of 32
launches of 3 and 4 ranks that did nothing else, 5.0.11).
"""

import contextlib
import os
import signal
import threading

from . import comm

COMMAND = "mpirun --with-ft ulfm"
CODE, WELL, STAYS = 0xFF, 0x100, 0x200     # of what ranks agree on bit by bit: an exit code, no death was seen, no rank ends the job


lost = False                # whether a rank of this job has died


def enabled(environ=os.environ):
    """Whether this job was started with fault tolerance."""
    return environ.get("OMPI_MCA_mpi_ft_enable", "0").lower() in ("1", "true", "yes")


def is_failure(error):
    """Whether an exception says that a rank died or that another rank saw that."""
    from mpi4py import MPI
    if not isinstance(error, MPI.Exception):
        return False
    return error.Get_error_class() in (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED)


def meet(group, saw_death=False, code=None):
    """All ranks of `group` that live say how they are. Collective over those.

    Parameters
    ----------
    group : Group
    saw_death : bool
        This rank got an error by which `is_failure`.
    code : int or None
        The exit code with which this rank ends the job.

    Returns
    -------
    (bool, int or None): whether a rank died or some rank saw an error of that kind, and the exit code where a rank ends the job; after a
    death that nobody knew of yet (True, None) whatever ranks said. The same on all ranks.
    """
    from mpi4py import MPI
    flags = CODE | WELL | STAYS
    if saw_death:
        flags &= ~WELL
    if code is not None:
        flags = flags & ~(CODE | STAYS) | code & CODE
    if saw_death or code is not None:
        _revoke_all()
    try:
        flags = group.handle.Agree(flags)
    except MPI.Exception as error:      # raised on all alike
        if not is_failure(error):
            raise
        return True, None
    return not flags & WELL, None if flags & STAYS else flags & CODE or 1      # several codes: some failure


def _revoke_all():
    """Wakes the ranks that wait in any communicator of the run."""
    from mpi4py import MPI
    for group in comm.GROUPS:
        with contextlib.suppress(MPI.Exception):    # a communicator that was freed
            group.handle.Revoke()


def end(group, code, seconds):
    """Tells all ranks to leave with `code`, as this one is about to. After `seconds` without an answer it kills itself: that the others see.

    Not once it is in MPI_Finalize, where no timer of Python runs: a death at the same time can leave it there.
    """
    last = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    last.daemon = True
    last.start()
    meet(group, code=code)


def survivors(world):
    """The group of the ranks of `world` that live. Collective over those, after a death; what was made before is of no use from now on."""
    global lost
    lost = True
    comm.GROUPS.clear()
    return comm.Group(world.handle.Shrink(), "world")


def regroup(alive, ranks):
    """The group of the members `ranks` of `alive`, which becomes the world of this process; Solo where there is one. None on the other members. Collective."""
    handle = alive.handle.Split(0 if alive.rank in ranks else 1, alive.rank)
    group = None if alive.rank not in ranks else comm.Group(handle, "world") if len(ranks) > 1 else comm.Solo()
    comm.set_world(group or comm.Solo())
    return group


def exit(code):
    """Ends this process after a death, as all others of its world do now. Collective."""
    world = comm.world()
    if world.size > 1:
        meet(world)         # the launcher ends a rank that still works when another one goes in this way
    os._exit(code)


def die():
    """Ends this process while the others go on: as a dead one, which they bear."""
    os.kill(os.getpid(), signal.SIGKILL)
