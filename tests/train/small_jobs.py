"""Small jobs and a source of samples for the tests of training."""

from typing import NamedTuple

import numpy as np

from mpillm.backend import open_backend
from mpillm.config import job_from_dict
from mpillm.layout.comm import Solo
from mpillm.layout.mesh import Mesh, sizes_of
from mpillm.model.shape import Layout, Shape
from mpillm.model.transformer import Transformer
from mpillm.run.session import TYPES
from mpillm.train.gradients import Gradients
from mpillm.train.optimizer import AdamW
from mpillm.train.step import Trainer

OPS = open_backend("cpu")
VOCABULARY, CONTEXT = 31, 9


class Source:
    """Samples whose tokens, targets and weights are a pure function of their number; a quarter of the weights is 0."""

    def __init__(self, context=CONTEXT):
        self.context, self.asked = context, []

    def samples(self, first, count):
        self.asked.append((first, count))
        rows = [np.random.default_rng(number) for number in range(first, first + count)]
        text = np.stack([random.integers(0, VOCABULARY, self.context + 1) for random in rows])
        weights = np.stack([random.random(self.context) * (random.random(self.context) > 0.25) for random in rows])
        return text[:, :-1], text[:, 1:], weights


def job_of(family="llama", **sections):
    """5 heads of width 4 (grouped in llama), 7 samples a step; sections override: train={"batch": 3}."""
    values = {
        "model": {"family": family, "layers": 2, "width": 20, "heads": 5, "context": CONTEXT, "mlp_width": 13},
        "data": {"train": "random"}, "mesh": {"zero": 0}, "train": {"steps": 50, "batch": 7},
        # AdamW divides by |gradient| + epsilon: epsilon is far above the rounding of the key bias, whose true gradient is 0
        "optimizer": {"rate": 3e-3, "warmup": 2, "epsilon": 1e-6}, "precision": {"compute": "float64"}, "run": {"name": "test"},
    }
    if family == "llama":
        values["model"]["kv_heads"] = 1
    for section, entries in sections.items():
        values[section] = values.get(section, {}) | entries
    return job_from_dict(values, "test")


def trainer_of(job, group=None, ops=OPS):
    """A Trainer on all ranks of `group` in the layout of the job, or on this rank alone."""
    alone = group is None
    mesh = Mesh(group or Solo(), {} if alone else sizes_of(job.mesh, group.size))
    layout = Layout() if alone else Layout(job.mesh.sequence, job.mesh.cp_form, job.mesh.chunks, tuple(job.mesh.stages or ()))
    model = Transformer(ops, Shape.of(job.model, VOCABULARY), TYPES[job.precision.compute], job.train.seed, job.train.recompute, mesh, layout)
    model.place(0 if alone else job.mesh.zero, job.train.offload == "optimizer")
    model.initialize()
    for number, parameter in enumerate(model.every_parameter()):     # so that no bias and no norm is at its special value
        if parameter.bucket is not None:
            change = 0.1 * np.random.default_rng([7, number]).normal(size=parameter.shape)
            state = parameter.bucket.state
            master = state.to_host(parameter.master)
            state.put(parameter.master, master + change[parameter.updated.slices()].astype(master.dtype))
    for bucket in model.buckets:
        bucket.refresh()
    return Trainer(ops, model, Gradients(ops, model.buckets), AdamW(ops, model.buckets, job.optimizer), mesh, job)


class Trace(NamedTuple):
    """What a few steps left on this rank: arrays of `updated` slabs."""
    losses: list
    norms: list
    gradients: list     # of each step: {name: (slab, array)}
    weights: dict       # {name: (slab, array)}


def steps_of(trainer, count, source=None, keep_gradients=True):
    """Trains steps 1 .. count."""
    host = lambda array: np.array(array if isinstance(array, np.ndarray) else trainer.ops.to_host(array))
    batch, source, results, gradients = trainer.job.train.batch, source or Source(), [], []
    for step in range(1, count + 1):
        results.append(trainer.train_step(step, source, (step - 1) * batch))
        if keep_gradients:
            gradients.append({p.name: (p.updated, host(p.owned_grad)) for p in trainer.model.parameters()})
    weights = {p.name: (p.updated, host(p.master)) if p.bucket.zero == 3 else (p.held, host(p.value)) for p in trainer.model.parameters()}
    return Trace([r.loss for r in results], [r.grad_norm for r in results], gradients, weights)


def worst_gradient(found, expected):
    """The largest relative difference of any gradient (DESIGN.md section 8) and its name; `expected` is of one rank.

    The true gradient of a key bias is 0: what is found is the rounding of sums as large as those of the key weight.
    """
    sizes = {name: float(np.abs(expected[name.replace("key.bias", "key.weight")][1]).max()) for name in expected}
    least = 1e-6 * max(sizes.values())
    return max(((float(np.abs(array - expected[name][1][slab.slices()]).max(initial=0)) / max(sizes[name], least), name)
                for name, (slab, array) in found.items()), default=(0.0, "no parameters"))


def worst_weight(found, expected, rate):
    """The same for weights."""
    return max(((float(np.abs(array - expected[name][1][slab.slices()]).max(initial=0)) / max(float(np.abs(expected[name][1]).max()), rate), name)
                for name, (slab, array) in found.items()), default=(0.0, "no parameters"))


def worst_of_all(group, pair):
    """The largest (difference, name) of all ranks, on all ranks, so that a test passes or fails on all alike."""
    return max(tuple(each) for each in group.collect(pair))
