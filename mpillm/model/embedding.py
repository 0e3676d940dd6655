"""Tokens (and for gpt positions) to vectors; under tp each rank has some of the vocabulary."""

from typing import NamedTuple

import numpy as np


class Embedding:
    """Rows of a table, plus rows of a table of positions where there is one.

    Parameters
    ----------
    tokens : Parameter
        (V/tp, C)
    positions : Parameter or None
        (T, C)
    region : Region
    dropout_key : int
    """

    class Saved(NamedTuple):
        mask: object        # Dropout or None
        positions: object   # (n,) position of each row; None without a table of positions

    def __init__(self, ops, tokens, positions, region, dropout_key):
        self.ops, self.tokens, self.positions, self.region, self.dropout_key = ops, tokens, positions, region, dropout_key

    def forward(self, batch):
        """Batch of (B, t) tokens -> (n, C)"""
        ids, (start, size) = batch.tokens.reshape(-1), self.region.rows(batch.num_rows)
        y = self.ops.embedding(ids, self.tokens.value, self.tokens.held.start[0])       # (B t, C), partial over tp
        y = self.region.leave(y)                                                        # (n, C)
        positions = None
        if self.positions is not None:
            rows = np.tile(batch.positions, batch.shape[0])[start:start + size]
            positions = self.ops.constant(rows)                                         # (n,)
            self.ops.add(y, self.ops.embedding(positions, self.positions.value))
        mask = batch.row_mask(self.dropout_key, start, size)
        if mask is not None:
            self.ops.dropout(y, mask)
        return y, self.Saved(mask, positions)

    def backward(self, dy, saved, batch):
        """(n, C) -> nothing: tokens have no gradient. Writes over `dy`."""
        if saved.mask is not None:
            self.ops.dropout(dy, saved.mask)
        for table in [self.tokens] + ([self.positions] if self.positions is not None else []):
            if not table.accumulates():
                self.ops.fill(table.grad, 0)
        if self.positions is not None:
            self.ops.embedding_backward(saved.positions, dy, self.positions.grad)
        dy = self.region.leave_backward(dy, batch.num_rows)                             # (B t, C)
        self.ops.embedding_backward(batch.tokens.reshape(-1), dy, self.tokens.grad, self.tokens.held.start[0])
