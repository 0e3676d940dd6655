"""Forward and backward of a micro-batch as graphs of the device: recorded once, then launched in place of hundreds of calls."""

from typing import NamedTuple


class Pass(NamedTuple):
    """A recorded forward and backward."""
    pieces: list        # (graph, bucket whose gradients are complete after it)
    batch: object       # Batch whose arrays it reads
    loss: object        # (1,) float64 that it writes


class Recorded:
    """The passes of a model, by shape of the micro-batch, by whether gradients are written or added, and whether it is the last.

    MPI cannot be recorded: a pass is cut where the gradients of a bucket are to be reduced, and communicates nothing else,
    so the model lies on one rank of tp, cp and pp. Nor can what the host decides or sends in between: routing, dropout.
    The first pass of a kind runs as it is, so that tables are there and kernels are compiled; the second is recorded.

    Parameters
    ----------
    ops : backend
    model : Transformer
    """

    def __init__(self, ops, model):
        self.ops, self.model, self.passes = ops, model, {}
        mesh, shape = model.mesh, model.shape
        self.possible = (ops.capture is not None and not shape.experts and len(model.parts) == 1
                         and all(mesh.size(axis) == 1 for axis in ("tp", "cp", "pp")))
        self.matrices = [parameter for parameter in model.parameters() if len(parameter.shape) > 1] if self.possible else []

    def takes(self, batch):
        """Whether graphs may run this micro-batch."""
        stay = all(bucket.group.size == 1 or bucket.zero < 2 for bucket in self.model.buckets)
        return self.possible and stay and batch.dropout == 0.0

    def run(self, batch, last, work, done):
        """The loss (1,) of `work(batch, done)`: a forward and a backward that calls `done` with each bucket that is complete."""
        last = last and any(bucket.group.size > 1 for bucket in self.model.buckets)
        key = batch.shape, last, tuple(parameter.fresh for parameter in self.matrices)
        if key not in self.passes:
            self.passes[key] = None
            return work(batch, done)
        if self.passes[key] is None:
            self.passes[key] = self._record(batch, last, work)
        recorded = self.passes[key]
        for name in ("tokens", "targets", "scale"):
            self.ops.copy(getattr(recorded.batch, name), getattr(batch, name))
        for parameter in self.matrices:
            parameter.fresh = False
        for graph, bucket in recorded.pieces:
            graph.launch()
            if bucket is not None:
                done(bucket)
        return recorded.loss

    def _record(self, batch, last, work):
        own, loss = {}, []
        for name in ("tokens", "targets", "scale"):
            array = getattr(batch, name)
            own[name] = self.ops.empty(array.shape, array.dtype)
        batch = batch._replace(**own)

        def record(cut):
            loss.append(work(batch, lambda bucket: cut(bucket) if last and bucket.group.size > 1 else None))
        return Pass(self.ops.capture(record), batch, loss[0])
