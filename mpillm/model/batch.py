"""What a layer may know about the tokens that pass through it."""

from typing import NamedTuple

import numpy as np

from ..backend import Dropout


class Batch(NamedTuple):
    """One micro-batch on this rank; under context parallelism t of the T tokens of each sequence."""
    tokens: object      # (B, t) int
    targets: object     # (B, t) int; None when generating
    scale: object       # (B, t) w/W of each target, in the compute type; None when generating
    positions: object   # (t,) int64, position of each token in its sequence, on the host
    samples: object     # (B,) int64, sample numbers: the dropout counter
    step: int           # optimizer step: the dropout counter
    dropout: float      # share dropped; 0.0 outside training
    length: int = 0     # T, tokens of a whole sequence
    share: object = None    # (B,) float64 on the host: 1 / samples of the step, 0 for fillers; None when generating
    auxiliary: object = None    # (2,) float64 to which routers add their balance and z losses; None: not wanted

    @property
    def shape(self):
        """(B, t)"""
        return self.tokens.shape

    @property
    def num_rows(self):
        """Rows of the flattened tokens, B t."""
        return self.tokens.shape[0] * self.tokens.shape[1]

    def row_mask(self, key, start, size):
        """The dropout mask of a site for the rows start .. start + size - 1 of the flattened tokens, or None."""
        if self.dropout == 0.0:
            return None
        rows = np.arange(start, start + size)
        sequences, tokens = np.divmod(rows, max(1, self.tokens.shape[1]))
        return Dropout(self.dropout, key, self.step, np.asarray(self.samples)[sequences], np.asarray(self.positions)[tokens])

    def probability_mask(self, key, first_head):
        """The dropout mask of attention probabilities of the heads from `first_head` on, or None."""
        if self.dropout == 0.0:
            return None
        return Dropout(self.dropout, key, self.step, self.samples, self.positions, first_head, keys=self.length or None)
