"""Arrays of different lifetimes in one piece of memory: where each lies. No memory itself, so a plan can be made with it.

The lowest gap that is large enough is taken. The lifetimes of a training step nest like a stack, so few gaps stay; and the
same step takes the same places each time, on the device as in the plan.
"""

import bisect

ALIGNMENT = 512     # bytes


class Place:
    """Bytes `start` .. `start + size` of an arena; they are free again when this dies."""

    __slots__ = ("arena", "start", "size")

    def __init__(self, arena, start, size):
        self.arena, self.start, self.size = arena, start, size

    def __del__(self):
        self.arena._give_back(self.start, self.size)


class Arena:
    """
    Parameters
    ----------
    capacity : int
        Bytes.

    Attributes
    ----------
    peak : int
        The highest byte that was ever taken.
    """

    def __init__(self, capacity):
        self.capacity, self.peak = capacity, 0
        self.starts, self.sizes = [0], [capacity]       # of the gaps, by place

    def take(self, size):
        """The Place of an array of `size` bytes, or None where no gap is large enough."""
        size = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
        sizes = self.sizes
        for index, gap in enumerate(sizes):
            if gap >= size:
                break
        else:
            return None
        start = self.starts[index]
        if gap == size:
            del self.starts[index], sizes[index]
        else:
            self.starts[index], sizes[index] = start + size, gap - size
        if start + size > self.peak:
            self.peak = start + size
        return Place(self, start, size)

    def _give_back(self, start, size, bisect=bisect.bisect):       # kept here, for the interpreter takes modules apart before the last array
        starts, sizes = self.starts, self.sizes
        index = bisect(starts, start)
        joins_next = index < len(starts) and starts[index] == start + size
        if index and starts[index - 1] + sizes[index - 1] == start:
            sizes[index - 1] += size + (sizes[index] if joins_next else 0)
            if joins_next:
                del starts[index], sizes[index]
        elif joins_next:
            starts[index], sizes[index] = start, size + sizes[index]
        else:
            starts.insert(index, start)
            sizes.insert(index, size)
