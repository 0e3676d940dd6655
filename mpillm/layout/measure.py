"""What MPI is and how fast: for `mpillm doctor`. Times are taken on messages as they are, without the journal."""

import time

import numpy as np

from .launcher import short_library

SMALL, LARGE = 8, 4 << 20               # bytes of messages: latency, bandwidth
SUMS = (8, 1 << 20, 16 << 20)           # bytes that are summed over all ranks
TAG = 4711


def mpi_facts(group):
    """The library, the thread level and the standard of MPI; None where no launcher started several ranks."""
    if group.handle is None:
        return None
    mpi = group.mpi
    levels = {mpi.THREAD_SINGLE: "single", mpi.THREAD_FUNNELED: "funneled", mpi.THREAD_SERIALIZED: "serialized", mpi.THREAD_MULTIPLE: "multiple"}
    return {"library": short_library(mpi.Get_library_version()), "standard": list(mpi.Get_version()),
            "thread_level": levels.get(mpi.Query_thread(), "?")}


def exchange(group, partner):
    """(seconds of the way of a small message, bytes/s of large ones) between this rank and `partner`, which calls it too; both send at once."""
    handle, times = group.handle, {}
    for size, repeats in ((SMALL, 200), (LARGE, 8)):
        sent, received = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        handle.Sendrecv(sent, partner, TAG, received, partner, TAG)
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            for _ in range(repeats):
                handle.Sendrecv(sent, partner, TAG, received, partner, TAG)
            best = min(best, (time.perf_counter() - started) / repeats)
        times[size] = best
        if not received.all():
            raise RuntimeError(f"a message of {size} bytes from rank {partner} did not arrive as it was sent")
    return times[SMALL], LARGE / times[LARGE]


def pairs(hosts, rank):
    """Whom a rank exchanges messages with: {"within": its neighbour on the node or None, "across": its like on a neighbouring node or None}.

    Parameters
    ----------
    hosts : list of str
        Of all ranks.
    """
    names = list(dict.fromkeys(hosts))
    of_node = {name: [each for each, host in enumerate(hosts) if host == name] for name in names}
    own = of_node[hosts[rank]]
    place, node = own.index(rank), names.index(hosts[rank])
    within = own[place ^ 1] if place ^ 1 < len(own) else None
    other = of_node[names[node ^ 1]] if node ^ 1 < len(names) else []
    return {"within": within, "across": other[place] if place < len(other) else None}


def all_reduce_times(group):
    """[{bytes, seconds, right}] of sums of float32 over all ranks, by MPI's own all-reduce."""
    found = []
    for size in SUMS:
        x, total = np.full(size // 4, group.rank + 1, np.float32), np.empty(size // 4, np.float32)
        expected, best = group.size * (group.size + 1) / 2, float("inf")
        for _ in range(4):
            group.handle.Barrier()
            started = time.perf_counter()
            group.handle.Allreduce(x, total)
            best = min(best, time.perf_counter() - started)
        found.append({"bytes": size, "seconds": best, "right": bool((total == expected).all())})
    return found
