"""AdamW, square sums, normal numbers and hashes of the CUDA backend against the NumPy form."""

import ml_dtypes
import numpy as np
import pytest

from mpillm.backend import Update, wide_of
from mpillm.backend.reference import Reference

REFERENCE = Reference()
TYPES = pytest.mark.parametrize("dtype", [np.dtype(t) for t in (np.float32, np.float64, ml_dtypes.bfloat16, np.float16)], ids=str)
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 1e-2, "float16": 2e-3}    # of the largest element
STEP = {"rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}


def random(seed, *shape, dtype):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def close(array, expected, dtype):
    array, expected = np.asarray(array, np.float64), np.asarray(expected, np.float64)
    assert array.shape == expected.shape and np.isfinite(array).all()
    if array.size:
        assert np.abs(array - expected).max() <= TOLERANCE[np.dtype(dtype).name] * max(np.abs(expected).max(), 1e-3)


def state(seed, size, wide):
    """weight, grad, moment1, moment2 (size,)"""
    weight, grad, moment1, moment2 = (random(10 * seed + i, size, dtype=wide) for i in range(4))
    return [weight, grad, moment1, np.square(moment2)]


@TYPES
def test_adamw(cuda, dtype):
    """Several tensors at once over three steps: some unaligned, one longer than a chunk, one empty, one without a value."""
    wide = wide_of(dtype)
    cases = [(1, 0, 0.1), (0, 0, 0.1), (7, 1, 0.0), (1030, 0, 0.01), (16389, 0, 0.1), (100, 3, 0.2)]
    exact, updates = [], []
    for number, (size, skip, decay) in enumerate(cases):
        arrays = state(number, size, wide)
        moved = [cuda.from_host(np.concatenate([np.full(skip, 9, wide), array]))[skip:] for array in arrays]
        has_value = dtype != wide and number != 3
        value = cuda.from_host(np.full(size + skip, np.nan, dtype))[skip:] if has_value else None
        updates.append(Update(*moved, value, decay))
        exact.append(Update(*[array.astype(np.float64) for array in arrays], None, decay))
    for step in (1, 2, 30):
        cuda.adamw(updates, **STEP, step=step, scale=0.5)
        REFERENCE.adamw(exact, **STEP, step=step, scale=0.5)
    for ours, theirs in zip(updates, exact):
        for array, expected in zip(ours[:4], theirs[:4]):
            close(cuda.to_host(array), expected, wide)
        if ours.value is not None:
            assert np.array_equal(cuda.to_host(ours.value), cuda.to_host(ours.weight).astype(dtype))


def test_adamw_sees_that_a_list_has_changed(cuda):
    first, second = ([cuda.from_host(array) for array in state(seed, 20, np.float32)] for seed in (1, 2))
    updates = [Update(*first, None, 0.0)]
    cuda.adamw(updates, **STEP, step=1, scale=1.0)
    before = cuda.to_host(first[0])
    updates[0] = Update(*second, None, 0.0)
    cuda.adamw(updates, **STEP, step=1, scale=1.0)
    assert np.array_equal(cuda.to_host(first[0]), before)
    assert not np.array_equal(cuda.to_host(second[0]), state(2, 20, np.float32)[0])
    cuda.adamw([], **STEP, step=1, scale=1.0)


@TYPES
def test_square_sum(cuda, dtype):
    shapes = [(1,), (0,), (3, 5), (16384,), (16385,), (7, 1003)]
    arrays = [random(i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]
    moved = [cuda.from_host(array) for array in arrays] + [cuda.from_host(random(9, 50, dtype=dtype))[1:]]
    arrays.append(random(9, 50, dtype=dtype)[1:])
    total = cuda.square_sum(moved)
    exact = sum(np.square(array.astype(np.float64)).sum() for array in arrays)
    assert isinstance(total, float) and abs(total - exact) <= 1e-12 * exact
    assert cuda.square_sum(moved) == total


def test_square_sum_of_several_types_of_none_and_of_nan(cuda):
    arrays = [random(1, 40, dtype=np.float32), random(2, 3, 11, dtype=np.float64)]
    exact = REFERENCE.square_sum(arrays)
    assert abs(cuda.square_sum([cuda.from_host(array) for array in arrays]) - exact) <= 1e-12 * exact
    assert cuda.square_sum([]) == 0.0 and cuda.square_sum([cuda.empty((0, 3), np.float32)]) == 0.0
    assert np.isnan(cuda.square_sum([cuda.from_host(np.array([1.0, np.nan, 2.0], np.float32))]))


@TYPES
@pytest.mark.parametrize("rows, width, row, column", [(1, 1, 0, 0), (5, 33, 3, 2), (3, 130, 2**33, 5)])
def test_normal(cuda, dtype, rows, width, row, column):
    key, std, exact = 0xFEDCBA9876543210, 0.02, np.empty((rows, width))
    REFERENCE.normal(exact, key, row, column, 1000, std)
    buffer = cuda.from_host(np.full((rows, width + 3), np.nan, dtype))
    cuda.normal(buffer[:, :width], key, row, column, 1000, std)
    out = cuda.to_host(buffer).astype(np.float64)
    assert np.isnan(out[:, width:]).all()
    tolerance = {"float32": 1e-6, "float64": 1e-12, "bfloat16": 1e-2, "float16": 2e-3}[dtype.name]
    assert np.abs(out[:, :width] - exact).max() <= tolerance * std


def test_normal_of_many_words_is_that_of_the_reference(cuda):
    exact, out = np.empty((20, 500)), cuda.empty((20, 500), np.float64)
    REFERENCE.normal(exact, 3, 0, 0, 500, 1.0)
    cuda.normal(out, 3, 0, 0, 500, 1.0)
    assert np.abs(cuda.to_host(out) - exact).max() <= 1e-13


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (2, 5000), (600, 3), (0, 4)])
def test_tensor_hash(cuda, dtype, shape):
    array = (100 * np.random.default_rng(1).standard_normal(shape)).astype(dtype)
    padded = np.zeros((shape[0], shape[1] + 3), dtype)
    padded[:, : shape[1]] = array
    exact = REFERENCE.tensor_hash(array, 2**40 + 1, 3, 6000)
    assert cuda.tensor_hash(cuda.from_host(array), 2**40 + 1, 3, 6000) == exact
    assert cuda.tensor_hash(cuda.from_host(padded)[:, : shape[1]], 2**40 + 1, 3, 6000) == exact


def test_tensor_hash_of_one_dim(cuda):
    array = random(2, 77, dtype=np.float32)
    assert cuda.tensor_hash(cuda.from_host(array), 0, 4, 100) == REFERENCE.tensor_hash(array, 0, 4, 100)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", [1, 2, 4097])
def test_hash_of_replicas(cuda, dtype, size):
    """As ranks on CPUs have it, for 16-bit floats too."""
    from mpillm.run.replicas import array_hash
    array = np.random.default_rng(3).standard_normal(size).astype(np.dtype(dtype))
    assert array_hash(cuda, cuda.from_host(array)) == array_hash(REFERENCE, array)
