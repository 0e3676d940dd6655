"""How arrays of a GPU go to another rank: straight from device memory, or through pinned memory of the host.

| transport | messages | sums |
|---|---|---|
| cuda_aware | MPI reads and writes device memory | our own, by kernels |
| staged | MPI reads and writes pinned memory; copies of one piece go on beside the message of the one before | our own, by kernels |
| nccl | NCCL, on the stream of the device | NCCL's |

The first two send the same messages, so that ranks of both kinds, and ranks on CPUs, may be in one job.
"""

import collections
import time

STAGED_BYTES, DIRECT_BYTES = 8 << 20, 1 << 30   # of a message; 1 GB is below the counts that Open MPI refuses
DEPTH = 3       # pieces of an array that are on their way at a time, each in a pinned buffer of its own


class Direct:
    """Messages from and to device memory.

    Parameters
    ----------
    ops : Cuda
    """
    message_bytes = DIRECT_BYTES

    def __init__(self, ops):
        from mpi4py import MPI
        self.mpi, self.ops = MPI, ops

    def prepare(self):
        """Before MPI reads or writes: the work of the stream is done. MPI knows nothing of streams."""
        self.ops.synchronize()      # of a CPU: nothing

    def _parts(self, x):
        return [[self.mpi.memory.fromaddress(x.data.ptr + start, min(self.message_bytes, x.nbytes - start)), self.mpi.BYTE]
                for start in range(0, x.nbytes, self.message_bytes)]

    def send(self, handle, x, to, tag):
        return [handle.Isend(part, to, tag) for part in self._parts(x)]

    def receive(self, handle, x, source, tag):
        return [handle.Irecv(part, source, tag) for part in self._parts(x)]

    def wait(self, requests):
        for request in requests:
            request.Wait()


class Staged:
    """Messages through pinned memory.

    Requests are driven on by polling, all that are under way whichever is waited for: else two ranks could wait for
    messages that the other has not yet begun to send. Messages of one tag are told apart by their order alone, so an array's
    begin when all of those before it have begun, whichever copy is done first.
    """
    message_bytes = STAGED_BYTES

    def __init__(self, ops):
        self.ops, self.buffers, self.active = ops, [], []

    def prepare(self):
        """Copies wait for the stream by themselves."""

    def send(self, handle, x, to, tag):
        return [self._started(Sending(self, handle, x, to, tag))]

    def receive(self, handle, x, source, tag):
        return [self._started(Receiving(self, handle, x, source, tag))]

    def _started(self, request):
        self.active.append(request)
        request.advance(any(other.key == request.key and not other.all_begun for other in self.active[:-1]))
        return request

    def advance(self):
        """Drives on everything that is under way."""
        behind = set()      # keys of messages that have not begun
        for request in self.active:
            request.advance(request.key in behind)
            if not request.all_begun:
                behind.add(request.key)
        self.active = [request for request in self.active if not request.done]

    def wait(self, requests):
        while requests:
            requests = [request for request in requests if not request.Test()]
            time.sleep(0)       # ranks may be more than cores

    def buffer(self):
        return self.buffers.pop() if self.buffers else self.ops.device.pinned(STAGED_BYTES)


class Piece:
    """Bytes of an array in a pinned buffer, between the device and a message."""

    __slots__ = ("buffer", "array", "event", "request")

    def __init__(self, buffer, array):
        self.buffer, self.array, self.event, self.request = buffer, array, None, None

    @property
    def bytes(self):
        return self.buffer[:self.array.nbytes]


class Moving:
    """A whole array on its way, piece by piece in order; `Test()` as of an MPI request.

    Attributes
    ----------
    key
        Equal for arrays whose messages only their order tells apart.
    """

    def __init__(self, staged, handle, x, peer, tag):
        self.staged, self.handle, self.peer, self.tag, self.done = staged, handle, peer, tag, False
        self.key = type(self), id(handle), peer, tag
        flat, step = x.reshape(-1), STAGED_BYTES // x.itemsize
        self.waiting = collections.deque(flat[start:start + step] for start in range(0, flat.size, step))
        self.pieces = collections.deque()       # under way, in order

    @property
    def all_begun(self):
        """Whether MPI knows of all messages."""
        return not self.waiting and (not self.pieces or self.pieces[-1].request is not None)

    def Test(self):
        self.staged.advance()
        return self.done

    def advance(self, is_behind):
        """Does what can be done now; no message begins where it `is_behind` others."""
        while self.waiting and len(self.pieces) < DEPTH and not (is_behind and self.begins_with_message):
            piece = Piece(self.staged.buffer(), self.waiting.popleft())
            self.begin(piece)
            self.pieces.append(piece)
        for piece in self.pieces:
            if is_behind and piece.request is None or not self.go_on(piece):
                break
        while self.pieces and self.is_over(self.pieces[0]):
            self.staged.buffers.append(self.pieces.popleft().buffer)
        self.done = not self.waiting and not self.pieces


class Sending(Moving):
    """Device, pinned memory, message."""
    begins_with_message = False

    def begin(self, piece):
        self.staged.ops.device.copy_to_host_start(piece.bytes, piece.array)
        piece.event = self.staged.ops.device.record()

    def go_on(self, piece):
        if piece.request is None and piece.event.done:
            piece.request = self.handle.Isend(piece.bytes, self.peer, self.tag)
        return piece.request is not None

    def is_over(self, piece):
        return piece.request is not None and piece.request.Test()


class Receiving(Moving):
    """Message, pinned memory, device."""
    begins_with_message = True

    def begin(self, piece):
        piece.request = self.handle.Irecv(piece.bytes, self.peer, self.tag)

    def go_on(self, piece):
        if piece.event is None and piece.request.Test():
            self.staged.ops.device.copy_from_host_start(piece.array, piece.bytes)
            piece.event = self.staged.ops.device.record()
        return piece.event is not None

    def is_over(self, piece):
        return piece.event is not None and piece.event.done
