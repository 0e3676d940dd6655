"""Who is named when ranks stand still: from where each rank stands to the line of the report; and when it is an alarm at all."""

import pytest

from mpillm.run import hang
from mpillm.run.monitor import innermost
from mpillm.run.stragglers import AGAIN, Stragglers
from mpillm.run.watchdog import FACTOR, LEAST, PATIENCE, UNKNOWN, Limits


def at(rank, phase="reduce", call=None, **values):
    return {"rank": rank, "host": f"n{rank // 4}", "stopped": False, "gone": False, "quiet": 3.0, "phase": phase, "step": 410, "site": "step.py:1",
            "place": "", "call": call} | values


def waits(operation="reduce_scatter", turn=8812, group="dp", subject="blocks.7"):
    return {"operation": operation, "turn": turn, "group": group, "subject": subject}


def test_the_rank_that_does_not_wait_is_to_blame():
    ranks = [at(rank, call=waits()) for rank in range(64)]
    ranks[37] = at(37, "data", place="corpus.py:88")
    assert hang.culprits(ranks) == [37]
    assert hang.summary(ranks, 64) == ("rank 37 (node n9) is in step 410, reading data, corpus.py:88; "
                                       "63 ranks wait in reduce_scatter 8812 over dp, blocks.7")


@pytest.mark.parametrize("state, words", [("stopped", "is stopped by a signal"), ("gone", "its process ended")])
def test_a_rank_that_is_stopped_or_gone_is_to_blame_though_it_seems_to_wait(state, words):
    ranks = [at(rank, call=waits()) for rank in range(4)]
    ranks[2][state] = True
    ranks.append(at(4, "forward"))      # busy: what keeps the others from noticing that one is gone
    assert hang.culprits(ranks) == ([2] if state == "stopped" else [2, 4]) and words in hang.summary(ranks, 5)


def test_ranks_that_meet_after_a_death_wait_for_the_living():
    """MPI bears that a rank is gone; also where it counts fewer turns than the others."""
    meets = waits(operation="agree", turn=7)
    ranks = [at(0, "meet", call=meets), at(1, "forward"), at(2, "reduce"), at(3, "meet", call=meets | {"turn": 9})]
    ranks[1]["stopped"] = ranks[2]["gone"] = True
    assert hang.culprits(ranks) == [1]
    line = hang.summary(ranks, 4)
    assert line.startswith("rank 1 (node n0) is stopped") and "; rank 2 is no more; " in line and "rank 2 wait" not in line
    ranks[1] |= {"call": waits(), "stopped": False}
    assert hang.culprits(ranks) == [1]


def test_where_all_wait_the_one_behind_is_to_blame():
    ranks = [at(0, call=waits(turn=9)), at(1, call=waits(turn=8)), at(2, call=waits(turn=9))]
    assert hang.culprits(ranks) == [1]
    crossed = [at(0, call=waits("receive from 1", 0, "pp", "")), at(1, call=waits("receive from 0", 0, "pp", ""))]
    assert hang.culprits(crossed) == []
    assert "rank 0 waits in receive from 1 over pp" in hang.summary(crossed, 2)


def test_all_busy_names_nobody_and_one_rank_alone_names_itself():
    assert hang.culprits([at(0, "save"), at(1, "save")]) == []
    assert hang.summary([at(0, "save"), at(1, "save")], 2) == "ranks 0-1 wait in saving a checkpoint"
    assert hang.culprits([at(0, "save")]) == [0]


def test_a_node_that_gives_no_word_is_said_first():
    text = hang.summary([at(rank, call=waits()) for rank in range(4)], 8)
    assert text.startswith("no word from the node of ranks 4-7; ranks 0-3 wait in reduce_scatter 8812")


def test_many_culprits_are_told_shortly():
    ranks = [at(rank, "data") for rank in range(10)] + [at(10, call=waits())]
    text = hang.summary(ranks, 11)
    assert "so are 6 more: 4-9" in text and text.count("reading data") == 4
    assert hang.ranges_text([5, 0, 1, 2, 9, 8]) == "0-2, 5, 8-9"


def test_the_report_has_a_line_for_each_rank():
    lines = hang.report([at(0, call=waits()), at(1, "data")], 2, 61.7, "runs/x/hang-1")
    assert lines[0].startswith("no progress for 62 s: rank 1 ") and sum("quiet for 3.0 s" in line for line in lines) == 2
    assert "phases: reduce 1, data 1" in lines and lines[-1].endswith("runs/x/hang-1")


def test_the_innermost_line_of_mpillm_is_found_in_a_stack():
    stack = ('Thread 0x1 (most recent call first):\n  File "/a/mpillm/run/signals.py", line 5 in listen\n\n'
             'Current thread 0x2 (most recent call first):\n  File "/usr/lib/python3.11/threading.py", line 1 in wait\n'
             '  File "/a/mpillm/text/corpus.py", line 88 in read\n  File "/a/mpillm/run/training.py", line 7 in run\n')
    assert innermost(stack) == "corpus.py:88" and innermost("") == ""


# ---- how long a rank may be without progress ------------------------------------------------------------------------

def walk(limits, phases, now=0.0):
    """Enters phases of (name, seconds); the limits that were given."""
    found = []
    for name, seconds in phases:
        found.append(limits.enter(name, now))
        now += seconds
    return found, now


STEP = [("data", 1), ("forward", 20), ("reduce", 4), ("between", 0)]


def test_limits_are_learned_from_the_steps():
    limits = Limits(None)
    found, now = walk(limits, [("load", 100), *STEP, *STEP])
    assert set(found) == {UNKNOWN}
    _, now = walk(limits, STEP, now)
    assert limits.of("forward") == FACTOR * 25 and limits.of("save") == UNKNOWN
    _, now = walk(limits, [("save", 300), *STEP], now)
    assert limits.of("save") == FACTOR * 300 and limits.of("evaluate") == UNKNOWN and limits.of("load") == PATIENCE * LEAST
    assert limits.of("forward") == FACTOR * 25       # the save between two steps is no step


def test_ranks_that_meet_wait_as_long_as_for_what_was_cut_short():
    limits = Limits(None)
    found, now = walk(limits, [*STEP, *STEP, *STEP, ("save", 10), ("meet", 1)])
    assert found[-1] == UNKNOWN and limits.of("save") == UNKNOWN        # of which nobody knows how long it takes
    found, _ = walk(limits, [*STEP, ("save", 300), ("between", 0), ("forward", 1), ("meet", 1)], now)
    assert found[-1] == limits.of("forward")


def test_a_limit_of_the_user_holds_in_steps_and_leaves_slow_parts_ten_times_as_long():
    limits = Limits(3.0)
    found, now = walk(limits, [("load", 1), *STEP])
    assert set(found) == {30.0}
    _, now = walk(limits, [*STEP, *STEP, ("save", 1), ("between", 0)], now)
    assert limits.of("forward") == 3.0 and limits.of("save") == 30.0
    walk(limits, [("save", 20), ("between", 0)], now)
    assert limits.of("save") == 100.0


# ---- slow ranks -----------------------------------------------------------------------------------------------------

def test_a_slow_rank_is_named_once_and_only_among_its_equals():
    stragglers = Stragglers([0, 0, 1, 1])
    for turn in range(AGAIN + 2):
        ratios, named = stragglers.judge([1.0, 1.0, 3.0, 6.0])       # the second stage has more to do
        assert named == ([3] if turn == AGAIN - 1 else [])
    assert ratios == [1.0, 1.0, 0.5, 2.0]


def test_a_rank_without_an_equal_is_compared_with_itself():
    stragglers = Stragglers([0, 1])
    for _ in range(5):
        assert stragglers.judge([1.0, 3.0])[1] == []
    named = [stragglers.judge([1.0, 6.0])[1] for _ in range(AGAIN)]
    assert named == [[]] * (AGAIN - 1) + [[1]]


def test_noise_and_tiny_times_name_nobody():
    stragglers = Stragglers([0, 0])
    for turn in range(12):      # one comparison now and then is noise
        assert stragglers.judge([1.0, 2.0 if turn % 3 == 0 else 1.0])[1] == []
        assert stragglers.judge([1e-4, 9e-4])[1] == []
