"""When reductions start, how long held gradients and values live, and a step with a gradient that is not finite."""

import numpy as np
import pytest

from mpillm.train import gradients
from small_jobs import OPS, Source, job_of, steps_of, trainer_of

pytestmark = pytest.mark.ranks


def record(trainer, monkeypatch):
    """The events of a step in order: ("start", bucket, last, messages under way after it) and ("backward", block)."""
    events = []
    start = trainer.gradients.start

    def recorded_start(bucket, last):
        start(bucket, last)
        events.append(("start", bucket.name, last, len(trainer.gradients.pending)))
    monkeypatch.setattr(trainer.gradients, "start", recorded_start)
    for block in trainer.model.blocks.values():
        def recorded_backward(*arguments, block=block, backward=block.backward):
            events.append(("backward", block.name))
            return backward(*arguments)
        monkeypatch.setattr(block, "backward", recorded_backward)
    return events


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_reductions_start_during_the_backward_of_the_last_micro_batch(group, monkeypatch, zero):
    monkeypatch.setattr(gradients, "MOST_PENDING", 100)             # so that none is waited for at once
    job = job_of("llama", mesh={"zero": zero}, train={"batch": 2 * group.size, "micro_batch": 1})
    trainer = trainer_of(job, group)
    events = record(trainer, monkeypatch)
    trainer.train_step(1, Source(), 0)
    names = [event[:3] for event in events]
    order = [("start", "head"), ("backward", "blocks.1"), ("start", "blocks.1"), ("backward", "blocks.0"), ("start", "blocks.0"), ("start", "embedding")]
    assert names == [event + ((last,) if event[0] == "start" else ()) for last in (False, True) for event in order]
    under_way = {(event[1], event[2]): event[3] for event in events if event[0] == "start"}
    if group.size == 1:
        assert not any(under_way.values())
    else:
        assert under_way["head", True] >= 1                         # before the first block's backward
        assert all(count >= 1 for (_, last), count in under_way.items() if last)
        assert all((count >= 1) == (zero >= 2) for (_, last), count in under_way.items() if not last)
    assert not trainer.gradients.pending                            # all finished at the end of the step


@pytest.mark.parametrize("zero", [2, 3])
def test_the_gradients_kept_for_reductions_are_bounded(group, monkeypatch, zero):
    trainer = trainer_of(job_of("llama", model={"layers": 8}, mesh={"zero": zero}, train={"micro_batch": 1}), group)
    events = record(trainer, monkeypatch)
    trainer.train_step(1, Source(), 0)
    assert max(event[3] for event in events if event[0] == "start") <= gradients.MOST_PENDING
    assert len([event for event in events if event[0] == "start"]) == 10 * -(-7 // group.size)


def live(trainer):
    return sum(bucket._grads is not None for bucket in trainer.model.buckets)


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_zero_2_and_3_free_held_gradients(group, monkeypatch, tied, zero):
    trainer = trainer_of(job_of("llama", model={"tied": tied, "layers": 4}, mesh={"zero": zero}, train={"micro_batch": 1}), group)
    most, start = [], trainer.gradients.start

    def counting(bucket, last):
        most.append(live(trainer))
        start(bucket, last)
        assert bucket._grads is None or group.size == 1
    monkeypatch.setattr(trainer.gradients, "start", counting)
    trainer.train_step(1, Source(), 0)
    if group.size > 1:
        assert max(most) == (2 if tied else 1)      # a tied table's gradient lives from the loss to the embedding
        assert live(trainer) == 0


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_zero_3_holds_the_values_of_a_unit_and_of_the_next_one(group, monkeypatch, tied, recompute):
    job = job_of("llama", model={"tied": tied, "layers": 4}, mesh={"zero": 3}, train={"micro_batch": 2, "recompute": recompute})
    trainer, most = trainer_of(job, group), []
    buckets = trainer.model.buckets

    def counted(fetch_start):
        def fetch():
            fetch_start()
            most.append(sum(bucket.values is not None for bucket in buckets))
        return fetch
    for bucket in buckets:
        monkeypatch.setattr(bucket, "fetch_start", counted(bucket.fetch_start))
    for step in (1, 2):
        trainer.train_step(step, Source(), 7 * step)
        if group.size > 1:
            assert max(most) == (3 if tied else 2)      # the last block, the head and the tied table
            assert all(bucket.values is None for bucket in buckets)
    assert sum(group.collect(sum(bucket.kept.size for bucket in buckets))) == sum(bucket.size for bucket in buckets)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_moments_are_split_from_zero_1_on(group, zero):
    trainer = trainer_of(job_of("gpt", mesh={"zero": zero}), group)
    parameters = trainer.model.parameters()
    elements = sum(parameter.held.size for parameter in parameters)
    kept = sum(parameter.moment1.size for parameter in parameters)
    assert sum(group.collect(kept)) == (elements if zero else elements * group.size)
    assert sum(group.collect(sum(parameter.owned.size for parameter in parameters))) == elements


def spoil(trainer, monkeypatch, bad, bucket_name, element):
    """Makes one element of a bucket's gradients `bad` on this rank, in the last micro-batch, before its reduction."""
    start = trainer.gradients.start

    def spoiling(bucket, last):
        if last and bucket.name == bucket_name:
            bucket.grads[element] = bad
        start(bucket, last)
    monkeypatch.setattr(trainer.gradients, "start", spoiling)


def state(trainer):
    return [array.copy() for p in trainer.model.parameters()
            for array in (p.master if p.bucket.zero == 3 else p.value, p.moment1, p.moment2)]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("bad, bucket, element", [(np.nan, "head", 0), (np.inf, "blocks.1", -1), (-np.inf, "embedding", 5)])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(group, monkeypatch, bad, bucket, element, zero):
    trainer = trainer_of(job_of("gpt", mesh={"zero": zero}, train={"micro_batch": 2}), group)
    trainer.train_step(1, Source(), 0)
    before = state(trainer)
    with monkeypatch.context() as patch:
        if group.rank == group.size - 1:
            spoil(trainer, patch, bad, bucket, element)
        with np.errstate(invalid="ignore"):
            result = trainer.train_step(2, Source(), 7)
    assert group.collect(result.skipped) == [True] * group.size and not np.isfinite(result.grad_norm)
    assert np.isfinite(result.loss)
    assert group.collect(all(np.array_equal(a, b) for a, b in zip(before, state(trainer)))) == [True] * group.size
    after = trainer.train_step(3, Source(), 14)
    assert not after.skipped and np.isfinite(after.grad_norm) and np.isfinite(after.loss)


@pytest.mark.parametrize("zero", [1, 3])
def test_a_skipped_step_leaves_no_trace(group, monkeypatch, zero):
    job = job_of("llama", mesh={"zero": zero})
    spoilt, plain = trainer_of(job, group), trainer_of(job, group)
    for trainer in (spoilt, plain):
        trainer.train_step(1, Source(), 0)
    with monkeypatch.context() as patch:
        spoil(spoilt, patch, np.nan, "head", 0)
        assert spoilt.train_step(2, Source(), 7).skipped
    results = [trainer.train_step(3, Source(), 14) for trainer in (spoilt, plain)]
    assert results[0] == results[1]
    for a, b in zip(state(spoilt), state(plain)):
        np.testing.assert_array_equal(a, b)


def test_flags_are_summed_over_the_ranks(group):
    trainer = trainer_of(job_of("llama"), group)
    result = trainer.train_step(1, Source(), 0, flags=lambda: (1.0, group.rank))
    assert result.flags == [group.size, group.size * (group.size - 1) / 2]
    assert trainer.train_step(2, Source(), 7).flags == []


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_norm_is_that_of_all_gradients(group, zero):
    trace = steps_of(trainer_of(job_of("gpt", mesh={"zero": zero}), group), 1)
    alone = steps_of(trainer_of(job_of("gpt")), 1)
    expected = sum(OPS.square_sum([array]) for _, array in alone.gradients[0].values()) ** 0.5
    assert abs(trace.norms[0] / expected - 1) < 1e-12
