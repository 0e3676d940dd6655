"""Loss spikes: a loss far above those of the last steps. Going back to a checkpoint and leaving out the batches between is what
large runs do about them (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, section 5.1)."""

import collections
import math
import statistics

WINDOW = 100        # losses that count as usual
LEAST = 20          # of them, before anything is a spike
SHARE = 0.002       # of the mean: no smaller deviation counts, so that a flat curve has none by noise


class Spikes:
    """
    Parameters
    ----------
    deviations : float
        Standard deviations above the mean of the last WINDOW losses; 0: nothing is a spike.
    """

    def __init__(self, deviations):
        self.deviations, self.losses = deviations, collections.deque(maxlen=WINDOW)

    def threshold(self):
        """The loss above which a step is a spike; infinite while too few are known."""
        if not self.deviations or len(self.losses) < LEAST:
            return math.inf
        mean = statistics.fmean(self.losses)
        return mean + self.deviations * max(statistics.pstdev(self.losses), SHARE * abs(mean))

    def is_one(self, loss):
        """Whether the loss of a step is a spike; if not, it counts as usual from now on."""
        if not math.isfinite(loss):
            return False            # skipped by another rule
        if loss > self.threshold():
            return True
        self.losses.append(loss)
        return False

    def resume(self, losses):
        """Goes on with the usual losses that a checkpoint recorded, so that a resume knows what is usual; without any where it has no such list."""
        if isinstance(losses, list) and all(isinstance(loss, float) and math.isfinite(loss) for loss in losses):
            self.losses.extend(losses)

    def forget(self):
        """After a return to an earlier step, whose losses come again."""
        self.losses.clear()
