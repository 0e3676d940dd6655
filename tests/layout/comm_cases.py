"""Numbers for the tests of communication: small and whole, so that sums are exact and every comparison is for equality."""

import ml_dtypes
import numpy as np

from mpillm.layout.slab import cut

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
HALVES = [np.float16, ml_dtypes.bfloat16]


def numbers(shape, seed, rank=0, dtype=np.float64):
    """Whole numbers from -8 to 8: the same on any rank that asks for them."""
    return np.random.default_rng([seed, rank]).integers(-8, 9, shape).astype(dtype)


def of_all(ranks, shape, seed, dtype=np.float64):
    """What every rank has, (ranks, ...), known without communication."""
    return np.stack([numbers(shape, seed, rank, dtype) for rank in range(ranks.size)])


def lengths(ranks):
    return [0, 1, 2, ranks.size, ranks.size + 1, 7]


def uneven(ranks, length, order=1):
    """Counts of the ranks, the first (or last) ranks with none where there are few elements."""
    return [cut(length, ranks.size, rank)[1] for rank in range(ranks.size)][::order]
