"""Groups of ranks that are only planned: their calls are entered in a journal, have results of the right shape, and move nothing."""

import functools

import numpy as np

from .comm import Group
from .journal import JOURNAL
from .pending import Pending
from .slab import cut


class Started(Pending):
    """A started call of a planned group.

    It is done whenever it is asked. `call.done()` means that the rank waits, as in a call that blocks: not where it only asks.
    """
    asked = False

    def test(self):
        self.asked = True
        return True

    def wait(self):
        if not self.asked:
            self.call.done()


@functools.lru_cache(maxsize=256)
def _digest(ranges, num_ranks):
    """A number that is the same where the parts of all ranks are."""
    return hash(tuple(tuple(ranges(rank)) for rank in range(num_ranks)))


class Planned(Group):
    """A group that is only planned: it has a rank and a size, its calls are entered in a journal and move nothing.

    Parameters
    ----------
    rank, size : int
    name : str
    key : hashable
        The same for all members and for no other group of the job.
    journal : Journal
    empty : callable
        (shape, dtype) -> array, for results.
    """
    handle = None

    def __init__(self, rank, size, name="planned ranks", key=None, journal=None, empty=np.empty):
        self.rank, self.size, self.name, self.key = rank, size, name, key
        self.journal, self.empty = journal or JOURNAL, empty

    def synchronize(self):
        pass

    def _nothing(self, *arguments):
        return []

    _all_reduce = _all_gather = _all_to_all = _receive = _nothing

    def _started(self, x, *arguments):
        return Started([], arguments[-1])

    _all_gather_start = _shift_start = _started

    def _reduce_scatter_start(self, x, ranges, out, call, empty=None):
        return Started([], call, kept=self.empty(((self.size - 1) * out.size,), x.dtype))       # what `Group` receives into

    def _all_reduce_start(self, x, call):
        return Started([], call, kept=self.empty(((self.size - 1) * cut(x.size, self.size, self.rank)[1],), x.dtype))

    def _parts(self, x, ranges):
        return x.size, _digest(ranges, self.size)

    def send_start(self, x, to, tag=0):
        return Started([], self._begin("send", x, x.nbytes, tag, f"to {to}"))

    def broadcast(self, x, root=0):
        self._begin("broadcast", x, x.nbytes if self.rank == root else 0, (root, x.shape)).done()
        return x

    def barrier(self):
        self._begin("barrier", None).done()

    def _check(self, x, dim, extent):
        if x.shape[dim] != extent:
            raise ValueError(f"{x.shape} over {self.name}: expected {extent} along dim {dim}")

    def gather(self, x, dim, length, unit=1):
        self._check(x, dim, cut(length, self.size, self.rank, unit)[1])
        shape = x.shape[:dim] + (length,) + x.shape[dim + 1:]
        whole = self.empty(shape, x.dtype)
        self._begin("all_gather", whole, (self.size - 1) * x.nbytes, (shape, dim, unit)).done()
        return whole

    def scatter_sum(self, x, dim, length, unit=1):
        self._check(x, dim, length)
        part = self.empty(x.shape[:dim] + (cut(length, self.size, self.rank, unit)[1],) + x.shape[dim + 1:], x.dtype)
        self._begin("reduce_scatter", x, x.nbytes - part.nbytes, (x.shape, dim, unit)).done()
        return part

    def exchange(self, x, split_dim, joined_dim, split_length, joined_length):
        self._check(x, split_dim, split_length)
        self._check(x, joined_dim, cut(joined_length, self.size, self.rank)[1])
        shape = list(x.shape)
        shape[split_dim], shape[joined_dim] = cut(split_length, self.size, self.rank)[1], joined_length
        out = self.empty(tuple(shape), x.dtype)
        own = x.nbytes // max(1, split_length) * shape[split_dim]
        whole = list(x.shape)
        whole[joined_dim] = joined_length
        self._begin("all_to_all", x, x.nbytes - own, (tuple(whole), split_dim, joined_dim)).done()
        return out
