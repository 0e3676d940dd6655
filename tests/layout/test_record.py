"""The flight recorder in shared memory: what one process writes another one reads, as it stands."""

import subprocess
import sys

import numpy as np
import pytest

from mpillm.layout.comm import Solo
from mpillm.layout.journal import Journal
from mpillm.layout.record import ENTRIES, Record


@pytest.fixture
def journal():
    journal = Journal()
    journal.record = Record()
    yield journal
    journal.record.unlink()


def test_phase_step_and_place_are_seen(journal):
    journal.phase("data", 410)
    state = Record(journal.record.path).state()
    assert (state.phase, state.step, state.waits, state.limit) == ("data", 410, 0, 0.0)
    assert state.site.startswith("test_record.py:") and state.count == 1 and state.marked > 0


def test_a_call_is_waited_for_until_it_is_done_or_goes_on_by_itself(journal):
    journal.subject = "blocks.7"
    call = journal.enter(Solo(), "reduce_scatter", np.zeros(3), 24)
    seen = Record(journal.record.path)
    entry = seen.entry(seen.state().waits)
    assert (entry.operation, entry.group, entry.subject, entry.bytes, entry.turn, entry.seconds) == ("reduce_scatter", "one rank", "blocks.7", 24, 1, -1)
    assert entry.site.startswith("test_record.py:")
    call.begun()
    assert seen.state().waits == 0
    call.waits()
    assert seen.state().waits == call.number
    call.done()
    assert seen.state().waits == 0 and seen.entry(call.number).seconds == call.seconds
    journal.enter(Solo(), "barrier", None, 0)
    assert seen.entry(2).subject == ""


def test_waiting_is_counted_and_any_mark_is_progress(journal):
    call = journal.enter(Solo(), "all_reduce", np.zeros(1), 8)
    count = journal.record.state().count
    call.waits()
    assert journal.record.state().count == count
    call.done()
    journal.progress()
    assert journal.record.state().count == count + 2 and 0 < journal.waited < 5


def test_messages_have_no_turn_and_old_calls_are_forgotten(journal):
    for _ in range(ENTRIES + 3):
        journal.enter(Solo(), "send", np.zeros(1), 8, 5, "to 3").done()
    found = journal.record.entries()
    assert len(found) == ENTRIES and found[0].number == 4 and found[-1].number == ENTRIES + 3
    assert found[-1].operation == "send to 3" and found[-1].turn == 0 and journal.record.entry(1) is None


def test_another_process_reads_it_even_without_its_name(journal):
    journal.phase("save", 7)
    program = f"from mpillm.layout.record import Record; r = Record({journal.record.path!r}); r.unlink(); print(r.state().phase, r.state().step)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "save 7\n"
    journal.phase("data", 8)        # the writer goes on
    assert journal.record.state().step == 8


def test_long_names_are_cut(journal):
    journal.subject = "x" * 100
    journal.enter(Solo(), "y" * 100, None, 0)
    entry, = journal.record.entries()
    assert entry.subject == "x" * 32 and entry.operation == "y" * 48
