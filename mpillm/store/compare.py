"""What the tensors of a checkpoint hold, and how those of two differ: one tensor after the other, its rows dealt to the ranks.

No rank holds more than its rows of one tensor (of both checkpoints). Each tensor is proven by its hash as it is read.
"""

import math
from typing import NamedTuple

import numpy as np

from ..layout.slab import Slab
from .hyperslab import Entry, pieces


class Values(NamedTuple):
    """Of one tensor; numbers that are not finite are counted and left out of the others."""
    norm: float         # root of the sum of squares
    low: float          # nan where no number is finite
    high: float
    not_finite: int


class Difference(NamedTuple):
    """Of one tensor in two checkpoints."""
    differing: int      # elements that are not the same number; nan is the same as nan
    largest: float      # of |a - b|; inf where only one of the two is finite
    relative: float     # largest / largest finite |a| or |b|


def values_of(checkpoint, name, group, backend):
    """The Values of a tensor. Collective.

    Parameters
    ----------
    checkpoint : Checkpoint
    backend : backend
        Of the host, for the hashes.

    Raises
    ------
    DamagedCheckpoint
    """
    array, total = _rows(checkpoint, name, group, backend), np.zeros(2)
    ends = np.array([math.inf, math.inf])           # lowest value, and lowest of the negated ones
    for piece in _parts(array):
        finite = piece[np.isfinite(piece)].astype(np.float64)
        total += np.dot(finite, finite), piece.size - finite.size
        if finite.size:
            ends = np.minimum(ends, (finite.min(), -finite.max()))
    group.all_reduce(total)
    group.all_reduce(ends, "min")
    low, high = (ends[0], -ends[1]) if np.isfinite(ends).all() else (math.nan, math.nan)
    return Values(math.sqrt(total[0]), float(low), float(high), int(total[1]))


def difference(a, b, name, group, backend):
    """How a tensor differs between the Checkpoints `a` and `b`, in which it has one shape. Collective; raises as `values_of`."""
    count, most = np.zeros(1), np.zeros(2)          # largest |a - b|; largest magnitude
    for mine, theirs in zip(*(_parts(_rows(checkpoint, name, group, backend)) for checkpoint in (a, b))):
        mine, theirs = mine.astype(np.float64), theirs.astype(np.float64)
        differ = (mine != theirs) & ~(np.isnan(mine) & np.isnan(theirs))
        count += differ.sum()
        with np.errstate(invalid="ignore"):
            apart = np.abs(mine[differ] - theirs[differ])
        most[0] = max(most[0], np.nan_to_num(apart, nan=math.inf).max(initial=0.0))
        most[1] = max([most[1], *(np.abs(part[np.isfinite(part)]).max(initial=0.0) for part in (mine, theirs))])
    group.all_reduce(count)
    group.all_reduce(most, "max")
    return Difference(int(count[0]), float(most[0]), float(most[0] / most[1]) if most[1] else float(most[0]))


def _rows(checkpoint, name, group, backend):
    """This rank's rows of a tensor, in the type of the file."""
    stored = checkpoint.tensors[name]
    shape = tuple(stored["shape"])
    slab = Slab.whole(shape).cut(0, group.size, group.rank)
    entry = Entry(name, shape, slab, np.empty(slab.shape, stored["dtype"]))
    checkpoint.load([entry], group, backend)
    return entry.array


def _parts(array):
    """Flat parts of an array, cut alike whatever its type."""
    for piece in pieces(Slab.whole(array.shape), 8):
        yield array[piece.slices()].reshape(-1)
