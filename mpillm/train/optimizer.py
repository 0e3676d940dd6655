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

    def step(self, step, rate, scale):
        """Update number `step` (1 is the first): update the masters, round them to values, then gather the new values.

        `scale` multiplies every gradient (clipping).
        """
        config = self.config
        updates = [update for bucket in self.buckets for parameter in bucket.parameters for update in self._updates(parameter)]
        self.ops.adamw(updates, rate, *config.betas, config.epsilon, step, scale)
        for bucket in self.buckets:
            if bucket.zero in (1, 2):
                bucket.gather(bucket.values)

    def _updates(self, parameter):
        """The Updates of a parameter: one; of experts one each, since the rows that a rank owns of several are apart in their values."""
        rounded = parameter.updated_value if parameter.bucket.masters is not None else None
        arrays = parameter.master, parameter.owned_grad, parameter.moment1, parameter.moment2, rounded
        decay = self.config.weight_decay if parameter.decay else 0.0
        if len(parameter.shape) < 3:
            cut = [arrays]
        else:
            cut = zip(*([None] * len(parameter.master) if array is None else array for array in arrays))
        return [Update(*(None if part is None else part.reshape(-1) for part in parts), decay) for parts in cut if parts[0].size]
