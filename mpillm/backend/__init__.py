"""How numbers are computed on one device: one object with about forty named operations.

The operations and their meaning are listed by `reference.Reference`, which is their NumPy form. `Cpu` replaces
most of them by C++ kernels where those are built. Arrays never leave the device except by `to_host`.
"""

from typing import NamedTuple


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


def open_backend(device):
    """The backend of a device: "cpu". Imports what it needs only now.

    Raises
    ------
    UserError
        for a device that has no backend.
    """
    if device == "cpu":
        from mpillm.backend.cpu import Cpu

        return Cpu()
    from mpillm.config import UserError

    raise UserError(f'run.device = "{device}": only "cpu" is there so far; set run.device = "cpu"')
