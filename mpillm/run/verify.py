"""Two steps of a layout against the same two steps on one rank, in float64: loss, every gradient, the weights.

Rank 0 plays the one rank beside its share of the layout. After each step every tensor goes from it to all ranks, one at a
time, and each rank compares the slab it keeps. Data are random, so no token file is needed. Computed on the device of the job.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..config import Data, Mesh as MeshSection, Precision
from ..layout.comm import Solo
from ..layout.mesh import Mesh, sizes_of
from ..layout.parameter import Normal
from ..layout.slab import cut
from ..text.batches import RandomBatches
from ..train.gradients import Gradients
from ..train.optimizer import AdamW
from ..train.step import Trainer
from .connect import connect
from .session import build, open_device

TOLERANCE = 1e-10       # relative; rounding in float64 is some 1e-15
LOOKS = ("gradient of step 1", "weights after step 1", "gradient of step 2", "weights after step 2", "copies on several ranks")
LIMITS = (TOLERANCE,) * 4 + (0.0,)      # copies have to be equal
NUMBERS = {"loss": "loss", "gradient norm": "grad_norm", "balance loss": "balance_loss", "router z-loss": "router_z_loss"}     # of a step


# ---- which job ----------------------------------------------------------------------------------------------------------

def small_job(job, sizes):
    """The job with a small model of the same kind and a small, uneven batch; the layout stays.

    Every part of the pipeline has a block where the job's has; heads, experts, dropout, schedule and what is recomputed
    are those of the job; MLP width, vocabulary, tokens and samples do not divide by the ranks that split them.
    """
    model, tp, dp, passes = job.model, sizes["tp"], sizes["dp"], 2 * sizes["pp"] + 1
    stages = job.mesh.stages and [min(blocks, 2) for blocks in job.mesh.stages]
    layers = sum(stages) if stages else min(model.layers, sizes["pp"] * job.mesh.chunks + 1)
    small = replace(model, layers=layers, width=4 * model.heads, head_width=model.head_width and 6, mlp_width=13 + tp, context=max(17, 2 * sizes["cp"] + 3),
                    vocabulary=max(37, 2 * tp + 1))
    train = replace(job.train, batch=dp * (2 * passes - 1) + (dp > 1), micro_batch=2)
    return replace(job, model=small, mesh=replace(job.mesh, stages=stages), train=train)


def in_float64(job):
    """The job in float64 on random data, with two steps that move the weights."""
    # AdamW divides by |gradient| + epsilon: epsilon is far above the rounding of gradients that are truly 0.
    optimizer = replace(job.optimizer, warmup=0, epsilon=max(job.optimizer.epsilon, 1e-6))
    return replace(job, data=Data("random"), precision=Precision("float64"),
                   train=replace(job.train, start=None), optimizer=optimizer)


def on_one_rank(job, sizes):
    """The job without any layout, in passes of as many sequences."""
    share = cut(job.train.batch, sizes["dp"], 0)[1]
    micro_batch = min(job.train.micro_batch or share, share)
    return replace(job, mesh=MeshSection(zero=0), train=replace(job.train, recompute="none", micro_batch=micro_batch))


class Samples:
    """Random samples by number; a quarter of the targets weighs nothing, as padding does."""

    def __init__(self, job):
        self.batches = RandomBatches(job.model.vocabulary, job.model.context, job.train.seed)

    def samples(self, first, count):
        tokens, targets, _ = self.batches.samples(first, count)
        return tokens, targets, (targets % 4).astype(np.float32) / 4


def trainer_of(job, mesh, ops):
    """A Trainer with initial values."""
    model = build(job, mesh, job.model.vocabulary, ops).model
    for parameter in model.parameters():
        parameter.initialize(ops, job.train.seed)
        _disturb(parameter, ops, job)
    return Trainer(ops, model, Gradients(ops, model.buckets), AdamW(ops, model.buckets, job.optimizer), mesh, job)


def _disturb(parameter, ops, job):
    """Adds noise to the initial values, so that no norm and no bias has a value at which an error would not show."""
    array = _weight(parameter)[1]
    before = ops.empty(array.shape, array.dtype)
    ops.copy(before, array)
    parameter.init = Normal(0.5 * job.model.width ** -0.5)
    parameter.initialize(ops, job.train.seed + 1)
    ops.add(array, before)


# ---- comparing ----------------------------------------------------------------------------------------------------------

def _gradient(parameter):
    """(slab, array) of the reduced gradient that this rank has."""
    return parameter.updated, parameter.owned_grad


def _weight(parameter):
    """(slab, array) of the weights that this rank keeps."""
    return (parameter.owned, parameter.master) if parameter.bucket.zero == 3 else (parameter.held, parameter.value)


def _largest(x):
    return float(np.abs(x).max(initial=0.0))


class Comparison:
    """
    Parameters
    ----------
    layout : Trainer
    alone : Trainer or None
        The one-rank job, on rank 0 of `group`.
    group : Group
        All ranks.
    """

    def __init__(self, layout, alone, group):
        self.group, self.ops = group, layout.ops
        self.tensors = layout.model.every_parameter()
        self.mine = {parameter.name: parameter for parameter in layout.model.parameters()}
        self.theirs = {parameter.name: parameter for parameter in alone.model.parameters()} if alone else {}

    def gradients(self):
        """Relative differences of DESIGN.md section 8, as `_differences`.

        The true gradient of a gpt key bias is 0: what is found is the rounding of sums as large as those of the key weight.
        """
        sizes = self._sizes(_gradient)
        names = [tensor.name.replace("key.bias", "key.weight") for tensor in self.tensors]
        least = max(1e-6 * max(sizes.values()), np.finfo(np.float64).tiny)
        return self._differences(_gradient, [max(sizes[name], least) for name in names])

    def weights(self, rate):
        sizes = self._sizes(_weight)
        return self._differences(_weight, [max(sizes[tensor.name], rate) for tensor in self.tensors])

    def _sizes(self, part):
        """{name: max|x|} on one rank."""
        return self.group.share({name: _largest(self.ops.to_host(part(parameter)[1])) for name, parameter in self.theirs.items()})

    def _differences(self, part, scales):
        """(tensors,) float64: this rank's largest |found - expected| / scale of each tensor; -1 where it has nothing of it."""
        found = np.full(len(self.tensors), -1.0)
        for index, (tensor, scale) in enumerate(zip(self.tensors, scales)):
            whole = np.empty(tensor.shape)
            if self.theirs:
                whole[...] = self.ops.to_host(part(self.theirs[tensor.name])[1])
            self.group.broadcast(whole)
            if tensor.name in self.mine:
                slab, array = part(self.mine[tensor.name])
                if slab.size:
                    found[index] = _largest(self.ops.to_host(array) - whole[slab.slices()]) / scale
        return found

    def copies(self):
        """As `_differences`: how far values are from those of the first rank that holds the same slab."""
        found = np.full(len(self.tensors), -1.0)
        for index, tensor in enumerate(self.tensors):
            parameter = self.mine.get(tensor.name)
            if parameter is not None and parameter.bucket.zero < 3:
                value = self.ops.to_host(parameter.value)
                found[index] = _largest(parameter.bucket.group.broadcast(value.copy()) - value)
        return found


def compare(job, group, begin=lambda: None):
    """Runs two steps of the job on all ranks of `group`, and on rank 0 alone; the Report, the same on every rank.

    Parameters
    ----------
    job : Job
        As of `in_float64`, with its vocabulary.
    begin : callable
        Called when this rank has its device.
    """
    ops, batch = open_device(job.run.device, "float64", group), job.train.batch
    begin()
    group, _ = connect(group, ops, job.communication.transport)
    mesh = Mesh(group, sizes_of(job.mesh, group.size))
    layout = trainer_of(job, mesh, ops)
    alone = trainer_of(on_one_rank(job, mesh.sizes), Mesh(Solo(), {}), ops) if group.rank == 0 else None
    comparison, source, numbers, looks = Comparison(layout, alone, group), Samples(job), {}, []
    with np.errstate(invalid="ignore", over="ignore"):      # a broken layout may make any numbers
        for step in (1, 2):
            first = (step - 1) * batch
            expected = group.share(alone.train_step(step, source, first)._asdict() if alone else None)
            found = layout.train_step(step, source, first)._asdict()
            for name, field in list(NUMBERS.items())[:4 if job.model.experts else 2]:
                difference = abs(found[field] - expected[field]) / (abs(expected[field]) or 1.0)
                numbers[f"{name} of step {step}"] = difference if np.isfinite(difference) else np.inf
            looks += [comparison.gradients(), comparison.weights(job.optimizer.rate)]
        looks.append(comparison.copies())
    differences, ranks = _over_ranks(group, np.stack(looks, axis=1))        # (tensors, looks)
    rows = [Row(tensor.name, split_of(tensor, mesh, job.mesh.zero), *found)
            for tensor, *found in zip(comparison.tensors, differences.tolist(), ranks.tolist())]
    return Report(rows, dict(zip(numbers, group.all_reduce(np.array(list(numbers.values())), "max").tolist())))


def _over_ranks(group, found):
    """The largest of each number over the ranks, and the first rank that has it; what is no number is larger than all."""
    found = np.where(np.isnan(found), np.inf, found)
    largest = group.all_reduce(found.copy(), "max")
    return largest, group.all_reduce(np.where(found == largest, group.rank, group.size), "min")


# ---- what was found -----------------------------------------------------------------------------------------------------

def split_of(parameter, mesh, zero):
    """How a tensor lies on the ranks, in words. `parameter` as a rank of the first stage has it."""
    dims = ("experts", "rows", "columns")[-len(parameter.shape):] if len(parameter.shape) > 1 else ("elements",)
    words = [f"{dim} over {axis}" for dim, axis in zip(dims, parameter.axes) if axis and mesh.size(axis) > 1] or ["same"]
    if parameter.copies > 1:
        words.append(f"each on {parameter.copies} of tp")
    if parameter.tied:
        words.append("on the first and the last stage")
    replicas = len(mesh.members(parameter.shared))
    if replicas > 1:
        words.append(f"owned by {replicas}" if zero else f"{replicas} copies")
    return ", ".join(words)


class Row(NamedTuple):
    tensor: str
    split: str
    differences: list   # one of each of LOOKS; -1 where no rank has anything to compare
    ranks: list         # the first rank that has it


class Found(NamedTuple):
    size: float         # relative difference
    what: str           # of LOOKS, or of the numbers
    tensor: str | None
    rank: int | None


class Report(NamedTuple):
    rows: list          # Row of each tensor, in the order of the forward
    numbers: dict       # {"loss of step 1": relative difference}

    def of_look(self, look):
        """The Found of all tensors by one of LOOKS, in the order of the forward."""
        return [Found(row.differences[look], LOOKS[look], row.tensor, row.ranks[look]) for row in self.rows]

    @property
    def worst(self):
        """The largest relative difference of a tensor, else of a number."""
        tensors = [found for look in range(4) for found in self.of_look(look)]
        return max(tensors + [Found(size, what, None, None) for what, size in self.numbers.items()], key=lambda found: found.size)

    @property
    def wrong(self):
        """The Founds beyond the limit of the first look that has any, in the order of the forward; of numbers where no tensor differs."""
        for look, limit in enumerate(LIMITS):
            wrong = [found for found in self.of_look(look) if found.size > limit]
            if wrong:
                return wrong
        return [Found(size, what, None, None) for what, size in self.numbers.items() if size > TOLERANCE]
