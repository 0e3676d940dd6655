"""Every operation but attention: the C++ form against the NumPy form, odd sizes, strided views, NaN and inf."""

import numpy as np
import pytest
from backend_cases import CPU, DTYPES, REFERENCE, needs_kernels, random, same, same_all, wide

from mpillm.backend import Update

pytestmark = pytest.mark.parametrize("dtype", DTYPES)
SIZES = [(1, 1), (0, 5), (3, 0), (1, 768), (131, 77), (300, 64)]  # rows, width


def both(run):
    """The results of run(backend) in the C++ and the NumPy form, as pairs."""
    return zip(run(CPU), run(REFERENCE))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 7), (65, 1, 33), (0, 4, 3), (4, 0, 3), (4, 3, 0), (130, 70, 90)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_matmul(dtype, sizes, accumulate):
    m, k, n = sizes
    a, b, start = random(0, m, k, dtype=dtype), random(1, k, n, dtype=dtype), random(2, m, n, dtype=dtype)
    expected = a.astype(np.float64) @ b.astype(np.float64) + (start if accumulate else 0)
    for left in (a, np.ascontiguousarray(a.T).T, wide(a), wide(np.ascontiguousarray(a.T)).T, np.repeat(a, 2, 1)[:, ::2]):
        for right in (b, np.ascontiguousarray(b.T).T, wide(b), wide(np.ascontiguousarray(b.T)).T):
            for out in (start.copy(), wide(start)):
                assert CPU.matmul(left, right, out, accumulate) is out
                same(out, expected.astype(dtype))
                if out.base is not None:
                    assert (out.base[:, n:] == 99.0).all()
    same(CPU.matmul(a, b), (a.astype(np.float64) @ b.astype(np.float64)).astype(dtype))


@needs_kernels
@pytest.mark.parametrize("size", SIZES)
def test_adds(dtype, size):
    def run(backend):
        y, x, bias, dbias = random(0, *size, dtype=dtype), random(1, *size, dtype=dtype), random(2, size[1], dtype=dtype), random(3, size[1], dtype=dtype)
        strided, sums = wide(y), dbias.copy()
        backend.add(y, x)
        backend.add_bias(y, bias)
        backend.sum_rows(x, dbias)
        backend.add_bias(strided, bias)
        backend.sum_rows(wide(x), sums)
        return y, dbias, strided, sums

    same_all(both(run))


@needs_kernels
@pytest.mark.parametrize("size", [s for s in SIZES if s[1]])
def test_norms(dtype, size):
    x, dy = random(0, *size, dtype=dtype), random(1, *size, dtype=dtype)
    weight, bias = random(2, size[1], dtype=dtype), random(3, size[1], dtype=dtype)

    def run(backend):
        dweight, dbias, dgain = weight.copy(), bias.copy(), weight.copy()
        y, rstd = backend.rms_norm(x, weight, 1e-5)
        dx = backend.rms_norm_backward(dy, x, weight, rstd, dgain)
        z, mean, rstd2 = backend.layer_norm(x, weight, bias, 1e-5)
        dx2 = backend.layer_norm_backward(dy, x, weight, mean, rstd2, dweight, dbias)
        return y, rstd, dx, dgain, z, mean, rstd2, dweight, dbias, dx2

    same_all(both(run))


@needs_kernels
@pytest.mark.parametrize("size", [(1, 1, 1, 2), (2, 65, 5, 6), (2, 7, 3, 64), (1, 0, 2, 4)])
def test_rope(dtype, size):
    batch, tokens, heads, width = size
    x, turn = random(0, *size, dtype=dtype), random(1, tokens, width // 2, dtype=dtype)
    cos, sin = np.cos(turn), np.sin(turn)

    def run(backend):
        plain, view, inverse = x.copy(), wide(x.reshape(batch, tokens, heads * width)).reshape(size), x.copy()
        for array in (plain, view, inverse):
            backend.rope(array, cos, sin)
        backend.rope(inverse, cos, sin, inverse=True)
        return plain, view, inverse

    same_all(both(run))
    same(run(CPU)[2], x)


@needs_kernels
@pytest.mark.parametrize("size", SIZES)
def test_gelu(dtype, size):
    x, dy, bias = 3 * random(0, *size, dtype=dtype), random(1, *size, dtype=dtype), random(2, size[1], dtype=dtype)

    def run(backend):
        u, v = x.copy(), x.copy()
        y, z = backend.gelu(u, bias), backend.gelu(v)
        return y, z, u, v, backend.gelu_backward(dy.copy(), u)

    same_all(both(run))


def test_pointwise_at_the_ends_of_the_range(dtype):
    x = np.array([[-1000.0, -90.0, -20.0, -1e-10, 0.0, 1e-10, 20.0, 90.0, 1000.0, np.nan]], dtype)
    with np.errstate(all="ignore"):
        y, slope = CPU.gelu(x.copy()), CPU.gelu_backward(np.ones_like(x), x)
        z = CPU.swiglu(x, np.ones_like(x))
    for values in (y, z):
        same(values[0, [0, 4, 8, 9]], np.array([0.0, 0.0, 1000.0, np.nan], dtype))
    assert np.isnan(slope[0, 9]) and np.isfinite(slope[0, 1:8]).all()


@needs_kernels
@pytest.mark.parametrize("size", SIZES)
def test_swiglu(dtype, size):
    both_halves = 3 * random(0, size[0], 2 * size[1], dtype=dtype)
    gate, up, dy = both_halves[:, : size[1]], both_halves[:, size[1] :], random(1, *size, dtype=dtype)

    def run(backend):
        gradients = np.empty_like(both_halves)
        backend.swiglu_backward(dy, gate, up, gradients[:, : size[1]], gradients[:, size[1] :])
        return backend.swiglu(gate, up), gradients

    same_all(both(run))


@needs_kernels
@pytest.mark.parametrize("size", [(1, 1), (0, 5), (4, 0), (5, 63), (33, 1000)])
def test_cross_entropy(dtype, size):
    rows, columns = size
    logits = 5 * random(0, *size, dtype=dtype)
    targets = np.random.default_rng(1).integers(0, columns + 6, rows)  # some lie outside the slab 3..3+columns
    factor, coefficient = random(2, rows, dtype=dtype), random(3, rows, dtype=dtype)

    def run(backend):
        exps = wide(logits)
        stats = backend.cross_entropy_stats(exps, targets, 3)
        gradient = exps.copy()
        backend.cross_entropy_gradient(gradient, targets, factor, coefficient, 3)
        return *stats, exps, gradient

    same_all(both(run))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_cross_entropy_passes_on_what_is_not_finite(dtype, bad):
    logits = random(0, 3, 130, dtype=dtype)
    logits[1, 77] = bad
    _, row_sum, _ = CPU.cross_entropy_stats(logits, np.zeros(3, np.int64), 0)
    assert np.array_equal(np.isnan(row_sum), [False, True, False])


@needs_kernels
@pytest.mark.parametrize("first, ids_type", [(0, np.int64), (7, np.int32)])
@pytest.mark.parametrize("rows, table_rows", [(0, 5), (1, 1), (200, 11), (9, 0)])
def test_embedding(dtype, first, ids_type, rows, table_rows):
    ids = np.random.default_rng(0).integers(0, 20, rows).astype(ids_type)
    table, dy = random(1, table_rows, 37, dtype=dtype), random(2, rows, 37, dtype=dtype)

    def run(backend):
        dtable = wide(table)
        backend.embedding_backward(ids, dy, dtable, first)
        return backend.embedding(ids, table, first), backend.embedding(ids, wide(table), first), dtable

    same_all(both(run))


@needs_kernels
@pytest.mark.parametrize("elements", [0, 1, 77, 50000])
def test_adamw(dtype, elements):
    def run(backend):
        weight, grad, moment1, moment2 = (random(i, elements, dtype=dtype) for i in range(4))
        moment2 = np.abs(moment2)
        for step in (1, 2):
            updates = [Update(*(x[part] for x in (weight, grad, moment1, moment2)), None, decay)
                       for part, decay in ((slice(0, elements // 3), 0.1), (slice(elements // 3, None), 0.0))]
            backend.adamw(updates, 1e-2, 0.9, 0.95, 1e-8, step, 0.5)
        return weight, grad, moment1, moment2

    same_all(both(run))


def test_adamw_is_the_paper_s(dtype):
    weight, moment1, moment2 = np.array([2.0], dtype), np.zeros(1, dtype), np.zeros(1, dtype)
    CPU.adamw([Update(weight, np.array([3.0], dtype), moment1, moment2, None, 0.01)], 0.1, 0.9, 0.99, 0.0, 1, 1.0)
    same_all([(weight, np.array([2.0 * 0.999 - 0.1], dtype)), (moment1, np.array([0.3], dtype)), (moment2, np.array([0.09], dtype))])


@pytest.mark.parametrize("elements", [0, 1, 100003])
def test_square_sum(dtype, elements):
    x = random(0, elements, dtype=dtype)
    exact = float((x.astype(np.longdouble) ** 2).sum())
    for backend in (CPU, REFERENCE):
        assert abs(backend.square_sum([x[:elements // 3], x[elements // 3:]]) - exact) <= 1e-13 * max(1.0, exact)
        if elements:
            for bad in (np.nan, np.inf):
                y = x.copy()
                y[elements // 2] = bad
                assert np.isnan(bad) == np.isnan(backend.square_sum([x, y])) and not np.isfinite(backend.square_sum([x, y]))


def test_tensor_hash_is_additive_over_any_cut(dtype):
    x = random(0, 37, 91, dtype=dtype)
    for backend in (CPU, REFERENCE):
        whole = backend.tensor_hash(x, 0, 0, 91)
        cuts = [(slice(0, 10), slice(0, 91)), (slice(10, 37), slice(0, 33)), (slice(10, 37), slice(33, 33)), (slice(10, 37), slice(33, 91))]
        parts = sum(backend.tensor_hash(x[r, c], r.start, c.start, 91) for r, c in cuts)
        assert parts % 2**64 == whole == REFERENCE.tensor_hash(x, 0, 0, 91)
        assert whole != backend.tensor_hash(x[::-1].copy(), 0, 0, 91)


def test_memory(dtype):
    dirty = CPU.empty((300, 1000), dtype)
    dirty[...] = 1.0
    del dirty
    assert not CPU.zeros((300, 1000), dtype).any()
    x = CPU.from_host(random(0, 3, 4, dtype=dtype).T)
    y = CPU.empty(x.shape, dtype)
    CPU.copy(y, x)
    CPU.synchronize()
    assert np.array_equal(CPU.to_host(y), x)


@needs_kernels
def test_results_do_not_depend_on_threads(dtype):
    ids, dy = np.random.default_rng(0).integers(0, 7, 3000), random(1, 3000, 37, dtype=dtype)
    weight = random(2, 37, dtype=dtype)

    def run(threads):
        CPU.set_threads(threads)
        try:
            dtable, dbias, dweight = np.zeros((7, 37), dtype), np.zeros(37, dtype), np.zeros(37, dtype)
            CPU.embedding_backward(ids, dy, dtable)
            CPU.add_rows(dtable, ids, dy, dy[:, 0].copy())
            CPU.sum_rows(dy, dbias)
            y, rstd = CPU.rms_norm(dy, weight, 1e-5)
            dx = CPU.rms_norm_backward(dy, dy, weight, rstd, dweight)
            return dtable, dbias, dweight, y, dx, np.array(CPU.square_sum([dy])), CPU.gelu(dy.copy())
        finally:
            CPU.set_threads(1)

    for one, two in zip(run(1), run(2)):
        assert np.array_equal(one, two)
