"""AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) on the part of each parameter that this rank updates."""

from ..backend import Update


class AdamW:
    """
    Parameters
    ----------
    ops : backend
    buckets : list of Bucket
    config : Optimizer section of the job
    """

    def __init__(self, ops, buckets, config):
        self.ops, self.buckets, self.config = ops, buckets, config
        self.updates = None     # of all parameters; their arrays stay where they are, so they are listed once

    def step(self, step, rate, scale):
        """Update number `step` (1 is the first): update the masters, round them to values, then gather the new values.

        `scale` multiplies every gradient (clipping).
        """
        numbers = rate, *self.config.betas, self.config.epsilon, step, scale
        offloaded = [bucket for bucket in self.buckets if bucket.state is not bucket.ops]
        if offloaded:
            self._step_on_host(offloaded, numbers)
        else:
            if self.updates is None:
                self.updates = [update for bucket in self.buckets for update in self._updates(bucket, self._owned_grads(bucket))]
            self.ops.adamw(self.updates, *numbers)
        for bucket in self.buckets:
            if bucket.zero in (1, 2):
                bucket.gather(bucket.values)

    def _step_on_host(self, buckets, numbers):
        """The gradients of the next bucket come from the device and the values of the one before go there while one is updated."""
        coming = [self.ops.fetch_start(self._owned_grads(buckets[0]))]
        for index, bucket in enumerate(buckets):
            if index + 1 < len(buckets):
                coming.append(self.ops.fetch_start(self._owned_grads(buckets[index + 1])))
            bucket.state.adamw(self._updates(bucket, coming.pop(0)()), *numbers)
            for parameter in bucket.parameters if bucket.zero < 3 else []:
                bucket.set_value(parameter.updated_value, parameter.master)

    def _owned_grads(self, bucket):
        """The reduced gradients of what this rank updates, flat, in the order of the masters."""
        return bucket.grads if bucket.zero == 0 else bucket.owned_grads

    def _updates(self, bucket, grads):
        """The Updates of a bucket's parameters, one each; of experts one each, since the rows that a rank owns of several are apart in their values."""
        found, start = [], 0
        for parameter in bucket.parameters:
            size = parameter.updated.size
            grad = grads[start:start + size].reshape(parameter.updated.shape)
            start += size
            rounded = bucket.masters is not None and bucket.state is bucket.ops
            arrays = parameter.master, grad, parameter.moment1, parameter.moment2, parameter.updated_value if rounded else None
            decay = self.config.weight_decay if parameter.decay else 0.0
            parts = zip(*([None] * len(parameter.master) if array is None else array for array in arrays)) if len(parameter.shape) == 3 else [arrays]
            found += [Update(*(None if part is None else part.reshape(-1) for part in each), decay) for each in parts if each[0].size]
        return found
