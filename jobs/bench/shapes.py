"""The GPT-2 shapes that are timed, and the tokens both sides read. Standard library at import: both sides' processes use it."""

from typing import NamedTuple


class GPT(NamedTuple):
    """A GPT-2 shape and its batch."""
    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int          # sequences of a step, per rank
    context: int        # tokens of a sequence

    @property
    def tokens(self):
        """Tokens of a step, per rank."""
        return self.batch * self.context


SHAPES = {
    "tiny": GPT(2, 64, 2, 256, 2, 32),              # tries the bench itself
    "14M": GPT(6, 384, 6, 8192, 8, 256),
    "124M": GPT(12, 768, 12, 50257, 4, 512),        # GPT-2 small
    "124M-long": GPT(12, 768, 12, 50257, 1, 2048),  # the same with long sequences, for context parallelism
}
RATE, BETAS, EPSILON, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


class RandomTokens:
    """Samples of uniform random tokens: as hard as text for every operation, and the same on both sides."""

    def __init__(self, shape):
        self.shape = shape

    def samples(self, first, count):
        """Tokens, targets (count, T) int32 and weights (count, T) float32 of samples first, first + 1, ..."""
        import numpy as np
        rows = np.stack([np.random.default_rng(first + row).integers(0, self.shape.vocabulary, self.shape.context + 1, dtype=np.int32)
                         for row in range(count)])
        return rows[:, :-1], rows[:, 1:], np.ones((count, self.shape.context), np.float32)
