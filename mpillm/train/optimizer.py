"""AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) on the part of each parameter that this rank updates."""


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
        """Update number `step` (1 is the first): update the masters, then gather the new values.

        `scale` multiplies every gradient (clipping).
        """
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                self._update(parameter, step, rate, scale)
            if bucket.zero in (1, 2):
                bucket.gather(bucket.values)

    def _update(self, parameter, step, rate, scale):
        config = self.config
        arrays = parameter.master, parameter.owned_grad, parameter.moment1, parameter.moment2
        # The rows of several experts that a rank owns do not lie one after the other in their values.
        for parts in zip(*arrays) if len(parameter.shape) == 3 else [arrays]:
            if parts[0].size:
                self.ops.adamw(*(part.reshape(-1) for part in parts), rate, *config.betas, config.epsilon,
                               config.weight_decay if parameter.decay else 0.0, step, scale)
