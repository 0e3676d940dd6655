"""One optimizer step: tokens -> batch -> forward -> backward -> reduce -> clip -> update; and the loss alone."""

import math
from typing import NamedTuple

import numpy as np

from ..backend import wide_of
from ..layout.slab import cut, token_ranges
from ..model.batch import Batch
from .pipeline import Pipeline
from .rates import rate_of
from .scaling import LossScale
from .schedule import forward_only, make_schedule


class StepResult(NamedTuple):
    loss: float         # nats per target token, all ranks
    grad_norm: float    # global, before clipping
    rate: float
    skipped: bool       # the loss or a gradient was not finite: no update on any rank
    balance_loss: float     # of the routers of a mixture of experts, with its coefficient; 0 without
    router_z_loss: float    # the same
    flags: list         # sums over the ranks of the numbers of `flags()`


def micro_batches(source, first, count, dp_rank, dp_size, micro_batch):
    """This data-parallel rank's samples of a step, in micro-batches of equal number on all ranks.

    Parameters
    ----------
    source : Batches
        `source.samples(first, count)` -> tokens, targets, weights, each (count, T).
    first, count : int
        The step's samples, all ranks.

    Returns
    -------
    list of (tokens, targets, weights, sample numbers, real); a rank with fewer samples gets fillers of weight 0, not real.
    """
    start, size = cut(count, dp_size, dp_rank)
    most = cut(count, dp_size, 0)[1]
    tokens, targets, weights = source.samples(first + start, size) if size else source.samples(first, 1)
    numbers = np.arange(first + start, first + start + size, dtype=np.int64)
    if size == 0:
        tokens, targets, weights = tokens[:0], targets[:0], weights[:0]
    parts = []
    for begin in range(0, most, micro_batch):
        end = min(begin + micro_batch, most)
        part = [array[begin:end] for array in (tokens, targets, weights, numbers, np.ones(size, bool))]
        missing = end - begin - len(part[0])
        if missing:
            part = [np.concatenate([array, np.zeros((missing,) + array.shape[1:], array.dtype)]) for array in part]
        parts.append(part)
    return parts


class Trainer:
    """What a step needs: the model, its gradients and optimizer, and the mesh.

    Parameters
    ----------
    ops, model, gradients, optimizer, mesh
    job : Job
    """

    def __init__(self, ops, model, gradients, optimizer, mesh, job):
        self.ops, self.model, self.gradients, self.optimizer = ops, model, gradients, optimizer
        self.mesh, self.job, self.pipeline = mesh, job, Pipeline(ops, model)
        self.loss_scale = LossScale.of(model.dtype)
        self.ahead = None       # source, first sample and `_parts` of the next step

    def _parts(self, source, first):
        """The micro-batches of the step that begins with sample `first`, and the tokens and targets of each on the device."""
        if self.ahead and self.ahead[0] is source and self.ahead[1] == first:
            return self.ahead[2]
        mesh = self.mesh
        parts = micro_batches(source, first, self.job.train.batch, mesh.coord("dp"), mesh.size("dp"), self.micro_batch())
        return parts, [tokens_of(self.ops, self.model, part) for part in parts]

    def micro_batch(self):
        """Sequences of one pass on this rank."""
        share = cut(self.job.train.batch, self.mesh.size("dp"), 0)[1]
        return min(self.job.train.micro_batch or share, share)

    def schedule(self, microbatches):
        """The job's pipeline schedule; where there is one stage, each backward follows its forward."""
        mesh, stages = self.job.mesh, self.mesh.size("pp")
        return make_schedule(mesh.schedule if stages > 1 else "1f1b", stages, microbatches, mesh.chunks)

    def train_step(self, step, source, first, flags=tuple):
        """Optimizer step number `step` (1 is the first) on samples first .. first + batch - 1 of `source`.

        `flags()` gives numbers of this rank, asked for after the backward and summed over the ranks on the way
        (a wish to stop, say).
        """
        mesh, job, journal = self.mesh, self.job, self.mesh.world.journal
        journal.phase("data", step)
        parts, sent = self._parts(source, first)
        total = np.array([sum(float(part[2].sum(dtype=np.float64)) for part in parts)])
        mesh["dp"].all_reduce(total)                    # W: weight of all targets of the step
        auxiliary, scale = np.zeros(2), self.loss_scale.scale
        with self.ops.range("batch"):
            batches = [make_batch(self.ops, self.model, part, (total[0] or 1.0) / scale, step, job.model.dropout, tokens)._replace(
                share=part[4] / (job.train.batch / scale), auxiliary=auxiliary) for part, tokens in zip(parts, sent)]
        self.gradients.begin()
        with self.ops.range("forward and backward"):
            loss = self.pipeline.run(self.schedule(len(batches)), batches, self.gradients)
        if self.ops.host is not self.ops and step < job.train.steps:    # while the device computes
            self.ahead = source, first + job.train.batch, self._parts(source, first + job.train.batch)
        journal.phase("reduce")
        with self.ops.range("reduce"):
            self.gradients.finish()
            numbers = np.array([self.gradients.square_sum() / scale, self.ops.to_host(loss)[0], *auxiliary], np.float64) / scale
            numbers = np.concatenate([numbers, np.array(flags(), np.float64)])
            mesh.world.all_reduce(numbers)
        norm = math.sqrt(numbers[0]) if numbers[0] >= 0 else math.nan
        rate = rate_of(job.optimizer, step, job.train.steps)
        journal.phase("optimizer")
        skipped = not (math.isfinite(norm) and math.isfinite(numbers[1]))
        self.loss_scale = self.loss_scale.after(skipped)
        if not skipped:
            clip = job.optimizer.clip
            with self.ops.range("optimizer"):
                self.optimizer.step(step, rate, (min(1.0, clip / (norm + 1e-6)) if clip else 1.0) / scale)
        return StepResult(float(numbers[1]), norm, rate, skipped, float(numbers[2]), float(numbers[3]), numbers[4:].tolist())


def positions_of(model, length):
    """Positions (t,) of this rank's tokens of a sequence: some of them under context parallelism."""
    mesh = model.mesh
    ranges = token_ranges(length, mesh.size("cp"), mesh.coord("cp"), model.setting.layout.cp_form)
    return np.concatenate([np.arange(start, start + size, dtype=np.int64) for start, size in ranges])


def tokens_of(ops, model, part):
    """This rank's tokens and targets (B, t) int64 of a part of `micro_batches`, on the device before the work that is under way is done."""
    length = part[0].shape[1]
    for tokens in part[:2]:     # on the host: a device would read past its table without a word
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < model.shape.vocabulary:
            raise ValueError(f"token {tokens.max() if tokens.min() >= 0 else tokens.min()} in the data: the model has tokens 0 to {model.shape.vocabulary - 1}")
    positions = positions_of(model, length)
    return [ops.send_ahead(np.asarray(array if len(positions) == length else array[:, positions], np.int64)) for array in part[:2]]


def make_batch(ops, model, part, total, step=0, dropout=0.0, sent=None):
    """The Batch of a part of `micro_batches`, whole sequences on the host; each target counts weight / total.

    `sent` is what `tokens_of` made of the part, where it was asked before.
    """
    weights, numbers, length = part[2], part[3], part[0].shape[1]
    positions, wide = positions_of(model, length), wide_of(model.dtype)
    if len(positions) < length:
        weights = weights[:, positions]                                         # (B, t)
    tokens, targets = sent or tokens_of(ops, model, part)
    scale = ops.from_host(weights.astype(wide) / np.asarray(total, wide))
    return Batch(tokens, targets, scale, positions, numbers, step, dropout, length)


def validation_loss(ops, model, count, windows, micro_batch):
    """Mean nll of the first `count` windows, each read once, on any layout.

    Parameters
    ----------
    count : int
    windows : callable
        (first, number) -> tokens, targets, weights, each (number, T).

    Returns
    -------
    loss : float, nats per token
    tokens : int, targets counted
    """
    mesh, sums = model.mesh, np.zeros(2)
    pipeline, stages, data = Pipeline(ops, model), mesh.size("pp"), mesh.size("dp")
    round_ = data * micro_batch * 2 * stages            # windows read at once, by all ranks
    for first in range(0, count, round_):
        number = min(round_, count - first)
        parts = micro_batches(Windows(windows), first, number, mesh.coord("dp"), data, min(micro_batch, -(-number // data)))
        batches = [make_batch(ops, model, part, 1.0) for part in parts]
        sums[0] += ops.to_host(pipeline.run(forward_only(stages, len(batches), model.setting.layout.chunks), batches))[0]
        if mesh.position("pp", "cp", "tp") == 0:
            sums[1] += sum(part[2].sum(dtype=np.float64) for part in parts)
    mesh.world.all_reduce(sums)
    return float(sums[0] / max(sums[1], 1.0)), int(sums[1])


class Windows(NamedTuple):
    """Validation windows as a source of samples."""
    samples: object     # (first, count) -> tokens, targets, weights
