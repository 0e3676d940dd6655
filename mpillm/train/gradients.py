"""Gradients over the replicas: each bucket's reduction starts while the backward of the next block runs.

| ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054) | call | the held gradients live |
|---|---|---|
| 0 | all-reduce in place | always |
| 1 | reduce-scatter to the owners, on the last micro-batch | always |
| 2 | reduce-scatter to the owners, on every micro-batch | from a block's backward to the end of its reduction |
"""

import collections
from typing import NamedTuple


class Reduction(NamedTuple):
    """A reduction on its way."""
    bucket: object
    message: object     # Pending
    packed: object      # (held elements,) in order of owner; kept until the message is done
    out: object         # (owned elements,)


class Gradients:
    """The reduction of one step's gradients.

    Parameters
    ----------
    ops : backend
    buckets : list of Bucket
        Placed; each reduces over its own group of replicas.
    """

    def __init__(self, ops, buckets):
        self.ops, self.buckets, self.pending = ops, buckets, collections.deque()

    def begin(self):
        """Before the first forward of a step."""
        for bucket in self.buckets:
            bucket.clear()
            if bucket.zero == 2:
                self.ops.fill(bucket.owned_grads, 0)

    def start(self, bucket, last):
        """After a bucket's backward: starts its reduction if this is the time; drives the others on."""
        while self.pending and self.pending[0].message.test():
            self._complete()
        if bucket.group.size == 1 or not (last or bucket.zero == 2):
            return
        if bucket.zero == 0:
            message = bucket.group.all_reduce_start(bucket.grads)
            self.pending.append(Reduction(bucket, message, None, None))
            return
        packed = bucket.pack(bucket.grads)
        if bucket.zero == 2:
            bucket.free_grads()
        out = self.ops.empty(bucket.owned_grads.shape, bucket.dtype)
        message = bucket.group.reduce_scatter_start(packed, bucket.counts, out)
        self.pending.append(Reduction(bucket, message, packed, out))

    def _complete(self):
        """Finishes the oldest reduction: always in the order of starting, so that sums do not depend on timing."""
        bucket, message, _, out = self.pending.popleft()
        message.wait()
        if bucket.zero == 2:
            self.ops.add(bucket.owned_grads, out)
        elif bucket.zero == 1:
            self.ops.copy(bucket.owned_grads, out)

    def finish(self):
        """Waits for the reductions; every parameter's `owned_grad` is then the sum over the replicas."""
        while self.pending:
            self._complete()

    def square_sum(self):
        """This rank's share of the squared global norm: each element of the model counted by its owner, once."""
        total = 0.0
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                grad = parameter.owned_grad
                if bucket.zero == 0:
                    grad = grad[parameter.owned.within(parameter.held)]
                total += self.ops.square_sum(grad)
        return total
