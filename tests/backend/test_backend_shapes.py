"""The data-free backend: bytes alive and their peak are exact, and results have the shapes and types of the real ones."""

import numpy as np
import pytest
from backend_cases import REFERENCE

from mpillm.backend import Dropout
from mpillm.backend.shapes import Shapes


def test_bytes_live_as_long_as_the_array_or_a_view():
    ops = Shapes()
    x = ops.empty((5, 8), np.float32)
    y = ops.zeros((3,), np.float64)
    assert (ops.live, ops.peak) == (184, 184)
    view = x.reshape(4, 10)[1:, ::2].T
    del x
    assert ops.live == 184
    del view
    assert (ops.live, ops.peak) == (24, 184)
    z = ops.empty((0, 7), np.float32)
    assert (y.shape, z.size, ops.live) == ((3,), 0, 24)
    del y, z
    assert (ops.live, ops.peak) == (0, 184)


def test_arrays_are_alike_but_apart():
    ops = Shapes()
    x, y = ops.empty((2, 3), np.float32), ops.empty((2, 3), np.float32)
    x[...] = 5.0
    assert (y == 1.0).all() and y.dtype == np.float32 and (ops.empty((2,), np.int64) == 1).all()


def test_experts_are_balanced_and_counted():
    ops = Shapes()
    logits = ops.empty((10, 4), np.float32)
    experts, *others = ops.route(logits, 2)
    assert np.array_equal(experts.reshape(-1), np.arange(20) % 4)
    assert ops.live == 160 + 160 + 80 + 160 + 40
    view = experts[3:]
    del experts, others
    assert ops.live == 160 + 160
    del view
    assert ops.live == 160


def calls():
    """(name, arguments) of every operation that blocks, experts and rows of tokens need; arrays of ones."""
    f = np.float32
    x, y, rows, scale = np.ones((6, 8), f), np.ones((5, 8), f), np.array([4, 0, 1, 1, 2, 3]), np.ones(6, f)
    out, lse = np.ones((2, 3, 4, 8), f), np.ones((2, 4, 3), f)
    experts, k_weights, probabilities = np.zeros((6, 2), np.int64), np.ones((6, 2), f), np.ones((6, 3), f)
    yield "dropout", (x, Dropout(0.5, 1, 1, rows, rows))
    yield "attention", (out, out[:, :2, :2], out[:, :2, :2], 0.5, False, Dropout(0.5, 1, 1, rows[:2], rows[:3], 1, 3, 9))
    yield "attention_merge", (out, lse, out.copy(), lse.copy())
    yield "route", (probabilities, 2)
    yield "route_backward", (k_weights, probabilities, scale, experts, k_weights, probabilities)
    yield "route_backward", (k_weights, None, None, experts, k_weights, probabilities)
    yield "embedding", (rows, y)
    yield "embedding_backward", (rows, x, y)
    yield "add_rows", (y, rows, x)
    yield "add_rows", (y, rows, x, scale)
    yield "scale_rows", (x, scale)
    yield "row_dot", (x, x)
    yield "add_rows", (y, rows[:0], x[:0])
    yield "sum_rows", (x[:0], np.ones(8, f))


@pytest.mark.parametrize("name, arguments", list(calls()))
def test_results_have_the_real_shapes(name, arguments):
    found, expected = getattr(Shapes(), name)(*arguments), getattr(REFERENCE, name)(*arguments)
    if expected is None:
        assert found is None
        return
    found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("dropout", (np.ones((6, 8)), Dropout(0.5, 1, 1, np.arange(2), np.arange(3)))),
        ("attention_merge", (np.ones((2, 3, 4, 8)), np.ones((2, 4, 3)), np.ones((2, 3, 4, 8)), np.ones((2, 3, 4)))),
        ("add_rows", (np.ones((5, 8)), np.arange(4), np.ones((5, 8)))),
        ("add_rows", (np.ones((5, 8)), np.arange(5), np.ones((5, 8)), np.ones(4))),
        ("scale_rows", (np.ones((5, 8)), np.ones(8))),
        ("row_dot", (np.ones((5, 8)), np.ones((5, 7)))),
        ("add", (np.ones((5, 8)), np.ones((5, 7)))),
        ("rope", (np.ones((2, 5, 3, 8)), np.ones((6, 4)), np.ones((6, 4)))),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, arguments):
    with pytest.raises(ValueError):
        getattr(Shapes(), name)(*arguments)
