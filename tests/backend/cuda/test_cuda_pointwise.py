"""Element by element on the GPU against float64: odd sizes, views with longer rows, unaligned starts."""

import ml_dtypes
import numpy as np
import pytest

from cuda_cases import DTYPES, REFERENCE, TOLERANCES, exact, on, random, same, wide
from mpillm.backend import philox
from mpillm.backend.types import Dropout
from mpillm.model.rope import angles

SIZES = [(0, 4), (4, 0), (1, 1), (3, 33), (130, 64), (67, 100)]


@pytest.fixture(params=TOLERANCES)
def name(request):
    return request.param


def longer(cuda, host, skip):
    """A view of the same elements whose rows are `skip` + 3 apart, from column `skip` on."""
    whole = np.full((len(host), host.shape[1] + skip + 3), np.nan, host.dtype)
    whole[:, skip:skip + host.shape[1]] = host
    return cuda.from_host(whole)[:, skip:skip + host.shape[1]]


@pytest.mark.parametrize("rows, width", SIZES)
def test_sums(cuda, name, rows, width):
    dtype, tolerance = DTYPES[name], TOLERANCES[name]
    y, x, bias = random(0, rows, width, dtype=dtype), random(1, rows, width, dtype=dtype), random(2, width, dtype=dtype)
    start = wide(random(3, width, dtype=dtype))
    found = on(cuda, y)[0]
    cuda.add(found, on(cuda, x)[0])
    same(cuda, found, np.add(*exact(y, x)), tolerance)
    for view in (on(cuda, y)[0], longer(cuda, y, 0), longer(cuda, y, 5)):
        sums = on(cuda, start)[0]
        cuda.sum_rows(view, sums)
        same(cuda, sums, exact(start)[0] + exact(y)[0].sum(axis=0), tolerance)
        cuda.add_bias(view, on(cuda, bias)[0])
        same(cuda, view, np.add(*exact(y, bias)), tolerance)
    views = longer(cuda, y, 1), longer(cuda, x, 2)
    cuda.add(*views)
    same(cuda, views[0], np.add(*exact(y, x)), tolerance)


def test_column_sums_of_many_rows(cuda, name):
    dtype = DTYPES[name]
    dy = random(0, 3000, 40, dtype=dtype)
    results = []
    for _ in range(2):
        sums = cuda.zeros((40,), wide(dy).dtype)
        cuda.sum_rows(on(cuda, dy)[0], sums)
        results.append(cuda.to_host(sums))
    assert results[0].tobytes() == results[1].tobytes()
    np.testing.assert_allclose(results[0], exact(dy)[0].sum(axis=0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("rows, width", SIZES)
def test_gelu(cuda, name, rows, width):
    dtype, tolerance = DTYPES[name], TOLERANCES[name]
    x, bias, dy = random(0, rows, width, dtype=dtype), random(1, width, dtype=dtype), random(2, rows, width, dtype=dtype)
    for b in (None, bias):
        hidden, = exact(x)
        expected = REFERENCE.gelu(hidden, *exact(b))
        found = on(cuda, x)[0]
        same(cuda, cuda.gelu(found, *on(cuda, b)), expected, tolerance)
        same(cuda, found, hidden, tolerance)
    slope = on(cuda, dy)[0]
    assert cuda.gelu_backward(slope, on(cuda, x)[0]) is slope
    same(cuda, slope, REFERENCE.gelu_backward(*exact(dy, x)), tolerance)


@pytest.mark.parametrize("rows, width", SIZES)
def test_swiglu(cuda, name, rows, width):
    dtype, tolerance = DTYPES[name], TOLERANCES[name]
    both, dy = random(0, rows, 2 * width, dtype=dtype), random(1, rows, width, dtype=dtype)
    gate, up = exact(both[:, :width], both[:, width:])
    halves = on(cuda, both)[0]
    same(cuda, cuda.swiglu(halves[:, :width], halves[:, width:]), REFERENCE.swiglu(gate, up), tolerance)
    dgate, dup = np.empty_like(gate), np.empty_like(up)
    REFERENCE.swiglu_backward(exact(dy)[0], gate, up, dgate, dup)
    dboth = cuda.empty(both.shape, dtype)
    cuda.swiglu_backward(on(cuda, dy)[0], halves[:, :width], halves[:, width:], dboth[:, :width], dboth[:, width:])
    same(cuda, dboth, np.concatenate([dgate, dup], axis=1), tolerance)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 6), (2, 7, 4, 64), (0, 3, 2, 4)])
@pytest.mark.parametrize("inverse", [False, True])
def test_rope(cuda, name, shape, inverse):
    dtype, tolerance = DTYPES[name], TOLERANCES[name]
    b, t, h, d = shape
    x = random(0, b, t, h + 3, d, dtype=dtype)
    tables = angles(np.arange(t), d, 10000.0)
    expected, = exact(x)
    REFERENCE.rope(expected[:, :, :h], *tables, inverse)
    found = on(cuda, x)[0]
    cuda.rope(found[:, :, :h], *on(cuda, *(part.astype(wide(x).dtype) for part in tables)), inverse=inverse)
    same(cuda, found, expected, tolerance)


@pytest.mark.parametrize("rows, width, first", [(1, 1, 0), (5, 33, 0), (4, 64, 6), (3, 10, 7)])
def test_dropout_drops_what_the_cpu_drops(cuda, name, rows, width, first):
    dtype = DTYPES[name]
    mask = Dropout(0.3, 2**64 - 12345, 7, np.arange(rows) + 2**31, np.arange(rows) * 3, first)
    found = on(cuda, np.ones((rows, width), dtype))[0]
    cuda.dropout(found, mask)
    np.testing.assert_array_equal(cuda.to_host(found), philox.dropout_factors(mask, width).astype(dtype))


@pytest.mark.parametrize("source", TOLERANCES)
@pytest.mark.parametrize("shape", [(0,), (1,), (1000,), (7, 33)])
def test_copy_rounds_once_between_any_two_types(cuda, name, source, shape):
    host = random(0, *shape, dtype=np.float64).astype(DTYPES[source])
    found = cuda.empty(shape, DTYPES[name])
    cuda.copy(found, on(cuda, host)[0])
    np.testing.assert_array_equal(cuda.to_host(found), host.astype(DTYPES[name]))


def test_copy_of_views(cuda, name):
    host = random(0, 3, 4, 6, 5, dtype=DTYPES[name])
    array = on(cuda, host)[0]
    target = cuda.zeros((4, 3, 2, 5), DTYPES[name])
    cuda.copy(target.swapaxes(0, 1), array[:, :, 1::3])
    np.testing.assert_array_equal(cuda.to_host(target), host[:, :, 1::3].swapaxes(0, 1))
    five = cuda.zeros((3, 2, 2, 6, 5), DTYPES[name])
    cuda.copy(five[:, :, :, ::2], array.reshape(3, 2, 2, 6, 5)[:, :, :, 1::2])
    np.testing.assert_array_equal(cuda.to_host(five)[:, :, :, ::2], host.reshape(3, 2, 2, 6, 5)[:, :, :, 1::2])
    np.testing.assert_array_equal(cuda.to_host(array[:, 1]), host[:, 1])
    with pytest.raises(ValueError, match="copy from shape"):
        cuda.copy(target, array)


def test_whole_numbers_are_copied_and_filled(cuda):
    host = np.arange(24, dtype=np.int64).reshape(4, 6) * 2**40
    array, target = cuda.from_host(host), cuda.empty((6, 4), np.int64)
    cuda.copy(target, array.T)
    np.testing.assert_array_equal(cuda.to_host(target), host.T)
    cuda.fill(target[:, 1:3], 5)
    expected = host.T.copy()
    expected[:, 1:3] = 5
    np.testing.assert_array_equal(cuda.to_host(target), expected)


def test_fill(cuda, name):
    x = cuda.empty((5, 7), DTYPES[name])
    cuda.fill(x, 0)
    assert not cuda.to_host(x).any()
    cuda.fill(x, 2.5)
    cuda.fill(x[:, 1:3], -1)
    expected = np.full((5, 7), 2.5)
    expected[:, 1:3] = -1
    np.testing.assert_array_equal(cuda.to_host(x).astype(np.float64), expected)


def test_bfloat16_keeps_infinities_and_not_a_number(cuda):
    host = np.array([np.inf, -np.inf, np.nan, 3e38, 1e-40], np.float32)
    found = cuda.empty((5,), ml_dtypes.bfloat16)
    cuda.copy(found, cuda.from_host(host))
    np.testing.assert_array_equal(cuda.to_host(found).astype(np.float32), host.astype(ml_dtypes.bfloat16).astype(np.float32))
