"""What the backend's tests share: both forms, random arrays, a comparison scaled to the largest element."""

import numpy as np
import pytest

from mpillm.backend.cpu import Cpu
from mpillm.backend.reference import Reference

REFERENCE = Reference()
CPU = Cpu()
DTYPES = [np.float32, np.float64]
TOLERANCE = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 2e-13}  # of the largest element, or of 1

needs_kernels = pytest.mark.skipif(not CPU.kernels, reason=CPU.note or "kernels are built")


def random(seed, *shape, dtype):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def wide(x, extra=3):
    """The same values in a view whose rows are further apart than they are wide."""
    buffer = np.full((*x.shape[:-1], x.shape[-1] + extra), 99.0, x.dtype)
    buffer[..., : x.shape[-1]] = x
    return buffer[..., : x.shape[-1]]


def same(a, b):
    """a and b agree to the tolerance of their type; inf and NaN must be in the same places."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape and a.dtype == b.dtype
    finite = np.isfinite(b)
    assert np.array_equal(np.isfinite(a), finite) and np.array_equal(a[~finite], b[~finite], equal_nan=True)
    if finite.any():
        difference, size = np.abs(a[finite] - b[finite]).max(), max(1.0, np.abs(b[finite]).max())
        assert difference <= TOLERANCE[a.dtype] * size, f"differ by {difference} of {size}"


def same_all(pairs):
    for a, b in pairs:
        same(a, b)
