"""The flight recorder and the ledger: every call entered before it starts, with its group, array and bytes."""

import re

import ml_dtypes
import numpy as np
import pytest

from mpillm.layout.comm import Group, Solo
from mpillm.layout.journal import JOURNAL, RECORD_LENGTH, Journal, Traffic, ledger_table
from mpillm.layout.slab import ranges_of


@pytest.mark.ranks
def test_the_flight_recorder_knows_the_last_calls(group):
    if group.size == 1:
        pytest.skip("needs ranks")
    first = JOURNAL.calls[-1].number if JOURNAL.calls else 0
    group.all_reduce(np.zeros((2, 3), np.float32))
    group.broadcast(np.zeros(4, ml_dtypes.bfloat16))
    group.barrier()
    pending = group.reduce_scatter_start(np.zeros(group.size), ranges_of([1] * group.size), np.zeros(1))
    calls = list(JOURNAL.calls)[-4:]
    assert [call.number for call in calls] == [first + 1, first + 2, first + 3, first + 4]
    assert [call.operation for call in calls] == ["all_reduce", "broadcast", "barrier", "reduce_scatter"]
    assert [(call.shape, call.dtype) for call in calls] == [((2, 3), "float32"), ((4,), "bfloat16"), ((), ""), ((group.size,), "float64")]
    assert all(call.seconds is not None for call in calls[:3]) and calls[3].seconds is None
    assert JOURNAL.last_calls(1) == [f"#{first + 4} reduce_scatter over world [{group.size}] float64: not finished"]
    pending.wait()
    lines = JOURNAL.last_calls(4)
    assert len(lines) == 4 and re.fullmatch(rf"#{first + 1} all_reduce over world \[2, 3\] float32: \d+\.\d+ s", lines[0])
    assert lines[3].endswith(" s")


@pytest.mark.ranks
def test_the_flight_recorder_names_the_operation_and_the_other_end(group):
    if group.size == 1:
        pytest.skip("needs ranks")
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    pending = group.send_start(np.zeros(3), right, tag=5)
    group.receive(np.zeros(3), left, tag=5)
    pending.wait()
    group.all_reduce(np.zeros(1), "max")
    assert [call.operation for call in list(JOURNAL.calls)[-3:]] == [f"send to {right}", f"receive from {left}", "all_reduce max"]


class Broken:
    """A communicator that never gets to work."""
    def Get_rank(self):
        return 0

    def Get_size(self):
        return 2

    def Bcast(self, part, root):
        raise RuntimeError("the network is down")


@pytest.mark.ranks
def test_the_flight_recorder_enters_a_call_before_it_starts(group):
    if group.size == 1:
        pytest.skip("needs ranks")
    with pytest.raises(RuntimeError):
        Group(Broken(), "broken").broadcast(np.zeros(3))
    assert "broadcast over broken [3] float64: not finished" in JOURNAL.last_calls(1)[0]


def test_the_flight_recorder_forgets_the_oldest():
    journal = Journal()
    for _ in range(RECORD_LENGTH + 10):
        journal.enter(Solo(), "nothing", None, 0)
    assert len(journal.calls) == RECORD_LENGTH
    assert (journal.calls[0].number, journal.calls[-1].number) == (11, RECORD_LENGTH + 10)
    assert len(journal.last_calls()) == 8 and journal.last_calls(1)[0].startswith(f"#{RECORD_LENGTH + 10} nothing over one rank [] ")


@pytest.mark.ranks
def test_the_ledger_counts_calls_and_bytes_that_a_rank_sends(group):
    """Bytes of the direct or ring forms (Thakur et al. 2005), elements that stay at home left out."""
    if group.size == 1:
        pytest.skip("needs ranks")
    ranks, p, x = Group(group.handle, "ledger"), group.size, np.zeros(12, np.float32)
    right, left = (group.rank + 1) % p, (group.rank - 1) % p
    before = JOURNAL.snapshot()
    for _ in range(2):
        ranks.all_reduce(x)                                                     # 48 bytes: 2 (p - 1) / p of them
    ranks.all_reduce_start(x).wait()
    ranks.reduce_scatter(np.zeros(2 * p), [2] * p)                              # the parts of the others
    ranks.all_gather(np.zeros(3 * p), [3] * p)                                  # the own part to all others
    ranks.all_gather_start(np.zeros(3 * p), ranges_of([3] * p)).wait()
    ranks.all_to_all(np.zeros(5 * p), [5] * p, [5] * p, np.zeros(5 * p))
    ranks.broadcast(x)
    ranks.shift_start(x, x.copy()).wait()
    pending = ranks.send_start(x, right)
    ranks.receive(x.copy(), left)
    pending.wait()
    ranks.barrier()
    expected = {"all_reduce": Traffic(3, 3 * (2 * (p - 1) * 48 // p)), "reduce_scatter": Traffic(1, 16 * (p - 1)),
                "all_gather": Traffic(2, 2 * 24 * (p - 1)), "all_to_all": Traffic(1, 40 * (p - 1)),
                "broadcast": Traffic(1, 48 if group.rank == 0 else 0), "shift": Traffic(1, 48), "send": Traffic(1, 48),
                "receive": Traffic(1, 0), "barrier": Traffic(1, 0)}
    assert JOURNAL.since(before) == {("ledger", operation): entry for operation, entry in expected.items()}


@pytest.mark.ranks
def test_what_is_sent_is_what_is_received(group):
    """Over all ranks: a gather and a reduce-scatter send each element of the whole to, or from, p - 1 ranks."""
    if group.size == 1:
        pytest.skip("needs ranks")
    ranks, counts = Group(group.handle, "uneven"), [rank * rank for rank in range(group.size)]
    before = JOURNAL.snapshot()
    ranks.reduce_scatter(np.zeros(sum(counts)), counts)
    ranks.all_gather(np.zeros(sum(counts)), counts)
    found = JOURNAL.since(before)
    for operation in ("reduce_scatter", "all_gather"):
        assert sum(group.collect(found["uneven", operation].bytes)) == 8 * (group.size - 1) * sum(counts)


def test_since_tells_what_came_after_a_snapshot_only():
    journal, group = Journal(), Solo()
    journal.enter(group, "shift", None, 5)
    before = journal.snapshot()
    assert journal.since(before) == {} and journal.since({}) == {("one rank", "shift"): Traffic(1, 5)}
    journal.enter(group, "shift", None, 7)
    journal.enter(group, "barrier", None, 0)
    assert journal.since(before) == {("one rank", "shift"): Traffic(1, 7), ("one rank", "barrier"): Traffic(1, 0)}
    assert before == {("one rank", "shift"): (1, 5)}            # what is handed out is not changed later


def test_the_ledger_as_a_table():
    traffic = {("tp", "all_reduce"): Traffic(48, 6_000_000), ("dp", "reduce_scatter"): Traffic(2, 1_234_567)}
    assert ledger_table(traffic, steps=2) == [
        "axis  operation       calls/step  MB sent/step",
        "dp    reduce_scatter           1        0.6173",
        "tp    all_reduce              24             3"]
    assert ledger_table({}) == ["axis  operation  calls/step  MB sent/step"]
