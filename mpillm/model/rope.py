"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the layout of Hugging Face's Llama:
channel i turns with channel i + D/2."""

import functools

import numpy as np


def frequencies(head_width, base, scaling=None):
    """Radians per token of each pair of channels, float64 (D/2,).

    With a RopeScaling they are lower: all by `factor` ("linear"; Chen et al. 2023, arXiv:2306.15595, section 2.2), or those of which the
    original context holds few turns ("llama3"; Llama Team 2024, arXiv:2407.21783, as its authors' code and transformers have it): none from
    `high_frequency_factor` turns on, all by `factor` up to `low_frequency_factor`, in between by what lies between.
    """
    plain = base ** (-np.arange(0, head_width, 2) / head_width)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = scaling.original_context * plain / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * plain + (1 - kept) * plain / scaling.factor


def angles(positions, head_width, base, scaling=None):
    """cos and sin of the rotation of each position.

    Parameters
    ----------
    positions : array (T,)
    head_width : int
        D, even.
    base : float
    scaling : RopeScaling or None

    Returns
    -------
    cos, sin : float64 arrays (T, D/2)
    """
    turned = np.asarray(positions, np.float64)[:, None] * frequencies(head_width, base, scaling)     # (T, D/2)
    return np.cos(turned), np.sin(turned)


@functools.lru_cache(maxsize=4)
def table(length, head_width, base, dtype, scaling=None):
    """cos and sin of the first `length` positions, (T, D/2); for all models of a process that want the same."""
    return [part.astype(dtype) for part in angles(np.arange(length), head_width, base, scaling)]


class Rope:
    """The table of rotations up to some position, grown when a longer sequence comes."""

    def __init__(self, ops, head_width, base, dtype, scaling=None):
        self.ops, self.head_width, self.base, self.dtype, self.scaling = ops, head_width, base, dtype, scaling
        self.table = None

    def at(self, positions):
        """cos, sin (t, D/2) of the ascending host array `positions` (t,), in the type of sums."""
        longest = int(positions[-1]) + 1 if len(positions) else 0
        if self.table is None or len(self.table[0]) < longest:
            self.table = [self.ops.constant(part) for part in table(longest, self.head_width, self.base, self.dtype, self.scaling)]
        first = longest - len(positions)
        if not len(positions) or positions[0] == first:
            return [part[first:longest] for part in self.table]
        rows = self.ops.constant(np.asarray(positions))
        return [self.ops.embedding(rows, part) for part in self.table]
