"""How a job ends: exit codes, an error of the user said once, a failure of one rank that ends all.

A user error may be raised by all ranks alike or by some of them while the others wait in a collective. Who prints
is agreed by point-to-point messages with a tag of their own, which disturb no collective that is under way:

1. Each rank that raises tells rank 0, and rank 0, if it raises, prints and tells everyone. All told within
   `PATIENCE`: the ranks leave in order, each with exit code 2; otherwise rank 0 aborts the job.
2. Where rank 0 stays silent it did not raise: the ranks that did tell the higher ones, the lowest prints and aborts.

Where MPI bears the death of a rank (ULFM) it does not abort: there all ranks agree on the end (`settle`, `end_together`).
"""

import contextlib
import os
import sys
import threading
import time
import traceback

FINISHED, FAILED, REFUSED, STOPPED, WRONG_NUMBERS, HANG = 0, 1, 2, 75, 76, 77  # exit codes (DESIGN.md section 8)
INTERRUPTED = 130        # second Ctrl-C, as shells have it
CLOSED_PIPE = 141        # the reader of standard output went away, as shells have it

TAG, ELECTION_TAG = 32766, 32765    # MPI guarantees tags up to 32767; the layers count from 0
PATIENCE = 2.0           # seconds in which all ranks that raise alike have raised
ELECTION = 0.7           # seconds for the messages of the election
HEAD_START = 0.5         # seconds that rank 0 has to report a failure that all ranks share, before the others do too
LAST_RESORT = 10.0       # seconds after which a rank that was to be aborted ends the job itself


def say(text):
    """Writes text to standard error now, in one piece; a closed standard error is no further error."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        pass
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def code_of(error):
    """The exit code of a job that ends by this exception."""
    from ..config import UserError
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return REFUSED if isinstance(error, UserError) else INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED


def error_line(error):
    """The line of a user error."""
    return "mpillm: error: " + " ".join(str(error).split()) + "\n"


def refuse(error, group):
    """Prints a user error once over all ranks and ends the job with code 2.

    Parameters
    ----------
    error : UserError
    group : Group, Solo or None
        All ranks; None where MPI was not needed.

    Returns
    -------
    The exit code, where all ranks raised; where only some did, the job is aborted here.
    """
    if group is None or group.size == 1:
        say(error_line(error))
        return REFUSED
    try:
        everyone = _first_speaks(error, group) if group.rank == 0 else _others_listen(error, group)
    except Exception as trouble:  # MPI itself is in disorder: the job has to end all the same
        say(error_line(error) + f"mpillm: rank {group.rank}: while ending: {trouble}\n")
        everyone = False
    return REFUSED if everyone else end(REFUSED, group)


def _tell(group, ranks, tag):
    """Starts an empty message to each of `ranks`; keep the result until the end."""
    return [group.handle.Isend([bytearray(1), group.mpi.BYTE], to, tag) for to in ranks]


def _heard(group, tag, enough, patience):
    """Ranks heard from with `tag`: returns when `enough(ranks)` or after `patience` seconds."""
    heard, deadline = set(), time.monotonic() + patience
    status = group.mpi.Status()
    while not enough(heard):
        if group.handle.Iprobe(group.mpi.ANY_SOURCE, tag, status):
            heard.add(status.Get_source())
            group.handle.Recv([bytearray(1), group.mpi.BYTE], status.Get_source(), tag)
        elif time.monotonic() > deadline:
            break
        else:
            time.sleep(0.002)
    return heard


def _first_speaks(error, group):
    """Rank 0's part; True when every other rank has raised too."""
    say(error_line(error))
    messages = _tell(group, range(1, group.size), TAG)
    everyone = len(_heard(group, TAG, lambda ranks: len(ranks) == group.size - 1, PATIENCE)) == group.size - 1
    return everyone and _sent(messages)


def _others_listen(error, group):
    """Another rank's part; True when rank 0 has raised and printed."""
    messages = _tell(group, [0], TAG)
    if _heard(group, TAG, bool, PATIENCE):
        return _sent(messages)
    messages += _tell(group, range(group.rank + 1, group.size), ELECTION_TAG)
    if _heard(group, ELECTION_TAG, bool, ELECTION):
        time.sleep(LAST_RESORT)  # the lowest rank prints and aborts
    else:
        say(error_line(error))
    return False


def _sent(messages):
    """Completes messages that are known to be received."""
    deadline = time.monotonic() + PATIENCE
    while not all(message.Test() for message in messages):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def fail(error, group):
    """Prints which rank failed and why, and ends the whole job with code 1; returns only where there is one rank.

    Other ranks leave rank 0 a head start: what fails on all of them alike is then told once.
    """
    rank = 0 if group is None else group.rank
    if rank:
        time.sleep(HEAD_START)
    say(_words(error, rank))
    return end(FAILED, group)


def _words(error, rank):
    """What people are told of an exception that ends a job."""
    from ..config import UserError
    if isinstance(error, UserError):
        return error_line(error)
    if isinstance(error, KeyboardInterrupt):
        return "mpillm: interrupted\n"
    if isinstance(error, SystemExit):
        return ""
    if isinstance(error, RanksDied):
        return f"mpillm: {error}\n"
    trace = "".join(traceback.format_exception(error)) + last_communication()
    return f"mpillm: rank {rank} failed: {type(error).__name__}: {error}\n{trace}"


def last_communication():
    """The newest entries of the flight recorder, as lines; "" where nothing was communicated."""
    journal = sys.modules.get("mpillm.layout.journal")
    calls = journal.JOURNAL.last_calls(5) if journal else []
    return "".join(["last communication of this rank:\n", *(f"  {call}\n" for call in calls)]) if calls else ""


def end(code, group):
    """Ends the whole job with `code` where other ranks may be waiting; returns it where there is one rank."""
    if group is not None and group.size > 1:
        group.abort(code)
    return code


# ---- where MPI bears the death of a rank ----------------------------------------------------------------------------

class RanksDied(RuntimeError):
    """The end of a job of which ranks died, in one line for people."""


def settle(error, group):
    """What the ranks that live agree on after `error` on this one: an ulfm.Verdict. Collective over those."""
    from ..config import UserError
    from ..layout import ulfm
    if ulfm.is_failure(error):
        return ulfm.settle(group, met=error.args if isinstance(error, ulfm.Met) else None)
    text = type(error).__name__ if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return ulfm.settle(group, code_of(error), text)     # of mistakes of the user one is said


def end_together(error, group):
    """The exit code with which all ranks end by `error` of this one. Collective over those that live, unless they have settled it before."""
    from ..layout import ulfm
    from .hang import ranks_text
    verdict, said = ulfm.verdict, []
    words, mine = _words(error, group.rank), not ulfm.is_failure(error)
    if verdict is None:
        with ulfm.limited(group.rank), _after(ulfm.PATIENCE / 2, lambda: said.append(say(words)) if mine else None):
            try:
                verdict = settle(error, group)
                if verdict.code is None:
                    died = RanksDied(f"{ranks_text(ulfm.missing(group, verdict.alive))} died")
                    words, verdict = _words(died, group.rank), settle(died, verdict.alive)
            except Exception as trouble:    # MPI itself is in disorder: the others wait as long as they may, and end too
                say(f"{words}mpillm: rank {group.rank}: while ending: {trouble}\n")
                os._exit(code_of(error) or FAILED)
    if verdict.speaks and not said:
        say(words)
    return verdict.code


@contextlib.contextmanager
def _after(seconds, function):
    """A block; where it lasts longer than `seconds` a thread calls the function."""
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def finish(code):
    """`code`, for the interpreter to end with; after a failure that MPI_Finalize does not bear, this ends the process."""
    ulfm = sys.modules.get("mpillm.layout.ulfm")
    if ulfm and ulfm.lost:
        say("")
        ulfm.leave(code)
    return code


def close_output():
    """After the reader of standard output went away: keeps the interpreter from failing again at its end."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, sys.stdout.fileno())
    os.close(silent)
