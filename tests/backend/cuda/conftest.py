"""The backend of a GPU for tests: on a real one where there is one, else on the emulator."""

import pytest
from emulator import is_usable


@pytest.fixture(scope="session")
def cuda():
    """A `Cuda`; tests that need it are skipped where neither a GPU nor what the emulator needs is there."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed; jobs/setup.sh --test installs it", exc_type=ImportError)
    from mpillm.backend.cuda import Cuda

    if cupy.cuda.is_available():
        from mpillm.backend.cuda.device import Device

        return Cuda(Device(0))
    if not is_usable():
        pytest.skip("no GPU, and no C++ compiler for the emulator")
    from fake import FakeDevice
    from fake_cublaslt import NumpyLt

    backend = Cuda(FakeDevice())
    backend.library = NumpyLt(backend.device)
    return backend
