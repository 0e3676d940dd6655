"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the layout of Hugging Face's Llama:
channel i turns with channel i + D/2."""

import functools

import numpy as np


def angles(positions, head_width, base):
    """cos and sin of the rotation of each position.

    Parameters
    ----------
    positions : array (T,)
    head_width : int
        D, even.
    base : float

    Returns
    -------
    cos, sin : float64 arrays (T, D/2)
    """
    frequencies = base ** (-np.arange(0, head_width, 2) / head_width)   # (D/2,) radians per token
    turns = np.asarray(positions, np.float64)[:, None] * frequencies     # (T, D/2)
    return np.cos(turns), np.sin(turns)


@functools.lru_cache(maxsize=4)
def table(length, head_width, base, dtype):
    """cos and sin of the first `length` positions, (T, D/2); for all models of a process that want the same."""
    return [part.astype(dtype) for part in angles(np.arange(length), head_width, base)]


class Rope:
    """The table of rotations up to some position, grown when a longer sequence comes."""

    def __init__(self, ops, head_width, base, dtype):
        self.ops, self.head_width, self.base, self.dtype = ops, head_width, base, dtype
        self.table = None

    def at(self, positions):
        """cos, sin (t, D/2) of the ascending host array `positions` (t,), in the type of sums."""
        longest = int(positions[-1]) + 1 if len(positions) else 0
        if self.table is None or len(self.table[0]) < longest:
            self.table = [self.ops.constant(part) for part in table(longest, self.head_width, self.base, self.dtype)]
        first = longest - len(positions)
        if not len(positions) or positions[0] == first:
            return [part[first:longest] for part in self.table]
        rows = self.ops.constant(np.asarray(positions))
        return [self.ops.embedding(rows, part) for part in self.table]
