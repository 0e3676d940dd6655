"""Products on the GPU against float64: every mix of transposed and strided views, wide sums of 16-bit factors, fused biases."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from mpillm.backend.reference import Reference

DTYPES = {"float32": (np.float32, 1e-5), "float64": (np.float64, 1e-12), "bfloat16": (ml_dtypes.bfloat16, 1e-2), "float16": (np.float16, 2e-3)}
REFERENCE = Reference()


@pytest.fixture(params=DTYPES)
def kind(request):
    """(dtype, tolerance)"""
    return DTYPES[request.param]


def random(seed, *shape, dtype):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def views(cuda, host):
    """The same matrix, lying in memory in three ways."""
    rows, columns = host.shape
    wider = np.zeros((rows, columns + 5), host.dtype)
    wider[:, 2:-3] = host
    yield cuda.from_host(host)
    yield cuda.from_host(np.ascontiguousarray(host.T)).T
    yield cuda.from_host(wider)[:, 2:-3]


def same(found, expected, tolerance):
    expected = np.asarray(expected, np.float64)
    difference = np.abs(np.asarray(found, np.float64) - expected).max(initial=0)
    assert difference <= tolerance * max(np.abs(expected).max(initial=0), 1e-30), difference


@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (3, 5, 7), (64, 16, 33), (40, 8, 1), (1, 9, 24)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_matmul(cuda, kind, m, k, n, accumulate):
    dtype, tolerance = kind
    a, b, start = random(0, m, k, dtype=dtype), random(1, k, n, dtype=dtype), random(2, m, n, dtype=dtype)
    expected = a.astype(np.float64) @ b.astype(np.float64) + (start.astype(np.float64) if accumulate else 0)
    for left, right in itertools.product(views(cuda, a), views(cuda, b)):
        for target in (start.astype(np.float32), start) if np.dtype(dtype).itemsize == 2 else (start,):
            wide = cuda.from_host(np.tile(target if accumulate else np.full_like(target, np.nan), (1, 2)))
            for out in (cuda.from_host(target), wide[:, :n]):
                assert cuda.matmul(left, right, out, accumulate) is out
                same(cuda.to_host(out), expected, tolerance)
        if not accumulate:
            same(cuda.to_host(cuda.matmul(left, right)), expected, tolerance)


def test_no_rows_and_nothing_to_add(cuda, kind):
    dtype, _ = kind
    zero, some = cuda.empty((0, 4), dtype), cuda.from_host(random(0, 4, 3, dtype=dtype))
    assert cuda.matmul(zero, some).shape == (0, 3)
    out = cuda.from_host(random(1, 4, 3, dtype=dtype))
    before = cuda.to_host(out)
    cuda.matmul(zero.T, cuda.empty((0, 3), dtype), out, accumulate=True)
    np.testing.assert_array_equal(cuda.to_host(out), before)
    cuda.matmul(zero.T, cuda.empty((0, 3), dtype), out)
    assert not cuda.to_host(out).any()


def test_a_view_without_contiguous_rows_or_columns_is_refused(cuda):
    x = cuda.from_host(random(0, 6, 8, dtype=np.float32))
    with pytest.raises(ValueError, match="neither rows nor columns"):
        cuda.matmul(x[:, ::2], x[:4])


@pytest.mark.parametrize("rows, inner, columns", [(5, 16, 24), (33, 7, 9), (64, 32, 8)])
def test_linear(cuda, kind, rows, inner, columns):
    dtype, tolerance = kind
    x, weight, bias = random(0, rows, inner, dtype=dtype), random(1, columns, inner, dtype=dtype), random(2, columns, dtype=dtype)
    exact = [each.astype(np.float64) for each in (x, weight, bias)]
    on_gpu = [cuda.from_host(each) for each in (x, weight, bias)]
    same(cuda.to_host(cuda.linear(*on_gpu)), REFERENCE.linear(*exact), tolerance)
    same(cuda.to_host(cuda.linear(*on_gpu[:2])), REFERENCE.linear(*exact[:2]), tolerance)
    out = cuda.empty((rows, 2 * columns), dtype)[:, columns:]
    assert cuda.linear(*on_gpu, out=out) is out
    same(cuda.to_host(out), REFERENCE.linear(*exact), tolerance)
    for found, expected in zip(cuda.linear_gelu(*on_gpu), REFERENCE.linear_gelu(*exact)):
        same(cuda.to_host(found), expected, tolerance)


def test_equal_bits_from_run_to_run(cuda, kind):
    dtype, _ = kind
    a, b = cuda.from_host(random(0, 8, 4096, dtype=dtype)), cuda.from_host(random(1, 4096, 16, dtype=dtype))
    first = cuda.to_host(cuda.matmul(a, b))
    for _ in range(3):
        np.testing.assert_array_equal(cuda.to_host(cuda.matmul(a, b)), first)


def test_padded_rows(cuda, kind):
    dtype, tolerance = kind
    x, table = random(0, 6, 8, dtype=dtype), random(1, 37, 8, dtype=dtype)
    logits = cuda.padded((6, 37), dtype)
    assert logits.shape == (6, 37) and logits.strides[0] % 128 == 0
    cuda.matmul(cuda.from_host(x), cuda.from_host(table).T, out=logits)
    same(cuda.to_host(logits), x.astype(np.float64) @ table.astype(np.float64).T, tolerance)


def test_tf32_rounds_only_where_it_is_asked_for(cuda, monkeypatch):
    asked, run = [], cuda.library.run
    monkeypatch.setattr(cuda.library, "run", lambda problem, *rest: asked.append(problem.tf32) or run(problem, *rest))
    a, b = random(0, 64, 128, dtype=np.float32), random(1, 128, 32, dtype=np.float32)
    for tf32 in (False, True):
        monkeypatch.setattr(cuda, "tf32", tf32)
        same(cuda.to_host(cuda.matmul(cuda.from_host(a), cuda.from_host(b))), a.astype(np.float64) @ b, 2e-3 if tf32 else 1e-5)
    assert asked == [False, True]
