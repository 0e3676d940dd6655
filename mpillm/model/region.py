"""The ways in and out of a part of a block that is computed in tensor parallel (Shoeybi et al. 2019, arXiv:1909.08053, section 3).

Between such parts the tokens are the same on all tp ranks, or, with sequence parallelism, split over them (Korthikanti
et al. 2022, arXiv:2205.05198, section 4.2.2): then norms, dropout and the residual are computed once, and an all-gather and
a reduce-scatter stand in place of an all-reduce.

| | same tokens | split tokens |
|---|---|---|
| enter | - | all-gather |
| leave | all-reduce | reduce-scatter |
| backward of leave | - | all-gather |
| backward of enter | all-reduce | reduce-scatter |
"""

from ..layout.slab import cut


class Region:
    """
    Parameters
    ----------
    group : Group
        The tp ranks.
    sequence : bool
        Whether tokens are split over them outside.
    """

    def __init__(self, group, sequence):
        self.group, self.sequence = group, sequence and group.size > 1

    def rows(self, num_rows):
        """(start, size) of the rows that this rank holds outside, of `num_rows`."""
        return cut(num_rows, self.group.size, self.group.rank) if self.sequence else (0, num_rows)

    def enter(self, x, num_rows):
        """(n, C) outside -> (N, C)"""
        return self.group.gather(x, 0, num_rows) if self.sequence else x

    def enter_backward(self, dx):
        """(N, C) partial -> (n, C)"""
        return self._sum(dx)

    def leave(self, y):
        """(N, C) partial -> (n, C) outside"""
        return self._sum(y)

    def leave_backward(self, dy, num_rows):
        """(n, C) -> (N, C)"""
        return self.enter(dy, num_rows)

    def _sum(self, x):
        return self.group.scatter_sum(x, 0, len(x)) if self.sequence else self.group.all_reduce(x)
