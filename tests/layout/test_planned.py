"""Planned groups: the same calls on a real group and on a planned one give the same shapes and the same ledger."""

import numpy as np
import pytest

from mpillm.backend.shapes import Shapes
from mpillm.layout.comm import Group
from mpillm.layout.journal import JOURNAL, Journal
from mpillm.layout.planned import Planned
from mpillm.layout.slab import cut, ranges_of

LENGTH = 7      # of what is split, uneven on 2, 3 and 4 ranks


def counts_of(ranks, length, unit=1):
    return [cut(length, ranks.size, rank, unit)[1] for rank in range(ranks.size)]


def play(ranks, make):
    """Every call on arrays of `make(shape, dtype)`; yields (call, result or array that was filled)."""
    counts, (start, mine) = counts_of(ranks, LENGTH), cut(LENGTH, ranks.size, ranks.rank)
    right, left = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
    ranges = ranges_of(counts)
    for dtype in (np.float32, np.float64, np.float16):
        for op in ("sum", "max", "min"):
            yield f"all_reduce {op}", ranks.all_reduce(make((2, 5), dtype), op)
        x = make((5,), dtype)
        ranks.all_reduce_start(x).wait()
        yield "all_reduce_start", x
        yield "reduce_scatter", ranks.reduce_scatter(make((LENGTH,), dtype), counts)
        out = make((mine,), dtype)
        ranks.reduce_scatter_start(make((LENGTH,), dtype), ranges, out).wait()
        yield "reduce_scatter_start", out
        yield "all_gather", ranks.all_gather(make((LENGTH,), dtype), counts)
        x = make((LENGTH,), dtype)
        ranks.all_gather_start(x, ranges).wait()
        yield "all_gather_start", x
        yield "broadcast", ranks.broadcast(make((3, 2), dtype), ranks.size - 1)
        send = [(ranks.rank + 2 * to) % 3 for to in range(ranks.size)]
        receive = [(source + 2 * ranks.rank) % 3 for source in range(ranks.size)]
        yield "all_to_all", ranks.all_to_all(make((sum(send),), dtype), send, receive, make((sum(receive),), dtype))
        out = make((left + 1,), dtype)
        ranks.shift_start(make((ranks.rank + 1,), dtype), out).wait()
        yield "shift_start", out
        pending = ranks.send_start(make((4,), dtype), right, tag=3)
        yield "receive", ranks.receive(make((4,), dtype), left, tag=3)
        pending.wait()
    ranks.barrier()


def play_pairs(ranks, make):
    """The adjoint pairs, along every dim."""
    for dim in (0, 1, 2):
        for length, unit in ((LENGTH, 1), (2 * LENGTH, 2), (1, 1), (0, 1)):
            shape = [2, 3, 4]
            shape[dim] = cut(length, ranks.size, ranks.rank, unit)[1]
            yield f"gather {dim} {length}", ranks.gather(make(tuple(shape), np.float32), dim, length, unit)
            shape[dim] = length
            yield f"scatter_sum {dim} {length}", ranks.scatter_sum(make(tuple(shape), np.float32), dim, length, unit)
    for split_dim, joined_dim in ((0, 1), (1, 0), (2, 1), (0, 2)):
        for split_length, joined_length in ((LENGTH, 5), (1, 6), (5, 1), (0, 3), (ranks.size, ranks.size + 1)):
            shape = [2, 2, 2]
            shape[split_dim], shape[joined_dim] = split_length, cut(joined_length, ranks.size, ranks.rank)[1]
            x = make(tuple(shape), np.float32)
            yield f"exchange {split_dim} {joined_dim} {shape}", ranks.exchange(x, split_dim, joined_dim, split_length, joined_length)


@pytest.mark.ranks
@pytest.mark.parametrize("calls", [play, play_pairs])
@pytest.mark.parametrize("kind", ["numpy", "shapes"])
def test_results_and_ledger_are_those_of_a_real_group(group, calls, kind):
    if group.size == 1:
        pytest.skip("needs ranks")
    before, journal, ops = JOURNAL.snapshot(), Journal(), Shapes()
    real = [(name, x.shape, x.dtype) for name, x in calls(Group(group.handle, "axis"), np.zeros)]
    empty = np.empty if kind == "numpy" else ops.empty
    planned = Planned(group.rank, group.size, "axis", journal=journal, empty=empty)
    assert [(name, x.shape, x.dtype) for name, x in calls(planned, empty)] == real
    assert journal.since({}) == JOURNAL.since(before)


def test_a_planned_group_has_a_place_and_moves_nothing():
    before, journal = JOURNAL.snapshot(), Journal()
    group = Planned(2, 5, "ranks", key="k", journal=journal)
    x = np.arange(4.0)
    assert (group.rank, group.size, group.name, group.key, group.handle) == (2, 5, "ranks", "k", None)
    assert group.all_reduce(x) is x and group.all_gather(x, [1, 1, 1, 1, 0]) is x
    out = np.full(1, 9.0)
    group.reduce_scatter_start(x, ranges_of([1, 1, 1, 1, 0]), out).wait()
    assert out[0] == 9.0 and list(x) == [0.0, 1.0, 2.0, 3.0]
    assert JOURNAL.since(before) == {} and sum(entry.calls for entry in journal.since({}).values()) == 3


def test_one_process_plays_every_rank_of_a_large_job():
    """Bytes of all ranks together: what each of 1000 ranks sends of a gather is its part, 999 times."""
    journals = [Journal() for _ in range(1000)]
    for rank, journal in enumerate(journals):
        Planned(rank, 1000, "dp", journal=journal).gather(np.empty((cut(3500, 1000, rank)[1], 2)), 0, 3500)
    assert sum(journal.since({})["dp", "all_gather"].bytes for journal in journals) == 999 * 3500 * 2 * 8
