"""What a layer may know about the tokens that pass through it."""

from typing import NamedTuple

from ..backend import Dropout


class Batch(NamedTuple):
    """One micro-batch on this rank."""
    tokens: object      # (B, T) int
    targets: object     # (B, T) int; None when generating
    scale: object       # (B, T) w/W of each target, in the compute type; None when generating
    positions: object   # (T,) int64, position of each token in its sequence, on the host
    samples: object     # (B,) int64, sample numbers: the dropout counter
    step: int           # optimizer step: the dropout counter
    dropout: float      # share dropped; 0.0 outside training

    @property
    def shape(self):
        """(B, T)"""
        return self.tokens.shape

    def mask(self, key):
        """The dropout mask of a site, or None."""
        if self.dropout == 0.0:
            return None
        return Dropout(self.dropout, key, self.step, self.samples, self.positions)
