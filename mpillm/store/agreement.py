"""One outcome for all ranks: what fails on one rank is raised on every rank, and nobody waits in a collective.

It moves only messages; what is written and read is in the other files of this folder.
"""

from contextlib import contextmanager

import numpy as np

from ..config import UserError


class DamagedCheckpoint(UserError):
    """A checkpoint that is incomplete, altered or unsafe to read; resuming falls back to an older one."""


class SaveFailed(Exception):
    """A checkpoint could not be written (one line); the earlier ones are intact."""


KINDS = {kind.__name__: kind for kind in (UserError, DamagedCheckpoint, SaveFailed)}


def one_line(error):
    """The text of an exception without line breaks; its type too where that is not ours."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (OSError, *KINDS.values())) else f"{type(error).__name__}: {text}"


@contextmanager
def agreed(group, kind, what):
    """Runs the block on every rank; if it raised on any, all raise the error of the lowest such rank.

    The block may hold no collective that a failing rank would miss. Errors of this folder (and `UserError`) keep
    their type; others become `kind`, with `what` and the rank in the message.
    """
    error = None
    try:
        yield
    except Exception as caught:  # any failure of one rank has to reach the others
        error = caught
    failed = int(group.all_reduce(np.array([group.rank if error else group.size], np.int64), "min")[0])
    if failed < group.size:
        name, text = group.share([type(error).__name__, one_line(error)] if error else None, root=failed)
        if name in KINDS:
            raise KINDS[name](text) from error
        raise kind(f"{what} failed on rank {failed}: {text}") from error


def on_root(group, kind, what, work):
    """The JSON-able result of `work()`, which runs on rank 0 only; its error is raised on every rank."""
    result = None
    with agreed(group, kind, what):
        if group.rank == 0:
            result = work()
    return group.share(result)
