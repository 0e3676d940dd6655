"""Attention in plain NumPy, with the whole B x H x T x S matrix: the definition, for small sizes.

Query i sees the keys j <= i + S - T (aligned at the end), or all keys without `causal`. Query head h reads
kv head h // (H / K). A query that sees no key has out = 0 and lse = -inf.
"""

import numpy as np

from mpillm.backend.philox import attention_dropout_factors


def attention(q, k, v, scale, causal, dropout):
    """out (B, T, H, D), lse (B, H, T) of q (B, T, H, D), k, v (B, S, K, D)."""
    scores = grouped_scores(q, k, scale, causal)  # (B, H, T, S)
    top = scores.max(axis=-1, initial=-np.inf)
    top = np.where(np.isneginf(top), 0.0, top).astype(q.dtype)
    exps = np.exp(scores - top[..., None])
    total = exps.sum(axis=-1)
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    probs = exps / np.where(total == 0.0, 1.0, total)[..., None].astype(q.dtype)
    if dropout is not None:
        probs *= attention_dropout_factors(dropout, q.shape[2], k.shape[1]).astype(q.dtype)
    out = np.matmul(probs, spread(v, q.shape[2]))  # (B, H, T, D)
    return np.ascontiguousarray(out.transpose(0, 2, 1, 3)), lse


def attention_backward(dout, q, k, v, out, lse, dq, dk, dv, scale, causal, dropout):
    """Writes dq, dk, dv; the probabilities are computed again from lse."""
    heads, kv_heads = q.shape[2], k.shape[2]
    scores = grouped_scores(q, k, scale, causal)
    finite = np.where(np.isneginf(lse), 0.0, lse).astype(q.dtype)
    probs = np.exp(scores - finite[..., None])  # masked scores are -inf, so rows without keys give 0
    dout_heads = dout.transpose(0, 2, 1, 3)  # (B, H, T, D)
    dprobs = np.matmul(dout_heads, spread(v, heads).swapaxes(-1, -2))  # (B, H, T, S)
    dropped = probs
    if dropout is not None:
        factors = attention_dropout_factors(dropout, heads, k.shape[1]).astype(q.dtype)
        dropped, dprobs = probs * factors, dprobs * factors
    inner = (dout * out).sum(axis=-1).swapaxes(1, 2)  # (B, H, T): row sums of dprobs * probs
    dscores = probs * (dprobs - inner[..., None]) * q.dtype.type(scale)
    dq[...] = np.matmul(dscores, spread(k, heads)).transpose(0, 2, 1, 3)
    dk[...] = gathered(np.matmul(dscores.swapaxes(-1, -2), q.transpose(0, 2, 1, 3)), kv_heads)
    dv[...] = gathered(np.matmul(dropped.swapaxes(-1, -2), dout_heads), kv_heads)


def attention_merge(out, lse, part_out, part_lse):
    """The online softmax over blocks of keys: weights exp(lse - new lse) of both, in place.

    Milakov & Gimelshein 2018; between ranks: Liu et al. 2023, Ring Attention, arXiv:2310.01889.
    """
    with np.errstate(invalid="ignore"):
        new = np.logaddexp(lse, part_lse)  # (B, H, T); -inf where neither has seen a key
    finite = np.where(np.isneginf(new), 0.0, new).astype(lse.dtype)
    old_share, part_share = (np.exp(x - finite).swapaxes(1, 2)[..., None] for x in (lse, part_lse))  # (B, T, H, 1)
    out *= old_share
    out += part_out * part_share
    lse[...] = new


def grouped_scores(q, k, scale, causal):
    """scale q k^T (B, H, T, S), -inf where a query does not see a key."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    scores = np.matmul(q.transpose(0, 2, 1, 3), spread(k, q.shape[2]).swapaxes(-1, -2)) * q.dtype.type(scale)
    if causal:
        last = np.arange(num_queries)[:, None] + num_keys - num_queries
        scores[:, :, np.arange(num_keys)[None, :] > last] = -np.inf
    return scores


def spread(x, heads):
    """(B, S, K, D) as (B, H, S, D): each kv head repeated for its query heads."""
    return np.repeat(x.transpose(0, 2, 1, 3), heads // x.shape[2], axis=1)


def gathered(dx, kv_heads):
    """(B, H, S, D) gradients as (B, S, K, D): summed over the query heads of a kv head."""
    batch, heads, keys, width = dx.shape
    return dx.reshape(batch, kv_heads, heads // kv_heads, keys, width).sum(axis=2).transpose(0, 2, 1, 3)
