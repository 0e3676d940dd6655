"""Mixture-of-experts operations: definitions, finite differences, the C++ form against the NumPy form."""

import numpy as np
import pytest
from backend_cases import CPU, DTYPES, REFERENCE, needs_kernels, random, same, same_all, wide

BACKENDS = pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=["numpy", "cpu"])
STEP = 1e-6


def slope(value, x, direction):
    """Central difference of value() as x moves along direction."""
    x += STEP * direction
    ahead = value()
    x -= 2 * STEP * direction
    behind = value()
    x += STEP * direction
    return (ahead - behind) / (2 * STEP)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, experts, k", [(0, 3, 2), (1, 1, 1), (37, 5, 5), (101, 8, 2), (64, 13, 3)])
def test_route_is_its_definition(backend, dtype, tokens, experts, k):
    logits = 3 * random(0, tokens, experts, dtype=dtype)
    chosen, weights, probabilities, lse = backend.route(logits.copy(), k)
    exact = np.exp(logits.astype(np.float64))
    same(probabilities, (exact / exact.sum(1, keepdims=True)).astype(dtype))
    same(lse, np.log(exact.sum(1)).astype(dtype))
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    assert chosen.dtype == np.int64 and np.array_equal(chosen, order)
    picked = np.take_along_axis(exact, order, axis=1)
    same(weights, (picked / picked.sum(1, keepdims=True)).astype(dtype))


@BACKENDS
def test_ties_go_to_the_lower_expert(backend):
    logits = np.array([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 3.0, 4.0]])
    assert np.array_equal(backend.route(logits, 3)[0], [[1, 2, 3], [0, 1, 2], [3, 0, 2]])


@BACKENDS
def test_route_of_large_logits_is_finite(backend):
    chosen, weights, probabilities, lse = backend.route(np.array([[1e4, -1e4, 1e4 - 1.0]], np.float32), 2)
    assert np.array_equal(chosen, [[0, 2]]) and lse[0] > 9999 and np.isfinite(weights).all() and np.isfinite(probabilities).all()


@BACKENDS
@pytest.mark.parametrize("through", ["weights", "probabilities", "lse", "all"])
def test_route_backward_against_finite_differences(backend, through):
    logits, direction = random(0, 21, 7, dtype=np.float64), random(1, 21, 7, dtype=np.float64)
    dweights, dprobabilities, dlse = (random(2 + i, *shape, dtype=np.float64) for i, shape in enumerate([(21, 3), (21, 7), (21,)]))
    if through not in ("weights", "all"):
        dweights[...] = 0.0
    dprobabilities = dprobabilities if through in ("probabilities", "all") else None
    dlse = dlse if through in ("lse", "all") else None

    def value():
        _, weights, probabilities, lse = backend.route(logits, 3)
        pairs = (weights, dweights), (probabilities, dprobabilities), (lse, dlse)
        return sum(float((y * dy).sum()) for y, dy in pairs if dy is not None)

    experts, weights, probabilities, _ = backend.route(logits, 3)
    dlogits = backend.route_backward(dweights, dprobabilities, dlse, experts, weights, probabilities)
    assert abs(slope(value, logits, direction) - (dlogits * direction).sum()) < 1e-7


@BACKENDS
def test_no_tokens_are_routed(backend):
    experts, weights, probabilities, lse = backend.route(np.zeros((0, 4), np.float32), 2)
    assert backend.route_backward(weights, probabilities, lse, experts, weights, probabilities).shape == (0, 4)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", [(0, 5), (1, 1), (200, 37), (3, 0), (130, 700)])
def test_forms_of_the_row_operations_agree(dtype, rows, width):
    numbers = np.random.default_rng(0).integers(0, 11, rows)
    shapes = (rows, width), (rows, width), (rows,), (11, width)
    x, other, scale, start = (random(i, *shape, dtype=dtype) for i, shape in enumerate(shapes))
    results = []
    for backend in (CPU, REFERENCE):
        plain, strided, scaled, product = start.copy(), wide(start), start.copy(), x.copy()
        backend.add_rows(plain, numbers, x)
        backend.add_rows(strided, numbers.astype(np.int32), x)
        backend.add_rows(scaled, numbers, x, scale)
        backend.scale_rows(product, scale)
        results.append((plain, strided, scaled, product, backend.row_dot(x, other), backend.embedding(numbers, start)))
    same_all(zip(*results))
    same(results[0][0], results[0][1])
    assert np.array_equal(results[0][5], start[numbers])


@BACKENDS
def test_gradients_of_scaled_sums_of_rows(backend):
    """y[rows] += scale x has dx = scale dy[rows] and dscale = <dy[rows], x>."""
    rows = np.array([4, 0, 4, 4, 2, 6])
    x, scale, dy = random(0, 6, 9, dtype=np.float64), random(1, 6, dtype=np.float64), random(2, 7, 9, dtype=np.float64)

    def value():
        y = np.zeros((7, 9))
        backend.add_rows(y, rows, x, scale)
        return float((y * dy).sum())

    dx = backend.embedding(rows, dy)
    dscale = backend.row_dot(dx, x)
    backend.scale_rows(dx, scale)
    for array, gradient in ((x, dx), (scale, dscale)):
        direction = random(3, *array.shape, dtype=np.float64)
        assert abs(slope(value, array, direction) - (gradient * direction).sum()) < 1e-8
