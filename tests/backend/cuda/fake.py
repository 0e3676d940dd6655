"""A device without a GPU: CuPy arrays over host memory, kernels by the emulator. So operations of `Cuda` run on any CPU.

It is stricter than a GPU: new memory is full of NaN, and bytes written before or behind an array are an error.
"""

import contextlib
import ctypes
import weakref

import numpy as np
from emulator import KernelError, launch

from mpillm.backend.cuda.device import Device, import_cupy
from mpillm.backend.cuda.modules import KERNELS

GUARD = 512             # bytes before and behind each piece of memory; also its alignment, as CuPy's
NAN = 0xFF              # every byte of fresh memory and of guards: NaN in all types of floats, -1 in whole numbers


class Block:
    """A piece of host memory between guards."""

    def __init__(self, size):
        self.size = size
        self.bytes = np.full(size + 3 * GUARD, NAN, np.uint8)
        self.start = -self.bytes.ctypes.data % GUARD + GUARD
        self.address = self.bytes.ctypes.data + self.start
        self.before = self.bytes[self.start - GUARD : self.start]
        self.behind = self.bytes[self.start + size : self.start + size + GUARD]

    def is_whole(self):
        """Whether nobody has written to the guards."""
        return (self.before == NAN).all() and (self.behind == NAN).all()


class Pool:
    """What a device took of memory beside its arena."""

    def __init__(self):
        self.blocks = weakref.WeakValueDictionary()     # by address

    def take(self, size):
        block = Block(size)
        self.blocks[block.address] = block
        return block

    def total_bytes(self):
        return sum(block.size for block in self.blocks.values())


class Stream:
    """Whatever is asked for is done at once."""

    ptr = 0
    done = True

    def synchronize(self):
        pass

    def wait_event(self, event):
        pass


class Graph:
    """Recorded work. Of reserved memory it knows addresses only, as on a GPU: whose it is when it is launched, nobody asks."""

    def __init__(self):
        self.work, self.blocks = [], []     # blocks: memory taken meanwhile, where none is reserved

    def launch(self):
        for call in self.work:
            call()


class FakeDevice(Device):
    """One that computes on the CPU.

    Parameters
    ----------
    multiprocessors : int
        Few, so that loops over what is larger than the device are walked.
    """

    def __init__(self, multiprocessors=3, arch="80"):
        self.cupy, self.index = import_cupy(), 0
        self.name, self.arch, self.multiprocessors, self.address = "emulator", arch, multiprocessors, "none"
        self.shared_memory = 227 << 10
        self.pool, self.stream, self.copies, self.recording = Pool(), Stream(), Stream(), None
        self.runtime = None
        self._start()

    def free_bytes(self):
        return 1 << 33

    def _new_pool(self):
        return self.pool

    def malloc(self, size, pool):
        block = self.pool.take(size)
        if self.recording is not None:
            self.recording.blocks.append(block)
        return self.cupy.cuda.MemoryPointer(self.cupy.cuda.UnownedMemory(block.address, size, block, self.index), 0)

    def empty(self, shape, dtype):
        array = super().empty(shape, dtype)
        ctypes.memset(array.data.ptr, NAN, array.nbytes)
        return array

    def clear(self, array):
        pointer, size, held = array.data.ptr, array.nbytes, self.held(array)
        self.do(lambda: ctypes.memset(pointer, 0, size), held)

    def pinned(self, size):
        return np.full(size, NAN, np.uint8)

    def copy_to_host_start(self, host, array):
        assert array.flags.c_contiguous
        self.check("a copy to the host", [array])
        pointer, size, held = array.data.ptr, array.nbytes, self.held(array)
        self.do(lambda: ctypes.memmove(host.ctypes.data, pointer, size), held)

    def copy_from_host_start(self, array, host, stream=None):
        assert array.flags.c_contiguous
        pointer, size, held = array.data.ptr, array.nbytes, self.held(array)
        self.do(lambda: ctypes.memmove(pointer, host.ctypes.data, size), held)

    def held(self, *arrays):
        """What work keeps until it is done: arrays on memory of their own; reserved memory stays."""
        blocks = [self.pool.blocks.get(array.data.mem.ptr) for array in arrays]
        return [array for array, block in zip(arrays, blocks) if block is not None and block.size == array.data.mem.size]

    def launch(self, file, kernel, dtype, grid, block, args, shared=0, **defines):
        settings = KERNELS / f"{file}.cu", kernel, np.dtype(dtype).name, grid, block
        arrays = self.held(*(arg for arg in args if isinstance(arg, self.cupy.ndarray)))
        plain = [0 if arg is None else arg.data.ptr if isinstance(arg, self.cupy.ndarray) else arg for arg in args]
        for arg in plain:
            if type(arg) not in (int, float):   # CuPy passes NumPy's numbers in their own size
                raise KernelError(f"{kernel}: argument {arg!r} is a {type(arg).__name__}, not an int, a float, an array or None")

        def call():
            launch(*settings, plain, shared, tuple(sorted(defines.items())))
            self.check(f"{kernel} of {file}.cu", arrays)

        self.do(call, arrays)

    def check(self, what, arrays):
        """Nobody has written outside of these arrays' memory."""
        for array in arrays:
            block = self.pool.blocks.get(array.data.mem.ptr)
            if block is not None and not block.is_whole():
                raise KernelError(f"{what}: bytes before or behind an array {array.shape} of {array.dtype} were written")

    def do(self, call, held=()):
        """Does it, or records it, with what has to be there until then."""
        if self.recording is None:
            call()
        else:
            self.recording.work.append(call)
            self.recording.blocks += held

    def record(self, stream=None):
        return self.stream

    def range(self, name):
        return contextlib.nullcontext()

    def capture(self, work):
        pieces = []

        def cut(action):
            pieces.append((self.recording, action))
            self.recording = Graph()

        self.recording, self.capturing = Graph(), True
        try:
            work(cut)
            cut(None)
        finally:
            self.recording, self.capturing = None, False
        return pieces
