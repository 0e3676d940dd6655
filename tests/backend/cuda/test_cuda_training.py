"""Whole models on a GPU: loss and every gradient as on the CPU, equal bits from run to run, graphs, masters and moments."""

import sys
from pathlib import Path

import numpy as np
import pytest

from mpillm.backend import open_backend

sys.path.append(str(Path(__file__).resolve().parents[2] / "train"))
from small_jobs import Source, job_of, steps_of, trainer_of, worst_gradient, worst_weight  # noqa: E402

FAMILIES = {
    "gpt": {"family": "gpt", "model": {"layers": 2, "width": 20, "heads": 5}},
    "llama": {"family": "llama", "model": {"kv_heads": 1}},
    "experts": {"family": "llama", "model": {"experts": 3, "experts_per_token": 2, "shared_experts": 1, "mlp_width": 8, "layers": 1}},
    "dropout": {"family": "gpt", "model": {"dropout": 0.1, "layers": 1}},
}
TOLERANCES = {"float64": 1e-11, "float32": 2e-4}


def trainer_on(ops, name, compute, **train):
    sections = {key: dict(value) if isinstance(value, dict) else value for key, value in FAMILIES[name].items()}
    trainer = trainer_of(job_of(precision={"compute": compute}, train={"batch": 3, **train}, **sections), ops=ops)
    if compute == "float16":
        trainer.loss_scale = trainer.loss_scale._replace(scale=2.0**8)      # the first one is for batches of many tokens
    return trainer


@pytest.mark.parametrize("compute", TOLERANCES)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_steps_are_those_of_the_cpu(cuda, name, compute):
    expected = steps_of(trainer_on(open_backend("cpu"), name, "float64", micro_batch=2), 2)
    found = steps_of(trainer_on(cuda, name, compute, micro_batch=2), 2)
    tolerance = TOLERANCES[compute]
    np.testing.assert_allclose(found.losses, expected.losses, rtol=tolerance)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=tolerance)
    worst = worst_gradient(found.gradients[0], expected.gradients[0])
    assert worst[0] < tolerance, worst
    if compute == "float64":
        worst = worst_weight(found.weights, expected.weights, 3e-3)
        assert worst[0] < 1e-9, worst


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
def test_equal_bits_from_run_to_run_and_with_graphs(cuda, compute):
    """Five micro-batches a step: the first two of their kind run as they are, the others by graphs."""
    def trace(graphs):
        trainer = trainer_on(cuda, "gpt", compute, batch=5, micro_batch=1)
        trainer.pipeline.recorded.possible &= graphs
        found = steps_of(trainer, 3)
        return found, len(trainer.pipeline.recorded.passes)
    (one, used), (two, _), (eager, unused) = trace(True), trace(True), trace(False)
    assert used == 2 and unused == 0
    for other in (two, eager):
        assert one.losses == other.losses and one.norms == other.norms
        for name, (_, array) in one.weights.items():
            np.testing.assert_array_equal(array, other.weights[name][1], name)


@pytest.mark.parametrize("compute, tolerance", [("bfloat16", 2.0**-5), ("float16", 2.0**-8)])
def test_half_precision_follows_the_rounding_cpu(cuda, compute, tolerance):
    from mpillm.run.session import TYPES

    for name in ("gpt", "llama"):
        expected = steps_of(trainer_on(open_backend("cpu", dtype=TYPES[compute]), name, compute), 1)
        found = steps_of(trainer_on(cuda, name, compute), 1)
        assert abs(found.losses[0] / expected.losses[0] - 1) < tolerance / 4
        worst = worst_gradient(found.gradients[0], expected.gradients[0])
        assert worst[0] < 2 * tolerance, worst


def test_a_graph_takes_new_data_and_a_new_loss_scale(cuda):
    trainer = trainer_on(cuda, "llama", "float32", batch=4, micro_batch=1)
    for step in range(1, 4):
        trainer.loss_scale = trainer.loss_scale._replace(scale=2.0**step, dynamic=True)
        trainer.train_step(step, Source(), 4 * step)
    other = trainer_on(open_backend("cpu"), "llama", "float32", batch=4, micro_batch=1)
    for step in range(1, 4):
        other.train_step(step, Source(), 4 * step)
    last = trainer.train_step(4, Source(), 16).loss
    np.testing.assert_allclose(last, other.train_step(4, Source(), 16).loss, rtol=1e-5)
