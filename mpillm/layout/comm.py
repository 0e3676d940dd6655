"""Every MPI call on an array, and nothing else touches MPI.

A `Group` is the ranks along one axis of the mesh (or all of them); `Solo` is the same for one rank without MPI.
Collectives come in adjoint pairs: if the forward of a layer uses the left one, its backward uses the right one.

| forward | along the axis | backward |
|---|---|---|
| `use` (same -> same, each rank computes a part) | identity | `all_reduce` of the partial gradients |
| `all_reduce` (partial -> same) | sum | identity |
| `gather` (split -> same, partial gradients) | all ranks' parts joined along a dim | `scatter_sum` |
| `scatter_sum` (partial -> split) | sum, own part kept | `gather` |
| `exchange` (split along one dim -> split along another) | all-to-all | `exchange` with the dims swapped |

Rules kept here: 16-bit floats are moved as raw words and reduced in float32 (MPI has no usable 16-bit sums);
no call carries more than `MAX_COUNT` elements (Open MPI 5.0 refuses counts above 2^31 - 1); every call is
entered in the flight recorder before it starts.
"""

import collections
import json
import os
import time

import numpy as np

from .launcher import launched
from .slab import cut

MAX_COUNT = 2**30           # elements of one MPI call
FIRST_TAG, NUM_TAGS = 1000, 30000   # of the messages of reductions (MPI guarantees tags up to 32767)
RECORD_LENGTH = 256         # calls that the flight recorder remembers

recorder = collections.deque(maxlen=RECORD_LENGTH)  # Call entries of this process, newest last
_count = 0


def part_of(flat, counts, rank):
    """The part of `counts[rank]` elements that belongs to `rank`."""
    start = sum(counts[:rank])
    return flat[start:start + counts[rank]]


class Call:
    """One call in the flight recorder."""
    __slots__ = ("number", "group", "operation", "shape", "dtype", "started", "seconds")

    def __init__(self, group, operation, array):
        global _count
        _count += 1
        self.number, self.group, self.operation = _count, group, operation
        self.shape, self.dtype = getattr(array, "shape", ()), str(getattr(array, "dtype", ""))
        self.started, self.seconds = time.monotonic(), None
        recorder.append(self)

    def done(self):
        self.seconds = time.monotonic() - self.started

    def __str__(self):
        state = "not finished" if self.seconds is None else f"{self.seconds:.6f} s"
        return f"#{self.number} {self.operation} over {self.group} {list(self.shape)} {self.dtype}: {state}"


def last_calls(count=8):
    """The newest `count` recorded calls as lines of text, newest last."""
    return [str(call) for call in list(recorder)[-count:]]


def is_half(array):
    """Whether `array` is float16 or bfloat16 (which MPI moves but cannot add)."""
    return array.dtype.itemsize == 2 and array.dtype.kind in "fV"


def raw(array):
    """`array` as a type that MPI knows: 16-bit floats as words."""
    return array.view(np.uint16) if is_half(array) else array


def chunks(array):
    """Flat pieces of a contiguous array, each at most MAX_COUNT elements."""
    flat = array.reshape(-1)
    if not np.shares_memory(flat, array) and array.size:
        raise ValueError("communication needs a contiguous array")
    return [flat[start:start + MAX_COUNT] for start in range(0, flat.size, MAX_COUNT)]


class Pending:
    """A started call; `test()` drives it on and tells whether it is done, `wait()` returns when it is.

    Parameters
    ----------
    requests : list of MPI requests
    call : Call
    stages : callables
        Each runs when the requests before it are done, and may return further requests.
    kept : object
        Arrays that MPI still reads or writes.
    """

    def __init__(self, requests, call, stages=(), kept=None):
        self.requests, self.call, self.stages, self.kept = requests, call, list(stages), kept

    def _next_stage(self):
        if self.stages:
            self.requests = self.stages.pop(0)() or []
            return True
        if self.call.seconds is None:
            self.call.done()
        return False

    def test(self):
        while True:
            self.requests = [request for request in self.requests if not request.Test()]
            if self.requests:
                return False
            if not self._next_stage():
                return True

    def wait(self):
        while True:
            for request in self.requests:
                request.Wait()
            self.requests = []
            if not self._next_stage():
                return


class Solo:
    """The group of one rank: every method of `Group`, no MPI."""
    rank, size, handle, name = 0, 1, None, "one rank"

    def all_reduce(self, x, op="sum"):
        return x

    def all_reduce_start(self, x):
        return Pending([], Call(self.name, "all_reduce", x))

    def reduce_scatter(self, x, counts):
        return x

    def reduce_scatter_start(self, x, counts, out):
        out[...] = x
        return Pending([], Call(self.name, "reduce_scatter", x))

    def all_gather(self, x, counts):
        return x

    def broadcast(self, x, root=0):
        return x

    def all_to_all(self, x, send_counts, receive_counts, out):
        out[...] = x
        return out

    def send_start(self, x, to, tag=0):
        raise ValueError("a group of one rank has nobody to send to")

    receive = send_start

    def barrier(self):
        pass

    def share(self, value, root=0):
        return json.loads(json.dumps(value))

    def collect(self, value):
        return [json.loads(json.dumps(value))]

    def abort(self, code):
        os._exit(code)

    def split(self, color, key, name):
        return self

    use = staticmethod(lambda x: x)
    gather = scatter_sum = staticmethod(lambda x, dim, length, unit=1: x)
    exchange = staticmethod(lambda x, split_dim, joined_dim, split_length, joined_length: x)


class Planned(Solo):
    """A group that is only planned: it has a rank and a size, and its collectives do nothing."""
    name = "planned ranks"

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def reduce_scatter_start(self, x, counts, out):
        return Pending([], Call(self.name, "reduce_scatter", x))


class Group:
    """The ranks of one communicator.

    Parameters
    ----------
    handle : mpi4py.MPI.Comm
    name : str
        Shown in the flight recorder and in messages.
    synchronize : callable
        Waits for the device before its arrays are handed to MPI.
    """

    def __init__(self, handle, name="world", synchronize=lambda: None):
        from mpi4py import MPI
        self.mpi, self.handle, self.name, self.synchronize = MPI, handle, name, synchronize
        self.rank, self.size, self._tag = handle.Get_rank(), handle.Get_size(), FIRST_TAG

    def _begin(self, operation, array):
        self.synchronize()
        return Call(self.name, operation, array)

    def all_reduce(self, x, op="sum"):
        """Sum (or "max", "min") of `x` over the ranks, in place; returns `x`."""
        call = self._begin(f"all_reduce {op}", x)
        operation = {"sum": self.mpi.SUM, "max": self.mpi.MAX, "min": self.mpi.MIN}[op]
        wide = x.astype(np.float32) if is_half(x) else x
        for part in chunks(wide):
            self.handle.Allreduce(self.mpi.IN_PLACE, part, operation)
        if wide is not x:
            x[...] = wide.astype(x.dtype)
        call.done()
        return x

    def all_reduce_start(self, x):
        """Starts the sum of `x` over the ranks, in place; `x` is not to be touched until `wait()`."""
        if not x.flags.c_contiguous:
            raise ValueError("communication needs a contiguous array")
        flat = x.reshape(-1)
        counts = [cut(flat.size, self.size, rank)[1] for rank in range(self.size)]
        own = part_of(flat, counts, self.rank)
        pending = self.reduce_scatter_start(flat, counts, own, "all_reduce")
        tag = self._next_tag()
        pending.stages.append(lambda: self._exchange(lambda rank: own, lambda rank: part_of(flat, counts, rank), tag))
        return pending

    def reduce_scatter(self, x, counts):
        """Sum of flat `x` over the ranks; this rank gets its part of `counts[rank]` elements, in a new array."""
        out = np.empty(counts[self.rank], x.dtype)
        self.reduce_scatter_start(x, counts, out).wait()
        return out

    def reduce_scatter_start(self, x, counts, out, operation="reduce_scatter"):
        """Starts the sum of flat `x` (sum of `counts` elements); `out` gets this rank's part, of which it may be a view.

        Every rank sends every other its part and adds what it gets in the order of ranks: as few bytes as a
        reduce-scatter can do with, sums that do not depend on timing, and 16-bit floats travel as such. MPI's own
        Ireduce_scatter took 4 times as long (Open MPI 5.0, 28 MB, 2 ranks).
        """
        call = self._begin(operation, x)
        parts = [part_of(x, counts, self.rank) if rank == self.rank else np.empty(counts[self.rank], x.dtype) for rank in range(self.size)]
        requests = self._exchange(lambda rank: part_of(x, counts, rank), lambda rank: parts[rank], self._next_tag())

        def add_up():
            total = parts[0].astype(np.float32 if is_half(x) else x.dtype)
            for part in parts[1:]:
                total += part
            out[...] = total
        return Pending(requests, call, [add_up], kept=x)

    def _next_tag(self):
        """A tag for the messages of one call: ranks start calls in the same order, but may drive them on in any."""
        self._tag = FIRST_TAG + (self._tag + 1 - FIRST_TAG) % NUM_TAGS
        return self._tag

    def _exchange(self, sent, received, tag):
        """Starts sending `sent(rank)` to every other rank and receiving `received(rank)` from it; the requests."""
        requests = []
        for distance in range(1, self.size):
            source, to = (self.rank - distance) % self.size, (self.rank + distance) % self.size
            requests += [self.handle.Irecv(part, source, tag) for part in chunks(raw(received(source)))]
            requests += [self.handle.Isend(part, to, tag) for part in chunks(raw(sent(to)))]
        return requests

    def all_gather(self, x, counts):
        """Fills flat `x` with all ranks' parts; this rank's part is already in its place. Returns `x`."""
        call = self._begin("all_gather", x)
        words = raw(x)
        if x.size <= MAX_COUNT:
            kind = self.mpi._typedict[words.dtype.char]
            self.handle.Allgatherv(self.mpi.IN_PLACE, [words, list(counts), kind])
        else:
            start = 0
            for root, count in enumerate(counts):
                for part in chunks(words[start:start + count]):
                    self.handle.Bcast(part, root)
                start += count
        call.done()
        return x

    def broadcast(self, x, root=0):
        """`x` of rank `root` on every rank, in place; returns `x`."""
        call = self._begin("broadcast", x)
        for part in chunks(raw(x)):
            self.handle.Bcast(part, root)
        call.done()
        return x

    def all_to_all(self, x, send_counts, receive_counts, out):
        """Flat `x` in pieces of `send_counts` to each rank; flat `out` gets pieces of `receive_counts`."""
        if max(x.size, out.size) > MAX_COUNT:
            raise ValueError(f"all_to_all of {max(x.size, out.size)} elements: at most {MAX_COUNT}; use smaller micro-batches")
        call = self._begin("all_to_all", x)
        words, target = raw(x), raw(out)
        kind = self.mpi._typedict[words.dtype.char]
        self.handle.Alltoallv([words, list(send_counts), kind], [target, list(receive_counts), kind])
        call.done()
        return out

    def send_start(self, x, to, tag=0):
        """Starts sending `x` to rank `to`; keep `x` until `wait()`."""
        call = self._begin(f"send to {to}", x)
        return Pending([self.handle.Isend(part, to, tag) for part in chunks(raw(x))], call)

    def receive(self, x, source, tag=0):
        """`x` from rank `source`; blocks. Returns `x`."""
        call = self._begin(f"receive from {source}", x)
        for part in chunks(raw(x)):
            self.handle.Recv(part, source, tag)
        call.done()
        return x

    def barrier(self):
        call = self._begin("barrier", None)
        self.handle.Barrier()
        call.done()

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
        handle = self.handle.Split(color, key)
        if handle.Get_size() == 1:
            handle.Free()
            return Solo()
        return Group(handle, name, self.synchronize)

    # The adjoint pairs of layers (table at the top of this file).

    def use(self, x):
        return x

    def gather(self, x, dim, length, unit=1):
        """The parts of all ranks joined along `dim`, whose whole extent is `length`; adjoint: `scatter_sum`."""
        parts = np.moveaxis(x, dim, 0)
        others = parts.shape[1:]
        counts = [cut(length, self.size, rank, unit)[1] * int(np.prod(others)) for rank in range(self.size)]
        whole = np.empty((length,) + others, x.dtype)
        start, size = cut(length, self.size, self.rank, unit)
        whole[start:start + size] = parts
        self.all_gather(whole.reshape(-1), counts)
        return np.ascontiguousarray(np.moveaxis(whole, 0, dim))

    def scatter_sum(self, x, dim, length, unit=1):
        """The sum over the ranks, of which this rank keeps its part along `dim`; adjoint: `gather`."""
        whole = np.ascontiguousarray(np.moveaxis(x, dim, 0))
        others = whole.shape[1:]
        extents = [cut(length, self.size, rank, unit)[1] for rank in range(self.size)]
        part = self.reduce_scatter(whole.reshape(-1), [extent * int(np.prod(others)) for extent in extents])
        return np.ascontiguousarray(np.moveaxis(part.reshape((extents[self.rank],) + others), 0, dim))

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
        sizes = [int(np.prod(shape)) for shape in shapes]
        out = np.empty(sum(sizes), x.dtype)
        self.all_to_all(np.concatenate([p.reshape(-1) for p in pieces]), [p.size for p in pieces], sizes, out)
        ends = np.cumsum(sizes)
        return np.concatenate([out[end - size:end].reshape(shape) for end, size, shape in zip(ends, sizes, shapes)], joined_dim)


_world = None


def world():
    """The group of all ranks of this job; a Solo, without MPI, where no launcher started several."""
    global _world
    if _world is None:
        _world = Solo()
        if launched():
            from mpi4py import MPI
            if MPI.COMM_WORLD.Get_size() > 1:
                _world = Group(MPI.COMM_WORLD)
    return _world
