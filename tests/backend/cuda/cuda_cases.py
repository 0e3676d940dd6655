"""Types, tolerances and comparison of the tests of CUDA operations."""

import ml_dtypes
import numpy as np

from mpillm.backend.reference import Reference
from mpillm.backend.types import wide_of

REFERENCE = Reference()
TOLERANCES = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 1e-2, "float16": 2e-3}     # relative to the largest element
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, None) or name) for name in TOLERANCES}


def random(seed, *shape, dtype):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def exact(*arrays):
    """The same numbers in float64."""
    return [None if array is None else array.astype(np.float64) for array in arrays]


def on(cuda, *arrays):
    """Copies on the device."""
    return [None if array is None else cuda.from_host(array) for array in arrays]


def same(cuda, found, expected, tolerance, least=1e-30):
    """Compares a device array with a float64 one, relative to its largest element, or to `least` where that is more."""
    found, expected = np.asarray(cuda.to_host(found), np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    difference = np.abs(found - expected).max(initial=0)
    assert difference <= tolerance * max(np.abs(expected).max(initial=0), least), difference


def wide(array):
    """In the type of sums."""
    return array.astype(wide_of(array.dtype))
