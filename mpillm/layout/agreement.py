"""One outcome for all ranks: what fails on one rank is raised on every rank, and nobody waits in a collective."""

from contextlib import contextmanager

import numpy as np

from ..config import UserError


def one_line(error, *plain):
    """The text of an exception without line breaks; its type too where the text is not made for users, as that of `plain` types is."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    return text if isinstance(error, (OSError, UserError, *plain)) else f"{type(error).__name__}: {text}"


@contextmanager
def agreed(group, kind, what):
    """Runs the block on every rank; if it raised on any, all raise the error of the lowest such rank.

    The block may hold no collective that a failing rank would miss. A `UserError` (or one of its kinds) stays what
    it is; others become `kind`, with `what` and the rank in the message. But where `kind` is a user error, only
    errors of the file system become one: a bug is no mistake of the user, it becomes a RuntimeError.

    Parameters
    ----------
    group : Group or Solo
    kind : exception type
    what : str
        Which file, and what was done with it.
    """
    error = None
    try:
        yield
    except Exception as caught:  # any failure of one rank has to reach the others
        error = caught
    failed = int(group.all_reduce(np.array([group.rank if error else group.size], np.int64), "min")[0])
    if failed == group.size:
        return
    name, is_ours, is_file, text = group.share(
        [type(error).__name__, isinstance(error, (UserError, kind)), isinstance(error, OSError), one_line(error, kind)] if error else None,
        root=failed)
    if is_ours:
        kinds = {known.__name__: known for known in (kind, UserError, *UserError.__subclasses__())}
        raise kinds.get(name, kind)(text) from error
    if issubclass(kind, UserError) and not is_file:
        kind = RuntimeError
    raise kind(f"{what} failed" + (f" on rank {failed}" if group.size > 1 else "") + f": {text}") from error


def on_root(group, kind, what, work):
    """The JSON-able result of `work()`, which runs on rank 0 only; its error is raised on every rank."""
    result = None
    with agreed(group, kind, what):
        if group.rank == 0:
            result = work()
    return group.share(result)
