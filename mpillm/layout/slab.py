"""Block arithmetic: which part of a tensor, a batch or a file a rank has. Nothing else divides sizes by ranks."""

import math
from typing import NamedTuple


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
