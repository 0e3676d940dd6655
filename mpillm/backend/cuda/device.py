"""One GPU: memory, copies, kernel launches, events and graphs. Nothing else of mpillm talks to the driver.

CuPy arrays are used as containers only (shape, strides, type, memory): every computation is a kernel of ours or a product
of cuBLASLt. All work goes to one stream, so operations need no further order among themselves.
"""

import collections
import contextlib
import functools

import numpy as np

from mpillm.backend.arena import Arena
from mpillm.config import UserError

NUM_CONSTANTS = 256                                 # arrays remembered by content
SHARED_LIMIT = 40 << 10                             # bytes of dynamic shared memory a kernel may use unasked: of 48 K, some are static


def import_cupy():
    """The module cupy, or one line on how to get it."""
    try:
        import cupy
    except ImportError as error:
        raise UserError(f'device = "gpu" needs CuPy: {error}; install the extra gpu-cuda12 or gpu-cuda13 of mpillm, or use device "cpu"') from None
    return cupy


def addresses():
    """Where the GPUs that this process sees are on the PCI bus of its node; [] without a driver."""
    runtime = import_cupy().cuda.runtime
    try:
        return [runtime.deviceGetPCIBusId(index) for index in range(runtime.getDeviceCount())]
    except runtime.CUDARuntimeError:
        return []


class Memory:
    """Where arrays of one kind come from: a piece of planned size, and a pool for what does not fit into it.

    Parameters
    ----------
    device : Device
    pool : cupy.cuda.MemoryPool
        Of its own, so that nobody else gets what is freed here.
    """

    def __init__(self, device, pool):
        self.device, self.pool, self.arena, self.block = device, pool, None, None

    def reserve(self, size):
        self.block, self.arena = self.device.malloc(size, self.pool), Arena(size)

    def take(self, size):
        """A MemoryPointer to `size` bytes, which go back when the last array on them dies."""
        if self.arena is not None:
            place = self.arena.take(size)
            if place is not None:
                cuda = self.device.cupy.cuda
                return cuda.MemoryPointer(cuda.UnownedMemory(self.block.ptr + place.start, size, place, self.device.index), 0)
        return self.device.malloc(size, self.pool)

    def peak_bytes(self):
        """The most bytes that were in use; of those that were not planned, all that were taken from the driver."""
        if self.arena is None:
            return self.pool.total_bytes()
        return self.arena.peak + self.pool.total_bytes() - self.arena.capacity


class Device:
    """
    Parameters
    ----------
    index : int
        Of the GPUs that this process sees.

    Attributes
    ----------
    name : str
    arch : str
        As compilers call it: "90a" for compute capability 9.0, else such as "80".
    multiprocessors : int
    shared_memory : int
        Bytes that a block can have.
    address : str
        On the PCI bus of its node.
    """

    def __init__(self, index):
        self.cupy = cupy = import_cupy()
        self.index, self.runtime = index, cupy.cuda.runtime
        try:
            cupy.cuda.Device(index).use()
            properties = self.runtime.getDeviceProperties(index)
        except self.runtime.CUDARuntimeError as error:
            raise UserError(f'device = "gpu": no usable GPU: {error}; load the driver, or use device "cpu"') from None
        self.name, self.multiprocessors = properties["name"].decode(), properties["multiProcessorCount"]
        self.shared_memory, self.address = properties["sharedMemPerBlockOptin"], self.runtime.deviceGetPCIBusId(index)
        capability = f"{properties['major']}{properties['minor']}"
        self.arch = "90a" if capability == "90" else capability
        self.stream, self.copies = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
        self.stream.use()
        self._start()

    def _start(self):
        self.kept, self.activation_memory = Memory(self, self._new_pool()), Memory(self, self._new_pool())
        self.ahead = self._new_pool()
        self.memory, self._workspace, self.capturing = self.kept, {}, False
        self.kernels, self.sent = {}, collections.deque()
        self.constants, self.constants_of_graphs = collections.OrderedDict(), {}

    @property
    def stream_pointer(self):
        """Address of the stream, for libraries."""
        return self.stream.ptr

    # -- memory -------------------------------------------------------------------------------------------------

    def reserve(self, kept, activations):
        """Takes so many bytes in one piece each, from which further arrays are cut while they fit."""
        self.kept.reserve(kept)
        self.activation_memory.reserve(activations)

    @contextlib.contextmanager
    def activations(self):
        """In here arrays come from memory that graphs use again at each launch: all must have died when the next one is launched."""
        before, self.memory = self.memory, self.activation_memory
        try:
            yield
        finally:
            self.memory = before

    def free_bytes(self):
        """Bytes of the GPU that nobody has taken."""
        return self.runtime.memGetInfo()[0]

    def peak_bytes(self):
        """The most bytes that arrays needed, gaps between them included."""
        return self.kept.peak_bytes() + self.activation_memory.peak_bytes()

    def _new_pool(self):
        return self.cupy.cuda.MemoryPool()

    def malloc(self, size, pool):
        """A MemoryPointer to memory of a pool."""
        try:
            return pool.malloc(size)
        except self.cupy.cuda.memory.OutOfMemoryError:
            raise MemoryError(f"{self.name} has {self.free_bytes() >> 20} MiB left of its memory, {size >> 20} MiB are asked for") from None

    def empty(self, shape, dtype):
        dtype = np.dtype(dtype)
        size = dtype.itemsize
        for length in shape if isinstance(shape, tuple) else (shape,):
            size *= length
        return self.cupy.ndarray(shape, dtype, self.memory.take(max(size, 16)))

    def zeros(self, shape, dtype):
        array = self.empty(shape, dtype)
        self.clear(array)
        return array

    def clear(self, array):
        """All bytes of a contiguous array become 0."""
        if array.nbytes:
            self.runtime.memsetAsync(array.data.ptr, 0, array.nbytes, self.stream.ptr)

    def workspace(self, size):
        """Scratch memory of a library, the same at every call; kept."""
        if size not in self._workspace:
            self._workspace[size] = self.malloc(size, self.kept.pool)
        return self._workspace[size].ptr

    # -- host and device ----------------------------------------------------------------------------------------

    def pinned(self, size):
        """`size` bytes of page-locked host memory, (size,) uint8."""
        return np.frombuffer(self.cupy.cuda.alloc_pinned_memory(size), np.uint8, size)

    def copy_to_host_start(self, host, array):
        """Starts copying a contiguous array to pinned memory behind the work of the stream."""
        self.runtime.memcpyAsync(host.ctypes.data, array.data.ptr, array.nbytes, self.runtime.memcpyDeviceToHost, self.stream.ptr)

    def copy_from_host_start(self, array, host, stream=None):
        """Starts copying pinned memory into a contiguous array, behind the work of the stream; `host` stays as it is until then."""
        stream = stream or self.stream
        self.runtime.memcpyAsync(array.data.ptr, host.ctypes.data, array.nbytes, self.runtime.memcpyHostToDevice, stream.ptr)

    def from_host(self, array):
        """A copy of a NumPy array; returns at once."""
        host = np.ascontiguousarray(array)
        copy = self.empty(host.shape, host.dtype)
        self.upload(copy, host)
        return copy

    def upload(self, array, host):
        """A contiguous array becomes a copy of a NumPy array, which may change as soon as this returns."""
        if not array.nbytes:
            return
        if self.capturing:
            raise RuntimeError("a graph cannot contain a copy from the host")
        staging = self.pinned(array.nbytes)
        staging[:] = np.ascontiguousarray(host).reshape(-1).view(np.uint8)
        self.copy_from_host_start(array, staging)
        self.sent.append((self.record(), staging))
        while self.sent and self.sent[0][0].done:
            self.sent.popleft()

    def send_ahead(self, array):
        """As `from_host`, on a stream of its own: it does not wait for the work under way, only later work waits for it.

        The memory is used again for nothing else, and is free only when the work of the step that read it has been waited for.
        """
        host = np.ascontiguousarray(array)
        copy = self.cupy.ndarray(host.shape, host.dtype, self.malloc(max(host.nbytes, 16), self.ahead))
        if host.nbytes:
            staging = self.pinned(host.nbytes)
            staging[:] = host.reshape(-1).view(np.uint8)
            self.copy_from_host_start(copy, staging, self.copies)
            sent = self.record(self.copies)
            self.stream.wait_event(sent)
            self.sent.append((sent, staging))
        return copy

    def to_host(self, array):
        """A contiguous array as a NumPy array, when it is there."""
        host = np.empty(array.shape, array.dtype)
        if array.nbytes:
            self.copy_to_host_start(host, array)
        self.synchronize()
        return host

    def constant(self, array):
        """As `from_host`, in memory that is kept, remembered by content: for tables that are asked for again and again.

        The least recently used of many are forgotten, but for those that graphs read.
        """
        host = np.ascontiguousarray(array)
        key = host.shape, host.dtype, host.tobytes()
        if key in self.constants_of_graphs:
            return self.constants_of_graphs[key]
        if key not in self.constants:
            before, self.memory = self.memory, self.kept
            self.constants[key] = self.from_host(host)
            self.memory = before
        found = self.constants[key]
        if self.capturing:
            self.constants_of_graphs[key] = self.constants.pop(key)
        else:
            self.constants.move_to_end(key)
            if len(self.constants) > NUM_CONSTANTS:
                self.constants.popitem(last=False)
        return found

    # -- kernels ------------------------------------------------------------------------------------------------

    def launch(self, file, kernel, dtype, grid, block, args, shared=0, **defines):
        """Runs `kernel` of kernels/<file>.cu, compiled for `dtype` as REAL and with `defines`, on the stream.

        args : arrays, Python ints (long long), Python floats (double), None (null)
        """
        key = file, kernel, dtype, tuple(defines.items())
        function = self.kernels.get(key)
        if function is None:
            function = self.kernels[key] = self._function(file, kernel, dtype, defines)
        if shared > SHARED_LIMIT and function.max_dynamic_shared_size_bytes < shared:
            function.max_dynamic_shared_size_bytes = shared
        function(grid if type(grid) is tuple else (grid,), block if type(block) is tuple else (block,), tuple(
            0 if arg is None else arg for arg in args), shared_mem=shared, stream=self.stream)       # CuPy's own is that of the last Device of this thread

    def _function(self, file, kernel, dtype, defines):
        return self._module(file, np.dtype(dtype).name, tuple(sorted(defines.items()))).get_function(kernel)

    @functools.cache
    def _module(self, file, dtype, defines):
        from mpillm.backend.cuda.modules import compile_file

        path = compile_file(file, dtype, self.arch, dict(defines))
        return self.cupy.RawModule(path=str(path))

    # -- order --------------------------------------------------------------------------------------------------

    def synchronize(self):
        """Returns when the work of the stream is done."""
        self.stream.synchronize()

    def record(self, stream=None):
        """An event behind the work of the stream so far: `.done`, `.synchronize()`."""
        event = self.cupy.cuda.Event(disable_timing=True)
        event.record(stream or self.stream)
        return event

    @contextlib.contextmanager
    def range(self, name):
        """A named range for profilers (NVTX)."""
        self.cupy.cuda.nvtx.RangePush(name)
        try:
            yield
        finally:
            self.cupy.cuda.nvtx.RangePop()

    def capture(self, work):
        """Records the launches of `work(cut)` without running them, in pieces that end where it calls `cut(action)`.

        Returns
        -------
        list of (graph, action): `.launch()` runs a graph. The last action is None. Arrays that graphs use must be kept.
        """
        pieces, self.capturing = [], True

        def cut(action):
            pieces.append((self.stream.end_capture(), action))
            self.stream.begin_capture()
        self.stream.begin_capture()
        try:
            work(cut)
        finally:
            self.capturing = False
            last = self.stream.end_capture()
        return pieces + [(last, None)]
