"""Arrays of a device between ranks: every call on a fake device, straight and staged, beside ranks on the CPU; the order of the stream."""

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mpillm.backend import open_backend
from mpillm.layout import transport as transports
from mpillm.layout.slab import cut, ranges_of

sys.path.append(str(Path(__file__).resolve().parents[1] / "backend/cuda"))
pytest.importorskip("cupy", reason="CuPy is not installed: jobs/setup.sh --test installs it on x86-64 Linux", exc_type=ImportError)

pytestmark = pytest.mark.ranks
TYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float64": np.dtype(np.float64)}


def fake_ops(device=None, reserve=0):
    """The GPU's operations on a fake device; with so many bytes reserved for each kind of arrays, as `mpillm train` does."""
    from emulator import is_usable
    if not is_usable():
        pytest.skip("no C++ compiler for the emulator")
    from fake import FakeDevice
    from fake_cublaslt import NumpyLt
    from mpillm.backend.cuda import Cuda
    ops = Cuda(device or FakeDevice())
    ops.library = NumpyLt(ops.device)
    if reserve:
        ops.device.reserve(reserve, reserve)
    return ops


@pytest.fixture(params=["cuda_aware", "staged"])
def kind(request, monkeypatch):
    """The class of a transport, with messages so small that arrays take several."""
    found = {"cuda_aware": transports.Direct, "staged": transports.Staged}[request.param]
    monkeypatch.setattr(transports, "STAGED_BYTES", 64)
    monkeypatch.setattr(found, "message_bytes", 64)
    return found


@pytest.fixture(params=["gpus", "mixed"])
def side(request, group, kind):
    """(ops, group) of this rank: all with GPUs, or odd ranks on the CPU."""
    if request.param == "mixed" and group.size == 1:
        pytest.skip("one rank is not mixed")
    from mpillm.layout.device_group import DeviceGroup
    handle = group.handle.Dup() if group.handle else None
    if handle is None:
        pytest.skip("one rank has nobody to talk to")
    mixed = request.param == "mixed"
    ops = open_backend("cpu") if mixed and group.rank % 2 else fake_ops()
    yield ops, DeviceGroup(handle, "world", ops, kind(ops), mixed)
    handle.Free()


def numbers(rank, shape, dtype, seed=0):
    return np.random.default_rng([rank, seed]).integers(-50, 50, shape).astype(dtype)


def everybody(size, shape, dtype, seed=0):
    return [numbers(rank, shape, dtype, seed) for rank in range(size)]


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("elements", [0, 1, 5, 301])
def test_sums(side, dtype, elements):
    ops, ranks = side
    total = sum(x.astype(np.float64) for x in everybody(ranks.size, elements, dtype)).astype(dtype)
    x = ops.from_host(numbers(ranks.rank, elements, dtype))
    assert ranks.all_reduce(x) is x
    np.testing.assert_array_equal(ops.to_host(x), total)
    x = ops.from_host(numbers(ranks.rank, elements, dtype))
    ranks.all_reduce_start(x).wait()
    np.testing.assert_array_equal(ops.to_host(x), total)
    counts = [cut(elements, ranks.size, rank)[1] for rank in range(ranks.size)]
    start = sum(counts[:ranks.rank])
    part = ranks.reduce_scatter(ops.from_host(numbers(ranks.rank, elements, dtype)), counts)
    np.testing.assert_array_equal(ops.to_host(part), total[start:start + counts[ranks.rank]])


def test_the_largest(side):
    ops, ranks = side
    x = ops.from_host(numbers(ranks.rank, 33, np.float32))
    ranks.all_reduce(x, "max")
    np.testing.assert_array_equal(ops.to_host(x), np.max(everybody(ranks.size, 33, np.float32), axis=0))


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_ranges_of_several_pieces(side, dtype):
    """As the owned rows of several experts lie."""
    ops, ranks = side
    each, size = 7, ranks.size
    ranges = lambda rank: [(rank * each, (rank + 1) * each), (size * each + 2 * rank, size * each + 2 * rank + 2)]
    length = size * (each + 2)
    total = sum(x.astype(np.float64) for x in everybody(size, length, dtype)).astype(dtype)
    out = ops.empty((each + 2,), dtype)
    ranks.reduce_scatter_start(ops.from_host(numbers(ranks.rank, length, dtype)), ranges, out).wait()
    mine = np.concatenate([total[start:stop] for start, stop in ranges(ranks.rank)])
    np.testing.assert_array_equal(ops.to_host(out), mine)
    host = np.full(length, -1, dtype)
    for start, stop in ranges(ranks.rank):
        host[start:stop] = total[start:stop]
    x = ops.from_host(host)
    ranks.all_gather_start(x, ranges).wait()
    np.testing.assert_array_equal(ops.to_host(x), total)


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_moving(side, dtype):
    ops, ranks = side
    size, rank = ranks.size, ranks.rank
    counts = [3 * each + 1 for each in range(size)]
    whole = numbers(9, sum(counts), dtype)
    (start, stop), = ranges_of(counts)(rank)
    host = np.zeros_like(whole)
    host[start:stop] = whole[start:stop]
    x = ops.from_host(host)
    ranks.all_gather(x, counts)
    np.testing.assert_array_equal(ops.to_host(x), whole)
    x = ops.from_host(whole if rank == size - 1 else np.zeros_like(whole))
    ranks.broadcast(x, size - 1)
    np.testing.assert_array_equal(ops.to_host(x), whole)
    x, out = ops.from_host(numbers(rank, 77, dtype)), ops.empty((77,), dtype)
    ranks.shift_start(x, out).wait()
    np.testing.assert_array_equal(ops.to_host(out), numbers((rank - 1) % size, 77, dtype))
    sent = ranks.send_start(x, (rank + 1) % size, 5)
    ranks.receive(out, (rank - 1) % size, 5)
    sent.wait()
    np.testing.assert_array_equal(ops.to_host(out), numbers((rank - 1) % size, 77, dtype))


def test_all_to_all(side):
    ops, ranks = side
    size, rank = ranks.size, ranks.rank
    count = lambda source, to: (source + 2 * to) % 4
    x = np.concatenate([np.full(count(rank, to), 10 * rank + to, np.float32) for to in range(size)])
    expected = np.concatenate([np.full(count(source, rank), 10 * source + rank, np.float32) for source in range(size)])
    out = ops.empty(expected.shape, np.float32)
    ranks.all_to_all(ops.from_host(x), [count(rank, to) for to in range(size)], [count(source, rank) for source in range(size)], out)
    np.testing.assert_array_equal(ops.to_host(out), expected)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gather_and_scatter_sum(side, dim):
    ops, ranks = side
    length = 2 * ranks.size + 1
    shape = [3, 4, 5]
    shape[dim] = length
    whole = numbers(3, shape, np.float32)
    start, size = cut(length, ranks.size, ranks.rank)
    part = np.take(whole, range(start, start + size), dim)
    np.testing.assert_array_equal(ops.to_host(ranks.gather(ops.from_host(part), dim, length)), whole)
    total = sum(everybody(ranks.size, shape, np.float32))
    found = ranks.scatter_sum(ops.from_host(numbers(ranks.rank, shape, np.float32)), dim, length)
    np.testing.assert_array_equal(ops.to_host(found), np.take(total, range(start, start + size), dim))


def test_exchange_there_and_back(side):
    ops, ranks = side
    rows, columns = 2 * ranks.size + 1, ranks.size + 2
    whole = numbers(4, (rows, 3, columns), np.float32)
    (r, nr), (c, nc) = cut(rows, ranks.size, ranks.rank), cut(columns, ranks.size, ranks.rank)
    x = ops.from_host(np.ascontiguousarray(whole[:, :, c:c + nc]))
    y = ranks.exchange(x, 0, 2, rows, columns)
    np.testing.assert_array_equal(ops.to_host(y), whole[r:r + nr])
    np.testing.assert_array_equal(ops.to_host(ranks.exchange(y, 2, 0, columns, rows)), whole[:, :, c:c + nc])


def test_host_arrays_and_groups_of_a_group(side):
    ops, ranks = side
    assert ranks.all_reduce(np.ones(3)).tolist() == [ranks.size] * 3
    assert ranks.collect(ranks.rank) == list(range(ranks.size))
    part = ranks.split(ranks.rank % 2, ranks.rank, "half")
    x = part.all_reduce(ops.from_host(np.ones(3, np.float32)))
    assert ops.to_host(x).tolist() == [part.size] * 3


def test_copies_that_are_done_in_any_order(group, kind):
    """Pieces of unequal size with one tag, whose copies are seen to be done at unequal times."""
    if group.size == 1 or kind is transports.Direct:
        pytest.skip("copies to pinned memory are between ranks")
    from fake import FakeDevice
    from mpillm.layout.device_group import DeviceGroup

    class Event:
        def __init__(self, polls):
            self.polls = polls

        @property
        def done(self):
            self.polls -= 1
            return self.polls < 0

    class Slow(FakeDevice):
        random = np.random.default_rng(group.rank)

        def record(self, stream=None):
            return Event(int(self.random.integers(6)))

    ops = fake_ops(Slow())
    ranks = DeviceGroup(group.handle, "slow", ops, kind(ops))
    width, size = 90, group.size        # float32: pieces of 7 to 83 numbers, some of several messages
    bounds = [[(rank * width, rank * width + 7), (rank * width + 7, (rank + 1) * width)] for rank in range(size)]
    total = sum(everybody(size, size * width, np.float32))
    for _ in range(20):
        out = ops.empty((width,), np.float32)
        ranks.reduce_scatter_start(ops.from_host(numbers(ranks.rank, size * width, np.float32)), lambda rank: bounds[rank], out).wait()
        np.testing.assert_array_equal(ops.to_host(out), total[ranks.rank * width:(ranks.rank + 1) * width])


def test_a_child_is_no_rank_of_this_job(group):
    """As the probe starts it, whatever the launcher set."""
    from mpillm.layout.probe import environment_of_child
    command = "from mpi4py import MPI; print(MPI.COMM_WORLD.size)"
    done = subprocess.run([sys.executable, "-c", command], env=environment_of_child(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_the_stream_is_waited_for_before_a_message(group, kind):
    """On a device that does its work only when it is waited for, a message without that would carry old bytes."""
    if group.size == 1:
        pytest.skip("one rank has nobody to talk to")
    from fake import FakeDevice
    from mpillm.layout.device_group import DeviceGroup

    class Event:
        def __init__(self, device):
            self.device, self.number = device, len(device.late)

        @property
        def done(self):
            self.device.until(self.number)
            return True

        def synchronize(self):
            self.device.until(self.number)

    class Late(FakeDevice):
        """Work waits in a list until somebody asks for it."""
        late = ()

        def _start(self):
            super()._start()
            self.late, self.kept_alive, self.finished = [], [], 0

        def do(self, call, held=()):
            self.late.append(call)
            self.kept_alive += held

        def until(self, number):
            while self.finished < number:
                self.finished += 1
                self.late[self.finished - 1]()

        def synchronize(self):
            self.until(len(self.late))

        def record(self, stream=None):
            return Event(self)

    def sum_of(prepares):
        ops = fake_ops(Late())
        transport = kind(ops)
        if not prepares:
            transport.prepare = lambda: None
        ranks = DeviceGroup(group.handle, "late", ops, transport)
        x, one = ops.from_host(np.zeros(50, np.float32)), ops.from_host(np.ones(50, np.float32))
        ops.add(x, one)                 # not done yet
        ranks.all_reduce(x)
        return ops.to_host(x)
    np.testing.assert_array_equal(sum_of(True), np.full(50, group.size, np.float32))
    if kind is transports.Direct:       # staged copies are behind the stream's work anyway
        wrong = group.collect(bool((sum_of(False) != group.size).any()))
        assert any(wrong), "the test would not see a missing wait"
