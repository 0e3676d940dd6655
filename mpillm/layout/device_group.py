"""A Group whose arrays may lie on a GPU. Arrays of the host go the way they go in any Group.

Sums are those of `Group`: every rank sends every other its part and adds what it gets in the order of ranks, by kernels.
So they move as few bytes as a ring, need one round instead of p - 1, do not depend on timing, and have the bits that CPU
ranks get. MPI's own reductions would take device arrays through the host (Open MPI 4.1 and 5.0).
"""

import math

import numpy as np

from .comm import Group, is_half
from .pending import Pending
from .slab import cut, extent, in_messages, ranges_of


class PendingOnDevice(Pending):
    """A started call whose messages a transport drives on."""

    def __init__(self, transport, requests, call, stages=(), kept=None):
        super().__init__(requests, call, stages, kept)
        self.transport = transport

    def wait(self):
        if self.requests or self.stages:
            self.expect()
        while True:
            self.transport.wait(self.requests)
            self.requests = []
            if not self._next_stage():
                return


def on_host(x):
    return x is None or isinstance(x, np.ndarray)


class DeviceGroup(Group):
    """
    Parameters
    ----------
    handle, name
        As of Group.
    ops : backend
        Of this rank.
    transport : Direct or Staged
    mixed : bool
        Whether some ranks have no GPU. Then arrays of the host go as those of a device do: a rank on a CPU cannot tell
        which of its arrays lie on the devices of others.
    """

    def __init__(self, handle, name, ops, transport, mixed=False):
        super().__init__(handle, name)
        self.ops, self.transport, self.mixed, self.message_bytes = ops, transport, mixed, transport.message_bytes

    def _like(self, handle, name):
        return DeviceGroup(handle, name, self.ops, self.transport, self.mixed)

    def _plain(self, x):
        """Whether `x` goes as in any Group."""
        return on_host(x) and not self.mixed

    def _ops_of(self, x):
        return self.ops.host if on_host(x) else self.ops

    def _send_messages(self, x, to, tag):
        if on_host(x):
            return [self.handle.Isend(part, to, tag) for part in self._messages(x)]
        return self.transport.send(self.handle, x, to, tag)

    def _receive_messages(self, x, source, tag):
        if on_host(x):
            return [self.handle.Irecv(part, source, tag) for part in self._messages(x)]
        return self.transport.receive(self.handle, x, source, tag)

    # ---- messages -------------------------------------------------------------------------------------------------

    def _exchange(self, sent, received, tag):
        """As of Group; the arrays of a call are all on the device or all on the host."""
        pairs = [((self.rank - distance) % self.size, (self.rank + distance) % self.size) for distance in range(1, self.size)]
        if all(self._plain(array) for source, to in pairs for array in [*received(source), *sent(to)]):
            return super()._exchange(sent, received, tag)
        self.transport.prepare()
        requests = []
        for source, to in pairs:
            for array in received(source):
                requests += self._receive_messages(array, source, tag)
            for array in sent(to):
                requests += self._send_messages(array, to, tag)
        return requests

    def _pending(self, requests, call, stages=(), kept=None):
        return PendingOnDevice(self.transport, requests, call, stages, kept)

    def _shift_start(self, x, out, call):
        if self._plain(x):
            return super()._shift_start(x, out, call)
        self.transport.prepare()
        tag, source, to = self._next_tag(), (self.rank - 1) % self.size, (self.rank + 1) % self.size
        requests = self._receive_messages(out, source, tag) + self._send_messages(x, to, tag)
        return self._pending(requests, call, kept=(x, out))

    def send_start(self, x, to, tag=0):
        if self._plain(x):
            return super().send_start(x, to, tag)
        call = self._begin("send", x, x.nbytes, tag, f"to {to}")
        self.transport.prepare()
        return self._pending(self._send_messages(x, to, tag), call, kept=x)

    def _receive(self, x, source, tag):
        if self._plain(x):
            super()._receive(x, source, tag)
            return
        self.transport.prepare()
        self.transport.wait(self._receive_messages(x, source, tag))

    def broadcast(self, x, root=0):
        if self._plain(x):
            return super().broadcast(x, root)
        call = self._begin("broadcast", x, x.nbytes if self.rank == root else 0, (root, x.shape))
        mine = self.rank == root
        requests = self._exchange(lambda rank: [x] if mine else [], lambda rank: [x] if rank == root else [], self._next_tag())
        self.transport.wait(requests)
        call.done()
        return x

    def _all_to_all(self, x, send_counts, receive_counts, out):
        if self._plain(x):
            super()._all_to_all(x, send_counts, receive_counts, out)
            return
        sent, received = ranges_of(send_counts), ranges_of(receive_counts)
        part = lambda array, ranges, rank: [array[start:stop] for start, stop in ranges(rank) if stop > start]
        requests = self._exchange(lambda rank: part(x, sent, rank), lambda rank: part(out, received, rank), self._next_tag())
        for own, target in zip(part(x, sent, self.rank), part(out, received, self.rank)):
            self._ops_of(x).copy(target, own)
        self.transport.wait(requests)

    # ---- sums -----------------------------------------------------------------------------------------------------

    def all_reduce(self, x, op="sum"):
        if self._plain(x):
            return super().all_reduce(x, op)
        call = self._begin("all_reduce" if op == "sum" else f"all_reduce {op}", x, self._around(x), x.shape)
        if op == "sum":
            self._all_reduce_start(x, call).wait()
            return x
        host = self._ops_of(x).to_host(x)       # statistics of rows: few numbers
        if self.mixed:
            every = np.empty((self.size,) + host.shape, host.dtype)
            every[self.rank] = host
            self._all_gather_start(every.reshape(-1), ranges_of([host.size] * self.size), call).wait()
            host = {"max": np.max, "min": np.min}[op](every, axis=0)
        else:
            self._all_reduce(host, op)
        self._done(call)
        self._ops_of(x).put(x, host)
        return x

    def reduce_scatter(self, x, counts):
        if self._plain(x):
            return super().reduce_scatter(x, counts)
        out = self._ops_of(x).empty((counts[self.rank],), x.dtype)
        self.reduce_scatter_start(x, ranges_of(counts), out).wait()
        return out

    def _reduce_scatter_start(self, x, ranges, out, call, empty=None):
        if self._plain(x):
            return super()._reduce_scatter_start(x, ranges, out, call, empty)
        pieces = lambda rank: [x[start:stop] for start, stop in ranges(rank) if stop > start]
        ops, size = self._ops_of(x), extent(ranges(self.rank))
        empty = ops.empty if empty is None or on_host(x) else empty
        own = [(start, stop) for start, stop in ranges(self.rank) if stop > start]
        parts = [None if rank == self.rank else empty((size,), x.dtype) for rank in range(self.size)]
        requests = self._exchange(pieces, lambda rank: in_messages(parts[rank], own), self._next_tag())

        def add_up():
            wide = np.dtype(np.float32) if is_half(x) else x.dtype
            total, begun = empty((size,), wide), False
            for rank in range(self.size):
                part = parts[rank]
                if rank == self.rank:
                    part = empty((size,), x.dtype)
                    for target, piece in zip(in_messages(part, own), pieces(rank)):
                        ops.copy(target, piece)
                if begun and wide != x.dtype:
                    narrow, part = part, empty((size,), wide)
                    ops.copy(part, narrow)
                (ops.add if begun else ops.copy)(total, part)
                begun, parts[rank] = True, None
            ops.copy(out, total)
        return self._pending(requests, call, [add_up], kept=x)

    def all_gather(self, x, counts):
        if self._plain(x):
            return super().all_gather(x, counts)
        call = self._begin("all_gather", x, (self.size - 1) * counts[self.rank] * x.itemsize, tuple(counts))
        self._all_gather_start(x, ranges_of(counts), call).wait()
        return x

    def _all_gather_start(self, x, ranges, call):
        pending = super()._all_gather_start(x, lambda rank: [each for each in ranges(rank) if each[1] > each[0]], call)
        return pending if self._plain(x) else self._pending(pending.requests, call, kept=x)

    # ---- the adjoint pairs of layers --------------------------------------------------------------------------------

    def _moved(self, x, dim):
        """A contiguous copy with `dim` first."""
        view = x.transpose(dim, *(other for other in range(x.ndim) if other != dim))
        ops = self._ops_of(x)
        moved = ops.empty(view.shape, x.dtype)
        ops.copy(moved, view)
        return moved

    def _back(self, x, dim):
        """The inverse of `_moved`."""
        if dim == 0:
            return x
        ops = self._ops_of(x)
        back = ops.empty(x.shape[1:dim + 1] + x.shape[:1] + x.shape[dim + 1:], x.dtype)
        ops.copy(back.transpose(dim, *(other for other in range(x.ndim) if other != dim)), x)
        return back

    def gather(self, x, dim, length, unit=1):
        if self._plain(x):
            return super().gather(x, dim, length, unit)
        view = x.transpose(dim, *(other for other in range(x.ndim) if other != dim))
        ops = self._ops_of(x)
        whole = ops.empty((length,) + view.shape[1:], x.dtype)
        start, size = cut(length, self.size, self.rank, unit)
        ops.copy(whole[start:start + size], view)
        row = math.prod(view.shape[1:])
        self.all_gather(whole.reshape(-1), [cut(length, self.size, rank, unit)[1] * row for rank in range(self.size)])
        return self._back(whole, dim)

    def scatter_sum(self, x, dim, length, unit=1):
        if self._plain(x):
            return super().scatter_sum(x, dim, length, unit)
        whole = x if dim == 0 and x.flags.c_contiguous else self._moved(x, dim)
        row, extents = math.prod(whole.shape[1:]), [cut(length, self.size, rank, unit)[1] for rank in range(self.size)]
        part = self.reduce_scatter(whole.reshape(-1), [each * row for each in extents])
        return self._back(part.reshape((extents[self.rank],) + whole.shape[1:]), dim)

    def exchange(self, x, split_dim, joined_dim, split_length, joined_length):
        if self._plain(x):
            return super().exchange(x, split_dim, joined_dim, split_length, joined_length)
        rows, columns = [[cut(length, self.size, rank) for rank in range(self.size)] for length in (split_length, joined_length)]
        ops = self._ops_of(x)
        packed = ops.empty((x.size,), x.dtype)
        shape = list(x.shape)
        shape[split_dim], shape[joined_dim] = rows[self.rank][1], joined_length
        out = ops.empty(tuple(shape), x.dtype)
        received = ops.empty((out.size,), x.dtype)
        sent_counts = self._copy_parts(packed, x, split_dim, rows, to_array=False)
        counts = [out.size // max(1, joined_length) * size for _, size in columns]
        self.all_to_all(packed, sent_counts, counts, received)
        self._copy_parts(received, out, joined_dim, columns, to_array=True)
        return out

    def _copy_parts(self, flat, array, dim, cuts, to_array):
        """Copies the slices of an array along `dim` to one after the other in `flat`, or back; elements of each."""
        end, counts = 0, []
        for start, size in cuts:
            index = (slice(None),) * dim + (slice(start, start + size),)
            view = array[index]
            part = flat[end:end + view.size].reshape(view.shape)
            if view.size:
                self._ops_of(array).copy(*((view, part) if to_array else (part, view)))
            end += view.size
            counts.append(view.size)
        return counts


class NcclGroup(DeviceGroup):
    """A DeviceGroup whose device arrays go by NCCL: all ranks have GPUs of their own.

    Parameters
    ----------
    handle, name, ops
        As of DeviceGroup.
    """

    def __init__(self, handle, name, ops):
        from ..backend.cuda.nccl import Nccl, new_id
        Group.__init__(self, handle, name)
        self.ops, self.transport, self.mixed = ops, self, False     # of messages: `wait`
        unique_id = new_id() if self.rank == 0 else np.empty(128, np.uint8)
        Group.broadcast(self, unique_id)
        self.nccl = Nccl(ops.device, self.size, self.rank, unique_id)

    def _like(self, handle, name):
        return NcclGroup(handle, name, self.ops)

    def _later(self, event, call, stages=(), kept=None):
        """A Pending whose end lets the device wait for NCCL."""
        return self._pending([Ordered(self.ops, event)], call, stages, kept)

    def _exchange(self, sent, received, tag):
        peers = [rank for rank in range(self.size) if rank != self.rank]
        if all(on_host(array) for rank in peers for array in [*received(rank), *sent(rank)]):
            return Group._exchange(self, sent, received, tag)
        return [Ordered(self.ops, self.nccl.exchange([(x, rank) for rank in peers for x in sent(rank)],
                                                     [(x, rank) for rank in peers for x in received(rank)]))]

    def _all_reduce_start(self, x, call):
        return super()._all_reduce_start(x, call) if on_host(x) else self._later(self.nccl.all_reduce(x), call, kept=x)

    def all_reduce(self, x, op="sum"):
        if on_host(x):
            return Group.all_reduce(self, x, op)
        call = self._begin("all_reduce" if op == "sum" else f"all_reduce {op}", x, self._around(x), x.shape)
        self._later(self.nccl.all_reduce(x, op), call).wait()
        return x

    def wait(self, requests):
        """Of a transport: lets the device wait for what NCCL does."""
        for request in requests:
            request.Wait()

    def _shift_start(self, x, out, call):
        if on_host(x):
            return Group._shift_start(self, x, out, call)
        source, to = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        return self._later(self.nccl.exchange([(x, to)], [(out, source)]), call, kept=(x, out))

    def send_start(self, x, to, tag=0):
        if on_host(x):
            return Group.send_start(self, x, to, tag)
        call = self._begin("send", x, x.nbytes, tag, f"to {to}")
        return self._later(self.nccl.exchange([(x, to)], []), call, kept=x)

    def _receive(self, x, source, tag):
        if on_host(x):
            Group._receive(self, x, source, tag)
            return
        self.ops.device.stream.wait_event(self.nccl.exchange([], [(x, source)]))

    def broadcast(self, x, root=0):
        if on_host(x):
            return Group.broadcast(self, x, root)
        call = self._begin("broadcast", x, x.nbytes if self.rank == root else 0, (root, x.shape))
        others = [rank for rank in range(self.size) if rank != root]
        mine = self.rank == root
        event = self.nccl.exchange([(x, rank) for rank in others] if mine else [], [] if mine else [(x, root)])
        self._later(event, call).wait()
        return x


class Ordered:
    """What NCCL does, as a request: `Wait` lets the device wait, not the host; `Test` lets nobody wait before it is done."""

    def __init__(self, ops, event):
        self.ops, self.event = ops, event

    def Test(self):
        if not self.event.done:
            return False
        self.Wait()
        return True

    def Wait(self):
        self.ops.device.stream.wait_event(self.event)
