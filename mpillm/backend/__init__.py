"""How numbers are computed on one device: one object with about forty named operations.

The operations and their meaning are listed by `reference.Reference`, which is their NumPy form. `Cpu` replaces
most of them by C++ kernels where those are built. Arrays never leave the device except by `to_host`.
"""

from mpillm.backend.types import Dropout, Update, wide_of  # noqa: F401


def open_backend(device, index=0, dtype=None):
    """The backend of a device. Imports what it needs only now.

    Parameters
    ----------
    device : "cpu" or "gpu"
    index : int
        Of the GPUs that this process sees.
    dtype : numpy type or None
        The compute type; a CPU has 16-bit floats by rounding only (half.py).

    Raises
    ------
    UserError
        where there is no such device, or software for it.
    """
    if device == "gpu":
        from mpillm.backend.cuda import Cuda
        from mpillm.backend.cuda.device import Device

        return Cuda(Device(index))
    from mpillm.backend.cpu import Cpu

    if dtype is not None and wide_of(dtype) != dtype:
        from mpillm.backend.half import HalfCpu

        return HalfCpu()
    return Cpu()
