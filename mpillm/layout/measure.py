"""What MPI is and how fast: for `mpillm doctor`. Times are taken on messages as they are, without the journal."""

import time

import numpy as np

from .launcher import short_library

SMALL, LARGE = (8, 200), (4 << 20, 8)   # (bytes of a message, most messages of a try): latency, bandwidth
ROUNDS = 3                              # in which each place of a ring meets both of its neighbours
TRIES = 3                               # of which the best counts
TRY = 0.03                              # seconds of a try, where messages are slow
SUMS = (8, 1 << 20, 16 << 20)           # bytes that are summed over all ranks
TAG = 4711


def mpi_facts(group):
    """The library, the standard and the thread level of MPI; for one rank without MPI those that mpi4py would use, not initialised; None where there is none."""
    if group.handle is None:
        return _unused_mpi()
    mpi = group.mpi
    levels = {mpi.THREAD_SINGLE: "single", mpi.THREAD_FUNNELED: "funneled", mpi.THREAD_SERIALIZED: "serialized", mpi.THREAD_MULTIPLE: "multiple"}
    return _names(mpi) | {"thread_level": levels.get(mpi.Query_thread(), "?")}


def _unused_mpi():
    try:
        import mpi4py
        mpi4py.rc.initialize = False    # some login nodes abort in MPI_Init
        from mpi4py import MPI
    except (ImportError, RuntimeError, OSError):    # mpi4py finds no library
        return None
    return _names(MPI) | {"thread_level": None}


def _names(mpi):
    return {"library": short_library(mpi.Get_library_version()), "standard": list(mpi.Get_version())}


# ---- two ranks --------------------------------------------------------------------------------------------------------

def neighbour(place, count, turn):
    """With whom a place of a ring of `count` is paired in round `turn`; None where it rests.

    Each meets both neighbours in ROUNDS rounds: a slow place is slow with both, and its neighbour is not blamed for it.
    """
    if count < 2:
        return None
    for edge in (place, (place - 1) % count):       # an edge joins the place of its number and the next one
        if turn == (2 if count % 2 and edge == count - 1 else edge % 2):
            return (place + 1) % count if edge == place else edge
    return None


def partners(hosts, rank, turn):
    """Whom a rank exchanges messages with in a round: {"within": a neighbour on the node, "across": its like on a neighbouring node}, or None.

    Parameters
    ----------
    hosts : list of str
        Nodes of all ranks.
    """
    names = list(dict.fromkeys(hosts))
    of_node = {name: [each for each, host in enumerate(hosts) if host == name] for name in names}
    own = of_node[hosts[rank]]
    place, node = own.index(rank), names.index(hosts[rank])
    within, across = neighbour(place, len(own), turn), neighbour(node, len(names), turn)
    other = [] if across is None else of_node[names[across]]
    return {"within": None if within is None else own[within], "across": other[place] if place < len(other) else None}


def exchange(group, partner):
    """(seconds of the way of a small message, bytes/s each way of large ones) between this rank and `partner`, which calls it too."""
    size, _ = LARGE
    return _exchange(group, partner, *SMALL), size / _exchange(group, partner, size, LARGE[1])


def _exchange(group, partner, size, most):
    """Seconds of a message of `size` bytes; both send at once."""
    handle = group.handle
    sent, received = np.full(size, group.rank % 251 + 1, np.uint8), np.zeros(size, np.uint8)

    def seconds(repeats):
        started = time.perf_counter()
        for _ in range(repeats):
            handle.Sendrecv(sent, partner, TAG, received, partner, TAG)
        return (time.perf_counter() - started) / repeats
    seconds(1)      # the first one makes the connection
    guess, other = np.array([seconds(2)]), np.empty(1)
    handle.Sendrecv(guess, partner, TAG, other, partner, TAG)
    repeats = int(min(most, max(2, TRY / max(guess[0], other[0]))))     # the same on both
    best = min(seconds(repeats) for _ in range(TRIES))
    if not (received == partner % 251 + 1).all():
        raise RuntimeError(f"a message of {size} bytes from rank {partner} to rank {group.rank} did not arrive as it was sent")
    return best


# ---- all ranks --------------------------------------------------------------------------------------------------------

def all_reduce_times(group):
    """[{bytes, seconds, wrong}] of sums of float32 by MPI's own all-reduce: of the slowest rank, and the ranks that got a wrong sum. Collective."""
    return [_all_reduce(group, size) for size in SUMS]


def _all_reduce(group, size):
    places = np.arange(size // 4, dtype=np.float32) % 8
    x, total, times = places + group.rank % 8, np.empty_like(places), np.empty(TRIES)
    # Whole numbers below 2^24 for up to a million ranks: exact in float32, in whichever order they are added.
    expected = places * group.size + sum(rank % 8 for rank in range(group.size))
    for number in range(TRIES):
        group.handle.Barrier()
        started = time.perf_counter()
        group.handle.Allreduce(x, total)
        times[number] = time.perf_counter() - started
    right = group.collect(bool((total == expected).all()))
    return {"bytes": size, "seconds": float(group.all_reduce(times, "max").min()), "wrong": [rank for rank, each in enumerate(right) if not each]}
