"""Runs the CUDA kernels on the CPU: compiled by g++ with emulate.h, threads as fibers (emulator.cpp). For tests only."""

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
import time
from pathlib import Path

from mpillm.backend.build import find_compiler
from mpillm.backend.cuda.modules import KERNELS, REAL, sources_of
from mpillm.config import UserError

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-w"]
KEPT = 7 * 24 * 3600                # seconds that a compiled kernel stays
MAX_WHOLE, MAX_FLOATS = 24, 8       # parameters of a kernel: whole numbers and pointers; floats
Whole, Floats, Three = ctypes.c_longlong * MAX_WHOLE, ctypes.c_double * MAX_FLOATS, ctypes.c_uint * 3


class KernelError(Exception):
    """A kernel that would hang or write where it must not."""


def is_usable():
    """Whether there is a C++ compiler."""
    try:
        return bool(find_compiler())
    except UserError:
        return False


@functools.cache
def folder():
    """Where compiled kernels lie: a folder of this user that no other one can write to."""
    path = Path(tempfile.gettempdir()) / f"mpillm-emulator-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to somebody else")
    for old in path.iterdir():
        with contextlib.suppress(FileNotFoundError):    # another process does the same
            if time.time() - old.stat().st_mtime > KEPT:
                old.unlink()
    return path


def build(words, sources, suffix):
    """Path of what the compiler makes of these words, compiled once for these sources."""
    content = b"\0".join([repr(words).encode(), *(source.read_bytes() for source in sources)])
    target = folder() / (hashlib.sha256(content).hexdigest()[:24] + suffix)
    if not target.exists():
        fresh = target.with_suffix(f".{os.getpid()}{suffix}")
        done = subprocess.run([*words, "-o", str(fresh)], capture_output=True, text=True)
        if done.returncode:
            raise KernelError(f"{' '.join(words)}\n{done.stderr[:8000]}")
        os.replace(fresh, target)
    return target


@functools.cache
def runtime():
    """The compiled emulator.cpp, loaded so that kernels find it."""
    words = [*find_compiler(), *FLAGS, "-O2", "-shared", str(HERE / "emulator.cpp")]
    library = ctypes.CDLL(str(build(words, [HERE / "emulator.cpp", HERE / "emulate.h"], ".so")), ctypes.RTLD_GLOBAL)
    address, number = ctypes.c_void_p, ctypes.c_int
    library.emulator_launch.argtypes = [address, address, Three, Three, Whole, Floats, number, ctypes.c_char_p, number]
    return library


@functools.cache
def load(source, dtype, defines):
    """The library of a .cu for the name of a type; defines: (name, value) pairs."""
    runtime()
    macros = [f"-D{name}={value}" for name, value in (("REAL", REAL[dtype]), *defines)]
    words = [*find_compiler(), *FLAGS, "-DEMULATED", *macros, f"-I{HERE}", f"-I{KERNELS}", "-shared", "-x", "c++", str(source)]
    return ctypes.CDLL(str(build(words, [*sources_of(source), HERE / "emulate.h"], ".so")))


@functools.cache
def functions_of(source, kernel, dtype, defines):
    """Addresses of a kernel, and of what tells the shared memory of its library."""
    library = load(source, dtype, defines)
    return [ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in (kernel, "shared_of_library")]


def three(size):
    size = size if isinstance(size, tuple) else (size,)
    return Three(*size, *[1] * (3 - len(size)))


def launch(source, kernel, dtype, grid, block, args, shared=0, defines=()):
    """Runs a kernel of the file `source`.

    Parameters
    ----------
    dtype : str
        Name of the type REAL.
    args : ints (addresses too) and floats
    defines : pairs of a macro and its value

    Raises
    ------
    KernelError
        where threads wait for ever, or a write went past the end of dynamic shared memory.
    """
    whole, floats = [arg for arg in args if not isinstance(arg, float)], [arg for arg in args if isinstance(arg, float)]
    if len(whole) > MAX_WHOLE or len(floats) > MAX_FLOATS:
        raise KernelError(f"{kernel}: {len(whole)} whole numbers and pointers, {len(floats)} floats; "
                          f"at most {MAX_WHOLE} and {MAX_FLOATS}")
    grid, block = three(grid), three(block)
    num_threads = block[0] * block[1] * block[2]
    if num_threads % 32 or not 0 < num_threads <= 1024 or not all(grid) or grid[1] > 65535 or grid[2] > 65535:
        raise KernelError(f"{kernel}: grid {tuple(grid)}, block {tuple(block)}; a block has a multiple of 32 threads, at most 1024")
    text = ctypes.create_string_buffer(400)
    functions = functions_of(source, kernel, dtype, defines)
    if runtime().emulator_launch(*functions, grid, block, Whole(*whole), Floats(*floats), shared, text, len(text)):
        raise KernelError(f"{kernel} of {source.name} ({dtype}): {text.value.decode()}")
