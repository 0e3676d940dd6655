"""Attention over blocks of the keys, merged, is attention over all of them: with dropout, forward and backward."""

import numpy as np
import pytest
from backend_cases import CPU, DTYPES, REFERENCE, needs_kernels, random, same, same_all, wide

from mpillm.backend import Dropout

BACKENDS = pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=["numpy", "cpu"])
SCALE = 0.3
# tokens, cuts of the tokens, H, K, D: odd offsets, slabs of one token, slabs longer than a tile of keys
CASES = [
    (23, (5, 6, 13), 4, 2, 6),
    (450, (33, 34, 101, 390), 2, 1, 8),
    (9, (3,), 1, 1, 5),
]


def slabs(tokens, cuts):
    return [slice(start, end) for start, end in zip((0, *cuts), (*cuts, tokens))]


def whole_and_mask(case, dtype, dropped):
    """q, k, v, dout of two samples and the dropout of the whole sequence."""
    tokens, _, heads, kv_heads, width = case
    arrays = [random(i, 2, tokens, h, width, dtype=dtype) for i, h in enumerate((heads, kv_heads, kv_heads, heads))]
    mask = Dropout(0.3, 2**63 + 3, 7, np.arange(2) + 2**32, np.arange(tokens) + 5, 3)
    return *arrays, mask if dropped else None


def mask_of_block(mask, queries, keys, tokens):
    return mask and mask._replace(positions=mask.positions[queries], first_key=keys.start, keys=tokens)


def merged(backend, q, k, v, mask, queries, blocks, causal):
    """Attention of a slab of queries over the blocks of keys, one after the other; the last is the causal one."""
    tokens, part = k.shape[1], q[:, queries]
    out, lse = np.zeros_like(part), np.full((len(q), q.shape[2], part.shape[1]), -np.inf, q.dtype)
    for keys in blocks:
        block_mask = mask_of_block(mask, queries, keys, tokens)
        found = backend.attention(part, k[:, keys], v[:, keys], SCALE, causal and keys == queries, block_mask)
        backend.attention_merge(out, lse, *found)
    return out, lse


def blocks_of(queries, all_slabs, causal):
    return [keys for keys in all_slabs if not causal or keys.start <= queries.start]


@BACKENDS
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_blocks_are_the_whole(backend, case, causal, dropped, dtype):
    q, k, v, _, mask = whole_and_mask(case, dtype, dropped)
    out, lse = backend.attention(q, k, v, SCALE, causal, mask)
    for queries in slabs(*case[:2]):
        for blocks in (blocks_of(queries, slabs(*case[:2]), causal), blocks_of(queries, slabs(*case[:2]), causal)[::-1]):
            part_out, part_lse = merged(backend, q, k, v, mask, queries, blocks, causal)
            same_all([(part_out, out[:, queries]), (part_lse, lse[:, :, queries])])


@BACKENDS
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_blocks_add_up(backend, case, causal, dropped):
    q, k, v, dout, mask = whole_and_mask(case, np.float64, dropped)
    out, lse = backend.attention(q, k, v, SCALE, causal, mask)
    expected = [np.empty_like(x) for x in (q, k, v)]
    backend.attention_backward(dout, q, k, v, out, lse, *expected, SCALE, causal, mask)
    sums = [np.zeros_like(x) for x in (q, k, v)]
    for queries in slabs(*case[:2]):
        for keys in blocks_of(queries, slabs(*case[:2]), causal):
            parts = q[:, queries], k[:, keys], v[:, keys]
            gradients = [np.empty_like(x) for x in parts]
            backend.attention_backward(dout[:, queries], *parts, out[:, queries], lse[:, :, queries], *gradients, SCALE,
                                       causal and keys == queries, mask_of_block(mask, queries, keys, case[0]))
            for total, rows, gradient in zip(sums, (queries, keys, keys), gradients):
                total[:, rows] += gradient
    for total, exact in zip(sums, expected):
        assert np.abs(total - exact).max() < 1e-12


@needs_kernels
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 65, 3, 20), (3, 7, 5, 64), (1, 0, 2, 4), (2, 3, 2, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forms_of_merge_agree(size, dtype):
    batch, tokens, heads, width = size
    out, part_out = (random(i, *size, dtype=dtype) for i in (0, 1))
    lse, part_lse = (30 * random(i, batch, heads, tokens, dtype=dtype) for i in (2, 3))
    results = []
    for backend in (CPU, REFERENCE):
        plain, plain_lse, view, view_lse = out.copy(), lse.copy(), wide(out), wide(lse)
        backend.attention_merge(plain, plain_lse, part_out, part_lse)
        backend.attention_merge(view, view_lse, wide(part_out), wide(part_lse))
        results.append((plain, plain_lse, view, view_lse))
    same_all(zip(*results))
    same_all(zip(results[0][:2], results[0][2:]))


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_at_the_ends_of_the_range(backend, dtype):
    inf = np.inf
    lse = np.array([-inf, -inf, 1.0, 5000.0, -5000.0, 2.0, np.nan], dtype)
    part_lse = np.array([-inf, 1.0, -inf, -5000.0, 5000.0, 2.0, 1.0], dtype)
    out, part_out = (np.full((1, 7, 1, 3), value, dtype) for value in (2.0, 4.0))
    out[0, :2] = 0.0
    part_out[0, [0, 2]] = 0.0
    backend.attention_merge(out, lse.reshape(1, 1, 7), part_out, part_lse.reshape(1, 1, 7))
    same(out[0, :, 0, 1], np.array([0.0, 4.0, 2.0, 2.0, 4.0, 3.0, np.nan], dtype))
    same(lse, np.array([-inf, 1.0, 1.0, 5000.0, 5000.0, 2.0 + np.log(2.0), np.nan], dtype))
