"""Runs a schedule: forwards and backwards of micro-batches through the parts of the model that this stage has.

Activations go to the next stage, gradients back. Sends do not block, and keep their array until they are done; receives
block; shapes are known from the job, so nothing is negotiated.
"""

import numpy as np

from .recorded import Recorded

TAGS = 2**14    # MPI guarantees tags up to 32767; messages of one tag arrive in order


class Pipeline:
    """The executor of one rank.

    Parameters
    ----------
    ops : backend
    model : Transformer
    """

    def __init__(self, ops, model):
        self.ops, self.model = ops, model
        self.group, self.stage, self.journal = model.mesh["pp"], model.mesh.coord("pp"), model.mesh.world.journal
        self.recorded = Recorded(ops, model)
        self.do = {"F": self._forward, "B": self._backward, "I": self._backward_input, "W": self._backward_weight}

    def run(self, schedule, batches, gradients=None):
        """This rank's share of the loss of the micro-batches, (1,) float64; gradients are reduced as soon as they are complete.

        Parameters
        ----------
        schedule : Schedule
        batches : list of Batch
        gradients : Gradients or None
            None: no backward.
        """
        self.schedule, self.batches, self.gradients = schedule, batches, gradients
        self.loss, self.saved, self.deferred, self.sending = self.ops.zeros((1,), np.float64), {}, {}, []
        if gradients is not None and self.recorded.possible:
            self._run_alone()
            return self.loss
        with self.ops.activations():
            self._run_schedule()
        return self.loss

    def _run_alone(self):
        """Each micro-batch forward and backward, by graphs where they can do it."""
        for number, batch in enumerate(self.batches):
            self.last = number == len(self.batches) - 1
            self.journal.phase("forward")
            if self.recorded.takes(batch):
                loss = self.recorded.run(batch, self.last, self._pass, self._done)
            else:
                loss = self._pass(batch, self._done)
            self.ops.add(self.loss, loss)

    def _pass(self, batch, done):
        """Forward and backward of a whole model; its loss."""
        with self.ops.activations():
            part, = self.model.parts
            loss, saved = part.forward(None, batch)
            self.journal.phase("backward")
            part.backward(None, saved, batch, done)
        return loss

    def _run_schedule(self):
        actions = self.schedule.actions[self.stage]
        finals = {action.chunk: index for index, action in enumerate(actions) if action.kind in "BW"}
        for index, action in enumerate(actions):
            self.last = finals.get(action.chunk) == index       # completes the step's gradients of its part
            self.do[action.kind](action)
        for message in self.sending:
            message.wait()

    def _tag(self, message):
        number = message.microbatch * self.schedule.chunks + message.chunk
        return (2 * number + (message.kind == "B")) % TAGS

    def _send(self, x, action):
        message = self.schedule.sends(self.stage, action)
        if message:
            self.sending = [started for started in self.sending if not started.test()]
            self.sending.append(self.group.send_start(x, message.target, self._tag(message)))

    def _receive(self, action):
        message = self.schedule.receives(self.stage, action)
        if not message:
            return None
        rows = self.model.setting.region.rows(self.batches[action.microbatch].num_rows)[1]
        x = self.ops.empty((rows, self.model.shape.width), self.model.dtype)        # (n, C)
        return self.group.receive(x, message.source, self._tag(message))

    def _forward(self, action):
        part = self.model.parts[action.chunk]
        if self.gradients is not None:
            self.journal.phase("forward")
        else:
            self.journal.progress()
        y, saved = part.forward(self._receive(action), self.batches[action.microbatch], self.gradients is not None)
        if self.gradients is not None:
            self.saved[action.microbatch, action.chunk] = saved
        if part.last:
            self.ops.add(self.loss, y)
        self._send(y, action)

    def _inputs(self, action, done):
        """The backward of a part, between receiving its gradients and sending them on."""
        saved = self.saved.pop((action.microbatch, action.chunk))
        self.journal.phase("backward")
        dx = self.model.parts[action.chunk].backward(self._receive(action), saved, self.batches[action.microbatch], done)
        self._send(dx, action)

    def _done(self, bucket):
        self.gradients.start(bucket, self.last)

    def _backward(self, action):
        self._inputs(action, self._done)

    def _backward_input(self, action):
        """Gradients of inputs only: those of matrices wait for their W (Qi et al. 2023, arXiv:2401.10241)."""
        buckets = self.model.parts[action.chunk].buckets
        for bucket in buckets:
            bucket.defer()
        self._inputs(action, lambda bucket: None)
        self.deferred[action.microbatch, action.chunk] = [(bucket, bucket.deferred_work()) for bucket in buckets]

    def _backward_weight(self, action):
        for bucket, works in reversed(self.deferred.pop((action.microbatch, action.chunk))):
            for work in works:
                work()
            self._done(bucket)
