"""Pipeline schedules: whole, free of deadlock, with the peaks and bubbles of their papers, and wrong ones named."""

import itertools
import random
import re
from fractions import Fraction

import pytest

from mpillm.train.schedule import (SCHEDULES, Action, check, execution_order, forward_only, gpipe, interleaved, make_schedule, one_f_one_b,
                                   simulate, table, zero_bubble)

CHUNKS = {"gpipe": (1,), "1f1b": (1,), "interleaved": (2, 3), "zero_bubble": (1,)}
SIZES = list(itertools.product(range(1, 7), range(1, 10)))  # stages, micro-batches
DURATIONS = [(1, 1, 1), (2, 3, 1), (5, 1, 1), (1, 5, 2), (1, 2, 4)]     # of F, I, W


def every(name):
    return [make_schedule(name, stages, microbatches, chunks) for stages, microbatches in SIZES for chunks in CHUNKS[name]]


def completes(schedule, seed, in_order):
    """A second opinion on deadlocks: synchronous sends, posted at once and waited for at the end; stages advance by chance.

    in_order: a receive takes only the oldest message of its channel, as if there were no tags.
    """
    chance, position = random.Random(seed), [0] * schedule.stages
    channels = {pair: [] for pair in itertools.product(range(schedule.stages), repeat=2)}     # sends not yet received

    def can_advance(stage):
        if position[stage] == len(schedule.actions[stage]):
            return False
        message = schedule.receives(stage, schedule.actions[stage][position[stage]])
        return message is None or message in channels[message.source, stage][:1 if in_order else None]

    while able := [stage for stage in range(schedule.stages) if can_advance(stage)]:
        stage = chance.choice(able)
        action = schedule.actions[stage][position[stage]]
        incoming, outgoing = schedule.receives(stage, action), schedule.sends(stage, action)
        if incoming:
            channels[incoming.source, stage].remove(incoming)
        if outgoing:
            channels[stage, outgoing.target].append(outgoing)
        position[stage] += 1
    return position == [len(actions) for actions in schedule.actions] and not any(channels.values())


def backward_after_forward(schedule):
    """Whether every backward part stands after the forward, and W after I, in a stage's list."""
    return all(actions.index(earlier) < actions.index(later) for actions in schedule.actions
               for earlier, later in itertools.permutations(actions, 2)
               if earlier[1:] == later[1:] and "FBIW".index(earlier.kind) < "FBIW".index(later.kind))


def swapped(schedule, stage, first, second):
    """The schedule with two actions of a stage, by position, in each other's place."""
    actions = [list(row) for row in schedule.actions]
    actions[stage][first], actions[stage][second] = actions[stage][second], actions[stage][first]
    return schedule._replace(actions=actions)


def bubble(schedule, forward, backward_input, backward_weight):
    """Time of the step beyond the work of a stage, in the unit of the durations."""
    work = schedule.microbatches * schedule.chunks * (forward + backward_input + backward_weight)
    return simulate(schedule, forward, backward_input, backward_weight).total - work


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_size_is_whole_and_runs(name):
    for schedule in every(name):
        report = check(schedule)
        assert report.overtaking == ()
        assert report.num_messages == 2 * schedule.microbatches * (schedule.stages * schedule.chunks - 1)
        assert completes(schedule, seed=schedule.microbatches, in_order=True)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_chunk_sees_the_micro_batches_in_order(name):
    """So the sum of the weight gradients has the same order of terms under every schedule."""
    for schedule in every(name):
        for actions, kind, chunk in itertools.product(schedule.actions, "FBIW", range(schedule.chunks)):
            seen = [action.microbatch for action in actions if (action.kind, action.chunk) == (kind, chunk)]
            assert seen in ([], list(range(schedule.microbatches)))


def test_forward_only():
    for (stages, microbatches), chunks in itertools.product(SIZES, (1, 2, 3)):
        schedule = forward_only(stages, microbatches, chunks)
        report = check(schedule)
        assert report.peak == (0,) * stages and report.overtaking == () and completes(schedule, 1, in_order=True)
        if microbatches % stages == 0:
            assert simulate(schedule, 1, 0, 0).total == microbatches * chunks + stages - 1


@pytest.mark.parametrize("stages, microbatches", SIZES)
def test_peaks(stages, microbatches):
    one_at_a_time = tuple(min(stages - stage, microbatches) for stage in range(stages))
    assert check(gpipe(stages, microbatches)).peak == (microbatches,) * stages
    assert check(one_f_one_b(stages, microbatches)).peak == one_at_a_time
    report = check(zero_bubble(stages, microbatches))
    assert report.peak == (min(stages, microbatches),) * stages
    assert report.peak_before_input == one_at_a_time


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_peaks_of_interleaved(chunks):
    for stages, microbatches in SIZES:
        most = [min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, microbatches * chunks) for stage in range(stages)]
        peak = check(interleaved(stages, microbatches, chunks)).peak
        assert all(found <= bound for found, bound in zip(peak, most))
        if microbatches % stages == 0:
            assert list(peak) == most
    for stages in range(1, 7):  # of a stage's whole activations: S (1 + (S - 1) / (S v)), Narayanan et al. 2021 and Korthikanti et al. 2022
        peak = check(interleaved(stages, 4 * stages, chunks)).peak[0]
        assert Fraction(peak, chunks) == stages * (1 + Fraction(stages - 1, stages * chunks))


@pytest.mark.parametrize("forward, backward_input, backward_weight", DURATIONS)
def test_bubbles_of_gpipe_and_1f1b_and_interleaved(forward, backward_input, backward_weight):
    """(S - 1) / M of the work, and (S - 1) / (v M) interleaved: S - 1 times F and B of one chunk."""
    times = (forward, backward_input, backward_weight)
    for stages, microbatches in SIZES:
        lost = (stages - 1) * sum(times)
        assert bubble(gpipe(stages, microbatches), *times) == bubble(one_f_one_b(stages, microbatches), *times) == lost
        for chunks in CHUNKS["interleaved"]:
            found = bubble(interleaved(stages, microbatches, chunks), *times)
            assert found == lost if microbatches % stages == 0 else lost <= found <= lost * chunks    # never beyond that of 1F1B


def test_bubble_of_zero_bubble():
    """(S - 1) / (3 M) of the work at equal times, one unit more for each micro-batch below S; (S - 1) max(F, I, F + I - W) at others."""
    for stages, microbatches in SIZES:
        zero, plain = (bubble(make(stages, microbatches), 1, 1, 1) for make in (zero_bubble, one_f_one_b))
        assert zero == (stages - 1) + max(0, stages - microbatches)
        if microbatches >= stages:
            work = 3 * microbatches
            assert Fraction(plain - zero, work) == Fraction(stages - 1, microbatches) - Fraction(stages - 1, 3 * microbatches)
            for forward, inputs, weights in DURATIONS:
                lost = (stages - 1) * max(forward, inputs, forward + inputs - weights)
                assert bubble(zero_bubble(stages, microbatches), forward, inputs, weights) == lost


def test_idle_shares_and_times():
    timeline = simulate(one_f_one_b(2, 2), 1.0, 1.5, 0.5, transfer=0.25)
    assert [(str(action), start, end) for action, start, end in timeline.times[0]] == [
        ("F0", 0.0, 1.0), ("F1", 1.0, 2.0), ("B0", 4.5, 6.5), ("B1", 7.5, 9.5)]
    assert [(str(action), start, end) for action, start, end in timeline.times[1]] == [
        ("F0", 1.25, 2.25), ("B0", 2.25, 4.25), ("F1", 4.25, 5.25), ("B1", 5.25, 7.25)]
    assert timeline.total == 9.5 and timeline.idle == pytest.approx((3.5 / 9.5,) * 2)
    assert simulate(one_f_one_b(4, 8), 1, 1, 1).idle == pytest.approx((3 / 11,) * 4)
    assert simulate(interleaved(1, 3, 2), 1, 1, 1, transfer=100).idle == (0,)      # nothing leaves the only stage


def test_messages_between_virtual_stages():
    schedule = interleaved(2, 2, 2)
    assert schedule.receives(0, Action("F", 1, 0)) is None and schedule.sends(1, Action("F", 1, 1)) is None
    assert schedule.receives(1, Action("B", 1, 1)) is None and schedule.sends(0, Action("B", 1, 0)) is None
    assert schedule.sends(1, Action("F", 1, 0)) == schedule.receives(0, Action("F", 1, 1)) == ("F", 1, 1, 1, 0)
    assert schedule.sends(0, Action("B", 1, 1)) == schedule.receives(1, Action("B", 1, 0)) == ("B", 1, 0, 0, 1)
    split = zero_bubble(2, 1)
    assert split.sends(1, Action("I", 0)) == split.receives(0, Action("I", 0)) == split.receives(0, Action("B", 0)) == ("B", 0, 0, 1, 0)
    assert split.sends(1, Action("W", 0)) is split.receives(0, Action("W", 0)) is None


def test_the_execution_order_keeps_each_stage_in_its_order():
    schedule = zero_bubble(3, 4)
    order = list(execution_order(schedule))
    assert [[action for stage, action, _, _ in order if stage == wanted] for wanted in range(3)] == schedule.actions


def test_names_of_actions():
    assert [str(Action("F", 3)), str(Action("B", 0)), str(Action("F", 3, 1))] == ["F3", "B0", "F3.1"]


def test_tables():
    assert table(one_f_one_b(4, 8)) == (
        "stage 0  F0 F1 F2 F3  .  .  .  .  .  . B0 -- F4 B1 -- F5 B2 -- F6 B3 -- F7 B4 --  . B5 --  . B6 --  . B7 --\n"
        "stage 1   . F0 F1 F2  .  .  .  . B0 -- F3 B1 -- F4 B2 -- F5 B3 -- F6 B4 -- F7 B5 --  . B6 --  . B7 --  .  .\n"
        "stage 2   .  . F0 F1  .  . B0 -- F2 B1 -- F3 B2 -- F4 B3 -- F5 B4 -- F6 B5 -- F7 B6 --  . B7 --  .  .  .  .\n"
        "stage 3   .  .  . F0 B0 -- F1 B1 -- F2 B2 -- F3 B3 -- F4 B4 -- F5 B5 -- F6 B6 -- F7 B7 --  .  .  .  .  .  .")
    assert table(zero_bubble(3, 4)) == (
        "stage 0  F0 F1 F2  .  . I0 W0 F3 I1 W1 I2 W2 I3 W3\n"
        "stage 1   . F0 F1  . I0 F2 I1 W0 F3 I2 W1 I3 W2 W3\n"
        "stage 2   .  . F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3")
    assert table(gpipe(2, 2)) == (
        "stage 0  F0 F1  .  .  . B0 -- B1 --\n"
        "stage 1   . F0 F1 B0 -- B1 --  .  .")
    assert table(interleaved(2, 2, 2), width=50) == (
        "stage 0    F0   F1 F0.1 F1.1    .    . B0.1 ----\n"
        "stage 1     .   F0   F1 F0.1 B0.1 ---- F1.1 B1.1\n"
        "\n"
        "stage 0     . B1.1 ----   B0   --   B1   --\n"
        "stage 1  ----   B0   --   B1   --    .    .")
    assert table(forward_only(2, 2)) == "stage 0  F0 F1  .\nstage 1   . F0 F1"


@pytest.mark.parametrize("width", [20, 80, 120])
def test_folded_tables_keep_to_the_width_and_lose_nothing(width):
    schedule = interleaved(4, 24, 3)
    lines = [line for line in table(schedule, width).splitlines() if line]
    assert max(map(len, lines)) <= width
    for stage, actions in enumerate(schedule.actions):
        shown = " ".join(line for line in lines if line.startswith(f"stage {stage}"))
        assert re.findall(r"[FB][\d.]+", shown) == [str(action) for action in actions]


def test_a_deadlock_is_named():
    late = swapped(one_f_one_b(2, 3), 1, 1, 4)          # F0 B0 F1 B1 F2 B2 -> F0 F2 F1 B1 B0 B2
    for work in (check, table):
        with pytest.raises(ValueError, match="^stage 0 waits in B0 for stage 1, which waits in F2 for stage 0$"):
            work(late)
    circle = "stage 0 waits in F0.1 for stage 2, which waits in F0.1 for stage 1, which waits in F0.1 for stage 0"
    with pytest.raises(ValueError, match=f"^{circle}$"):
        check(forward_only(3, 1, 2)._replace(actions=[[Action("F", 0, 1), Action("F", 0)]] * 3))
    with pytest.raises(ValueError, match="^stage 0 waits in F0.1 for stage 0$"):
        check(swapped(forward_only(1, 1, 2), 0, 0, 1))


@pytest.mark.parametrize("schedule, change, message", [
    (one_f_one_b(3, 4), lambda rows: rows[1].remove(Action("F", 3)), "stage 1 never does F3, for which stage 2 waits"),
    (one_f_one_b(3, 4), lambda rows: rows[1].remove(Action("B", 2)), "stage 1 never does B2, for which stage 0 waits"),
    (zero_bubble(3, 4), lambda rows: rows[1].remove(Action("I", 2)), "stage 1 never does I2, for which stage 0 waits"),
    (zero_bubble(3, 4), lambda rows: rows[1].remove(Action("W", 2)), "stage 1 never does W2"),
    (one_f_one_b(3, 4), lambda rows: rows[0].append(Action("B", 1)), "stage 0 does B1 twice"),
    (one_f_one_b(3, 4), lambda rows: rows[0].append(Action("F", 4)), "stage 0 does F4, which is no part of the step"),
    (one_f_one_b(3, 4), lambda rows: rows[0].append(Action("W", 1)), "stage 0 never does I1"),
    (one_f_one_b(3, 4), lambda rows: rows[2].sort(), "stage 2 does B0 before its own F0"),
    (zero_bubble(3, 4), lambda rows: rows[0].sort(key=lambda action: "FWI".index(action.kind)), "stage 0 does W0 before its own I0"),
    (forward_only(3, 4), lambda rows: rows[0].append(Action("B", 0)), "stage 0 does B0, which is no part of the step"),
    (one_f_one_b(3, 4), lambda rows: rows.pop(), "schedule 1f1b has 3 stages and lists for 2"),
])
def test_work_left_out_or_done_twice_is_named(schedule, change, message):
    rows = [list(row) for row in schedule.actions]
    change(rows)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check(schedule._replace(actions=rows))


def test_a_stage_that_waits_for_what_is_never_sent_is_named():
    schedule = one_f_one_b(2, 2)
    with pytest.raises(ValueError, match="^stage 1 waits in F0 for stage 0, which never sends it$"):
        simulate(schedule._replace(actions=[[], schedule.actions[1]]), 1, 1, 1)


def test_messages_that_overtake_are_reported():
    late = swapped(one_f_one_b(2, 4), 0, 0, 1)          # F1 is sent before F0
    assert check(late).overtaking == ((0, 1),)
    assert completes(late, 1, in_order=False) and not completes(late, 1, in_order=True)


@pytest.mark.parametrize("schedule", [gpipe(3, 3), one_f_one_b(3, 4), interleaved(2, 3, 2), zero_bubble(3, 4)], ids=lambda it: it.name)
def test_every_swap_of_two_actions_is_judged_as_the_second_opinion_does(schedule):
    verdicts = []
    for stage, actions in enumerate(schedule.actions):
        for first, second in itertools.combinations(range(len(actions)), 2):
            changed = swapped(schedule, stage, first, second)
            runs = backward_after_forward(changed) and completes(changed, first, in_order=False)
            try:
                overtaking = check(changed).overtaking
            except ValueError as error:
                assert not runs and str(error).startswith("stage ")
            else:
                assert runs and completes(changed, second, in_order=True) == (overtaking == ())
            verdicts.append(runs)
    assert any(verdicts) and not all(verdicts)


@pytest.mark.parametrize("arguments, message", [
    (("dualpipe", 2, 2), "schedule dualpipe is unknown; use one of gpipe, 1f1b, interleaved, zero_bubble"),
    (("1f1b", 2, 2, 3), "schedule 1f1b has 1 chunk a stage, not 3; use chunks = 1 or schedule interleaved"),
    (("interleaved", 2, 2), "schedule interleaved needs 2 or more chunks a stage, not 1; use schedule 1f1b for 1"),
    (("interleaved", 0, 2, 2), "schedule interleaved: stages 0 is below 1"),
    (("gpipe", 0, 2), "schedule gpipe: stages 0 is below 1"),
    (("zero_bubble", 2, 0), "schedule zero_bubble: microbatches 0 is below 1"),
])
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_schedule(*arguments)
