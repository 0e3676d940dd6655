"""Slow ranks: the time that each rank computes against the others that do the same work.

A step takes as long as its slowest rank; the others wait in MPI, so wall times are alike and only the time outside of calls tells.
Every `PERIOD` steps the ranks tell each other theirs. Ranks of one pipeline stage do the same work and are compared with each other;
a rank that has no equal is compared with what it took itself before.
"""

import collections
import statistics

import numpy as np

PERIOD = 5              # steps between comparisons
SLOW = 1.5              # times the median of the others
LEAST = 2e-2            # seconds of computing in a step below which nothing is judged
AGAIN = 3               # comparisons in a row in which a rank has to be slow to be named
OWN_HISTORY = 20        # comparisons that a rank without an equal is compared with


class Stragglers:
    """
    Parameters
    ----------
    stages : list of int
        Of each rank, its pipeline stage.
    """

    def __init__(self, stages):
        self.peers = [[other for other, stage in enumerate(stages) if stage == own and other != rank] for rank, own in enumerate(stages)]
        self.slow = [0] * len(stages)       # comparisons in a row
        self.history = collections.deque(maxlen=OWN_HISTORY)

    def judge(self, seconds):
        """The times the others' time of each rank, and those to be named now.

        Parameters
        ----------
        seconds : (ranks,) sequence
            Time that each rank computed in a step, the mean of the steps since the last comparison.

        Returns
        -------
        ratios : list of float
            1.0: as the others.
        named : list of int
            Ranks that have just been slow for the `AGAIN`-th time in a row.
        """
        ratios = []
        for rank, own in enumerate(seconds):
            others = [seconds[peer] for peer in self.peers[rank]] or [past[rank] for past in self.history]
            usual = statistics.median(others) if others else own
            ratios.append(own / usual if usual >= LEAST else 1.0)
        self.history.append(list(seconds))
        self.slow = [count + 1 if ratio > SLOW else 0 for count, ratio in zip(self.slow, ratios)]
        return ratios, [rank for rank, count in enumerate(self.slow) if count == AGAIN]


class ComputeTime:
    """The time that this rank computes, step by step, and what all ranks took.

    Parameters
    ----------
    mesh : Mesh
    journal : Journal
        Knows how long this rank waited.
    """

    def __init__(self, mesh, journal):
        self.group, self.journal = mesh.world, journal
        self.stragglers = Stragglers([mesh.coords_of(rank)["pp"] for rank in range(mesh.num_ranks)])
        self.seconds, self.steps, self.waited = 0.0, 0, 0.0

    def begin(self):
        """A step begins."""
        self.waited = self.journal.waited

    def end(self, step, wall):
        """A step has ended after `wall` seconds. Every PERIOD steps: (seconds of each rank, ratios, named), else None. Collective."""
        self.seconds += wall - (self.journal.waited - self.waited)
        self.steps += 1
        if self.group.size == 1 or step % PERIOD:
            return None
        every = np.zeros(self.group.size)
        every[self.group.rank] = self.seconds / self.steps
        self.seconds, self.steps = 0.0, 0
        every = self.group.all_reduce(every).tolist()
        return every, *self.stragglers.judge(every)
