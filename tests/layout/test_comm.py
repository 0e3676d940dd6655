"""Every call on arrays: what it computes, that pairs are adjoint, 16-bit types, large counts, the flight recorder.

Values are small whole numbers, so that sums are exact and every comparison is for equality.
"""

import re

import ml_dtypes
import numpy as np
import pytest

from mpillm.layout import comm
from mpillm.layout.comm import Planned, Solo
from mpillm.layout.slab import cut

pytestmark = pytest.mark.ranks

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
HALVES = [np.float16, ml_dtypes.bfloat16]


@pytest.fixture(params=["world", "solo"])
def ranks(request, group):
    """All ranks, and one rank by itself."""
    return group if request.param == "world" else Solo()


@pytest.fixture(params=[2**30, 3], ids=["one call", "chunks"])
def max_count(request, monkeypatch):
    monkeypatch.setattr(comm, "MAX_COUNT", request.param)
    return request.param


def numbers(shape, seed, rank=0, dtype=np.float64):
    """Whole numbers from -8 to 8: the same on any rank that asks for them."""
    return np.random.default_rng([seed, rank]).integers(-8, 9, shape).astype(dtype)


def of_all(ranks, shape, seed, dtype=np.float64):
    """What every rank has, (ranks, ...), known without communication."""
    return np.stack([numbers(shape, seed, rank, dtype) for rank in range(ranks.size)])


def lengths(ranks):
    return [0, 1, 2, ranks.size, ranks.size + 1, 7]


def total(ranks, *values):
    """Sum over the ranks of this rank's inner product."""
    return float(sum(ranks.collect(float(sum(values)))))


def inner(a, b):
    return float(np.vdot(a, b))


# -- reductions ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES + [np.int64], ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("start", [False, True], ids=["blocking", "started"])
def test_all_reduce_sums_in_place(ranks, max_count, dtype, start):
    for shape in [(0,), (1,), (2, 5)]:
        x = numbers(shape, 1, ranks.rank, dtype)
        if start:
            pending = ranks.all_reduce_start(x)
            while not pending.test():
                pass
            pending.wait()
        else:
            assert ranks.all_reduce(x) is x
        np.testing.assert_array_equal(x.astype(float), of_all(ranks, shape, 1).sum(0))
        assert x.dtype == dtype


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, ml_dtypes.bfloat16], ids=lambda dtype: np.dtype(dtype).name)
def test_all_reduce_max_and_min(ranks, max_count, dtype):
    every = of_all(ranks, (7,), 2)
    for op, expected in (("max", every.max(0)), ("min", every.min(0))):
        x = numbers((7,), 2, ranks.rank, dtype)
        np.testing.assert_array_equal(ranks.all_reduce(x, op).astype(float), expected)


def fractions(shape, seed, rank, dtype):
    """Values whose sums are exact in float32 and have to be rounded in 16 bits."""
    top = 2**8 if dtype == ml_dtypes.bfloat16 else 2**11
    return (np.random.default_rng([seed, rank]).integers(top // 2, top, shape) * np.float32(2.0**-6)).astype(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: np.dtype(dtype).name)
def test_half_precision_is_summed_in_float32_and_rounded_once(ranks, max_count, dtype):
    every = [fractions((1000,), 3, rank, dtype) for rank in range(ranks.size)]
    expected = sum(x.astype(np.float32) for x in every).astype(dtype)
    step_by_step = every[0]
    for x in every[1:]:
        step_by_step = (step_by_step + x).astype(dtype)
    if ranks.size > 2:
        assert (step_by_step != expected).any()     # so the comparison below can fail
    x = every[ranks.rank].copy()
    ranks.all_reduce(x)
    np.testing.assert_array_equal(x.view(np.uint16), expected.view(np.uint16))
    x = every[ranks.rank].copy()
    ranks.all_reduce_start(x).wait()
    np.testing.assert_array_equal(x.view(np.uint16), expected.view(np.uint16))
    counts = [cut(1000, ranks.size, rank)[1] for rank in range(ranks.size)]
    first, size = cut(1000, ranks.size, ranks.rank)
    part = ranks.reduce_scatter(every[ranks.rank].copy(), counts)
    np.testing.assert_array_equal(part.view(np.uint16), expected[first:first + size].view(np.uint16))


def uneven(ranks, length, order=1):
    """Counts of the ranks, the first (or last) ranks with none where there are few elements."""
    return [cut(length, ranks.size, rank)[1] for rank in range(ranks.size)][::order]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("order", [1, -1], ids=["larger first", "larger last"])
def test_reduce_scatter_and_all_gather(ranks, max_count, dtype, order):
    for length in lengths(ranks):
        counts = uneven(ranks, length, order)
        start = sum(counts[:ranks.rank])
        mine = slice(start, start + counts[ranks.rank])
        x = numbers((length,), 4, ranks.rank, dtype)
        expected = of_all(ranks, (length,), 4).sum(0)
        part = ranks.reduce_scatter(x, counts)
        np.testing.assert_array_equal(part.astype(float), expected[mine])
        out = np.full(counts[ranks.rank], 99, dtype)
        ranks.reduce_scatter_start(x, counts, out).wait()
        np.testing.assert_array_equal(out.astype(float), expected[mine])
        whole = np.full(length, 77, dtype)
        whole[mine] = out
        assert ranks.all_gather(whole, counts) is whole
        np.testing.assert_array_equal(whole.astype(float), expected)


def test_started_calls_may_overlap_and_finish_in_any_order(ranks, max_count):
    arrays = [numbers((10 + i,), 5 + i, ranks.rank) for i in range(6)]
    pending = [ranks.all_reduce_start(x) for x in arrays]
    for message in reversed(pending):
        message.wait()
    for i, x in enumerate(arrays):
        np.testing.assert_array_equal(x, of_all(ranks, (10 + i,), 5 + i).sum(0))


# -- moving -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES + [np.uint8], ids=lambda dtype: np.dtype(dtype).name)
def test_broadcast_from_every_root(ranks, max_count, dtype):
    for root in range(ranks.size):
        for shape in [(0,), (3, 4)]:
            x = np.abs(numbers(shape, 6, ranks.rank)).astype(dtype)
            assert ranks.broadcast(x, root) is x
            np.testing.assert_array_equal(x, np.abs(numbers(shape, 6, root)).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_all_to_all_with_uneven_and_empty_pieces(ranks, dtype):
    def count(source, to):
        return (source + 2 * to) % 3        # 0, 1 or 2 elements
    send = [count(ranks.rank, to) for to in range(ranks.size)]
    receive = [count(source, ranks.rank) for source in range(ranks.size)]
    x = np.concatenate([np.full(n, 10 * ranks.rank + to) for to, n in enumerate(send)]).astype(dtype)
    out = np.zeros(sum(receive), dtype)
    assert ranks.all_to_all(x, send, receive, out) is out
    expected = np.concatenate([np.full(n, 10 * source + ranks.rank) for source, n in enumerate(receive)])
    np.testing.assert_array_equal(out.astype(float), expected)


def test_all_to_all_refuses_what_one_call_cannot_carry(group, monkeypatch):
    if group.size == 1:
        pytest.skip("needs ranks")
    monkeypatch.setattr(comm, "MAX_COUNT", 3)
    x = np.zeros(2 * group.size)
    with pytest.raises(ValueError, match=f"all_to_all of {x.size} elements: at most 3; use smaller micro-batches"):
        group.all_to_all(x, [2] * group.size, [2] * group.size, x.copy())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_a_ring_of_messages(group, max_count, dtype):
    if group.size == 1:
        pytest.skip("needs ranks")
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    for shape in [(0,), (1,), (4, 2)]:
        x, y = numbers(shape, 7, group.rank, dtype), np.zeros(shape, dtype)
        pending = group.send_start(x, right, tag=5)
        assert group.receive(y, left, tag=5) is y
        pending.wait()
        np.testing.assert_array_equal(y, numbers(shape, 7, left, dtype))


def test_messages_of_two_tags_are_kept_apart(group):
    if group.size == 1:
        pytest.skip("needs ranks")
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    sent = [np.full(4, 10.0 * tag + group.rank) for tag in (0, 1)]
    pending = [group.send_start(x, right, tag) for tag, x in enumerate(sent)]
    second, first = (group.receive(np.empty(4), left, tag) for tag in (1, 0))
    for message in pending:
        message.wait()
    assert first[0] == left and second[0] == 10 + left


def test_one_rank_has_nobody_to_send_to():
    for call in (Solo().send_start, Solo().receive):
        with pytest.raises(ValueError, match="nobody to send to"):
            call(np.zeros(1), 0)


def test_arrays_must_be_contiguous(group):
    if group.size == 1:
        pytest.skip("needs ranks")
    with pytest.raises(ValueError, match="communication needs a contiguous array"):
        group.all_reduce(np.zeros((4, 6)).T)


# -- control values -----------------------------------------------------------------------------------------------

VALUES = [None, True, 3, 2.5, "", "text of some length " * 40, "Grüße", [], [1, [2, {"x": None}]], {"loss": 1.25, "files": ["a", "b"]}]


def test_share_gives_the_value_of_one_rank(ranks, max_count):
    for root in range(ranks.size):
        for value in VALUES:
            assert ranks.share(value if ranks.rank == root else "another", root) == value


def test_collect_gives_the_values_of_all_ranks_of_any_length(ranks, max_count):
    for turn in range(len(VALUES)):
        every = [VALUES[(turn + rank) % len(VALUES)] for rank in range(ranks.size)]
        assert ranks.collect(every[ranks.rank]) == every


def test_control_values_are_what_json_makes_of_them(ranks):
    assert ranks.share({"mesh": (1, 2)}) == {"mesh": [1, 2]}
    assert ranks.collect((1, 2)) == [[1, 2]] * ranks.size


# -- groups -------------------------------------------------------------------------------------------------------

def test_split_orders_by_key(group):
    reversed_world = group.split(0, -group.rank, "reversed")
    assert reversed_world.collect(group.rank) == list(range(group.size))[::-1]
    assert (reversed_world.rank, reversed_world.size) == (group.size - 1 - group.rank, group.size)
    parity = group.split(group.rank % 2, group.rank, "parity")
    assert parity.collect(group.rank) == list(range(group.rank % 2, group.size, 2))
    assert isinstance(group.split(group.rank, 0, "alone"), Solo)


def test_barrier_and_abort(ranks, monkeypatch):
    ranks.barrier()
    codes = []
    monkeypatch.setattr(comm.os, "_exit", codes.append)
    Solo().abort(77)
    assert codes == [77]


def test_a_planned_group_has_a_place_and_does_nothing():
    group = Planned(2, 5)
    x = np.arange(4.0)
    assert (group.rank, group.size) == (2, 5)
    assert group.all_reduce(x) is x and group.all_gather(x, [4]) is x
    out = np.full(1, 9.0)
    group.reduce_scatter_start(x, [1] * 5, out).wait()
    assert out[0] == 9.0


# -- adjoint pairs: <F x, y> = <x, F* y> --------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: np.dtype(dtype).name)
def test_use_and_all_reduce_are_adjoint(ranks, dtype):
    x = numbers((5, 3), 10, dtype=dtype)                        # same
    y = numbers((5, 3), 11, ranks.rank, dtype)                  # partial
    left = total(ranks, inner(ranks.use(x), y))
    assert left == inner(x, ranks.all_reduce(y.copy()))
    partial, same = numbers((5, 3), 12, ranks.rank, dtype), numbers((5, 3), 13, dtype=dtype)
    left = inner(ranks.all_reduce(partial.copy()), same)
    assert left == total(ranks, inner(partial, ranks.use(same)))


def shape_with(dim, extent):
    shape = [2, 3, 4]
    shape[dim] = extent
    return tuple(shape)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("unit", [1, 2])
def test_gather_and_scatter_sum_are_adjoint(ranks, max_count, dim, unit):
    for length in [unit * n for n in lengths(ranks)]:
        start, size = cut(length, ranks.size, ranks.rank, unit)
        mine = [slice(None)] * 3
        mine[dim] = slice(start, start + size)
        whole = numbers(shape_with(dim, length), 14)
        x = np.ascontiguousarray(whole[tuple(mine)])            # split
        gathered = ranks.gather(x, dim, length, unit)           # same
        np.testing.assert_array_equal(gathered, whole)
        y = numbers(gathered.shape, 15, ranks.rank)             # partial
        summed = ranks.scatter_sum(y, dim, length, unit)        # split
        np.testing.assert_array_equal(summed, of_all(ranks, whole.shape, 15).sum(0)[tuple(mine)])
        assert total(ranks, inner(gathered, y)) == total(ranks, inner(x, summed))
        assert total(ranks, inner(summed, x)) == total(ranks, inner(y, ranks.gather(x, dim, length, unit)))


@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: np.dtype(dtype).name)
def test_gather_scatter_sum_and_exchange_of_half_precision(ranks, dtype):
    start, size = cut(7, ranks.size, ranks.rank)
    whole = numbers((3, 7), 16, dtype=dtype)
    gathered = ranks.gather(whole[:, start:start + size], 1, 7)
    assert gathered.dtype == dtype
    np.testing.assert_array_equal(gathered, whole)
    summed = ranks.scatter_sum(numbers((3, 7), 17, ranks.rank, dtype), 1, 7)
    np.testing.assert_array_equal(summed.astype(float), of_all(ranks, (3, 7), 17).sum(0)[:, start:start + size])
    np.testing.assert_array_equal(ranks.exchange(whole[:, start:start + size], 0, 1, 3, 7),
                                  whole[slice(*np.cumsum(cut(3, ranks.size, ranks.rank)))])


def test_gather_of_an_empty_other_dim(ranks):
    start, size = cut(5, ranks.size, ranks.rank)
    assert ranks.gather(np.zeros((size, 0)), 0, 5).shape == (5, 0)
    assert ranks.scatter_sum(np.zeros((5, 0)), 0, 5).shape == (size, 0)


@pytest.mark.parametrize("dims", [(0, 1), (1, 0), (2, 0), (-1, 1)], ids=str)
def test_exchange_is_its_own_adjoint_with_the_dims_swapped(ranks, dims):
    split_dim, joined_dim = dims
    for split_length, joined_length in [(7, 5), (1, 6), (5, 1), (0, 3), (ranks.size, ranks.size + 1)]:
        shape = [2, 2, 2]
        shape[split_dim], shape[joined_dim] = split_length, joined_length
        whole = numbers(shape, 18)

        def part(dim, length):
            start, size = cut(length, ranks.size, ranks.rank)
            index = [slice(None)] * 3
            index[dim] = slice(start, start + size)
            return tuple(index)
        x = whole[part(joined_dim, joined_length)]
        y = ranks.exchange(x, split_dim, joined_dim, split_length, joined_length)
        np.testing.assert_array_equal(y, whole[part(split_dim, split_length)])
        dy = numbers(y.shape, 19, ranks.rank)
        dx = ranks.exchange(dy, joined_dim, split_dim, joined_length, split_length)
        assert dx.shape == x.shape
        assert total(ranks, inner(y, dy)) == total(ranks, inner(x, dx))
        np.testing.assert_array_equal(ranks.exchange(y, joined_dim, split_dim, joined_length, split_length), x)


# -- flight recorder ----------------------------------------------------------------------------------------------

def test_the_flight_recorder_knows_the_last_calls(group):
    if group.size == 1:
        pytest.skip("needs ranks")
    first = comm.recorder[-1].number if comm.recorder else 0
    group.all_reduce(np.zeros((2, 3), np.float32))
    group.broadcast(np.zeros(4, ml_dtypes.bfloat16))
    group.barrier()
    pending = group.reduce_scatter_start(np.zeros(group.size), [1] * group.size, np.zeros(1))
    calls = list(comm.recorder)[-4:]
    assert [call.number for call in calls] == [first + 1, first + 2, first + 3, first + 4]
    assert [call.operation for call in calls] == ["all_reduce sum", "broadcast", "barrier", "reduce_scatter"]
    assert [(call.shape, call.dtype) for call in calls] == [((2, 3), "float32"), ((4,), "bfloat16"), ((), ""), ((group.size,), "float64")]
    assert all(call.seconds is not None for call in calls[:3]) and calls[3].seconds is None
    assert comm.last_calls(1) == [f"#{first + 4} reduce_scatter over world [{group.size}] float64: not finished"]
    pending.wait()
    lines = comm.last_calls(4)
    assert len(lines) == 4 and re.fullmatch(rf"#{first + 1} all_reduce sum over world \[2, 3\] float32: \d+\.\d+ s", lines[0])
    assert lines[3].endswith(" s")


def test_the_flight_recorder_enters_a_call_before_it_starts(group, monkeypatch):
    if group.size == 1:
        pytest.skip("needs ranks")

    class Broken:
        """A communicator that never gets to work."""
        def Get_rank(self):
            return 0

        def Get_size(self):
            return 2

        def Bcast(self, part, root):
            raise RuntimeError("the network is down")
    with pytest.raises(RuntimeError):
        comm.Group(Broken(), "broken").broadcast(np.zeros(3))
    assert "broadcast over broken [3] float64: not finished" in comm.last_calls(1)[0]


def test_the_flight_recorder_forgets_the_oldest():
    for _ in range(comm.RECORD_LENGTH + 10):
        comm.Call("x", "nothing", None)
    assert len(comm.recorder) == comm.RECORD_LENGTH
    assert comm.recorder[-1].number - comm.recorder[0].number == comm.RECORD_LENGTH - 1


def test_the_device_is_synchronized_before_a_call(group):
    if group.size == 1:
        pytest.skip("needs ranks")
    waits = []
    watched = comm.Group(group.handle, "watched", lambda: waits.append(len(comm.recorder) and comm.recorder[-1].group))
    watched.all_reduce(np.zeros(2))
    watched.barrier()
    assert len(waits) == 2 and waits[0] != "watched"
