"""After the death of a rank, where MPI bears it: User-Level Failure Mitigation (Bland et al. 2013, IJHPCA 27(3)), of Open MPI 5.

A call that needs a dead rank raises; other ranks may be waiting for the one that got the error. So who sees an error revokes every
communicator of the run, which wakes all, and all meet in an agreement (`meet`), which no death disturbs. A rank that fails by itself
meets the others there too, and all that live learn whether the job ends, and with which code (`settle`).

What Open MPI 5.0.11 does when it was started with fault tolerance, and what is done here instead:

- MPI_Abort leaves some of four ranks or more waiting, and MPI_Finalize waits for the dead at times (3 of 32 launches of ranks that did
  nothing else). A job that does not end well leaves by `leave`, without either.
- A rank that exits with another code than 0 is not seen as dead: those that agree with it wait for ever. So all exit together, after
  they have met, and one that waits too long kills itself, which the others do see.
- A collective that was cut short may tell of success without having filled the array (Allgatherv, on a rank that others had revoked it
  for): `comm` looks for deaths after each.
- Where all were killed mpirun returns 0. So rank 0 exits with a code where the others kill themselves.
"""

import contextlib
import faulthandler
import os
import signal
from typing import NamedTuple

from . import comm
from .record import AGREE

COMMAND = "mpirun --with-ft ulfm"
# What ranks agree on bit by bit ("and"): an exit code and its complement, which shows whether codes differ; no death was seen; no rank ends the job.
CODE, COMPLEMENT, WELL, STAYS = 0xFF, 0xFF00, 0x10000, 0x20000
PATIENCE = 10.0             # seconds that a rank waits for the others to end with it, where no monitor watches over that
HEAD_START = 1.0            # seconds that the others have before rank 0 exits


class Verdict(NamedTuple):
    """What the ranks that live know of each other after a failure."""
    alive: object       # Group
    code: object        # int: all end with it; None: nobody wants to end, a rank died
    speaks: bool        # whether this rank is to say why: the lowest of those that have the same to say


class Met(Exception):
    """What `meet` told, (whether a rank died, exit code or None), where that is not that all are well. The same on all ranks."""


lost = False                # whether ranks of this job were left behind, or all are about to end
verdict = None              # of the end of the job


def is_failure(error):
    """Whether an exception says that a rank died, or that another rank saw that or ends the job."""
    if isinstance(error, Met):
        return True
    from mpi4py import MPI
    if not isinstance(error, MPI.Exception):
        return False
    return error.Get_error_class() in (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED) or any(
        comm.cut_short(group.handle) for group in comm.GROUPS)       # what is cut short may fail by any class: ERR_OTHER, seen in a barrier


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
    (bool, int or None): whether a rank died or some rank saw an error of that kind, and the exit code where a rank ends the job (1 where
    ranks have different ones); after a death that nobody knew of yet (True, None) whatever ranks said. The same on all ranks.
    """
    from mpi4py import MPI
    flags = _flags(saw_death, code)
    if saw_death or code is not None:
        _revoke_all()
    call = group._begin(AGREE, None)
    try:
        flags = group.handle.Agree(flags)
    except MPI.Exception as error:      # raised on all alike
        if not is_failure(error):
            raise
        return True, None
    finally:
        call.done()
    return _read(flags)


def _flags(saw_death, code):
    """What one rank says, as bits that are combined by "and"."""
    ends = STAYS | CODE | COMPLEMENT if code is None else code & CODE | (~code & CODE) << 8
    return ends if saw_death else ends | WELL


def _read(flags):
    """What all have said: the result of `meet`."""
    same = flags & CODE ^ flags >> 8 & CODE == CODE
    return not flags & WELL, None if flags & STAYS else same and flags & CODE or 1


def _revoke_all():
    """Wakes the ranks that wait in any communicator of the run."""
    from mpi4py import MPI
    for group in comm.GROUPS:
        with contextlib.suppress(MPI.Exception):    # a communicator that was freed
            group.handle.Revoke()


def check_all(group):
    """Raises Met on all ranks where one died or ends the job. Collective over those that live."""
    if group.bears_deaths:
        met = meet(group)
        if met != (False, None):
            raise Met(*met)


def settle(group, code=None, text=None, met=None):
    """All ranks of `group` that live learn how it goes on, after a failure of any of them. Collective over those.

    Parameters
    ----------
    group : Group
    code : int or None
        The exit code with which this rank ends the job; None: it only saw the failure of another one.
    text : str or None
        What this rank has to say of the end.
    met : tuple or None
        What `meet` told, where the ranks of `group` have met already.

    Returns
    -------
    Verdict. The same on all ranks, but for `speaks`.
    """
    global verdict
    ends = (met or meet(group, saw_death=code is None, code=code))[1]
    alive = survivors(group)
    while ends is None:         # a death that nobody knew of hides what ranks have said
        died, ends = meet(alive, code=code)
        if ends is None and not died:
            return Verdict(alive, None, False)
        if ends is None:
            alive = survivors(alive)
    verdict = Verdict(alive, ends, _speaks(alive, text))
    return verdict


def missing(world, alive):
    """Ranks of `world` that are not in the group `alive` of those that live."""
    before, after = world.handle.Get_group(), alive.handle.Get_group()
    places = after.Translate_ranks(list(range(alive.size)), before)
    for group in (before, after):
        group.Free()
    return sorted(set(range(world.size)) - set(places))


def _speaks(alive, text):
    try:
        texts = alive.collect(text)
    except alive.mpi.Exception:     # one more died: rather twice than never
        _revoke_all()
        return text is not None
    return text is not None and texts.index(text) == alive.rank


def survivors(world):
    """The group of the ranks of `world` that live. Collective over those; what was made before is of no use from now on."""
    global lost
    lost = True
    comm.GROUPS.clear()
    return comm.Group(world.handle.Shrink(), "world")


def regroup(alive, ranks):
    """The group of the members `ranks` of `alive`, to go on with; Solo where there is one. None on the other members. Collective."""
    handle = alive.handle.Split(0 if alive.rank in ranks else 1, alive.rank)
    return None if alive.rank not in ranks else comm.Group(handle, "world") if len(ranks) > 1 else comm.Solo()


@contextlib.contextmanager
def limited(rank, seconds=None):
    """A block, of meetings, that ends the process where it lasts longer (`PATIENCE`); also while the process is in MPI. Only in the main thread."""
    seconds = PATIENCE if seconds is None else seconds
    with open(os.devnull, "w") as nowhere:
        if rank == 0:
            faulthandler.dump_traceback_later(seconds + HEAD_START, exit=True, file=nowhere)
        else:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 0)


def leave(code):
    """Ends this process, as all others of its world do now. Collective over those that live."""
    alive = verdict.alive if verdict else comm.world()
    with limited(alive.rank):
        if alive.size > 1:
            meet(alive)     # all have said and written what they had to
        os._exit(code)


def kill_self():
    """Ends this process while the others go on: as a dead one, which they bear."""
    os.kill(os.getpid(), signal.SIGKILL)
