"""Rows of a mixture of experts on the GPU against float64."""

import numpy as np
import pytest

from cuda_cases import DTYPES, REFERENCE, TOLERANCES, exact, on, random, same, wide


@pytest.fixture(params=TOLERANCES)
def name(request):
    return request.param


@pytest.mark.parametrize("rows, n, width", [(1, 1, 1), (5, 13, 33), (7, 300, 64), (4, 0, 8), (300, 3, 16)])
@pytest.mark.parametrize("scaled", [False, True])
def test_add_rows(cuda, name, rows, n, width, scaled):
    dtype = DTYPES[name]
    y, x, scale = random(0, rows, width, dtype=dtype), random(1, n, width, dtype=dtype), wide(random(2, n, dtype=dtype)) if scaled else None
    places = np.random.default_rng(3).integers(0, rows, n)
    expected, = exact(y)
    REFERENCE.add_rows(expected, places, *exact(x, scale))
    found = cuda.from_host(np.concatenate([y, y], axis=1))[:, width:]
    cuda.add_rows(found, cuda.from_host(places), *on(cuda, x, scale))
    same(cuda, found, expected, TOLERANCES[name])


@pytest.mark.parametrize("rows, width", [(1, 1), (5, 33), (70, 64), (0, 4)])
def test_scale_rows_and_row_dot(cuda, name, rows, width):
    dtype = DTYPES[name]
    a, b, scale = random(0, rows, width, dtype=dtype), random(1, rows, width, dtype=dtype), wide(random(2, rows, dtype=dtype))
    same(cuda, cuda.row_dot(*on(cuda, a, b)), REFERENCE.row_dot(*exact(a, b)), TOLERANCES[name])
    expected, found = exact(a)[0], on(cuda, a)[0]
    REFERENCE.scale_rows(expected, *exact(scale))
    cuda.scale_rows(found, *on(cuda, scale))
    same(cuda, found, expected, TOLERANCES[name])
