"""Gradients over the replicas: each bucket's reduction starts while the backward of the next block runs.

| ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054) | call | the held gradients live |
|---|---|---|
| 0 | all-reduce in place | always |
| 1 | reduce-scatter to the owners, on the last micro-batch | always |
| 2, 3 | reduce-scatter to the owners, on every micro-batch | from a block's backward to the end of its reduction |
"""

from typing import NamedTuple


MOST_PENDING = 2    # reductions under way at a time where they hold freed gradients (ZeRO 2, 3)


class Reduction(NamedTuple):
    """A reduction on its way."""
    bucket: object
    message: object     # Pending
    out: object         # (owned elements,), None under ZeRO 0


class Gradients:
    """The reduction of one step's gradients.

    Parameters
    ----------
    ops : backend
    buckets : list of Bucket
        Placed; each reduces over its own group of replicas.
    """

    def __init__(self, ops, buckets):
        self.ops, self.buckets, self.pending = ops, buckets, []
        self.owned = None       # of all buckets, flat; they stay where they are, so they are listed once

    def begin(self):
        """Before the first forward of a step."""
        for bucket in self.buckets:
            if bucket.zero < 2:
                bucket.make_grads()     # here, since they outlive the pass that writes them first
            bucket.clear()
            if bucket.zero >= 2:
                self.ops.fill(bucket.owned_grads, 0)

    def start(self, bucket, last):
        """After a bucket's backward: starts its reduction if this is the time; drives the others on."""
        self._drive()
        if bucket.group.size == 1 or not (last or bucket.zero >= 2):
            return
        bucket.ready_to_reduce()
        bucket.group.journal.subject = bucket.name
        if bucket.zero == 0:
            self.pending.append(Reduction(bucket, bucket.group.all_reduce_start(bucket.grads), None))
            return
        out = bucket.empty(bucket.owned_grads.shape, bucket.wide)
        message = bucket.group.reduce_scatter_start(bucket.grads, bucket.ranges, out, bucket.empty)
        self.pending.append(Reduction(bucket, message, out))
        if bucket.zero >= 2:
            bucket.free_grads()
            self._bound()

    def _drive(self):
        """Finishes the reductions that are done: of one bucket in the order of starting, so that sums do not depend on timing."""
        waiting, kept = set(), []
        for reduction in self.pending:
            bucket = reduction.bucket
            if id(bucket) in waiting or not reduction.message.test():
                waiting.add(id(bucket))
                kept.append(reduction)
            else:
                self._complete(reduction)
        self.pending = kept

    def _bound(self):
        """Waits while too many gradients are kept for reductions; but not for another stage, which may need this one first."""
        while True:
            ours = [reduction for reduction in self.pending if not reduction.bucket.spans_stages]
            if len(ours) <= MOST_PENDING:
                return
            ours[0].message.wait()
            self._drive()

    def _complete(self, reduction):
        bucket, message, out = reduction
        message.wait()
        if bucket.zero >= 2:
            self.ops.add(bucket.owned_grads, out)
        elif bucket.zero == 1:
            self.ops.copy(bucket.owned_grads, out)

    def finish(self):
        """Waits for the reductions; every parameter's `owned_grad` is then the sum over the replicas."""
        while self.pending:
            self.pending[0].message.expect()
            self._drive()

    def square_sum(self):
        """This rank's share of the squared global norm: each element of the model counted by its owner, once."""
        if self.owned is None:
            self.owned = [part for bucket in self.buckets for parameter in bucket.parameters for part in self._owned(parameter)]
        return self.ops.square_sum(self.owned)

    def _owned(self, parameter):
        """The gradient that this rank answers for, in contiguous parts: the rows that it owns of several experts are apart."""
        grad = parameter.owned_grad
        if parameter.bucket.zero == 0:
            grad = grad[parameter.owned.within(parameter.held)]
        return [part for part in (grad if len(parameter.shape) == 3 else [grad]) if part.size]
