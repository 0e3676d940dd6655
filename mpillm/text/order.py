"""Which tokens the samples of a run are made of: pure functions of seed, epoch, weights and sample number.

The token stream of a corpus is cut into grains of G tokens, and every epoch reads the grains in another order: a
keyed bijection of the grain numbers, computed and never stored. The grains in that order, one epoch after the other,
are one endless stream; sample n is its tokens n T, ..., n T + T - 1. A range of the stream that lies in one grain is a
range of the file, and its targets are the same range one further, so a grain needs one token more than it has. With T a
multiple of G a sample is some whole grains, with T a divisor a piece of one; any other T joins pieces of grains.
Nothing here depends on ranks, batches or time.
"""

import hashlib

import numpy as np

PERIOD = 1024       # samples after which a mixture repeats its pattern
ROUNDS = 8          # of the Feistel network


def keys_of(name, *numbers):
    """ROUNDS 64-bit keys for one use and some whole numbers, uint64 (ROUNDS,)."""
    text = " ".join([name, *(str(int(number)) for number in numbers)])
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8 * ROUNDS).digest(), "<u8").astype(np.uint64)


def mix(x):
    """splitmix64 of a uint64 array (Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index, size, keys):
    """A keyed bijection of 0..size-1, at each of `index`.

    A Feistel network over the next power of two; numbers that leave the range walk on along their cycle until they
    are back in it (Black and Rogaway 2002).

    Parameters
    ----------
    index : int array (n,)
    size : int
    keys : uint64 (ROUNDS,)

    Returns
    -------
    int64 (n,)
    """
    x = _feistel(np.asarray(index).astype(np.uint64), size, keys)
    outside = np.flatnonzero(x >= size)
    while outside.size:
        x[outside] = _feistel(x[outside], size, keys)
        outside = outside[x[outside] >= size]
    return x.astype(np.int64)


def _feistel(x, size, keys):
    bits = max(2, (size - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = (np.uint64(2**count - 1) for count in (bits // 2, bits - bits // 2))
    high, low = x >> low_bits, x & low_mask
    for number, key in enumerate(keys):
        if number % 2:
            low = low ^ (mix(high ^ key) & low_mask)
        else:
            high = high ^ (mix(low ^ key) & high_mask)
    return high << low_bits | low


def fits(grain, context):
    """Whether samples of `context` tokens are whole grains, or whole parts of one."""
    return context % grain == 0 or grain % context == 0


def context_message(name, grain, context):
    """What a run says when it goes on with a context that does not fit the grain of its data order; else None."""
    if fits(grain, context):
        return None
    return (f"{name}: context {context} is no multiple or divisor of the {grain} tokens in which this epoch is shuffled: "
            f"samples join pieces of them until the epoch ends, the next is shuffled by {context}")


class Order:
    """Where the samples of one corpus lie in its file.

    Parameters
    ----------
    num_tokens : int
        Tokens of the file.
    grain, context : int
        G and T, tokens. The epoch of the cursor is cut into grains of G; later ones too if T fits it, else of T.
    seed : int
    epoch, consumed : int
        The cursor: tokens of this epoch that are done with. Sample 0 begins there.

    Raises
    ------
    ValueError
        Fewer tokens than a grain or a sample and its last target.
    """

    def __init__(self, num_tokens, grain, context, seed, epoch=0, consumed=0):
        if num_tokens <= max(grain, context):
            raise ValueError(f"{num_tokens} tokens: fewer than {max(grain, context)} and one more target")
        later = grain if fits(grain, context) else context
        self.context, self.seed, self.epoch, self.consumed = context, seed, epoch, consumed
        self.grains = grain, later                                              # this epoch's, all later ones'
        self.num_grains = tuple((num_tokens - 1) // size for size in self.grains)
        self.epoch_tokens = tuple(size * number for size, number in zip(self.grains, self.num_grains))
        if not 0 <= consumed < self.epoch_tokens[0]:
            raise ValueError(f"{consumed} tokens consumed of an epoch of {self.epoch_tokens[0]}")

    def cursor_after(self, num_samples):
        """(epoch, tokens of it consumed, its grain) after so many samples."""
        epoch, inside = (int(x[0]) for x in self._locate(np.array([self.consumed + num_samples * self.context])))
        return epoch, inside, self.grains[epoch > self.epoch]

    def ranges(self, first, count):
        """The token ranges of samples first, ..., first + count - 1, joined to one list.

        Returns
        -------
        starts, lengths : int64 (num_ranges,)
            In stream order: their tokens one after the other are count x T tokens. The targets of a range are it
            moved on by one token.
        """
        begin = self.consumed + first * self.context
        stop = begin + count * self.context
        cuts = np.union1d(np.arange(begin, stop, self.context, dtype=np.int64), self._edges(begin, stop))
        return self._starts(cuts), np.diff(np.append(cuts, stop))

    def _edges(self, begin, stop):
        """Where grains begin, strictly inside begin..stop of the stream."""
        (grain, later), turn = self.grains, self.epoch_tokens[0]
        parts = (np.arange(begin // grain * grain + grain, min(stop, turn), grain, dtype=np.int64),
                 np.arange(turn + max(begin - turn, -later) // later * later + later, stop, later, dtype=np.int64))
        return np.concatenate(parts)

    def _locate(self, positions):
        """(epoch, tokens into it) of positions in the stream, which is counted from the begin of the cursor's epoch."""
        behind = positions - self.epoch_tokens[0]
        later, inside = np.divmod(behind, self.epoch_tokens[1])
        now = behind < 0
        return np.where(now, self.epoch, self.epoch + 1 + later), np.where(now, positions, inside)

    def _starts(self, positions):
        epochs, inside = self._locate(positions)
        starts = np.empty(positions.shape, np.int64)
        for epoch in np.unique(epochs).tolist():
            which = epochs == epoch
            grain, num_grains = self.grains[epoch > self.epoch], self.num_grains[epoch > self.epoch]
            number, offset = np.divmod(inside[which], grain)
            starts[which] = permute(number, num_grains, keys_of("order", self.seed, epoch)) * grain + offset
        return starts


class Mixture:
    """Which corpus each sample of a mixture is from.

    Every PERIOD samples hold each corpus a fixed number of times (its weight, by largest remainder), in an
    order made from the seed, the same in every period: so how many samples before n are from a corpus is a closed form.

    Parameters
    ----------
    weights : sequence of float
        More than 0; their sum is free.
    seed : int

    Attributes
    ----------
    quota : int64 (num_corpora,)
        Samples of each corpus in a period.
    """

    def __init__(self, weights, seed):
        exact = np.array(weights, np.float64) / np.sum(weights) * PERIOD
        self.quota = np.floor(exact).astype(np.int64)
        largest = np.argsort(-(exact - self.quota), kind="stable")
        self.quota[largest[:PERIOD - self.quota.sum()]] += 1
        slots = permute(np.arange(PERIOD), PERIOD, keys_of("mixture", seed))
        self._corpus = np.searchsorted(np.cumsum(self.quota), slots, side="right")              # (PERIOD,)
        drawn = self._corpus[:, None] == np.arange(len(self.quota))                             # (PERIOD, num_corpora)
        self._before = np.concatenate([np.zeros((1, len(self.quota)), np.int64), np.cumsum(drawn, 0)])

    def corpora(self, first, count):
        """The corpus of samples first, ..., first + count - 1: int64 (count,)."""
        return self._corpus[np.arange(first, first + count) % PERIOD]

    def before(self, number):
        """How many of the samples 0..number-1 are from each corpus: int64 (num_corpora,)."""
        return number // PERIOD * self.quota + self._before[number % PERIOD]
