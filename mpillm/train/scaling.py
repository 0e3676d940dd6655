"""The loss scale of float16: gradients below 6e-8 would vanish in it (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2)."""

import math
from typing import NamedTuple

FIRST, SMALLEST, LARGEST = 2.0**16, 1.0, 2.0**24
PATIENCE = 1000     # steps without a non-finite gradient after which the scale is tried twice as large


class LossScale(NamedTuple):
    """What every gradient of a step is multiplied with; a power of two, so that it changes no digit. 1 for all types but float16."""
    scale: float = 1.0
    good_steps: int = 0     # with finite gradients, since the scale changed
    dynamic: bool = False

    @classmethod
    def of(cls, dtype):
        return cls(FIRST, 0, True) if dtype == "float16" else cls()

    @staticmethod
    def could_be(saved):
        """Whether a checkpoint's record is one of `resumed`: [scale, good steps]."""
        return (isinstance(saved, list) and [type(each) for each in saved] in ([float, int], [int, int]) and SMALLEST <= saved[0] <= LARGEST
                and math.log2(saved[0]).is_integer() and saved[1] >= 0)

    @property
    def at_its_end(self):
        """Whether a gradient that is not finite cannot be due to the scale."""
        return self.scale == SMALLEST

    def resumed(self, saved):
        """With the scale and the count of a checkpoint, where this type has a scale and the checkpoint recorded one."""
        if not self.dynamic or saved is None:
            return self
        return self._replace(scale=float(saved[0]), good_steps=int(saved[1]))

    def after(self, skipped):
        """The loss scale of the step after one that was `skipped` because a gradient was not finite, or was not."""
        if not self.dynamic:
            return self
        if skipped:
            return self._replace(scale=max(SMALLEST, self.scale / 2), good_steps=0)
        if self.good_steps + 1 < PATIENCE:
            return self._replace(good_steps=self.good_steps + 1)
        return self._replace(scale=min(LARGEST, self.scale * 2), good_steps=0)
