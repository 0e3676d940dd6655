"""When a loss is a spike."""

import math
import random

from mpillm.run.spikes import LEAST, WINDOW, Spikes


def fed(deviations, losses):
    spikes = Spikes(deviations)
    return [place for place, loss in enumerate(losses) if spikes.is_one(loss)], spikes


def test_a_falling_noisy_curve_has_none_and_a_jump_is_one():
    draw = random.Random(1)
    curve = [3 + 2 * math.exp(-step / 50) + draw.gauss(0, 0.03) for step in range(400)]
    assert fed(6.0, curve)[0] == []
    curve[200] += 2.0
    assert fed(6.0, curve)[0] == [200]


def test_nothing_is_one_while_too_few_are_known_or_where_it_is_off():
    assert fed(6.0, [1.0] * (LEAST - 1) + [50.0])[0] == [] and fed(6.0, [1.0] * LEAST + [50.0])[0] == [LEAST]
    assert fed(0.0, [1.0] * 200 + [1e9])[0] == []


def test_a_flat_curve_allows_for_noise():
    assert fed(3.0, [4.0] * 50 + [4.01])[0] == [] and fed(3.0, [4.0] * 50 + [4.1])[0] == [50]


def test_a_spike_and_what_is_not_finite_do_not_count_as_usual():
    found, spikes = fed(5.0, [1.0, 1.1] * 30 + [9.0, math.nan, math.inf, 9.0])
    assert found == [60, 63] and len(spikes.losses) == 60
    spikes.forget()
    assert not spikes.is_one(9.0)


def test_a_resume_knows_what_is_usual():
    curve = [1.0, 1.1] * 12 + [9.0]
    before, after = fed(5.0, curve[:22])[1], Spikes(5.0)
    after.resume(list(before.losses))
    assert after.threshold() == before.threshold() and after.is_one(9.0)
    for foreign in (None, {}, ["1"], [math.nan]):
        spikes = Spikes(5.0)
        spikes.resume(foreign)
        assert spikes.threshold() == math.inf


def test_the_window_is_bounded():
    assert fed(5.0, [1.0] * 300)[1].losses.maxlen == WINDOW
