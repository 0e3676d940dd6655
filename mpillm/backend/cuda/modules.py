"""Compiles the CUDA kernels at run time by NVRTC, without a GPU; results are kept in a folder of the user.

The folder is MPILLM_CACHE, else mpillm in XDG_CACHE_HOME or ~/.cache. A file there is named by a hash of all that went into
it and renamed into place when complete, so any number of processes may compile at a time. Where the folder cannot be
written, each process compiles for itself.
"""

import functools
import os
import re
import sys
import tempfile
from pathlib import Path

from mpillm.backend.build import KERNELS, digest
from mpillm.config import UserError

REAL = {"float32": 1, "float64": 2, "bfloat16": 3, "float16": 4}    # of the macro REAL in common.cuh
HEADER = "cuda_bf16.h"
FLAGS = ["-std=c++17"]
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


class CompileError(Exception):
    """What the compiler said of a kernel."""


def nvrtc():
    """CuPy's binding of NVRTC, and NVRTC's version; UserError where the library is not there."""
    from cupy_backends.cuda.libs import nvrtc

    try:
        return nvrtc, nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f'device = "gpu": NVRTC, the run-time compiler of CUDA, does not load ({error}); load a module with '
                        "the CUDA toolkit, or install the extra gpu-cuda12 or gpu-cuda13 of mpillm") from None


def sources_of(path):
    """The file and all kernel files that it includes, directly or not, each once."""
    found, pending = [], [Path(path)]
    while pending:
        path = pending.pop()
        if path not in found and path.exists():
            found.append(path)
            pending += [KERNELS / name for name in INCLUDE.findall(path.read_text())]
    return found


@functools.cache
def cuda_include():
    """The folder with the headers of CUDA, of the major version of NVRTC: of NVIDIA's wheels, else of a toolkit.

    That is the order in which CuPy looks for NVRTC itself.

    Raises
    ------
    UserError
        when there is none.
    """
    major = nvrtc()[1][0]
    wheels = [wheel.parent for entry in sys.path if entry for wheel in sorted(Path(entry).glob(f"nvidia/*/include/{HEADER}"))]
    toolkits = [os.environ[name] for name in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(name)] + ["/usr/local/cuda"]
    for folder in [*wheels, *(Path(toolkit) / "include" for toolkit in toolkits)]:
        if (folder / HEADER).exists() and major_version(folder) in (major, None):
            return folder
    raise UserError(f'device = "gpu": {HEADER} of CUDA {major} is not found; load a module with this toolkit, set CUDA_PATH to '
                    f"its folder, or install the extra gpu-cuda{major} of mpillm")


def major_version(folder):
    """Of the CUDA whose headers these are; None where they do not tell."""
    try:
        found = re.search(r"#define CUDART_VERSION\s+(\d+)", (folder / "cuda_runtime_api.h").read_text(errors="replace"))
    except OSError:
        return None
    return int(found[1]) // 1000 if found else None


def options(dtype, arch, defines):
    """Options of NVRTC; no fast mathematics: exp and division are as exact as on a CPU."""
    macros = [f"-D{name}={value}" for name, value in (("REAL", REAL[dtype]), *sorted(defines.items()))]
    return [*FLAGS, f"-arch=sm_{arch}", *macros, f"-I{KERNELS}", f"-I{cuda_include()}"]


def compile_source(source, dtype, arch, defines, extra=()):
    """(cubin, log) of a .cu file for a type by name, and an architecture such as "80" or "90a".

    Raises
    ------
    CompileError
        with the compiler's log.
    """
    binding, _ = nvrtc()
    words = [*options(dtype, arch, defines), *extra]
    program = binding.createProgram(source.read_text(), source.name, [], [])
    try:
        binding.compileProgram(program, words)
        return binding.getCUBIN(program), binding.getProgramLog(program)
    except binding.NVRTCError as error:
        log = binding.getProgramLog(program)
        raise CompileError(f"{source.name} for {dtype}, sm_{arch}, {dict(defines)}: {error}\n{log}") from None
    finally:
        binding.destroyProgram(program)


def cache_folder():
    """Where compiled kernels are kept: the user's folder, or one of this process where that cannot be written."""
    named = os.environ.get("MPILLM_CACHE")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpillm"
    try:
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=base):
            return base
    except OSError:
        return Path(process_folder().name)


@functools.cache
def process_folder():
    """A folder that goes with the process."""
    return tempfile.TemporaryDirectory(prefix="mpillm-")


def compile_file(file, dtype, arch, defines):
    """Path of the cubin of kernels/<file>.cu, compiled unless it lies there from before.

    Parameters
    ----------
    dtype : str
        Name of the compute type.
    arch : str
        As "80" or "90a".
    defines : dict
        Macros and their values.

    Raises
    ------
    CompileError
    UserError
        where the compiler or the headers of CUDA are missing.
    """
    source, (_, version) = KERNELS / f"{file}.cu", nvrtc()
    macros = [REAL[dtype], arch, *sorted(defines.items())]
    parts = [repr((version, FLAGS, macros)).encode(), *(path.read_bytes() for path in sources_of(source))]
    folder = cache_folder()
    target = folder / f"{file}-{digest(*parts)}.cubin"
    if not target.exists():
        cubin, _ = compile_source(source, dtype, arch, defines)
        fd, fresh = tempfile.mkstemp(dir=folder, prefix=f"{file}-")
        with os.fdopen(fd, "wb") as handle:
            handle.write(cubin)
        os.chmod(fresh, 0o644)
        os.replace(fresh, target)
    return target
