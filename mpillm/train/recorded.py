"""Forward and backward of a micro-batch as one graph of the device: recorded once, then launched in place of hundreds of calls."""

from typing import NamedTuple


class Pass(NamedTuple):
    """A recorded forward and backward."""
    graph: object       # .launch()
    batch: object       # Batch whose arrays it reads
    loss: object        # (1,) float64 that it writes


class Recorded:
    """The graphs of a model, by shape of the micro-batch and by whether gradients are written or added.

    MPI cannot be recorded, so only passes without communication are: those of a model that lies on one rank, after which
    no gradients are reduced. Nor can what the host decides or sends in between: routing, dropout.
    The first pass of a kind runs as it is, so that tables are there and kernels are compiled; the second is recorded.

    Parameters
    ----------
    ops : backend
    model : Transformer
    """

    def __init__(self, ops, model):
        self.ops, self.model, self.passes = ops, model, {}
        mesh, shape = model.mesh, model.shape
        self.matrices = [parameter for parameter in model.parameters() if len(parameter.shape) > 1]
        self.possible = (ops.capture is not None and not shape.experts and len(model.parts) == 1
                         and all(mesh.size(axis) == 1 for axis in ("tp", "cp", "pp")))

    def takes(self, batch, last):
        """Whether this micro-batch, the last of its step or not, may be run by a graph."""
        buckets = self.model.buckets
        reduces = any(bucket.group.size > 1 and (last or bucket.zero >= 2) for bucket in buckets)
        return self.possible and not reduces and batch.dropout == 0.0

    def run(self, batch, work):
        """The loss (1,) of `work(batch)`, which is a forward and a backward that leave nothing but a loss and gradients."""
        key = batch.shape, self._fresh()
        if key not in self.passes:
            self.passes[key] = None
            return work(batch)
        if self.passes[key] is None:
            self.passes[key] = self._record(batch, work)
        recorded = self.passes[key]
        for name in ("tokens", "targets", "scale"):
            self.ops.copy(getattr(recorded.batch, name), getattr(batch, name))
        recorded.graph.launch()
        for parameter in self.matrices:
            parameter.fresh = False
        return recorded.loss

    def _fresh(self):
        """Whether the gradient of each matrix is to be written (True) or added."""
        return tuple(parameter.fresh for parameter in self.matrices)

    def _record(self, batch, work):
        own = {}
        for name in ("tokens", "targets", "scale"):
            array = getattr(batch, name)
            own[name] = self.ops.empty(array.shape, array.dtype)
        batch, loss = batch._replace(**own), []
        graph = self.ops.capture(lambda: loss.append(work(batch)))
        return Pass(graph, batch, loss[0])
