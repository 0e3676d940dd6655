"""The learning rate of every step, against values worked out by hand."""

import itertools

import pytest

from mpillm.config import Optimizer
from mpillm.train.rates import rate_of


def config(schedule="cosine", warmup=0, final=0.1, decay=0.2):
    return Optimizer(rate=1.0, rate_schedule=schedule, warmup=warmup, final_rate_share=final, decay_share=decay)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_then_decay"])
def test_warm_up_is_a_line_to_the_peak(schedule):
    rates = [rate_of(config(schedule, warmup=4), step, 100) for step in range(1, 5)]
    assert rates == [0.25, 0.5, 0.75, 1.0]


def test_cosine():
    rates = [rate_of(config(warmup=10), step, 110) for step in (10, 35, 60, 85, 110)]
    assert rates == pytest.approx([1.0, 0.1 + 0.9 * 0.8535533905932737, 0.55, 0.1 + 0.9 * 0.14644660940672624, 0.1], rel=1e-14)


def test_linear():
    assert [rate_of(config("linear", warmup=10), step, 110) for step in (10, 35, 60, 110)] == pytest.approx([1.0, 0.775, 0.55, 0.1], rel=1e-14)


def test_constant_then_decay():
    rates = [rate_of(config("constant_then_decay", warmup=5), step, 100) for step in (6, 50, 80, 85, 90, 100)]
    assert rates == pytest.approx([1.0, 1.0, 1.0, 0.775, 0.55, 0.1], rel=1e-14)
    assert [rate_of(config("constant_then_decay", decay=0.0), step, 10) for step in (1, 10)] == [1.0, 1.0]


@pytest.mark.parametrize("schedule, final", list(itertools.product(["cosine", "linear", "constant_then_decay"], [0.0, 0.1, 1.0])))
def test_the_rate_rises_once_and_then_never_again(schedule, final):
    for warmup, steps in itertools.product((0, 1, 3), (1, 2, 10, 37)):
        rates = [rate_of(config(schedule, warmup, final), step, steps) for step in range(1, steps + 1)]
        top = rates.index(max(rates))
        assert rates[:top + 1] == sorted(rates[:top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
        assert all(min(final, 1 / (warmup or 1)) - 1e-15 <= rate <= 1.0 for rate in rates)
        if steps > warmup:
            assert rates[-1] == pytest.approx(final, abs=1e-15)


def test_the_end_of_a_run_that_is_all_warm_up_and_steps_past_the_end():
    assert rate_of(config(warmup=10), 5, 5) == 0.5
    for schedule in ("cosine", "linear"):
        assert rate_of(config(schedule), 12, 10) == pytest.approx(0.1)
    assert rate_of(config(warmup=10), 10, 10) == 1.0
