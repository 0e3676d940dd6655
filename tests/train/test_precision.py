"""Training with 16-bit floats: it follows float32, masters are kept, the loss scale moves; on any layout."""

import numpy as np
import pytest

from mpillm.backend import open_backend
from mpillm.run.session import TYPES
from mpillm.train.scaling import FIRST, PATIENCE, LossScale
from small_jobs import CONTEXT, VOCABULARY, Source, job_of, steps_of, trainer_of, worst_gradient, worst_of_all

HALVES = {"bfloat16": 2.0**-8, "float16": 2.0**-11}     # spacing of numbers, relative


def job_in(compute, **sections):
    return job_of(precision={"compute": compute}, **sections)


def trainer_in(compute, group=None, **sections):
    return trainer_of(job_in(compute, **sections), group, open_backend("cpu", dtype=TYPES[compute]))


class Chain:
    """Every sample anew: half of the tokens follow from the one before, half are random, so that something is learnt but not all."""

    def samples(self, first, count):
        tokens = np.zeros((count, CONTEXT + 1), np.int64)
        for row, number in zip(tokens, range(first, first + count)):
            random = np.random.default_rng(number)
            for position in range(1, CONTEXT + 1):
                row[position] = (7 * row[position - 1] + 3) % VOCABULARY if random.random() < 0.5 else random.integers(VOCABULARY)
        return tokens[:, :-1], tokens[:, 1:], np.ones((count, CONTEXT))


def losses(trainer, count):
    batch = trainer.job.train.batch
    return [trainer.train_step(step, Chain(), step * batch).loss for step in range(1, count + 1)]


@pytest.mark.parametrize("compute", HALVES)
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_200_steps_follow_float32_within_a_percent(compute, family):
    sections = {"train": {"steps": 200, "batch": 16}, "family": family}
    exact, rounded = [losses(trainer_in(each, **sections), 200) for each in ("float32", compute)]
    assert np.mean(exact[-20:]) < 0.85 * exact[0]
    assert max(abs(a - b) / b for a, b in zip(rounded, exact)) < 0.01
    assert rounded != exact


@pytest.mark.parametrize("compute, spacing", HALVES.items())
def test_what_is_16_bits_wide_and_what_is_not(compute, spacing):
    trainer = trainer_in(compute)
    steps_of(trainer, 2)
    for parameter in trainer.model.parameters():
        assert parameter.value.dtype == TYPES[compute]
        assert parameter.master.dtype == parameter.grad.dtype == parameter.moment1.dtype == np.float32
        np.testing.assert_array_equal(parameter.value, parameter.master.astype(TYPES[compute]), parameter.name)
        if len(parameter.shape) > 1:
            assert (parameter.value.astype(np.float32) != parameter.master).any(), "the master has no more digits than the value"


@pytest.mark.ranks
@pytest.mark.parametrize("compute, spacing", HALVES.items())
@pytest.mark.parametrize("mesh", [{"zero": 0}, {"zero": 1}, {"zero": 2}, {"zero": 3}, {"tp": 2}, {"pp": 2, "zero": 1}, {"cp": 2}], ids=str)
def test_every_layout_gives_the_gradients_of_one_rank_to_the_rounding(group, compute, spacing, mesh):
    if group.size % np.prod([mesh.get(axis, 1) for axis in ("tp", "pp", "cp")]):
        pytest.skip("the layout does not divide the ranks")
    model = {"heads": 4, "width": 16, "kv_heads": 2}
    sections = {"model": model, "train": {"batch": 7, "micro_batch": 2}}
    expected = steps_of(trainer_in(compute, **sections), 1)
    found = steps_of(trainer_in(compute, group, mesh=mesh, **sections), 1)
    worst = worst_of_all(group, worst_gradient(found.gradients[0], expected.gradients[0]))
    assert worst[0] < 20 * spacing, worst
    assert abs(found.losses[0] / expected.losses[0] - 1) < 4 * spacing


def test_a_step_that_overflows_is_skipped_and_halves_the_loss_scale():
    trainer = trainer_in("float16")
    trainer.loss_scale = trainer.loss_scale._replace(scale=2.0**24)
    before = trainer.model.parameters()[2].master.copy()
    result = trainer.train_step(1, Source(), 0)
    assert result.skipped and trainer.loss_scale.scale == 2.0**23
    np.testing.assert_array_equal(trainer.model.parameters()[2].master, before)
    assert np.isfinite(result.loss)


def test_the_loss_scale_changes_no_digit_of_loss_and_gradient():
    results = []
    for scale in (2.0**4, 2.0**9):
        trainer = trainer_in("float32")
        trainer.loss_scale = LossScale(scale, 0, True)
        results.append(steps_of(trainer, 2))
    one, two = results
    assert one.losses == two.losses and one.norms == two.norms
    for name, (_, array) in one.weights.items():
        np.testing.assert_array_equal(array, two.weights[name][1], name)


def test_the_loss_scale_grows_with_patience_and_comes_back_from_a_checkpoint():
    assert LossScale.of(np.dtype(np.float32)) == LossScale.of(TYPES["bfloat16"]) == LossScale(1.0, 0, False)
    scale = LossScale.of(TYPES["float16"])
    assert scale.after(skipped=True).scale == FIRST / 2
    for _ in range(PATIENCE):
        scale = scale.after(skipped=False)
    assert scale == LossScale(2 * FIRST, 0, True)
    assert LossScale.of(TYPES["float16"]).resumed([8.0, 7]) == LossScale(8.0, 7, True)
    assert LossScale.of(TYPES["float16"]).resumed(None).scale == FIRST
    assert LossScale().resumed([8.0, 7]) == LossScale()


@pytest.mark.parametrize("saved, good", [([65536.0, 9], True), ([1, 0], True), ("abc", False), ([8], False), ({"a": 1}, False), ([65536, None], False),
                                         ([3.0, 1], False), ([2.0**30, 1], False), ([8.0, -1], False), ([True, 1], False), ([float("nan"), 1], False)])
def test_the_loss_scale_of_a_checkpoint(saved, good):
    assert LossScale.could_be(saved) == good


def test_a_scale_that_may_still_be_too_large_ends_no_run():
    scale, halvings = LossScale.of("float16"), 0
    while not scale.at_its_end:
        scale, halvings = scale.after(True), halvings + 1
    assert halvings == 16 and scale.after(True) == scale
