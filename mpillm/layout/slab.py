"""Block arithmetic: which part of a tensor, a batch or a file a rank has. Nothing else divides sizes by ranks."""

import math
from typing import NamedTuple

import numpy as np


def cut(length, parts, index, unit=1):
    """Block `index` of `length` elements cut into `parts`: whole units, the remainder to the first blocks.

    Parameters
    ----------
    length : int
        Elements to cut; a multiple of `unit`.
    parts, index : int
        Number of blocks, and which one.
    unit : int
        Elements that stay together (such as the D rows of a head).

    Returns
    -------
    start, size : int
        `size` may be zero when there are fewer units than blocks.
    """
    units, remainder = divmod(length // unit, parts)
    if length % unit:
        raise ValueError(f"length {length} is not a multiple of unit {unit}")
    start = index * units + min(index, remainder)
    return start * unit, (units + (index < remainder)) * unit


class Slab(NamedTuple):
    """A rectangular part of a tensor: first index and extent along each dimension."""
    start: tuple
    shape: tuple

    @classmethod
    def whole(cls, shape):
        return cls((0,) * len(shape), tuple(shape))

    @property
    def size(self):
        """Number of elements."""
        return math.prod(self.shape)

    def slices(self):
        """The index of this slab in the global tensor."""
        return tuple(slice(start, start + extent) for start, extent in zip(self.start, self.shape))

    def within(self, outer):
        """The index of this slab in an array that holds the slab `outer`."""
        return tuple(slice(start - base, start - base + extent)
                     for start, extent, base in zip(self.start, self.shape, outer.start))

    def cut(self, dim, parts, index, unit=1):
        """This slab cut further along `dim` (see `cut`)."""
        start, size = cut(self.shape[dim], parts, index, unit)
        starts, shape = list(self.start), list(self.shape)
        starts[dim] += start
        shape[dim] = size
        return Slab(tuple(starts), tuple(shape))


def sizes_of_cut(length, parts, unit=1):
    """The sizes of all blocks of `cut`: (parts,) int array."""
    units, remainder = divmod(length // unit, parts)
    sizes = np.full(parts, units * unit, np.int64)
    sizes[:remainder] += unit
    return sizes


def token_ranges(length, parts, index, form="ring"):
    """Which tokens of a sequence context-parallel rank `index` of `parts` holds.

    "ring": blocks `index` and `2 parts - 1 - index` of twice as many blocks as ranks, so that all ranks have as much
    to do under a causal mask (zig-zag; Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.2).
    "ulysses": one block.

    Returns
    -------
    tuple of (start, size), ascending; sizes may be zero where the sequence is short
    """
    if parts == 1:
        return ((0, length),)
    if form == "ulysses":
        return (cut(length, parts, index),)
    return cut(length, 2 * parts, index), cut(length, 2 * parts, 2 * parts - 1 - index)


def ranges_of(counts):
    """What each rank has of a flat array, as `reduce_scatter_start` takes it: rank -> [(start, stop)]."""
    ends = np.cumsum(counts).tolist()
    return lambda rank: [(ends[rank] - counts[rank], ends[rank])]


def extent(ranges):
    """Elements of a list of ranges."""
    return sum(stop - start for start, stop in ranges)


def in_messages(flat, ranges):
    """The packed array of `ranges` as the pieces in which it arrives, one a range."""
    ends = np.cumsum([stop - start for start, stop in ranges]).tolist()
    return [flat[end - stop + start:end] for end, (start, stop) in zip(ends, ranges)]
