"""AdamW against its formula, decay of matrices only, clipping, and the samples of a step."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from small_jobs import OPS, Source, job_of, steps_of, trainer_of
from mpillm.backend import open_backend
from mpillm.config import Optimizer
from mpillm.layout.mesh import Mesh
from mpillm.layout.parameter import Bucket, Constant, Parameter
from mpillm.train.optimizer import AdamW
from mpillm.train.rates import rate_of
from mpillm.train.step import make_batch, micro_batches


def adamw(weight, gradients, rates, scale, config, decay):
    """Loshchilov and Hutter 2017, algorithm 2, in its plainest form."""
    first, second, (beta1, beta2) = 0.0, 0.0, config.betas
    for step, (gradient, rate) in enumerate(zip(gradients, rates), start=1):
        gradient = gradient * scale
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        change = (first / (1 - beta1**step)) / (np.sqrt(second / (1 - beta2**step)) + config.epsilon)
        weight = weight - rate * (change + decay * weight)
    return weight, first, second


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-13), (np.float32, 2e-6)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_follows_its_formula(dtype, tolerance, weight_decay):
    config = Optimizer(betas=[0.8, 0.9], epsilon=1e-6, weight_decay=weight_decay)
    matrix, vector = Parameter("m", (5, 3), Constant(0.0)), Parameter("v", (4,), Constant(0.0))
    table = Parameter("t", (2, 3), Constant(0.0), decay=False)
    bucket = Bucket("b", [matrix, vector, table])
    bucket.place(Mesh.plan({}, 0), 0, open_backend("cpu"), dtype)
    random = np.random.default_rng(1)
    bucket.values[:] = random.normal(size=bucket.values.size)
    start = {p.name: p.value.copy() for p in bucket.parameters}
    gradients = random.normal(size=(6, bucket.values.size)).astype(dtype)
    rates = [1e-2 * (step + 1) for step in range(6)]
    optimizer = AdamW(OPS, [bucket], config)
    for step, (gradient, rate) in enumerate(zip(gradients, rates), start=1):
        bucket.grads[:] = gradient
        optimizer.step(step, rate, scale=0.5)
    for p in bucket.parameters:
        own = [bucket._part(gradient, p).astype(np.float64) for gradient in gradients]
        expected = adamw(start[p.name].astype(np.float64), own, rates, 0.5, config, weight_decay if p is matrix else 0.0)
        for found, value in zip((p.value, p.moment1, p.moment2), expected):
            np.testing.assert_allclose(found, value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_a_step_is_adamw_with_the_clipped_gradient(family, clip):
    job = job_of(family, optimizer={"clip": clip, "epsilon": 1e-3})
    trainer = trainer_of(job)
    start = {p.name: p.value.copy() for p in trainer.model.parameters()}
    trace = steps_of(trainer, 2)
    scales = [min(1.0, clip / (norm + 1e-6)) if clip else 1.0 for norm in trace.norms]
    assert (max(scales) < 1) == (clip == 0.05)
    rates = [rate_of(job.optimizer, step, 50) for step in (1, 2)]
    for p in trainer.model.parameters():
        own = [gradients[p.name][1] * scale for gradients, scale in zip(trace.gradients, scales)]
        decay = job.optimizer.weight_decay if len(p.shape) == 2 else 0.0
        expected, _, _ = adamw(start[p.name], own, rates, 1.0, job.optimizer, decay)
        np.testing.assert_allclose(p.value, expected, rtol=1e-11, atol=1e-13, err_msg=p.name)


def test_training_lowers_the_loss():
    job = job_of("llama", optimizer={"rate": 1e-2}, train={"batch": 4})
    trainer, losses = trainer_of(job), []
    for step in range(1, 51):
        losses.append(trainer.train_step(step, Source(), 0).loss)       # the same four samples again and again
    assert losses[-1] < 0.5 * losses[0] and abs(losses[0] - np.log(31)) < 1.0


# -- the samples of a step ----------------------------------------------------------------------------------------

@given(count=st.integers(1, 20), ranks=st.integers(1, 7), micro_batch=st.integers(1, 6), first=st.integers(0, 50))
def test_every_sample_is_taken_once_and_all_ranks_run_alike(count, ranks, micro_batch, first):
    plans = [micro_batches(Source(3), first, count, rank, ranks, micro_batch) for rank in range(ranks)]
    shapes = [[[array.shape for array in part] for part in parts] for parts in plans]
    assert all(shape == shapes[0] for shape in shapes)                  # micro-batches of equal number and size
    taken = []
    for parts in plans:
        for tokens, targets, weights, numbers, real in parts:
            assert 1 <= len(tokens) <= micro_batch
            assert not weights[~real].any()                             # fillers
            for row, number in enumerate(numbers):
                sample = [array[0] for array in Source(3).samples(int(number), 1)]
                if weights[row].any():
                    assert all(np.array_equal(a, b) for a, b in zip((tokens[row], targets[row], weights[row]), sample))
                    taken.append(number)
    full = [n for n in range(first, first + count) if Source(3).samples(n, 1)[2].any()]
    assert sorted(taken) == full


def test_weights_become_shares_of_the_step():
    trainer = trainer_of(job_of("llama", precision={"compute": "float32"}))
    part, = micro_batches(Source(), 0, 7, 0, 1, 7)
    batch = make_batch(OPS, trainer.model, part, part[2].sum(), step=3, dropout=0.1)
    assert batch.scale.dtype == np.float32 and abs(batch.scale.sum(dtype=np.float64) - 1) < 1e-6
    assert batch.step == 3 and batch.dropout == 0.1 and list(batch.samples) == list(range(7)) and list(batch.positions) == list(range(9))


@pytest.mark.parametrize("micro_batch", [7, 3])
def test_the_loss_of_a_step_is_the_weighted_mean_over_its_targets(micro_batch):
    trainer = trainer_of(job_of("gpt", train={"micro_batch": micro_batch}))
    tokens, targets, weights = Source().samples(0, 7)
    batch = make_batch(OPS, trainer.model, (tokens, targets, weights, np.arange(7)), 1.0)
    logits = trainer.model.logits(batch)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], 2)[..., 0]
    assert abs(trainer.train_step(1, Source(), 0).loss / ((weights * nll).sum() / weights.sum()) - 1) < 1e-13


def test_a_step_without_any_weight_changes_nothing_but_decay():
    class Empty(Source):
        def samples(self, first, count):
            tokens, targets, weights = super().samples(first, count)
            return tokens, targets, np.zeros_like(weights)
    result = trainer_of(job_of("llama")).train_step(1, Empty(), 0)
    assert result.loss == 0.0 and result.grad_norm == 0.0 and not result.skipped


def test_micro_batch_left_out_is_the_whole_share():
    for batch, given_size, expected in ((7, None, 7), (7, 3, 3), (2, 5, 2)):
        train = {"batch": batch} | ({"micro_batch": given_size} if given_size else {})
        assert trainer_of(job_of("llama", train=train)).micro_batch() == expected
