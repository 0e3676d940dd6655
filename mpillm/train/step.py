"""One optimizer step: tokens -> batch -> forward -> backward -> reduce -> clip -> update."""

import math
from typing import NamedTuple

import numpy as np

from ..layout.slab import cut
from ..model.batch import Batch
from .rates import rate_of


class StepResult(NamedTuple):
    loss: float         # nats per target token, all ranks
    grad_norm: float    # global, before clipping
    rate: float
    skipped: bool       # a gradient was not finite: no update on any rank
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
    list of (tokens, targets, weights, sample numbers); a rank with fewer samples gets fillers of weight 0.
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
        part = [array[begin:end] for array in (tokens, targets, weights, numbers)]
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
        self.mesh, self.job = mesh, job

    def micro_batch(self):
        """Sequences of one pass on this rank."""
        share = cut(self.job.train.batch, self.mesh.size("dp"), 0)[1]
        return min(self.job.train.micro_batch or share, share)

    def train_step(self, step, source, first, flags=tuple):
        """Optimizer step number `step` (1 is the first) on samples first .. first + batch - 1 of `source`.

        `flags()` gives numbers of this rank, asked for after the backward and summed over the ranks on the way
        (a wish to stop, say).
        """
        mesh, job = self.mesh, self.job
        parts = micro_batches(source, first, job.train.batch, mesh.coord("dp"), mesh.size("dp"), self.micro_batch())
        total = np.array([sum(float(part[2].sum(dtype=np.float64)) for part in parts)])
        mesh["dp", "cp"].all_reduce(total)              # W: weight of all targets of the step
        loss = self._forward_backward(parts, total[0] or 1.0, step)
        self.gradients.finish()
        numbers = np.array([self.gradients.square_sum(), loss, *flags()], np.float64)
        mesh.world.all_reduce(numbers)
        norm = math.sqrt(numbers[0]) if numbers[0] >= 0 else math.nan
        rate = rate_of(job.optimizer, step, job.train.steps)
        skipped = not math.isfinite(norm)
        if not skipped:
            clip = job.optimizer.clip
            self.optimizer.step(step, rate, min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
        return StepResult(float(numbers[1]), norm, rate, skipped, numbers[2:].tolist())

    def _forward_backward(self, parts, total, step):
        loss = 0.0
        self.gradients.begin()
        for index, part in enumerate(parts):
            batch = make_batch(self.ops, self.model, part, total, step, self.job.model.dropout)
            part_loss, saved = self.model.forward(batch)
            loss += part_loss
            for bucket in self.model.backward(saved, batch):
                self.gradients.start(bucket, last=index == len(parts) - 1)
        return loss


def make_batch(ops, model, part, total, step=0, dropout=0.0):
    """The Batch of host arrays (tokens, targets, weights, sample numbers); each target counts weight / total."""
    tokens, targets, weights, numbers = part
    scale = weights.astype(model.dtype) / np.asarray(total, model.dtype)
    return Batch(ops.from_host(tokens), ops.from_host(targets), ops.from_host(scale),
                 np.arange(tokens.shape[1], dtype=np.int64), numbers, step, dropout)


def validation_loss(ops, model, mesh, count, windows, micro_batch):
    """Mean nll of the first `count` windows, each read once, on any number of ranks.

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
    start, size = cut(count, mesh.size("dp"), mesh.coord("dp"))
    sums = np.zeros(2)
    for begin in range(start, start + size, micro_batch):
        tokens, targets, weights = windows(begin, min(micro_batch, start + size - begin))
        part = (tokens, targets, weights, np.zeros(len(tokens), np.int64))
        sums += [model.forward(make_batch(ops, model, part, 1.0), training=False)[0], weights.sum(dtype=np.float64)]
    mesh["dp"].all_reduce(sums)
    return float(sums[0] / max(sums[1], 1.0)), int(sums[1])
