"""Self-attention with grouped query heads (Ainslie et al. 2023, arXiv:2305.13245); under tp each rank has some of the heads."""

from typing import NamedTuple

from .linear import Linear


class Heads(NamedTuple):
    """The heads of this rank."""
    query: int      # H/tp
    kv: int         # K/tp, at least one
    width: int      # D
    first: int      # global number of the first query head


class Attention:
    """Queries, keys and values by matrix products, rotation (llama), attention, output product.

    Parameters
    ----------
    projections : list of Linear
        One of the stack of query, key and value, ((H + 2K)/tp D, C); or, where key/value heads are held by several
        ranks, one of the queries and one of the stack of key and value.
    output : RowLinear
        (C, H/tp D)
    heads : Heads
    rope : Rope or None
    core : Local, Ring or Ulysses
        How queries meet keys (context.py).
    region : Region
    dropout_key : int
        Random key of the dropout of probabilities.
    light : bool
        Whether the attention itself is computed again in backward (selective recompute; Korthikanti et al. 2022,
        arXiv:2205.05198, section 5).
    """

    class Saved(NamedTuple):
        inputs: list        # Linear.Saved of each projection
        qkv: object         # (B, t, (H + 2K)/tp, D), rotated
        out: object         # (B, t, H/tp, D); None when light
        lse: object         # of the core; None when light
        mask: object        # Dropout or None

    def __init__(self, ops, projections, output, heads, rope, core, region, dropout_key, light=False):
        self.ops, self.projections, self.output, self.heads, self.rope = ops, projections, output, heads, rope
        self.core, self.region, self.dropout_key, self.light = core, region, dropout_key, light

    def _parts(self, qkv):
        """Views of (B, t, (H + 2K)/tp, D): queries (B, t, H/tp, D), keys and values (B, t, K/tp, D)."""
        h, k = self.heads.query, self.heads.kv
        return qkv[:, :, :h], qkv[:, :, h:h + k], qkv[:, :, h + k:]

    def _columns(self, flat):
        """The columns of (N, (H + 2K)/tp D) that each projection makes."""
        if len(self.projections) == 1:
            return [flat]
        end = self.heads.query * self.heads.width
        return [flat[:, :end], flat[:, end:]]

    def _rotate(self, qkv, batch, inverse=False):
        if self.rope is not None:
            cos, sin = self.rope.at(batch.positions)    # (t, D/2)
            self.ops.rope(qkv[:, :, :self.heads.query + self.heads.kv], cos, sin, inverse=inverse)

    def forward(self, x, batch, cache=None):
        """(n, C) -> (n, C); with a cache, keys and values of earlier tokens are attended to as well."""
        (b, t), heads = batch.shape, self.heads
        x = self.region.enter(x, batch.num_rows)                        # (B t, C)
        flat = self.ops.empty((b * t, (heads.query + 2 * heads.kv) * heads.width), x.dtype)
        inputs = [projection.forward(x, out=out)[1] for projection, out in zip(self.projections, self._columns(flat))]
        qkv = flat.reshape(b, t, heads.query + 2 * heads.kv, heads.width)
        self._rotate(qkv, batch)
        q, k, v = self._parts(qkv)
        if cache is not None:
            k, v = cache.extend(k, v)                                   # (B, S, K/tp, D)
        mask = batch.probability_mask(self.dropout_key, heads.first)
        out, lse = self.core.forward(q, k, v, batch, mask)              # (B, t, H/tp, D)
        y, _ = self.output.forward(out.reshape(b * t, heads.query * heads.width))       # (n, C)
        kept = (None, None) if self.light else (out, lse)
        return y, self.Saved(inputs, qkv, *kept, mask)

    def backward(self, dy, saved, batch):
        """(n, C) -> (n, C)"""
        parts, out, lse = self._parts(saved.qkv), saved.out, saved.lse
        if out is None:
            out, lse = self.core.forward(*parts, batch, saved.mask)
        rows, width = batch.num_rows, self.heads.query * self.heads.width
        dout = self.output.backward(dy, Linear.Saved(out.reshape(rows, width))).reshape(out.shape)     # (B, t, H/tp, D)
        dqkv = self.ops.empty(saved.qkv.shape, saved.qkv.dtype)         # (B, t, (H + 2K)/tp, D)
        self.core.backward(dout, *parts, out, lse, *self._parts(dqkv), batch, saved.mask)
        self._rotate(dqkv, batch, inverse=True)
        columns = self._columns(dqkv.reshape(rows, dqkv.shape[2] * dqkv.shape[3]))
        dx, *others = [projection.backward(each, kept)                  # (B t, C)
                       for projection, each, kept in zip(self.projections, columns, saved.inputs)]
        for other in others:
            self.ops.add(dx, other)
        return self.region.enter_backward(dx)                           # (n, C)
