"""The walk of a training run: data, model, resume, steps with metrics and checkpoints, and a clean end."""

import math
import time
from pathlib import Path

from ..backend import wide_of
from ..config import UserError, job_to_dict
from ..layout.journal import JOURNAL
from ..store.checkpoint import load_named, load_newest, save
from ..store.errors import SaveFailed
from ..train.gradients import Gradients
from ..train.optimizer import AdamW
from ..train.step import Trainer, validation_loss
from .account import Account
from .ending import FINISHED, STOPPED, WRONG_NUMBERS
from .health import Health, WrongNumbers
from .metrics import last_event
from .resume import changes, check_model
from .session import check_manifest, entries, gather_loaded

def state_bytes(model):
    """Bytes of the masters and the two moments of the whole model: of a checkpoint."""
    return 3 * wide_of(model.dtype).itemsize * sum(math.prod(parameter.shape) for parameter in model.every_parameter())


class Continued:
    """Samples by their number in the whole run; Batches count from where they were opened."""

    def __init__(self, batches):
        self.batches, self.base = batches, batches.first

    def samples(self, first, count):
        return self.batches.samples(first - self.base, count)

    def cursor_after(self, num_samples):
        return self.batches.cursor_after(num_samples - self.base)


class Training:
    """
    Parameters
    ----------
    session : Session
        The placed model.
    directory : RunDirectory
        Locked by this run.
    data : TrainingData
    metrics, progress, stop
        Of this run (run/metrics.py, run/progress.py, run/signals.py).
    """

    def __init__(self, session, directory, data, metrics, progress, stop):
        self.job, self.ops, self.mesh, self.model = session
        self.group = self.mesh.world
        self.directory, self.data, self.metrics, self.progress, self.stop = directory, data, metrics, progress, stop
        buckets = self.model.buckets
        self.trainer = Trainer(self.ops, self.model, Gradients(self.ops, buckets), AdamW(self.ops, buckets, self.job.optimizer),
                               self.mesh, self.job)
        self.step = self.samples = self.tokens = 0      # done so far, on all ranks
        self.saved_step = None              # step of the newest checkpoint
        self.validated_step = None          # of the last validation
        self.changes = []                   # lines of every resume that changed the job
        self.loaded = None                  # entries of the checkpoint that is read
        self.ready = False                  # weights, samples and counters are there
        self.skipped = False                # the last step: its numbers were not finite
        self.account = Account(session, metrics, progress)
        self.health = Health(self)

    # ---- beginning ------------------------------------------------------------------------------------------------

    def prepare(self):
        """Loads the newest valid checkpoint of the run directory, or makes initial weights."""
        if self.group.rank == 0:
            before = last_event(self.directory.file("metrics.jsonl"), "checkpoint")
            self.stop.expect_save(state_bytes(self.model), before and before.get("seconds"))
        checkpoint = load_newest(self.directory.checkpoints, self._entries_for, self.group, self.ops.host, self.progress.note)
        if checkpoint is not None:
            self._resume(checkpoint)
            self.ready = True
            return
        if self.job.train.start:
            start = load_named(self.job.train.start, self._weights_for, self.group, self.ops.host, self.progress.note)
            gather_loaded(self.model, self.loaded, moments=False)
            self.progress.note(f"weights of {start.directory}, step {start.step}")
        else:
            self.model.initialize()
        self.source = Continued(self.data.batches())
        self.ready = True

    def facts(self):
        """JSON-able: all of the state but tensors, as of the last step done."""
        return {"step": self.step, "saved_step": self.saved_step, "validated_step": self.validated_step, "samples": self.samples, "tokens": self.tokens, "changes": self.changes,
                "skipped": self.skipped, "usual_losses": list(self.health.spikes.losses), "counts": self.health.counts(), "loss_scale": list(self.trainer.loss_scale[:2]),
                "cursor": self.source.cursor_after(self.samples)}

    def adopt(self, facts):
        """Goes on where `facts` of another Training stood; the tensors are the caller's matter."""
        self.step, self.saved_step, self.validated_step, self.samples = (facts[key] for key in ("step", "saved_step", "validated_step", "samples"))
        self.tokens, self.changes, self.skipped = facts["tokens"], facts["changes"], facts["skipped"]
        self.trainer.loss_scale = self.trainer.loss_scale.resumed(facts["loss_scale"])
        self.source = Continued(self.data.batches(facts["cursor"]))
        self.health.spikes.resume(facts["usual_losses"])
        self.health.resume(facts["counts"])
        self.ready = True

    def _entries_for(self, checkpoint):
        """The tensors to load, once the job is known to fit the checkpoint."""
        self._check_tokenizer(checkpoint)
        changes(checkpoint.manifest["job"], self.job, checkpoint.directory)
        self.loaded = entries(self.model, moments=True)
        return self.loaded

    def _weights_for(self, checkpoint):
        self._check_tokenizer(checkpoint)
        check_model(checkpoint.manifest["job"], self.job, checkpoint.directory)
        self.loaded = entries(self.model, moments=False)
        return self.loaded

    def _check_tokenizer(self, checkpoint):
        check_manifest(checkpoint)
        found = checkpoint.manifest["tokenizer"]
        if found != self.data.tokenizer_hash:
            raise UserError(f"data.train: the tokenizer ({str(self.data.tokenizer_hash)[:12]}) is not the one of {checkpoint.directory} "
                            f"({str(found)[:12]}); use token files prepared with that checkpoint's tokenizer.json")

    def go_back(self):
        """To the newest checkpoint of this run, while the samples go on from here; its step, None where there is none. Collective."""
        self.ready = False      # until all is loaded: memory is of no step
        checkpoint = load_newest(self.directory.checkpoints, self._entries_for, self.group, self.ops.host, self.progress.note)
        if checkpoint is not None:
            self._take(checkpoint)
        self.ready = True
        return checkpoint and checkpoint.step

    def _take(self, checkpoint):
        """The loaded weights, moments, step and loss scale of a checkpoint."""
        gather_loaded(self.model, self.loaded, moments=True)
        self.trainer.loss_scale = self.trainer.loss_scale.resumed(checkpoint.manifest.get("loss_scale"))
        self.step = self.saved_step = checkpoint.step
        self.validated_step = checkpoint.step       # validation comes before the checkpoint

    def _resume(self, checkpoint):
        self._take(checkpoint)
        manifest = checkpoint.manifest
        self.samples, self.tokens = manifest["samples"], manifest["tokens"]
        self.source = Continued(self.data.batches(manifest["cursor"]))
        self.health.spikes.resume(manifest.get("usual_losses"))
        changed = changes(manifest["job"], self.job, checkpoint.directory)
        self.health.resume(manifest.get("counts"), anew=bool(changed))
        lines = changed + self.source.batches.messages
        self.changes = manifest["changes"] + [f"step {self.step}: {line}" for line in lines]
        for line in lines:
            self.progress.note(line)
        self.progress.note(f"resumed from {checkpoint.directory.name} on {self.group.size} rank{'s' * (self.group.size > 1)}")
        self.metrics.event("resumed", step=self.step, ranks=self.group.size)

    # ---- steps ----------------------------------------------------------------------------------------------------

    def run(self):
        """All steps that are left; returns the exit code of DESIGN.md section 8."""
        steps = self.job.train.steps
        self.progress.start(self.step, steps)
        if self.step >= steps and self.saved_step == self.step:
            self.progress.note(f"all {steps} steps are done; raise train.steps to go on")
        try:
            self._steps(steps)
            if self.saved_step != self.step:
                self.save()
        except WrongNumbers as error:       # of all ranks alike
            return self._end(WRONG_NUMBERS, str(error))
        if self.step < steps:
            return self._end(STOPPED, f"stopped by {self.stop.explain()}; start again to go on")
        self.validate()
        return self._end(FINISHED, "all steps are done")

    def _steps(self, steps):
        """Steps up to number `steps`, or to a wish to stop."""
        stopping = False
        while self.step < steps and not stopping:
            result = self._one_step()
            stopping = result.flags[0] > 0
            if not self.health.after_step(result):
                self._between_steps(stopping, result.flags[1] > 0)

    def _between_steps(self, stopping=False, wished=False):
        """Validation and checkpoint where they are due or wished; the last ones belong to the end of the run."""
        train = self.job.train
        if self.step < train.steps and not stopping and self._due(train.evaluate_every, self.validated_step):
            self.validate()
        if (wished and not stopping or self._due(self.job.checkpoint.every, self.saved_step)) and not self.skipped:    # numbers that went wrong must not push out good ones
            self.try_save()

    def _due(self, every, last):
        """Whether what is done after `every` steps, and was after step `last`, is to be done after this one."""
        return every and self.step % every == 0 and self.step != last

    def make_up(self):
        """After a death: the validation and the checkpoint that the others had not come to after their last step."""
        if self.step:
            self._between_steps()

    def _end(self, code, reason):
        """Says and records how the run ended."""
        if self.health.skipped:
            reason += f"; steps skipped, since their numbers were not finite: {self.health.skipped}"
        state = {FINISHED: "finished", STOPPED: "stopped", WRONG_NUMBERS: "failed"}[code]
        self.account.tell_traffic()
        self.progress.note(f"{state} at step {self.step}: {reason}")
        self.metrics.event(state, step=self.step, reason=reason)
        self.directory.status(state, code, reason, self.step)
        return code

    def _one_step(self):
        self.account.begin()
        result = self.trainer.train_step(self.step + 1, self.source, self.samples, self.stop.wishes)
        JOURNAL.phase("between")
        self.step, self.skipped = self.step + 1, result.skipped
        self.samples += self.job.train.batch
        self.tokens += self.job.train.batch * self.job.model.context
        self.account.end(self.step, self.tokens, result)
        self.directory.heartbeat(self.step)
        return result

    def validate(self):
        """Validation loss of the job's validation file, where there is one."""
        if self.data.validation is None:
            return
        started = time.monotonic()
        JOURNAL.phase("evaluate")
        loss, tokens = validation_loss(self.ops, self.model, *self.data.windows(), self.trainer.micro_batch())
        JOURNAL.phase("between")
        self.validated_step = self.step
        self.metrics.event("validation", step=self.step, validation_loss=loss, tokens=tokens, seconds=time.monotonic() - started)
        self.progress.note(f"step {self.step}: validation loss {loss:.4f} nats, perplexity {math.exp(min(loss, 700)):.2f}, {tokens} tokens")

    def try_save(self):
        """A checkpoint, or a line that says why there is none: the next one may find room, the last one has to."""
        try:
            self.save()
        except SaveFailed as error:     # of all ranks alike
            self.stop.save_failed()
            self.progress.note(f"step {self.step}: no checkpoint: {error}")
            self.metrics.event("checkpoint failed", step=self.step, reason=str(error))

    def save(self):
        """A checkpoint of the step just done, unless replicas differ: a wrong one is not to take the place of good ones."""
        self.health.compare_replicas()
        started = time.monotonic()
        JOURNAL.phase("save")
        manifest = {"kind": "state", "job": job_to_dict(self.job), "mesh": self.mesh.sizes, "tokenizer": self.data.tokenizer_hash,
                    "samples": self.samples, "tokens": self.tokens, "cursor": self.source.cursor_after(self.samples), "changes": self.changes}
        if self.trainer.loss_scale.dynamic:
            manifest["loss_scale"] = list(self.trainer.loss_scale[:2])
        if any(self.health.counts()):
            manifest["counts"] = self.health.counts()
        if self.job.train.spike:
            manifest["usual_losses"] = list(self.health.spikes.losses)
        path = save(self.directory.checkpoints, self.step, entries(self.model, moments=True), manifest,
                    {"tokenizer.json": self.data.tokenizer} if self.data.tokenizer else {}, self.group, self.ops.host, self.job.checkpoint.keep,
                    "offsets" if self.job.run.on_failure == "continue" else None)      # a rank that waits in HDF5's own communicator could not be woken
        JOURNAL.phase("between")
        self.saved_step = self.step
        seconds = time.monotonic() - started
        self.stop.saved(seconds)
        self.directory.granted()
        self.metrics.event("checkpoint", step=self.step, seconds=seconds)
        self.progress.note(f"step {self.step}: checkpoint {Path(path).name} in {seconds:.1f} s")
