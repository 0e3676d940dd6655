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


RESERVED = 1 << 25      # bytes


@pytest.fixture
def reserved(cuda):
    """A device of its own, with memory reserved as `mpillm train` does: what a graph thinks to be there may be another array."""
    from mpillm.backend.cuda import Cuda
    ops = Cuda(type(cuda.device)() if cuda.device.name == "emulator" else type(cuda.device)(0))
    if cuda.device.name == "emulator":
        ops.library = type(cuda.library)(ops.device)
    ops.device.reserve(RESERVED, RESERVED)
    return ops


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
def test_equal_bits_from_run_to_run_and_with_graphs(reserved, compute):
    """Five micro-batches a step: the first two of their kind run as they are, the others by graphs."""
    def trace(graphs):
        trainer = trainer_on(reserved, "gpt", compute, batch=5, micro_batch=1)
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


@pytest.mark.parametrize("name", FAMILIES)
def test_no_array_of_a_pass_outlives_it(reserved, name):
    """But for the loss that a graph writes: a graph of another model, made before, would write over it."""
    trainer = trainer_on(reserved, name, "float32", batch=5, micro_batch=2)
    steps_of(trainer, 3, keep_gradients=False)
    arena, recorded = reserved.device.activation_memory.arena, trainer.pipeline.recorded.passes.values()
    assert arena.capacity - sum(arena.sizes) == 512 * sum(each is not None for each in recorded)


def test_two_models_of_one_device(reserved):
    """As `verify` has them: what one keeps is not what a graph of the other, made before, may write over."""
    trainers = [trainer_on(reserved, "llama", "float32", batch=5, micro_batch=1) for _ in range(2)]
    traces = [[], []]
    for step in (1, 2, 3):
        for trainer, trace in zip(trainers, traces):
            trace.append(trainer.train_step(step, Source(), 5 * (step - 1)).loss)
    assert traces[0] == traces[1]


def test_constants_of_graphs_stay(cuda):
    device, first = cuda.device, np.arange(3) + 0.5
    address = cuda.constant(np.arange(4)).data.ptr
    device.capturing = True
    cuda.constant(np.arange(4))
    device.capturing = False
    cuda.constant(first)
    for number in range(600):
        cuda.constant(np.full(2, number))
    assert len(device.constants) == 256 and (first.shape, first.dtype, first.tobytes()) not in device.constants
    assert cuda.constant(np.arange(4)).data.ptr == address


@pytest.mark.parametrize("sections", [{}, {"precision": {"compute": "bfloat16"}}, {"train": {"offload": "optimizer"}},
                                      {"precision": {"compute": "bfloat16"}, "train": {"offload": "optimizer"}}, {"model": {"dropout": 0.1}},
                                      {"model": {"family": "llama", "kv_heads": 1}, "train": {"recompute": "block"}}], ids=str)
def test_the_plan_is_what_a_step_takes(reserved, sections):
    from mpillm.config import job_from_dict
    from mpillm.layout.comm import Solo
    from mpillm.layout.mesh import AXES, Mesh
    from mpillm.run.plan import needs
    from mpillm.run.session import build
    from mpillm.text.batches import RandomBatches
    from mpillm.train.gradients import Gradients
    from mpillm.train.optimizer import AdamW
    from mpillm.train.step import Trainer
    values = {"model": {"family": "gpt", "layers": 3, "width": 32, "heads": 2, "context": 32, "vocabulary": 600}, "data": {"train": "random"},
              "mesh": {"zero": 1}, "train": {"steps": 9, "batch": 4, "micro_batch": 2}, "run": {"name": "x", "device": "gpu"}}
    for section, entries in sections.items():
        values[section] = values.get(section, {}) | entries
    job, device = job_from_dict(values, "test"), reserved.device
    plan = needs(job, dict.fromkeys((*AXES, "ep"), 1), 600)
    session = build(job, Mesh(Solo(), {}), 600, reserved)
    session.model.initialize()
    trainer = Trainer(reserved, session.model, Gradients(reserved, session.model.buckets), AdamW(reserved, session.model.buckets, job.optimizer), session.mesh, job)
    for step in (1, 2, 3):
        trainer.train_step(step, RandomBatches(600, 32, 1), 4 * (step - 1))
    constants = sum(-(-array.nbytes // 512) * 512 for array in [*device.constants.values(), *device.constants_of_graphs.values()])
    assert plan.kept <= device.kept.arena.peak <= plan.kept + constants + 8192      # and losses, scales, batches of graphs
    assert plan.activations <= device.activation_memory.arena.peak <= plan.activations + 4096
