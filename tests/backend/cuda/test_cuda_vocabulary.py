"""Embedding and cross entropy of the CUDA backend against the NumPy form in float64, on the same rounded inputs."""

import ml_dtypes
import numpy as np
import pytest

from mpillm.backend import wide_of
from mpillm.backend.reference import Reference

REFERENCE = Reference()
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 1e-2, "float16": 2e-3}    # of the largest element
TYPES = pytest.mark.parametrize("dtype", [np.dtype(t) for t in (np.float32, np.float64, ml_dtypes.bfloat16, np.float16)], ids=str)
SHAPES = pytest.mark.parametrize("rows, columns", [(1, 1), (3, 33), (5, 1000), (2, 4097)])


def random(seed, *shape, dtype, size=1.0):
    return (size * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def close(array, expected, dtype):
    array, expected = np.asarray(array, np.float64), np.asarray(expected, np.float64)
    assert array.shape == expected.shape and np.isfinite(array).all()
    if array.size:
        assert np.abs(array - expected).max() <= TOLERANCE[np.dtype(dtype).name] * max(np.abs(expected).max(), 1e-3)


def padded(cuda, x, columns):
    """A view of x (N, V) with longer rows on the device, and the buffer whose rest is poisoned."""
    buffer = np.full((len(x), columns), np.nan, x.dtype)
    buffer[:, : x.shape[1]] = x
    buffer = cuda.from_host(buffer)
    return buffer[:, : x.shape[1]], buffer


def case(rows, columns, dtype):
    """logits (N, V), targets (N,), scale (N,)"""
    rng, wide = np.random.default_rng(5), wide_of(dtype)
    return random(1, rows, columns, dtype=dtype, size=3.0), rng.integers(0, columns, rows), rng.random(rows).astype(wide)


def paddings(columns):
    return [columns, -(-columns // 64) * 64, columns + 1]


@TYPES
@SHAPES
def test_cross_entropy(cuda, dtype, rows, columns):
    logits, targets, scale = case(rows, columns, dtype)
    exact, loss = logits.astype(np.float64), np.full(1, 0.25)
    REFERENCE.cross_entropy(exact, targets, scale.astype(np.float64), loss)
    for length in paddings(columns):
        view, buffer = padded(cuda, logits, length)
        total = cuda.from_host(np.full(1, 0.25))
        cuda.cross_entropy(view, cuda.from_host(targets), cuda.from_host(scale), total)
        out = cuda.to_host(buffer)
        close(out[:, :columns], exact, dtype)
        assert np.isnan(out[:, columns:].astype(np.float32)).all()
        close(cuda.to_host(total), loss, wide_of(dtype))


def test_cross_entropy_without_gradient_is_the_same_loss_every_time(cuda):
    logits, targets, scale = case(7, 333, np.dtype(np.float32))
    losses = []
    for gradient in (True, False, False):
        total = cuda.zeros((1,), np.float64)
        cuda.cross_entropy(cuda.from_host(logits), cuda.from_host(targets), cuda.from_host(scale), total, gradient=gradient)
        losses.append(cuda.to_host(total)[0])
    assert losses[0] == losses[1] == losses[2] != 0


@TYPES
def test_a_row_that_does_not_count_has_no_gradient_and_no_loss(cuda, dtype):
    logits, targets, scale = case(3, 65, dtype)
    logits[1], scale[1], targets[1] = np.inf, 0.0, -100
    view, total = cuda.from_host(logits), cuda.zeros((1,), np.float64)
    cuda.cross_entropy(view, cuda.from_host(targets), cuda.from_host(scale), total)
    out = cuda.to_host(view).astype(np.float64)
    assert not out[1].any() and np.isfinite(out).all() and np.isfinite(cuda.to_host(total)).all()


def test_cross_entropy_of_large_and_of_excluded_logits(cuda):
    logits = np.array([[1e4, -1e4, 9999.0, -np.inf], [-np.inf, -np.inf, 2.0, -np.inf]], np.float32)
    exact, loss, targets, scale = logits.astype(np.float64), np.zeros(1), np.array([2, 2]), np.ones(2)
    REFERENCE.cross_entropy(exact, targets, scale, loss)
    view, total = cuda.from_host(logits), cuda.zeros((1,), np.float64)
    cuda.cross_entropy(view, cuda.from_host(targets), cuda.from_host(scale.astype(np.float32)), total)
    close(cuda.to_host(view), exact, np.float32)
    close(cuda.to_host(total), loss, np.float32)


def test_a_row_longer_than_what_stays_in_shared_memory(cuda):
    dtype = np.dtype(np.float64)
    logits, targets, scale = case(1, 15001, dtype)
    exact, loss = logits.copy(), np.zeros(1)
    REFERENCE.cross_entropy(exact, targets, scale, loss)
    view, total = cuda.from_host(logits), cuda.zeros((1,), np.float64)
    cuda.cross_entropy(view, cuda.from_host(targets), cuda.from_host(scale), total)
    close(cuda.to_host(view), exact, dtype)
    close(cuda.to_host(total), loss, dtype)


@TYPES
@pytest.mark.parametrize("cuts", [(0, 70), (0, 33, 70), (0, 0, 64, 70)])
def test_cross_entropy_in_parts(cuda, dtype, cuts):
    """The columns in slabs, as ranks hold them: the slabs' gradients and the loss are those of whole rows."""
    logits, targets, scale = case(6, 70, dtype)
    scale[2] = 0.0
    exact, loss = logits.astype(np.float64), np.zeros(1)
    REFERENCE.cross_entropy(exact, targets, scale.astype(np.float64), loss)
    ids, weight, slabs = cuda.from_host(targets), cuda.from_host(scale), list(zip(cuts[:-1], cuts[1:]))
    views = [padded(cuda, logits[:, a:b], b - a + 3) for a, b in slabs]
    stats = [cuda.cross_entropy_stats(view, ids, a) for (view, _), (a, _) in zip(views, slabs)]
    largest = cuda.from_host(np.max([cuda.to_host(row_max) for row_max, _, _ in stats], axis=0))
    parts = [cuda.softmax_parts(row_max, largest, row_sum, target_logit) for row_max, row_sum, target_logit in stats]
    sums = cuda.from_host(np.sum([cuda.to_host(part) for part, _ in parts], axis=0))
    total = cuda.zeros((1,), np.float64)
    cuda.loss_sum(largest, sums[0], sums[1], weight, total)
    close(cuda.to_host(total), loss, wide_of(dtype))
    for (view, buffer), (_, shrink), (a, b) in zip(views, parts, slabs):
        cuda.cross_entropy_gradient(view, ids, cuda.softmax_factor(shrink, sums[0]), weight, a)
        close(cuda.to_host(buffer)[:, : b - a], exact[:, a:b], dtype)


@TYPES
@pytest.mark.parametrize("rows, width, first", [(1, 1, 0), (5, 33, 2), (37, 64, 3), (9, 520, 0)])
def test_embedding(cuda, dtype, rows, width, first):
    table, ids = random(3, 11, width, dtype=dtype), np.random.default_rng(4).integers(0, 16, rows)
    for extra in (0, 3, 8):
        y = cuda.to_host(cuda.embedding(cuda.from_host(ids), padded(cuda, table, width + extra)[0], first))
        assert y.dtype == dtype and np.array_equal(y, REFERENCE.embedding(ids, table, first))


def uneven_ids(n, table_rows):
    """Few ids have most of the places; some ids lie outside of the table."""
    ids = np.minimum(np.random.default_rng(6).zipf(1.3, n) - 1, table_rows + 2)
    ids[::7] = -1
    return ids


@TYPES
@pytest.mark.parametrize("n, table_rows, width, first", [(1, 1, 1, 0), (700, 300, 33, 0), (530, 70000, 64, 5), (200, 9, 296, -1)])
def test_embedding_backward(cuda, dtype, n, table_rows, width, first):
    ids, dy, wide = uneven_ids(n, table_rows) + first, random(7, n, width, dtype=dtype), wide_of(dtype)
    if table_rows > 1000:
        ids[::3] += 65536   # the third digit of the sort
    rows = np.unique(np.clip(ids - first, 0, table_rows - 1))
    exact = np.zeros((table_rows, width))
    exact[rows] = random(8, len(rows), width, dtype=wide)
    dtable = cuda.from_host(exact.astype(wide))
    REFERENCE.embedding_backward(ids, dy.astype(np.float64), exact, first)
    cuda.embedding_backward(cuda.from_host(ids), cuda.from_host(dy), dtable, first)
    close(cuda.to_host(dtable), exact, wide)


RUNS = {"one": [4] * 300, "all": list(range(300)), "chunks": [0] * 16 + [1] * 16 + [2] * 33, "outside": [9] * 40}


@pytest.mark.parametrize("name", RUNS)
def test_embedding_backward_of_runs(cuda, name):
    ids = np.array(RUNS[name])
    dy, exact = random(9, len(ids), 40, dtype=np.float32), np.ones((300 if ids.max() > 9 else 9, 40))
    tables = [cuda.from_host(exact.astype(np.float32)) for _ in range(2)]
    REFERENCE.embedding_backward(ids, dy.astype(np.float64), exact)
    for dtable in tables:
        cuda.embedding_backward(cuda.from_host(ids), cuda.from_host(dy), dtable)
    close(cuda.to_host(tables[0]), exact, np.float32)
    assert np.array_equal(*map(cuda.to_host, tables))


def test_row_order_is_a_stable_sort(cuda):
    ids = np.random.default_rng(10).integers(0, 1000, 1700)
    keys, places = cuda.to_host(cuda.row_order(cuda.from_host(ids), 10, 900))
    rows = np.where((ids >= 10) & (ids < 910), ids - 10, 900)
    order = np.argsort(rows, kind="stable")
    assert np.array_equal(places, order) and np.array_equal(keys, rows[order])


def test_nothing_at_all(cuda):
    empty, ids = cuda.empty((0, 5), np.float32), cuda.empty((0,), np.int64)
    scale, loss = cuda.empty((0,), np.float32), cuda.zeros((1,), np.float64)
    table = cuda.zeros((3, 5), np.float32)
    cuda.cross_entropy(empty, ids, scale, loss)
    stats = cuda.cross_entropy_stats(empty, ids, 0)
    cuda.cross_entropy_gradient(empty, ids, scale, scale, 0)
    cuda.loss_sum(*stats, scale, loss)
    sums, shrink = cuda.softmax_parts(stats[0], *stats)
    assert sums.shape == (2, 0) and cuda.softmax_factor(shrink, scale).shape == (0,)
    assert cuda.embedding(ids, table).shape == (0, 5)
    cuda.embedding_backward(ids, empty, table)
    assert not cuda.to_host(table).any() and cuda.to_host(loss)[0] == 0
