"""Every MPI call on an array, and nothing else touches MPI.

A `Group` is the ranks along one axis of the mesh (or all of them); `Solo` is the same for one rank without MPI
(planned.py: for ranks that are only planned). Collectives come in adjoint pairs: if the forward of a layer uses the
left one, its backward uses the right one.

| forward | along the axis | backward |
|---|---|---|
| identity (same -> same, each rank computes a part) | - | `all_reduce` of the partial gradients |
| `all_reduce` (partial -> same) | sum | identity |
| `gather` (split -> same, partial gradients) | all ranks' parts joined along a dim | `scatter_sum` |
| `scatter_sum` (partial -> split) | sum, own part kept | `gather` |
| `exchange` (split along one dim -> split along another) | all-to-all | `exchange` with the dims swapped |
| `all_to_all` (rows to the ranks that work on them) | all-to-all | `all_to_all` with the counts swapped |
| `shift_start` (every rank's block to the next one) | ring | `shift_start` of the gradients, the rest of the way round |
| `send_start` | point to point | `receive` |

Rules kept here: 16-bit floats are moved as raw words and reduced in float32 (MPI has no usable 16-bit sums);
no call carries more than `MAX_COUNT` elements (Open MPI 5.0 refuses counts above 2^31 - 1); every call is
entered in the journal before it starts.
"""

import contextlib
import json
import math
import os
import time
import warnings

import numpy as np

from ..config import UserError
from .journal import JOURNAL
from .launcher import cannot_join, fault_tolerant, launched, loaded_libraries, lone_rank, rank, started
from .pending import Pending
from .slab import cut, extent, in_messages, ranges_of

MAX_COUNT = 2**30           # elements of one MPI call
LATER = 1.0                 # seconds
GROUPS = []                 # all that were made, for the day on which a rank dies (ulfm.py)
_world = None               # group of all ranks, once it was asked for
FIRST_TAG, NUM_TAGS = 1000, 30000   # of the messages of started calls (MPI guarantees tags up to 32767)


def is_half(array):
    """Whether `array` is float16 or bfloat16 (which MPI moves but cannot add)."""
    return array.dtype.itemsize == 2 and array.dtype.kind in "fV"


def raw(array):
    """`array` as a type that MPI knows: 16-bit floats as words."""
    return array.view(np.uint16) if is_half(array) else array


def chunks(array, most=MAX_COUNT):
    """Flat pieces of a contiguous array, each at most `most` elements."""
    flat = array.reshape(-1)
    if not np.shares_memory(flat, array) and array.size:
        raise ValueError("communication needs a contiguous array")
    return [flat[start:start + most] for start in range(0, flat.size, most)]


def cut_short(handle):
    """Whether a rank of the communicator is known to have died, or another one has revoked it."""
    if not handle:      # it was freed
        return False
    if handle.Is_revoked():
        return True
    failed = handle.Get_failed()
    size = failed.Get_size()
    if size:
        failed.Free()
    return size > 0


class Solo:
    """The group of one rank: every method of `Group`, no MPI."""
    rank, size, handle, name, journal, bears_deaths = 0, 1, None, "one rank", JOURNAL, False
    empty = staticmethod(np.empty)

    def _begin(self, operation, x):
        return self.journal.enter(self, operation, x, 0)

    def all_reduce(self, x, op="sum"):
        return x

    def all_reduce_start(self, x):
        return Pending([], self._begin("all_reduce", x))

    def reduce_scatter(self, x, counts):
        return x

    def reduce_scatter_start(self, x, ranges, out, empty=None):
        out[...] = x
        return Pending([], self._begin("reduce_scatter", x))

    def all_gather(self, x, counts):
        return x

    def all_gather_start(self, x, ranges):
        return Pending([], self._begin("all_gather", x))

    def broadcast(self, x, root=0):
        return x

    def all_to_all(self, x, send_counts, receive_counts, out):
        out[...] = x
        return out

    def shift_start(self, x, out):
        out[...] = x
        return Pending([], self._begin("shift", x))

    def send_start(self, x, to, tag=0):
        raise ValueError("a group of one rank has nobody to send to")

    receive = send_start

    def barrier(self):
        pass

    def outside(self, operation):
        return contextlib.nullcontext()

    def share(self, value, root=0):
        return json.loads(json.dumps(value))

    def collect(self, value):
        return [json.loads(json.dumps(value))]

    def abort(self, code):
        os._exit(code)

    def split(self, color, key, name):
        return self

    gather = scatter_sum = staticmethod(lambda x, dim, length, unit=1: x)
    exchange = staticmethod(lambda x, split_dim, joined_dim, split_length, joined_length: x)


class Group:
    """The ranks of one communicator.

    Parameters
    ----------
    handle : mpi4py.MPI.Comm
    name : str
        Shown in the journal and in messages.

    Attributes
    ----------
    message_bytes : int or None
        The most bytes of a message between two ranks: where some of the ranks have GPUs, all must cut alike.
    bears_deaths : bool
        Whether the others can go on when a rank dies (ulfm.py).
    """
    empty = staticmethod(np.empty)
    message_bytes, bears_deaths = None, False

    def __init__(self, handle, name="world"):
        from mpi4py import MPI
        self.mpi, self.handle, self.name, self.journal = MPI, handle, name, JOURNAL
        GROUPS.append(self)
        self.rank, self.size, self._tag, self.bears_deaths = handle.Get_rank(), handle.Get_size(), FIRST_TAG, fault_tolerant()

    def _begin(self, operation, array, sent=0, detail=None, peer="", expected=None):
        return self.journal.enter(self, operation, array, sent, detail, peer, expected)

    def _done(self, call):
        """After a collective of MPI's own: where a death cuts it short, Open MPI 5.0.11 may tell of success without having filled the array."""
        call.done()
        if self.bears_deaths and cut_short(self.handle):
            raise self.mpi.Exception(self.mpi.ERR_REVOKED)

    def _messages(self, x):
        """The contiguous `x` in the messages in which it goes to another rank."""
        return chunks(raw(x), self.message_bytes // x.itemsize if self.message_bytes else MAX_COUNT)

    def _around(self, x):
        """Bytes that a rank sends to have `x` summed: 2 (p - 1) / p of it (Thakur et al. 2005)."""
        return 2 * (self.size - 1) * x.nbytes // self.size

    # ---- reductions -----------------------------------------------------------------------------------------------

    def all_reduce(self, x, op="sum"):
        """Sum (or "max", "min") of `x` over the ranks, in place; returns `x`."""
        call = self._begin("all_reduce" if op == "sum" else f"all_reduce {op}", x, self._around(x), x.shape)
        self._all_reduce(x, op)
        self._done(call)
        return x

    def _all_reduce(self, x, op):
        operation = {"sum": self.mpi.SUM, "max": self.mpi.MAX, "min": self.mpi.MIN}[op]
        wide = x.astype(np.float32) if is_half(x) else x
        for part in chunks(wide):
            self.handle.Allreduce(self.mpi.IN_PLACE, part, operation)
        if wide is not x:
            x[...] = wide.astype(x.dtype)

    def all_reduce_start(self, x):
        """Starts the sum of `x` over the ranks, in place; `x` is not to be touched until `wait()`."""
        return self._all_reduce_start(x, self._begin("all_reduce", x, self._around(x), x.shape))

    def _all_reduce_start(self, x, call):
        if not x.flags.c_contiguous:
            raise ValueError("communication needs a contiguous array")
        flat = x.reshape(-1)
        ranges = ranges_of([cut(flat.size, self.size, rank)[1] for rank in range(self.size)])
        own = flat[slice(*ranges(self.rank)[0])]
        pending = self._reduce_scatter_start(flat, ranges, own, call)
        tag = self._next_tag()
        pending.stages.append(lambda: self._exchange(lambda rank: [own], lambda rank: [flat[slice(*ranges(rank)[0])]], tag))
        return pending

    def reduce_scatter(self, x, counts):
        """Sum of flat `x` over the ranks; this rank gets its part of `counts[rank]` elements, in a new array."""
        out = self.empty((counts[self.rank],), x.dtype)
        self.reduce_scatter_start(x, ranges_of(counts), out).wait()
        return out

    def reduce_scatter_start(self, x, ranges, out, empty=None):
        """Starts the sum of flat `x`; `out` gets this rank's part of it, of which it may be a view.

        Every rank sends every other its part and adds what it gets in the order of ranks: as few bytes as a
        reduce-scatter can do with, sums that do not depend on timing, and 16-bit floats travel as such. MPI's own
        Ireduce_scatter took 4 times as long (Open MPI 5.0, 28 MB, 2 ranks).

        Parameters
        ----------
        x : flat array
            Not to be touched until `wait()`.
        ranges : callable
            rank -> list of (start, stop): the elements of `x` that the rank gets, one after the other in its `out`.
        empty : callable
            (shape, dtype) -> array, for what is received; that of the group when left out.
        """
        call = self._begin("reduce_scatter", x, x.nbytes - out.nbytes, self._parts(x, ranges))
        return self._reduce_scatter_start(x, ranges, out, call, empty)

    def _reduce_scatter_start(self, x, ranges, out, call, empty=None):
        pieces = lambda rank: [x[start:stop] for start, stop in ranges(rank)]
        size = extent(ranges(self.rank))
        parts = [None if rank == self.rank else (empty or self.empty)((size,), x.dtype) for rank in range(self.size)]
        requests = self._exchange(pieces, lambda rank: in_messages(parts[rank], ranges(self.rank)), self._next_tag())

        def add_up():
            apart = not (is_half(x) or np.may_share_memory(x, out))
            total = out if apart else self.empty((size,), np.float32 if is_half(x) else x.dtype)
            total[...] = 0
            for rank in range(self.size):
                if rank != self.rank:
                    total += parts[rank]
                    parts[rank] = None
                    continue
                for target, piece in zip(in_messages(total, ranges(rank)), pieces(rank)):
                    target += piece
            if not apart:
                out[...] = total
        return Pending(requests, call, [add_up], kept=x)

    def _parts(self, x, ranges):
        """What all ranks must see alike of a call on the parts `ranges` of `x`."""
        return x.size

    def _next_tag(self):
        """A tag for the messages of one call: ranks start calls in the same order, but may drive them on in any."""
        self._tag = FIRST_TAG + (self._tag + 1 - FIRST_TAG) % NUM_TAGS
        return self._tag

    def _exchange(self, sent, received, tag):
        """Starts sending the arrays `sent(rank)` to every other rank and receiving into those of `received(rank)`; the requests."""
        requests = []
        for distance in range(1, self.size):
            source, to = (self.rank - distance) % self.size, (self.rank + distance) % self.size
            requests += [self.handle.Irecv(part, source, tag) for array in received(source) for part in self._messages(array)]
            requests += [self.handle.Isend(part, to, tag) for array in sent(to) for part in self._messages(array)]
        return requests

    # ---- moving ---------------------------------------------------------------------------------------------------

    def all_gather(self, x, counts):
        """Fills flat `x` with all ranks' parts; this rank's part is already in its place. Returns `x`."""
        call = self._begin("all_gather", x, (self.size - 1) * counts[self.rank] * x.itemsize, tuple(counts))
        self._all_gather(x, counts)
        self._done(call)
        return x

    def _all_gather(self, x, counts):
        words = raw(x)
        if x.size <= MAX_COUNT:
            kind = self.mpi._typedict[words.dtype.char]
            self.handle.Allgatherv(self.mpi.IN_PLACE, [words, list(counts), kind])
            return
        start = 0
        for root, count in enumerate(counts):
            for part in chunks(words[start:start + count]):
                self.handle.Bcast(part, root)
            start += count

    def all_gather_start(self, x, ranges):
        """Starts filling flat `x` with all ranks' parts, `ranges` as in `reduce_scatter_start`; this rank's is in its place."""
        call = self._begin("all_gather", x, (self.size - 1) * extent(ranges(self.rank)) * x.itemsize, self._parts(x, ranges))
        return self._all_gather_start(x, ranges, call)

    def _all_gather_start(self, x, ranges, call):
        own = [x[start:stop] for start, stop in ranges(self.rank)]
        requests = self._exchange(lambda rank: own, lambda rank: [x[start:stop] for start, stop in ranges(rank)], self._next_tag())
        return Pending(requests, call, kept=x)

    def broadcast(self, x, root=0):
        """`x` of rank `root` on every rank, in place; returns `x`."""
        call = self._begin("broadcast", x, x.nbytes if self.rank == root else 0, (root, x.shape))
        for part in chunks(raw(x)):
            self.handle.Bcast(part, root)
        self._done(call)
        return x

    def all_to_all(self, x, send_counts, receive_counts, out):
        """Flat `x` in pieces of `send_counts` to each rank; flat `out` gets pieces of `receive_counts`."""
        if max(x.size, out.size) > MAX_COUNT:
            raise ValueError(f"all_to_all of {max(x.size, out.size)} elements: at most {MAX_COUNT}; use smaller micro-batches")
        call = self._begin("all_to_all", x, (x.size - send_counts[self.rank]) * x.itemsize)
        self._all_to_all(x, send_counts, receive_counts, out)
        self._done(call)
        return out

    def _all_to_all(self, x, send_counts, receive_counts, out):
        words, target = raw(x), raw(out)
        kind = self.mpi._typedict[words.dtype.char]
        self.handle.Alltoallv([words, list(send_counts), kind], [target, list(receive_counts), kind])

    def shift_start(self, x, out):
        """Starts sending `x` to the next rank (the last one's next is the first) and receiving `out` from the one before."""
        return self._shift_start(x, out, self._begin("shift", x, x.nbytes, expected=out.size))

    def _shift_start(self, x, out, call):
        tag, source, to = self._next_tag(), (self.rank - 1) % self.size, (self.rank + 1) % self.size
        requests = [self.handle.Irecv(part, source, tag) for part in self._messages(out)]
        requests += [self.handle.Isend(part, to, tag) for part in self._messages(x)]
        return Pending(requests, call, kept=(x, out))

    def send_start(self, x, to, tag=0):
        """Starts sending `x` to rank `to`; `x` is not to be touched until `wait()`."""
        call = self._begin("send", x, x.nbytes, tag, f"to {to}")
        return Pending(self._send(x, to, tag), call, kept=x)

    def _send(self, x, to, tag):
        return [self.handle.Isend(part, to, tag) for part in self._messages(x)]

    def receive(self, x, source, tag=0):
        """`x` from rank `source`; blocks. Returns `x`."""
        call = self._begin("receive", x, 0, tag, f"from {source}")
        self._receive(x, source, tag)
        call.done()
        return x

    def _receive(self, x, source, tag):
        for part in self._messages(x):
            self.handle.Recv(part, source, tag)

    def barrier(self):
        call = self._begin("barrier", None)
        self.handle.Barrier()
        self._done(call)

    @contextlib.contextmanager
    def outside(self, operation):
        """A block in which all ranks call MPI by other means than this class, such as a library: noted as one call."""
        call = self._begin(operation, None)
        yield
        self._done(call)

    # Small control values travel as JSON, so no rank ever runs what another sent.

    def share(self, value, root=0):
        """The JSON-able `value` of rank `root`, on every rank."""
        text = np.frombuffer(json.dumps(value).encode() if self.rank == root else b"", np.uint8).copy()
        size = self.broadcast(np.array([text.size], np.int64), root)
        text = text if self.rank == root else np.empty(int(size[0]), np.uint8)
        return json.loads(self.broadcast(text, root).tobytes())

    def collect(self, value):
        """The JSON-able `value` of every rank, as a list in rank order, on every rank."""
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = np.zeros(self.size, np.int64)
        sizes[self.rank] = text.size
        self.all_reduce(sizes)
        ends = np.cumsum(sizes)
        whole = np.empty(int(ends[-1]), np.uint8)
        whole[ends[self.rank] - text.size:ends[self.rank]] = text
        self.all_gather(whole, sizes.tolist())
        return [json.loads(whole[end - size:end].tobytes()) for end, size in zip(ends, sizes)]

    def abort(self, code):
        """Ends every rank of the job now."""
        self.handle.Abort(code)

    def split(self, color, key, name):
        """The group of the ranks that give the same `color`, in the order of `key`."""
        with self.outside("split"):
            handle = self.handle.Split(color, key)
        if handle.Get_size() == 1:
            handle.Free()
            return Solo()
        return self._like(handle, name)

    def _like(self, handle, name):
        """A Group of other ranks that treats arrays as this one does."""
        return Group(handle, name)

    # ---- the adjoint pairs of layers (table at the top of this file) ----------------------------------------------

    def gather(self, x, dim, length, unit=1):
        """The parts of all ranks joined along `dim`, whose whole extent is `length`; adjoint: `scatter_sum`."""
        parts = np.moveaxis(x, dim, 0)
        row = math.prod(parts.shape[1:])
        counts = [cut(length, self.size, rank, unit)[1] * row for rank in range(self.size)]
        whole = self.empty((length,) + parts.shape[1:], x.dtype)
        start, size = cut(length, self.size, self.rank, unit)
        whole[start:start + size] = parts
        self.all_gather(whole.reshape(-1), counts)
        return np.ascontiguousarray(np.moveaxis(whole, 0, dim))

    def scatter_sum(self, x, dim, length, unit=1):
        """The sum over the ranks, of which this rank keeps its part along `dim`; adjoint: `gather`."""
        whole = np.ascontiguousarray(np.moveaxis(x, dim, 0))
        row = math.prod(whole.shape[1:])
        extents = [cut(length, self.size, rank, unit)[1] for rank in range(self.size)]
        part = self.reduce_scatter(whole.reshape(-1), [each * row for each in extents])
        return np.ascontiguousarray(np.moveaxis(part.reshape((extents[self.rank],) + whole.shape[1:]), 0, dim))

    def exchange(self, x, split_dim, joined_dim, split_length, joined_length):
        """From split along `joined_dim` to split along `split_dim`; adjoint: the same with the two swapped.

        `x` holds all of `split_length` along `split_dim` and this rank's part of `joined_length` along
        `joined_dim`; the result holds its part of the first and all of the second.
        """
        cuts = [cut(split_length, self.size, rank) for rank in range(self.size)]
        pieces = [np.take(x, range(start, start + size), split_dim) for start, size in cuts]
        shapes = []
        for rank in range(self.size):
            shape = list(x.shape)
            shape[split_dim] = cuts[self.rank][1]
            shape[joined_dim] = cut(joined_length, self.size, rank)[1]
            shapes.append(shape)
        sizes = [math.prod(shape) for shape in shapes]
        out = np.empty(sum(sizes), x.dtype)
        self.all_to_all(np.concatenate([p.reshape(-1) for p in pieces]), [p.size for p in pieces], sizes, out)
        ends = np.cumsum(sizes)
        return np.concatenate([out[end - size:end].reshape(shape) for end, size, shape in zip(ends, sizes, shapes)], joined_dim)


def world():
    """The group of all ranks of this job; a Solo, without MPI, where no launcher started several."""
    global _world
    if _world is None:
        _world = Solo()
        if launched():
            MPI = start_mpi()
            if MPI.COMM_WORLD.Get_size() > 1:
                _world = Group(MPI.COMM_WORLD)
                if _world.bears_deaths:     # a revocation would crash a rank that is still in MPI_Init (Open MPI 5.0.11)
                    _world.handle.Barrier()
            elif started()[0] > 1:
                refuse_lone_rank(MPI.Get_library_version())
    return _world


def set_world(group):
    """After ranks were lost: from now on these are all ranks."""
    global _world
    _world = group
    GROUPS[:] = [group] if group is not None and group.handle is not None else []       # those that it was made from hold the dead


def start_mpi():
    """The module of MPI, initialised; not where its MPI_Init would abort or fill the log, for the launcher is another MPI's."""
    import mpi4py
    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)     # of a foreign launcher, once a rank
        from mpi4py import MPI
        if not MPI.Is_initialized():
            version = MPI.Get_library_version()
            if started()[0] > 1 and cannot_join(version, libraries=loaded_libraries()):
                refuse_lone_rank(version)
            MPI.Init_thread()
    return MPI


def refuse_lone_rank(version):
    """Ends a process that is not the rank of a job that it was started as: the first of them says why, the others leave it the time to."""
    if rank() == 0:
        raise UserError(lone_rank(version))
    time.sleep(LATER)
    raise SystemExit(2)
