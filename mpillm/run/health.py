"""Numbers that go wrong: losses and gradients that are not finite, loss spikes, replicas that differ.

A step whose loss or gradients are not finite is skipped by all ranks alike (train/step.py). After SKIPS in a row the run ends
and names tensors and samples. A spike (`train.spike`) goes back to the last checkpoint and leaves out the batches since. Replicas are
compared every `run.check_replicas` steps and before each checkpoint.
"""

import math

import numpy as np

from ..layout.journal import JOURNAL
from ..train.pipeline import Pipeline
from ..train.schedule import forward_only
from ..train.step import make_batch, micro_batches
from .hang import ranges_text
from .replicas import Replicas
from .spikes import Spikes

NAMED = 4           # tensors of a message
NUMBERS = 8         # ranks or samples of a message
SKIPS = 10          # steps in a row without finite numbers, after which the run ends
ROLLBACKS = 3       # returns for a spike; the next spike ends the run


class WrongNumbers(Exception):
    """The run cannot go on with its numbers; raised on all ranks alike, with one line."""


class Health:
    """
    Parameters
    ----------
    training : Training

    Attributes
    ----------
    skipped, in_a_row, rollbacks : int
        Steps that were skipped, those since the last that was not, and returns for a spike; in the whole run (`counts`, `resume`).
    """

    def __init__(self, training):
        self.training, self.config = training, training.job.train
        self.skipped = self.in_a_row = self.rollbacks = 0
        self.spikes = Spikes(self.config.spike)
        self.replicas, self.compared = Replicas(training.mesh, training.model), None

    def counts(self):
        """JSON-able."""
        return [self.skipped, self.in_a_row, self.rollbacks]

    def resume(self, counts, anew=False):
        """Goes on from the counts of a checkpoint; where someone changed the job since (`anew`), what would end the run begins anew."""
        if isinstance(counts, list) and len(counts) == 3 and all(type(count) is int and count >= 0 for count in counts):
            self.skipped, self.in_a_row, self.rollbacks = counts if not anew else (counts[0], 0, 0)

    def after_step(self, result):
        """Judges the step just done; whether the run went back to an earlier one. Collective.

        Raises
        ------
        WrongNumbers
        """
        run, every = self.training, self.training.job.run.check_replicas
        self._judge_skip(result)
        if self.spikes.is_one(result.loss):
            return self._go_back(result.loss)
        if every and run.step % every == 0:
            self.compare_replicas()
        return False

    def _judge_skip(self, result):
        run = self.training
        if not result.skipped:
            self.in_a_row = 0
            return
        self.skipped += 1
        scale = run.trainer.loss_scale
        if scale.dynamic and not scale.at_its_end:      # a float16 scale may still be too large
            return
        self.in_a_row += 1
        if self.in_a_row not in (1, SKIPS):
            return
        self.compare_replicas()     # one flipped bit of a weight may be why, and then its rank is known
        tensors = tensors_text(bad_gradients(run.ops, run.model, run.group))
        run.progress.note(f"step {run.step}: skipped: loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}; not finite: {tensors}")
        run.metrics.event("skipped", step=run.step, tensors=tensors)
        if self.in_a_row == SKIPS:
            first = run.samples - self.config.batch
            samples = samples_text(sample_losses(run.ops, run.model, run.source, first, self.config.batch), first)
            last = "there is no checkpoint" if run.saved_step is None else f"the last checkpoint is of step {run.saved_step}"
            raise WrongNumbers(f"loss or gradients were not finite in {self.in_a_row} steps in a row: {tensors}; {samples}; {last}")

    def _go_back(self, loss):
        """After a spike: to the last checkpoint, with the samples that come next."""
        self.compare_replicas()     # a checkpoint would undo what shows the rank that is to blame
        run, usual = self.training, self.spikes.threshold()
        if self.rollbacks == ROLLBACKS:
            raise WrongNumbers(f"loss {loss:.4f} at step {run.step} is a spike (usual: below {usual:.4f}), after {ROLLBACKS} returns for others; "
                               "lower optimizer.rate, or raise train.spike")
        spike = run.step
        step = run.go_back()
        if step is None:
            run.progress.note(f"step {spike}: loss {loss:.4f} is a spike (usual: below {usual:.4f}), but there is no checkpoint to go back to")
            self.spikes.losses.append(loss)     # where the curve stays up there, that is usual from now on
            return False
        self.rollbacks += 1
        run.saved_step = None       # what lies there reads the bad samples: where the save below fails, the end has to
        line = (f"loss {loss:.4f} at step {spike} was a spike (usual: below {usual:.4f}): back to step {step}, "
                f"the {(spike - step) * self.config.batch} samples up to {run.samples - 1} are left out")
        run.changes.append(f"step {step}: {line}")
        run.progress.note(line)
        run.metrics.event("rolled back", step=step, spike=spike, loss=loss, threshold=usual)
        self.spikes.forget()
        run.try_save()
        return True

    def compare_replicas(self):
        """Ends the run where ranks hold different numbers that are to be the same."""
        run = self.training
        if not run.job.run.check_replicas or self.compared == run.step:
            return
        JOURNAL.phase("check")
        found = self.replicas.check()
        JOURNAL.phase("between")
        if not found:
            self.compared = run.step
            return
        hosts = run.account.hosts
        texts = [f"{each.tensor} " + ("on " if each.sure else "on one of ") + ", ".join(f"rank {rank} (node {hosts[rank]})" for rank in each.ranks[:NAMED])
                 for each in found[:NAMED]]
        more = f" and {len(found) - NAMED} more tensors" if len(found) > NAMED else ""
        good = "no earlier comparison in this run" if self.compared is None else f"they were equal at step {self.compared}"
        run.metrics.event("replicas differ", step=run.step, tensors=[each._asdict() for each in found])
        raise WrongNumbers(f"step {run.step}: weights differ from those of the other replicas: {'; '.join(texts)}{more}; {good}; no checkpoint was written since, "
                           "so a new start goes on from a good one; have the node's memory and network checked")


def bad_gradients(ops, model, group):
    """Names of the tensors whose reduced gradient is not finite, in the order of the model: [(name, ranks that have it)]. Collective."""
    own = [parameter.name for parameter in model.parameters()
           if parameter.bucket is not None and not np.isfinite(ops.to_host(parameter.owned_grad)).all()]
    found = {}
    for rank, names in enumerate(group.collect(own)):
        for name in names:
            found.setdefault(name, []).append(rank)
    order = {parameter.name: place for place, parameter in enumerate(model.every_parameter())}
    return sorted(found.items(), key=lambda item: order[item[0]])


def first_text(numbers):
    """The first of many ranks or samples, for people; as they are where they are few ranges."""
    text = ranges_text(numbers)
    return text if text.count(",") < NUMBERS else f"{ranges_text(numbers[:NUMBERS])} and {len(numbers) - NUMBERS} more"


def tensors_text(found):
    """The tensors of `bad_gradients`, for people."""
    if not found:
        return "no gradient"
    texts = [f"{name} (rank{'s' * (len(ranks) > 1)} {first_text(ranks)})" for name, ranks in found[:NAMED]]
    return ", ".join(texts) + (f" and {len(found) - NAMED} more tensors" if len(found) > NAMED else "")


def sample_losses(ops, model, source, first, count):
    """The loss of each of `count` samples from number `first` on, by a forward of each alone: (count,) float64. Collective."""
    mesh = model.mesh
    data, place, stages = mesh.size("dp"), mesh.coord("dp"), mesh.size("pp")
    pipeline, losses = Pipeline(ops, model), np.zeros(count)
    for start in range(0, count, data):
        part, = micro_batches(source, first + start, min(data, count - start), place, data, 1)
        loss = pipeline.run(forward_only(stages, 1, model.setting.layout.chunks), [make_batch(ops, model, part, max(1.0, float(part[2].sum())))])
        if part[4].all():       # no filler
            losses[part[3][0] - first] = ops.to_host(loss)[0]
    return mesh.world.all_reduce(losses)


def samples_text(losses, first):
    """Which samples have a loss that is not finite, for people."""
    bad = [first + place for place, loss in enumerate(losses) if not math.isfinite(loss)]
    if len(bad) == len(losses):
        return f"every sample of the step ({first} to {first + len(losses) - 1}) has a loss that is not finite: the weights are to blame"
    if bad:
        return f"sample{'s' * (len(bad) > 1)} {first_text(bad)} {'have' if len(bad) > 1 else 'has'} a loss that is not finite"
    return f"each sample of the step ({first} to {first + len(losses) - 1}) has a finite loss"


def poison(trainer):
    """For tests: the next step has a NaN in the reduced gradient of one tensor on this rank."""
    finish = trainer.gradients.finish

    def finish_and_spoil():
        finish()
        trainer.gradients.finish = finish
        parameter = next(parameter for parameter in trainer.model.parameters() if parameter.owned_grad.size)
        ops, grad = trainer.ops, parameter.owned_grad
        host = ops.to_host(grad).copy()
        host.reshape(-1)[0] = math.nan
        ops.put(grad, host)
    trainer.gradients.finish = finish_and_spoil
