"""This world's ranks as data-parallel ranks against one rank: loss, every gradient, weights, on any ZeRO stage."""

import functools

import numpy as np
import pytest

from small_jobs import OPS, Source, job_of, steps_of, trainer_of, worst_gradient, worst_of_all, worst_weight
from mpillm.train.step import validation_loss

pytestmark = pytest.mark.ranks

CASES = {       # sections of the job
    "plain": {},
    "micro-batches": {"train": {"micro_batch": 1}},
    "uneven micro-batches": {"train": {"batch": 11, "micro_batch": 2}},
    "untied": {"model": {"tied": False}, "train": {"micro_batch": 2}},
    "recompute": {"train": {"recompute": "block", "micro_batch": 2}},
    "selective recompute, untied": {"model": {"tied": False}, "train": {"recompute": "selective", "micro_batch": 2}},
    "dropout": {"model": {"dropout": 0.2}, "train": {"micro_batch": 2}},
    "dropout and recompute, untied": {"model": {"dropout": 0.2, "tied": False}, "train": {"recompute": "block", "micro_batch": 3}},
    "fewer samples than ranks": {"train": {"batch": 2}},
    "one sample": {"train": {"batch": 1}},
    "clipped": {"optimizer": {"clip": 0.05}},
}


def job_for(family, case, **more):
    sections = {name: dict(entries) for name, entries in CASES[case].items()}
    for name, entries in more.items():
        sections[name] = sections.get(name, {}) | entries
    return job_of(family, **sections)


@functools.cache
def on_one_rank(family, case):
    """Two steps without communication, all samples in one pass unless the case says otherwise."""
    return steps_of(trainer_of(job_for(family, case)), 2)


def same_everywhere(group, value):
    assert len(set(group.collect(value))) == 1
    return value


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_two_steps_equal_those_of_one_rank(group, family, case, zero):
    expected = on_one_rank(family, case)
    found = steps_of(trainer_of(job_for(family, case, mesh={"zero": zero}), group), 2)
    for step in range(2):
        assert abs(same_everywhere(group, found.losses[step]) / expected.losses[step] - 1) < 1e-12
        assert abs(same_everywhere(group, found.norms[step]) / expected.norms[step] - 1) < 1e-12
        difference, name = worst_of_all(group, worst_gradient(found.gradients[step], expected.gradients[step]))
        assert difference < 1e-12, f"gradient of {name} in step {step + 1}: {difference}"
    difference, name = worst_of_all(group, worst_weight(found.weights, expected.weights, rate=3e-3))
    assert difference < 1e-12, f"{name}: {difference}"


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_weights_are_bit_for_bit_the_same_on_all_ranks(group, zero):
    trainer = trainer_of(job_for("gpt", "untied", mesh={"zero": zero}), group)
    steps_of(trainer, 2)
    for bucket in trainer.model.buckets:
        bucket.fetch()
    for parameter in trainer.model.parameters():
        first = group.broadcast(parameter.value.copy())
        assert OPS.square_sum([first - parameter.value]) == 0.0, parameter.name


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_all_zero_stages_make_the_same_bits_of_one_micro_batch(group, family):
    """Gradients are added up in the order of ranks whatever is split."""
    jobs = [job_for(family, "dropout", mesh={"zero": zero}, train={"micro_batch": 7}, optimizer={"clip": 0.0}) for zero in (0, 1, 2, 3)]
    traces = [steps_of(trainer_of(job, group), 2) for job in jobs]
    for trace in traces[1:]:
        assert trace.losses == traces[0].losses
        for name, (slab, array) in trace.weights.items():
            held, expected = traces[0].weights[name]
            np.testing.assert_array_equal(array, expected[slab.within(held)], err_msg=name)


@pytest.mark.parametrize("zero", [2, 3])
def test_two_runs_on_the_same_layout_are_bit_for_bit_the_same(group, zero):
    job = job_for("llama", "dropout", mesh={"zero": zero})
    first, second = [steps_of(trainer_of(job, group), 2) for _ in range(2)]
    assert first.losses == second.losses and first.norms == second.norms
    for name, (_, array) in first.weights.items():
        np.testing.assert_array_equal(second.weights[name][1], array, err_msg=name)


@functools.cache
def fifty_losses_of_one_rank(compute):
    return steps_of(trainer_of(job_for("llama", "plain", precision={"compute": compute})), 50, keep_gradients=False).losses


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("compute, tolerance", [("float64", 1e-12), ("float32", 1e-5)])
def test_fifty_losses_equal_those_of_one_rank(group, compute, tolerance, zero):
    expected = fifty_losses_of_one_rank(compute)
    job = job_for("llama", "plain", precision={"compute": compute}, mesh={"zero": zero})
    losses = steps_of(trainer_of(job, group), 50, keep_gradients=False).losses
    differences = np.abs(np.array(losses) / expected - 1)
    assert differences.max() < tolerance, f"step {differences.argmax() + 1}: {differences.max()}"


def test_ranks_read_their_own_samples_only(group):
    source = Source()
    steps_of(trainer_of(job_for("llama", "plain"), group), 2, source)
    asked = group.collect([range_ for range_ in source.asked])
    for step in range(2):
        numbers = sorted(number for ranges in asked for number in range(ranges[step][0], sum(ranges[step])))
        assert numbers == list(range(7 * step, 7 * step + 7))


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("count, micro_batch", [(7, 2), (1, 4), (12, 3), (40, 1)])
def test_validation_loss_is_the_same_on_any_number_of_ranks(group, count, micro_batch, zero):
    job = job_for("gpt", "dropout", mesh={"zero": zero})
    results = []
    for trainer in (trainer_of(job, group), trainer_of(job)):
        results.append(validation_loss(OPS, trainer.model, count, whole_weights, micro_batch))
    (found, tokens), (expected, all_tokens) = results
    assert tokens == all_tokens == count * 9
    assert abs(same_everywhere(group, found) / expected - 1) < 1e-12


def whole_weights(first, count):
    tokens, targets, weights = Source().samples(first, count)
    return tokens, targets, np.ones_like(weights)
