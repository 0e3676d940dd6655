"""What operations take beside arrays, and the types of arrays that belong together."""

from typing import NamedTuple


class Update(NamedTuple):
    """What AdamW updates of one tensor: flat arrays of equal length."""

    weight: object       # float32, or float64: the master
    grad: object         # of the type of the master, as the moments
    moment1: object
    moment2: object
    value: object        # gets the new weight rounded to its own type; None where the master itself is computed with
    decay: float         # weight decay


class Dropout(NamedTuple):
    """Which elements a dropout drops: a pure function of what is counted, not of where it is computed.

    The Philox counter of an element is (step, sample, position, channel // 4), its lane channel % 4. In attention the
    channel of a probability is head x (keys of the whole sequence, rounded up to fours) + key, so a block of the keys
    drops what attention over all of them drops.
    """

    rate: float          # share of elements dropped, 0 <= rate < 1
    key: int             # 64 bits; one per site (seed and name)
    step: int            # optimizer step
    samples: object      # int64, sample numbers of the run: (N,), one a row; (B,) in attention
    positions: object    # int64, token positions inside the sample: (N,), one a row; (T,), the queries', in attention
    first: int = 0       # global number of the first channel held here (in attention: of the first head)
    first_key: int = 0   # attention: global number of the first key of the call
    keys: int | None = None     # attention: keys of the whole sequence; None: those of the call are all


def wide_of(dtype):
    """The type in which sums are made and kept for a compute type: float32 for 16-bit floats, else the type itself."""
    import numpy as np     # here, because the command line imports this module and is to answer at once

    dtype = np.dtype(dtype)
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype
