"""Attention on the GPU against float64: every kernel, grouped heads, edges of tiles, blocks of keys, dropout, views."""

import numpy as np
import pytest

from cuda_cases import DTYPES, REFERENCE, TOLERANCES, exact, on, random, same, wide
from mpillm.backend.types import Dropout

CASES = {   # B, T, S, H, K, D, causal
    "one": (1, 1, 1, 1, 1, 4, True),
    "odd width": (2, 5, 5, 5, 5, 20, True),
    "few keys": (1, 9, 4, 2, 1, 8, True),
    "block of keys": (1, 6, 11, 4, 2, 64, False),
    "decode": (2, 1, 70, 4, 2, 64, True),
    "decode, many keys": (1, 3, 1000, 2, 1, 32, True),
    "decode, shared keys": (2, 1, 300, 8, 2, 128, True),
    "decode, fewer keys than queries": (1, 5, 3, 2, 2, 64, True),
    "tile": (1, 65, 65, 2, 1, 64, True),
    "whole tile": (1, 64, 64, 1, 1, 128, True),
    "more keys": (1, 33, 130, 2, 2, 64, True),
    "all keys": (1, 70, 66, 1, 1, 128, False),
    "two tiles": (1, 130, 130, 1, 1, 64, True),
    "grouped tiles": (2, 150, 150, 4, 2, 128, True),
}


@pytest.fixture(params=TOLERANCES)
def name(request):
    return request.param


@pytest.fixture(autouse=True)
def own(cuda, monkeypatch):
    """Our kernels, where cuDNN's would be taken too (test_cuda_cudnn.py)."""
    monkeypatch.setattr(cuda, "sdpa", None)


def parts(x, heads, kv):
    """Views of queries, keys and values of one buffer (B, T, H + 2 K, D)."""
    return x[:, :, :heads], x[:, :, heads:heads + kv], x[:, :, heads + kv:]


def run(cuda, name, case, dropout=None):
    """(found on the device, expected) of forward and backward."""
    (b, t, s, h, kv, d, causal), dtype = case, DTYPES[name]
    if t == s:
        host = parts(random(0, b, t, h + 2 * kv, d, dtype=dtype), h, kv)
        q, k, v = parts(on(cuda, random(0, b, t, h + 2 * kv, d, dtype=dtype))[0], h, kv)
    else:
        host = random(0, b, t, h, d, dtype=dtype), random(1, b, s, kv, d, dtype=dtype), random(2, b, s, kv, d, dtype=dtype)
        q, k, v = on(cuda, *host)
    dout, scale = random(3, b, t, h, d, dtype=dtype), d ** -0.5
    out, lse = REFERENCE.attention(*exact(*host), scale, causal, dropout)
    dhost = [np.empty(x.shape) for x in host]
    REFERENCE.attention_backward(*exact(dout), *exact(*host), out, lse, *dhost, scale, causal, dropout)
    found_out, found_lse = cuda.attention(q, k, v, scale, causal, dropout)
    if t == s:
        dfound = parts(cuda.empty((b, t, h + 2 * kv, d), dtype), h, kv)
    else:
        dfound = [cuda.empty(x.shape, dtype) for x in host]
    rounded = on(cuda, out.astype(dtype), lse.astype(found_lse.dtype))
    cuda.attention_backward(on(cuda, dout)[0], q, k, v, *rounded, *dfound, scale, causal, dropout)
    return (found_out, found_lse, *dfound), (out, lse, *dhost)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_backward(cuda, name, case):
    found, expected = run(cuda, name, case)
    finite = np.isfinite(expected[1])
    assert (np.isfinite(cuda.to_host(found[1])) == finite).all()
    same(cuda, cuda.from_host(np.where(finite, cuda.to_host(found[1]), 0)), np.where(finite, expected[1], 0), TOLERANCES[name])
    for each, other in zip(found[:1] + found[2:], expected[:1] + expected[2:]):
        same(cuda, each, other, 2 * TOLERANCES[name] if each is not found[0] else TOLERANCES[name], least=0.1)     # a true gradient may be 0


@pytest.mark.parametrize("case", [(2, 7, 7, 4, 2, 20, True), (1, 9, 9, 2, 1, 64, True), (1, 5, 12, 2, 2, 8, False)])
def test_dropout(cuda, name, case):
    b, t, s = case[:3]
    mask = Dropout(0.2, 987654321, 3, np.arange(b) + 5, np.arange(t) + (s - t), 2, 8, s + 8 if s == t else s + 9)
    found, expected = run(cuda, name, case, mask)
    for each, other in zip(found, expected):
        same(cuda, each, other, 2 * TOLERANCES[name])


@pytest.mark.parametrize("kilobytes", [163, 99])
def test_less_shared_memory(cuda, name, kilobytes, monkeypatch):
    """That of an A100: smaller tiles; that of a consumer's GPU: no tiles backward."""
    monkeypatch.setattr(cuda.device, "shared_memory", kilobytes << 10)
    found, expected = run(cuda, name, CASES["grouped tiles"])
    for each, other in zip(found, expected):
        same(cuda, each, other, 2 * TOLERANCES[name])


@pytest.mark.parametrize("width", [64, 128])
def test_scores_that_grow(cuda, name, width):
    """Maxima that grow by much and by little from tile to tile: sums are scaled anew, or are not."""
    t, dtype = 200, DTYPES[name]
    growing = np.concatenate([np.full(64, 0.1), np.full(64, 2.0), np.full(64, 2.5), np.full(8, 20.0)])[:, None, None]
    q, k, v = (random(i, 1, t, 1, width, dtype=dtype) for i in range(3))
    k = (k.astype(np.float64) * growing).astype(dtype)
    found, lse = cuda.attention(*on(cuda, q, k, v), 0.3)
    expected, expected_lse = REFERENCE.attention(*exact(q, k, v), 0.3)
    same(cuda, found, expected, TOLERANCES[name])
    same(cuda, lse, expected_lse, TOLERANCES[name])


@pytest.mark.parametrize("width", [20, 64])
def test_equal_bits_from_run_to_run(cuda, name, width):
    case = (1, 70, 70, 2, 1, width, True)
    one, two = [[cuda.to_host(x).tobytes() for x in run(cuda, name, case)[0]] for _ in range(2)]
    assert one == two


def test_merge(cuda, name):
    dtype = DTYPES[name]
    out, part = random(0, 2, 5, 3, 8, dtype=dtype), random(1, 2, 5, 3, 8, dtype=dtype)
    lse, part_lse = wide(random(2, 2, 3, 5, dtype=dtype)), wide(random(3, 2, 3, 5, dtype=dtype))
    lse[0, 0, 0] = part_lse[0, 1, 1] = lse[1, 2, 3] = part_lse[1, 2, 3] = -np.inf
    expected = exact(out, lse)
    REFERENCE.attention_merge(*expected, *exact(part, part_lse))
    found, found_lse = on(cuda, np.concatenate([out, out], axis=1), lse)
    cuda.attention_merge(found[:, :5], found_lse, *on(cuda, part, part_lse))
    same(cuda, found[:, :5], expected[0], TOLERANCES[name])
    got = cuda.to_host(found_lse)
    np.testing.assert_allclose(got, expected[1].astype(got.dtype), rtol=1e-5)


def test_heads_that_are_too_wide_are_refused(cuda):
    x = cuda.empty((1, 1, 1, 260), np.float32)
    with pytest.raises(ValueError, match="at most 256"):
        cuda.attention(x, x, x, 1.0)
