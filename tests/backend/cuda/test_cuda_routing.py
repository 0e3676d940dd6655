"""Mixture-of-experts routing of the CUDA backend against the NumPy form in float64."""

import numpy as np
import pytest

from mpillm.backend.reference import Reference

REFERENCE = Reference()
TOLERANCE = {np.float32: 1e-5, np.float64: 1e-12}       # of the largest element
TYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))
SHAPES = pytest.mark.parametrize("tokens, experts, k", [(1, 1, 1), (37, 5, 5), (101, 8, 2), (9, 64, 6), (11, 33, 16), (5, 256, 8)])


def random(seed, *shape, dtype):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def close(array, expected):
    assert array.shape == expected.shape and np.isfinite(array).all()
    assert np.abs(array - expected).max() <= TOLERANCE[array.dtype.type] * max(np.abs(expected).max(), 1e-3)


@TYPES
@SHAPES
def test_route(cuda, dtype, tokens, experts, k):
    logits = 3 * random(0, tokens, experts, dtype=dtype)
    chosen, weights, probabilities, lse = map(cuda.to_host, cuda.route(cuda.from_host(logits), k))
    exact = REFERENCE.route(logits.astype(np.float64), k)
    assert chosen.dtype == np.int64 and np.array_equal(chosen, exact[0])
    assert weights.dtype == probabilities.dtype == lse.dtype == dtype
    for array, expected in zip((weights, probabilities, lse), exact[1:]):
        close(array, expected)


@TYPES
def test_ties_go_to_the_lower_expert(cuda, dtype):
    logits = np.random.default_rng(1).integers(0, 3, (60, 70)).astype(dtype)
    chosen = cuda.to_host(cuda.route(cuda.from_host(logits), 10)[0])
    assert np.array_equal(chosen, np.argsort(-logits, axis=1, kind="stable")[:, :10])


def test_large_logits_and_those_that_exclude_an_expert(cuda):
    logits = np.array([[1e4, -1e4, 1e4 - 1.0, -np.inf], [-np.inf, 0.0, -np.inf, -np.inf]], np.float32)
    chosen, weights, probabilities, lse = map(cuda.to_host, cuda.route(cuda.from_host(logits), 2))
    assert np.array_equal(chosen, [[0, 2], [1, 0]])
    assert all(np.isfinite(array).all() for array in (weights, probabilities, lse)) and weights[1].tolist() == [1.0, 0.0]


@TYPES
@SHAPES
@pytest.mark.parametrize("through", ["weights", "probabilities", "lse", "all"])
def test_route_backward(cuda, dtype, tokens, experts, k, through):
    routed = REFERENCE.route(random(2, tokens, experts, dtype=dtype), k)
    dweights, dprobabilities, dlse = (random(3 + i, *array.shape, dtype=dtype) for i, array in enumerate(routed[1:]))
    dprobabilities = dprobabilities if through in ("probabilities", "all") else None
    dlse = dlse if through in ("lse", "all") else None
    arrays = dweights, dprobabilities, dlse, *routed[:3]
    out = cuda.route_backward(*[None if array is None else cuda.from_host(array) for array in arrays])
    doubled = [array if array is None or array.dtype == np.int64 else array.astype(np.float64) for array in arrays]
    close(cuda.to_host(out), REFERENCE.route_backward(*doubled))


def test_no_tokens(cuda):
    routed = cuda.route(cuda.empty((0, 8), np.float32), 2)
    assert [array.shape for array in routed] == [(0, 2), (0, 2), (0, 8), (0,)]
    dlogits = cuda.route_backward(cuda.empty((0, 2), np.float32), None, None, *routed[:3])
    assert dlogits.shape == (0, 8)
