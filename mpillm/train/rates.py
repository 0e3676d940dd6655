"""The learning rate of a step."""

import math


def rate_of(config, step, steps):
    """The rate of optimizer step `step` (1 is the first) of `steps`.

    Linear warm-up to `config.rate`, then
    cosine: half a cosine down to the final share (Loshchilov and Hutter 2016, arXiv:1608.03983);
    linear: a straight line down to it;
    constant_then_decay: constant, then a straight line over the last `decay_share` of the steps
    (Zhai et al. 2021, arXiv:2106.04560, section 3.5).
    """
    if step <= config.warmup:
        return config.rate * step / config.warmup
    final = config.rate * config.final_rate_share
    progress = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    if config.rate_schedule == "cosine":
        return final + (config.rate - final) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.rate_schedule == "linear":
        return config.rate + (final - config.rate) * progress
    decay_steps = config.decay_share * steps
    if decay_steps <= 0 or step <= steps - decay_steps:
        return config.rate
    return config.rate + (final - config.rate) * (1 - (steps - step) / decay_steps)
