"""Philox4x32-10, the counter-based random numbers of everything that is drawn, in plain NumPy.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Checked against the authors' known
answers in tests/backend. The normal numbers use only + - * / sqrt and bit operations, which IEEE 754 rounds alike
everywhere, so the same weights come out of NumPy and of the C++ form, on any machine.
"""

import numpy as np

LOW = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)
ROUNDS = 10


def philox4x32(counter, key):
    """Four random words per counter.

    Parameters
    ----------
    counter : four integer arrays or ints that broadcast together; taken mod 2^32
    key : int, 64 bits: (low word, high word) is the key of the paper

    Returns
    -------
    four uint32 arrays of the broadcast shape
    """
    words = [as_word(value) for value in counter]
    c0, c1, c2, c3 = np.broadcast_arrays(*words)
    low, high = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(ROUNDS):
        product0 = c0 * np.uint64(0xD2511F53)
        product1 = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> SHIFT) ^ c1 ^ np.uint64(low),
            product1 & LOW,
            (product0 >> SHIFT) ^ c3 ^ np.uint64(high),
            product0 & LOW,
        )
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return tuple(word.astype(np.uint32) for word in (c0, c1, c2, c3))


def as_word(value):
    """An integer or integer array mod 2^32, in uint64."""
    if isinstance(value, (int, np.integer)):
        return np.array(int(value) & 0xFFFFFFFF, np.uint64)
    return np.asarray(value).astype(np.uint64) & LOW


def keep_threshold(rate):
    """Smallest Philox word that is kept: word >= rate * 2^32."""
    return np.uint64(np.ceil(rate * 2.0**32))


def dropout_factors(mask, channels):
    """0 for dropped elements and 1 / (1 - rate) for kept ones: (N, channels), float64."""
    first_block, last_block = mask.first // 4, (mask.first + channels + 3) // 4
    samples = np.asarray(mask.samples)[:, None]
    positions = np.asarray(mask.positions)[:, None]
    words = philox4x32((mask.step, samples, positions, np.arange(first_block, last_block)), mask.key)
    return factors_of_words(words, mask.rate, mask.first % 4, channels)


def attention_dropout_factors(mask, heads, keys):
    """The same for attention probabilities: (B, heads, T, keys); every head has its own run of key blocks."""
    of_head = ((keys if mask.keys is None else mask.keys) + 3) // 4
    samples = np.asarray(mask.samples)[:, None, None, None]
    positions = np.asarray(mask.positions)[None, None, :, None]
    heads = (mask.first + np.arange(heads))[None, :, None, None]
    blocks = heads * of_head + np.arange(mask.first_key // 4, (mask.first_key + keys + 3) // 4)
    words = philox4x32((mask.step, samples, positions, blocks), mask.key)
    return factors_of_words(words, mask.rate, mask.first_key % 4, keys)


def factors_of_words(words, rate, skip, count):
    """Factors from four words a block, (..., blocks) each: (..., count) of the lanes from `skip` on, float64."""
    lanes = np.stack(words, axis=-1)  # (..., blocks, 4)
    lanes = lanes.reshape(*lanes.shape[:-2], 4 * lanes.shape[-2])[..., skip : skip + count]
    return np.where(lanes >= keep_threshold(rate), 1.0 / (1.0 - rate), 0.0)


def normal_rows(key, row, rows, column, num_columns):
    """(rows, num_columns) of N(0, 1) in float64: the slab at (row, column) of a tensor of any size."""
    first_block, last_block = column // 4, (column + num_columns + 3) // 4
    numbers = np.arange(row, row + rows, dtype=np.uint64)[:, None]
    blocks = np.arange(first_block, last_block, dtype=np.uint64)[None, :]
    w0, w1, w2, w3 = philox4x32((blocks, numbers & LOW, numbers >> SHIFT, 0), key)
    values = np.stack((*box_muller(w0, w1), *box_muller(w2, w3)), axis=-1)  # (rows, blocks, 4)
    return values.reshape(rows, -1)[:, column % 4 :][:, :num_columns]


def box_muller(a, b):
    """Two normal numbers from two words: radius from a, angle from b."""
    radius = np.sqrt(-2.0 * log_of_word(a))
    sine, cosine = turn_of_word(b)
    return radius * cosine, radius * sine


LOG_TERMS = [1.0 / (2 * k + 1) for k in range(12)]           # atanh(s) / s in powers of s^2
LN2 = 0.6931471805599453
SQRT_HALF = 0.7071067811865476


def log_of_word(word):
    """ln((word + 0.5) / 2^32) from exactly rounded operations."""
    mantissa, exponent = np.frexp((word.astype(np.float64) + 0.5) * 2.0**-32)  # mantissa in [0.5, 1)
    small = mantissa < SQRT_HALF
    mantissa = np.where(small, mantissa + mantissa, mantissa)
    exponent = exponent - small
    s = (mantissa - 1.0) / (mantissa + 1.0)
    s2 = s * s
    total = np.full_like(s, LOG_TERMS[-1])
    for term in LOG_TERMS[-2::-1]:
        total = total * s2 + term
    return exponent * LN2 + (s + s) * total


SIN_TERMS = [1.0, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800, 1 / 6227020800, -1 / 1307674368000, 1 / 355687428096000]
COS_TERMS = [1.0, -1 / 2, 1 / 24, -1 / 720, 1 / 40320, -1 / 3628800, 1 / 479001600, -1 / 87178291200, 1 / 20922789888000]
TWO_PI_OF_WORD = 6.283185307179586 * 2.0**-32


def turn_of_word(word):
    """Sine and cosine of the angle 2 pi word / 2^32, from exactly rounded operations."""
    quarter = ((word.astype(np.uint64) + np.uint64(1 << 29)) >> np.uint64(30)).astype(np.int64)  # nearest, 0..4
    angle = (word.astype(np.int64) - (quarter << 30)).astype(np.float64) * TWO_PI_OF_WORD  # in +-pi/4
    a2 = angle * angle
    sine, cosine = np.full_like(angle, SIN_TERMS[-1]), np.full_like(angle, COS_TERMS[-1])
    for sine_term, cosine_term in zip(SIN_TERMS[-2::-1], COS_TERMS[-2::-1]):
        sine, cosine = sine * a2 + sine_term, cosine * a2 + cosine_term
    sine = sine * angle
    odd, turned = (quarter & 1) == 1, (quarter & 2) == 2
    sine, cosine = np.where(odd, cosine, sine), np.where(odd, -sine, cosine)
    return np.where(turned, -sine, sine), np.where(turned, -cosine, cosine)
