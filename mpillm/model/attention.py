"""Causal self-attention with grouped query heads (Ainslie et al. 2023, arXiv:2305.13245)."""

from typing import NamedTuple

from .linear import Linear


class Attention:
    """Queries, keys and values by one matrix product, rotation (llama), attention, output product.

    Parameters
    ----------
    qkv : Linear
        The stack of query, key and value: ((H + 2K) D, C).
    output : Linear
        (C, H D)
    heads, kv_heads, head_width : int
        H, K, D
    rope : Rope or None
    dropout_key : int
        Random key of the dropout of probabilities.
    """

    class Saved(NamedTuple):
        qkv_input: Linear.Saved
        qkv: object         # (B, T, H + 2K, D), rotated
        out: object         # (B, T, H, D)
        lse: object         # (B, H, T)
        output_input: Linear.Saved
        mask: object        # Dropout or None

    def __init__(self, ops, qkv, output, heads, kv_heads, head_width, rope, dropout_key):
        self.ops, self.qkv, self.output, self.rope, self.dropout_key = ops, qkv, output, rope, dropout_key
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        self.scale = head_width ** -0.5

    def _parts(self, qkv):
        """Views of (B, T, H + 2K, D): queries (B, T, H, D), keys and values (B, T, K, D)."""
        h, k = self.heads, self.kv_heads
        return qkv[:, :, :h], qkv[:, :, h:h + k], qkv[:, :, h + k:]

    def _rotate(self, qkv, batch, inverse=False):
        if self.rope is not None:
            cos, sin = self.rope.at(batch.positions)    # (T, D/2)
            self.ops.rope(qkv[:, :, :self.heads + self.kv_heads], cos, sin, inverse=inverse)

    def forward(self, x, batch, cache=None):
        """(B T, C) -> (B T, C); with a cache, keys and values of earlier tokens are attended to as well."""
        b, t = batch.shape
        y, qkv_input = self.qkv.forward(x)                              # (B T, (H + 2K) D)
        qkv = y.reshape(b, t, self.heads + 2 * self.kv_heads, self.head_width)
        self._rotate(qkv, batch)
        q, k, v = self._parts(qkv)
        if cache is not None:
            k, v = cache.extend(k, v)                                   # (B, S, K, D)
        mask = batch.mask(self.dropout_key)
        out, lse = self.ops.attention(q, k, v, self.scale, True, mask)  # (B, T, H, D), (B, H, T)
        y, output_input = self.output.forward(out.reshape(b * t, -1))   # (B T, C)
        return y, self.Saved(qkv_input, qkv, out, lse, output_input, mask)

    def backward(self, dy, saved, batch):
        """(B T, C) -> (B T, C)"""
        b, t = batch.shape
        dout = self.output.backward(dy, saved.output_input).reshape(saved.out.shape)    # (B, T, H, D)
        dqkv = self.ops.empty(saved.qkv.shape, saved.qkv.dtype)                         # (B, T, H + 2K, D)
        self.ops.attention_backward(dout, *self._parts(saved.qkv), saved.out, saved.lse, *self._parts(dqkv),
                                    self.scale, True, saved.mask)
        self._rotate(dqkv, batch, inverse=True)
        return self.qkv.backward(dqkv.reshape(b * t, -1), saved.qkv_input)              # (B T, C)
