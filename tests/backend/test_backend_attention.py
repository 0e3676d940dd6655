"""Attention: the C++ form against the NumPy form, and the backward against float64 finite differences."""

import numpy as np
import pytest
from backend_cases import CPU, DTYPES, REFERENCE, needs_kernels, random, same, same_all

from mpillm.backend import Dropout

# B, T, S, H, K, D, causal
CASES = [
    (1, 1, 1, 1, 1, 6, True),
    (2, 65, 65, 5, 5, 6, True),
    (2, 65, 65, 6, 2, 16, True),
    (1, 100, 300, 4, 2, 64, True),
    (2, 200, 200, 2, 2, 64, False),
    (3, 1, 33, 5, 1, 8, True),
    (1, 2, 450, 2, 1, 8, False),
    (1, 30, 20, 2, 1, 8, True),
    (1, 500, 450, 2, 1, 20, False),
    (1, 420, 420, 1, 1, 80, True),
]


def arrays(case, dtype, fused=True):
    """q, k, v, dout; q, k and v as views of one buffer where their tokens match."""
    batch, queries, keys, heads, kv_heads, width, _ = case
    dout = random(1, batch, queries, heads, width, dtype=dtype)
    if queries != keys or not fused:
        shapes = [(queries, heads), (keys, kv_heads), (keys, kv_heads)]
        return *(random(2 + i, batch, t, h, width, dtype=dtype) for i, (t, h) in enumerate(shapes)), dout
    return *views(random(0, batch, queries, (heads + 2 * kv_heads) * width, dtype=dtype), case), dout


def views(buffer, case):
    batch, tokens, _, heads, kv_heads, width, _ = case
    cuts = np.cumsum([heads * width, kv_heads * width])
    parts = np.split(buffer, cuts, axis=2)
    return [part.reshape(batch, tokens, -1, width) if part.base is None else part.view() for part in as_heads(parts, width)]


def as_heads(parts, width):
    """(B, T, h * D) views as (B, T, h, D) views of the same memory."""
    for part in parts:
        batch, tokens, columns = part.shape
        strides = *part.strides[:2], width * part.itemsize, part.itemsize
        yield np.lib.stride_tricks.as_strided(part, (batch, tokens, columns // width, width), strides)


def mask_of(case):
    batch, queries = case[:2]
    return Dropout(0.3, 2**63 + 3, 7, np.arange(batch) + 2**32, np.arange(queries) + 5, 3)


@needs_kernels
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forms_agree(case, dtype, dropped):
    q, k, v, dout = arrays(case, dtype)
    mask, causal, scale = mask_of(case) if dropped else None, case[6], 0.3
    results = []
    for backend in (CPU, REFERENCE):
        out, lse = backend.attention(q, k, v, scale, causal, mask)
        gradients = [np.full(x.shape, 7.0, dtype) for x in (q, k, v)]
        backend.attention_backward(dout, q, k, v, out, lse, *gradients, scale, causal, mask)
        results.append((out, lse, *gradients))
    same_all(zip(*results))


@needs_kernels
def test_gradients_go_into_strided_views():
    case = (2, 70, 70, 4, 2, 10, True)
    q, k, v, dout = arrays(case, np.float64)
    buffer = np.full((2, 70, 80), 7.0)
    dq, dk, dv = views(buffer, case)
    out, lse = CPU.attention(q, k, v, 0.3)
    CPU.attention_backward(dout, q, k, v, out, lse, dq, dk, dv, 0.3)
    expected = [np.empty_like(x) for x in (q, k, v)]
    REFERENCE.attention_backward(dout, q, k, v, out, lse, *expected, 0.3)
    same_all(zip((dq, dk, dv), expected))
    same(buffer, np.concatenate([x.reshape(2, 70, -1) for x in expected], axis=2))


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("case", [(1, 5, 5, 2, 2, 4, True), (2, 4, 7, 4, 2, 6, True), (1, 9, 9, 5, 1, 6, False)], ids=str)
def test_backward_against_finite_differences(case, dropped):
    q, k, v, dout = arrays(case, np.float64, fused=False)
    mask, causal = mask_of(case) if dropped else None, case[6]
    out, lse = CPU.attention(q, k, v, 0.4, causal, mask)
    gradients = [np.empty_like(x) for x in (q, k, v)]
    CPU.attention_backward(dout, q, k, v, out, lse, *gradients, 0.4, causal, mask)
    step = 1e-5
    for x, dx in zip((q, k, v), gradients):
        direction = random(9, *x.shape, dtype=np.float64)
        values = []
        for sign in (1, -1):
            x += sign * step * direction
            values.append((CPU.attention(q, k, v, 0.4, causal, mask)[0] * dout).sum())
            x -= sign * step * direction
        assert abs((values[0] - values[1]) / (2 * step) - (dx * direction).sum()) < 1e-7


def test_dropout_does_not_depend_on_which_rank_holds_the_heads():
    case = (1, 40, 40, 4, 4, 8, True)
    q, k, v, _ = arrays(case, np.float64, fused=False)
    mask = mask_of(case)
    whole, _ = CPU.attention(q, k, v, 0.3, True, mask)
    part, _ = CPU.attention(q[:, :, 2:], k[:, :, 2:], v[:, :, 2:], 0.3, True, mask._replace(first=mask.first + 2))
    same(part, whole[:, :, 2:])


def test_generation_gives_the_rows_of_the_whole():
    case = (2, 70, 70, 4, 2, 16, True)
    q, k, v, _ = arrays(case, np.float64)
    whole, lse = CPU.attention(q, k, v, 0.25)
    for t in (0, 1, 33, 69):
        out, one = CPU.attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], 0.25)
        same(out, whole[:, t : t + 1])
        same(one, lse[:, :, t : t + 1])


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_and_nan(dtype):
    q, k, v, _ = arrays((1, 50, 50, 1, 1, 8, True), dtype, fused=False)
    q *= 300
    same(CPU.attention(q, k, v, 1.0)[0], REFERENCE.attention(q, k, v, 1.0)[0])
    v[0, 20] = np.nan
    out, _ = CPU.attention(q, k, v, 1.0)
    assert np.isnan(out[0, 20:]).all()


@needs_kernels
def test_threads_do_not_change_attention():
    q, k, v, dout = arrays((2, 130, 130, 4, 2, 16, True), np.float32)
    results = []
    for threads in (1, 2):
        CPU.set_threads(threads)
        try:
            out, lse = CPU.attention(q, k, v, 0.25)
            gradients = [np.empty_like(x) for x in (q, k, v)]
            CPU.attention_backward(dout, q, k, v, out, lse, *gradients, 0.25)
        finally:
            CPU.set_threads(1)
        results.append((out, lse, *gradients))
    assert all(np.array_equal(one, two) for one, two in zip(*results))
