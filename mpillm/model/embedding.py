"""Tokens (and for gpt positions) to vectors."""

from typing import NamedTuple


class Embedding:
    """Rows of a table, plus rows of a table of positions where there is one.

    Parameters
    ----------
    tokens : Parameter
        (V, C)
    positions : Parameter or None
        (T, C)
    dropout_key : int
    """

    class Saved(NamedTuple):
        mask: object        # Dropout or None

    def __init__(self, ops, tokens, positions, dropout_key):
        self.ops, self.tokens, self.positions, self.dropout_key = ops, tokens, positions, dropout_key

    def forward(self, batch):
        """Batch of (B, T) tokens -> (B T, C)"""
        b, t = batch.shape
        y = self.ops.embedding(batch.tokens.reshape(-1), self.tokens.value)     # (B T, C)
        if self.positions is not None:
            first = int(batch.positions[0])
            self.ops.add(y.reshape(b, t, -1), self.positions.value[first:first + t])
        mask = batch.mask(self.dropout_key)
        if mask is not None:
            self.ops.dropout(y.reshape(b, t, -1), mask)
        return y, self.Saved(mask)

    def backward(self, dy, saved, batch):
        """(B T, C) -> nothing: tokens have no gradient. Writes over `dy`."""
        b, t = batch.shape
        if saved.mask is not None:
            self.ops.dropout(dy.reshape(b, t, -1), saved.mask)
        tables = [table for table in (self.tokens, self.positions) if table is not None]
        for table in tables:
            if not table.accumulates():
                self.ops.fill(table.grad, 0)
        self.ops.embedding_backward(batch.tokens.reshape(-1), dy, self.tokens.grad)
        if self.positions is not None:
            first = int(batch.positions[0])
            rows = self.positions.grad[first:first + t]                         # (T, C)
            self.ops.sum_rows(dy.reshape(b, -1), rows.reshape(-1))
