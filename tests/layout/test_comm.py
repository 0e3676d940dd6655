"""Every call on arrays: what it computes, 16-bit types, several ranges a rank, large counts; control values and groups."""

import ml_dtypes
import numpy as np
import pytest

from comm_cases import DTYPES, HALVES, lengths, numbers, of_all, uneven
from mpillm.layout import comm
from mpillm.layout.comm import Group, Solo
from mpillm.layout.slab import cut, extent, in_messages, ranges_of

pytestmark = pytest.mark.ranks


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
        ranks.reduce_scatter_start(x, ranges_of(counts), out).wait()
        np.testing.assert_array_equal(out.astype(float), expected[mine])
        whole = np.full(length, 77, dtype)
        whole[mine] = out
        assert ranks.all_gather(whole, counts) is whole
        np.testing.assert_array_equal(whole.astype(float), expected)
        whole = np.full(length, 77, dtype)
        whole[mine] = out
        ranks.all_gather_start(whole, ranges_of(counts)).wait()
        np.testing.assert_array_equal(whole.astype(float), expected)


def test_ranges_of_counts():
    assert [ranges_of([2, 0, 3])(rank) for rank in range(3)] == [[(0, 2)], [(2, 2)], [(2, 5)]]
    assert extent([(0, 2), (5, 5), (7, 10)]) == 5 and extent([]) == 0
    pieces = in_messages(np.arange(5), [(0, 2), (5, 5), (7, 10)])
    assert [piece.tolist() for piece in pieces] == [[0, 1], [], [2, 3, 4]]


def rows_of_tensors(ranks):
    """Ranges of three tensors in one flat array, cut by rows: (5, 3), 3 matrices (2, 4) cut one by one, (1, 2); and their length."""
    tensors = [(0, 1, 5, 3), (15, 3, 2, 4), (39, 1, 1, 2)]      # where it begins, matrices, rows, columns

    def ranges(rank):
        found = []
        for begin, matrices, rows, columns in tensors:
            first, size = cut(rows, ranks.size, rank)
            starts = [begin + (matrix * rows + first) * columns for matrix in range(matrices)]
            found += [(start, start + size * columns) for start in starts if size]
        return found
    return ranges, 41


def dealt(ranks):
    """Ranges of single elements, as cards are dealt, some of them empty, in descending order; and their length."""
    length = 3 * ranks.size + 1
    return lambda rank: [(i, i) if i % 2 else (i, i + 1) for i in reversed(range(rank, length, ranks.size))] + [
        (i, i + 1) for i in range(rank, length, ranks.size) if i % 2], length


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("form", [rows_of_tensors, dealt])
def test_reduce_scatter_and_all_gather_of_several_ranges_a_rank(ranks, max_count, dtype, form):
    ranges, length = form(ranks)
    assert sorted(i for rank in range(ranks.size) for start, stop in ranges(rank) for i in range(start, stop)) == list(range(length))
    if ranks.size > 1:
        assert max(len(ranges(rank)) for rank in range(ranks.size)) > 2
    mine = np.array([i for start, stop in ranges(ranks.rank) for i in range(start, stop)], int)
    x = numbers((length,), 20, ranks.rank, dtype)
    if ranks.size > 1 or form is rows_of_tensors:       # one rank has its array as it is
        expected = of_all(ranks, (length,), 20).sum(0)
        out = np.full(len(mine), 99, dtype)
        ranks.reduce_scatter_start(x.copy(), ranges, out).wait()
        np.testing.assert_array_equal(out.astype(float), expected[mine])
        whole = np.full(length, 77, dtype)
        whole[mine] = out
        ranks.all_gather_start(whole, ranges).wait()
        np.testing.assert_array_equal(whole.astype(float), expected)


def test_a_reduce_scatter_may_put_its_part_into_what_it_sums(ranks, max_count):
    counts = uneven(ranks, 7)
    start = sum(counts[:ranks.rank])
    mine = slice(start, start + counts[ranks.rank])
    x = numbers((7,), 21, ranks.rank)
    ranks.reduce_scatter_start(x, ranges_of(counts), x[mine]).wait()
    expected = numbers((7,), 21, ranks.rank)
    expected[mine] = of_all(ranks, (7,), 21).sum(0)[mine]
    np.testing.assert_array_equal(x, expected)


class Started:
    """One of each started call, and what is to come of it."""

    def __init__(self, ranks, seed):
        size, rank = ranks.size, ranks.rank
        counts, every = uneven(ranks, 7), of_all(ranks, (7,), seed)
        mine = slice(sum(counts[:rank]), sum(counts[:rank]) + counts[rank])
        summed, scattered, shifted = every[rank].copy(), np.zeros(counts[rank]), np.zeros(7)
        gathered = np.zeros(7)
        gathered[mine] = every[0, mine]
        self.found = [summed, scattered, gathered, shifted]
        self.expected = [every.sum(0), every.sum(0)[mine], every[0], every[rank - 1]]
        self.calls = [ranks.all_reduce_start(summed), ranks.reduce_scatter_start(every[rank].copy(), ranges_of(counts), scattered),
                      ranks.all_gather_start(gathered, ranges_of(counts)), ranks.shift_start(every[rank].copy(), shifted)]

    def check(self):
        for found, expected in zip(self.found, self.expected):
            np.testing.assert_array_equal(found, expected)


def test_started_calls_may_overlap_and_finish_in_any_order(ranks, max_count):
    started = [Started(ranks, 30 + i) for i in range(5)]
    for each in reversed(started):
        for call in reversed(each.calls):
            call.wait()
    for each in started:
        each.check()


def test_every_rank_may_drive_started_calls_on_in_an_order_of_its_own(ranks, max_count):
    started = [Started(ranks, 40 + i) for i in range(5)]
    calls = [call for each in started for call in each.calls]
    order = np.random.default_rng([50, ranks.rank]).permutation(len(calls))
    while not all([calls[number].test() for number in order]):
        pass
    for each in started:
        each.check()


def test_tags_of_started_calls_go_round(group):
    if group.size == 1:
        pytest.skip("needs ranks")
    ranks = Group(group.handle, "tags")
    ranks._tag = comm.FIRST_TAG + comm.NUM_TAGS - 3
    started = Started(ranks, 60)                # its second call has the last tag
    assert comm.FIRST_TAG <= ranks._tag < comm.FIRST_TAG + 4 and comm.FIRST_TAG + comm.NUM_TAGS <= 2**15
    for call in started.calls:
        call.wait()
    started.check()


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


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_shift_gives_to_the_next_rank_what_the_one_before_has(ranks, max_count, dtype):
    before = (ranks.rank - 1) % ranks.size
    for shape in [(0,), (1,), (4, 2)]:
        x, out = numbers(shape, 8, ranks.rank, dtype), np.full(shape, 99, dtype)
        ranks.shift_start(x, out).wait()
        np.testing.assert_array_equal(out, numbers(shape, 8, before, dtype))


def test_what_is_shifted_may_be_of_another_size_on_every_rank(ranks, max_count):
    x, out = numbers((ranks.rank, 2), 9, ranks.rank), np.zeros(((ranks.rank - 1) % ranks.size, 2))
    ranks.shift_start(x, out).wait()
    np.testing.assert_array_equal(out, numbers(out.shape, 9, (ranks.rank - 1) % ranks.size))


def test_what_is_shifted_as_often_as_there_are_ranks_is_at_home_again(ranks):
    x = numbers((5,), 10, ranks.rank)
    for _ in range(ranks.size):
        out = np.zeros(5)
        ranks.shift_start(x, out).wait()
        x = out
    np.testing.assert_array_equal(x, numbers((5,), 10, ranks.rank))


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
