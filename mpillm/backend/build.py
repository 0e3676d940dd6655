"""Compiles the kernels: `python -m mpillm.backend.build`. Standard library only.

One library per level of x86-64 (baseline, v3 = AVX2, v4 = AVX-512), or one library elsewhere; the level is chosen when
the library is loaded, so a shared installation serves unequal nodes. Libraries lie in kernels/built (ignored by git) as
LEVEL-SOURCES-COMPILER.so, with hashes of the sources with their flags and of the compiler, so that a stale library is
never loaded and an up-to-date one is never built again. Each is renamed into place when it is complete.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mpillm.backend.threads import first_cpu
from mpillm.config import UserError

KERNELS = Path(__file__).parent / "kernels"
BUILT = KERNELS / "built"
COMMAND = "python -m mpillm.backend.build"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra"]
FLAGS_OF_FILE = {"normal": ["-ffp-contract=off"]}  # bit for bit the NumPy form
OPENMP = "-fopenmp"
WITHOUT_OPENMP = ["-fopenmp-simd", "-Wno-unknown-pragmas"]
LEVELS = {  # the best first: flags, and the features of /proc/cpuinfo that it needs
    "v4": (["-march=x86-64-v4", "-mprefer-vector-width=512"], "avx512f avx512bw avx512cd avx512dq avx512vl"),
    "v3": (["-march=x86-64-v3", "-mprefer-vector-width=256"], "avx2 bmi1 bmi2 f16c fma abm movbe"),
    "baseline": ([], ""),
}


def levels():
    """The levels worth building on this kind of machine: name -> flags."""
    if platform.machine() in ("x86_64", "AMD64"):
        return {name: flags for name, (flags, _) in LEVELS.items()}
    return {"baseline": []}


def usable_levels():
    """The levels that this CPU can run, the best first."""
    features = set(first_cpu().get("flags", "").split())
    v3 = set(LEVELS["v3"][1].split()) <= features
    return [name for name, (_, needed) in LEVELS.items() if set(needed.split()) <= features and (v3 or name == "baseline")]


def digest(*parts):
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def sources_hash():
    """Hash of every source and flag of the kernels."""
    files = sorted(path for path in KERNELS.iterdir() if path.suffix in (".cpp", ".h"))
    settings = repr((FLAGS, FLAGS_OF_FILE, OPENMP, WITHOUT_OPENMP, LEVELS)).encode()
    return digest(settings, *(path.name.encode() + b"\0" + path.read_bytes() for path in files))


def find_library():
    """The library of the present sources for this CPU, or None."""
    of_sources = sources_hash()
    for level in usable_levels():
        for path in sorted(BUILT.glob(f"{level}-{of_sources}-*.so")):
            return path
    return None


def find_compiler():
    """CXX, else c++, g++ or clang++; as a list of words.

    Raises
    ------
    UserError
        when there is none.
    """
    named = os.environ.get("CXX", "").split()
    for words in ([named] if named else [["c++"], ["g++"], ["clang++"]]):
        if shutil.which(words[0]):
            return words
    tried = named[0] if named else "c++, g++, clang++"
    raise UserError(f"no C++ compiler found ({tried}); load a compiler module or set CXX, then run {COMMAND}")


def run_compiler(words):
    """Runs it; its messages become the error."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(words)} failed ({done.returncode}): {done.stderr.strip()[:2000]}")


def compiles(compiler, flags, folder):
    """Whether the compiler builds a library with these flags."""
    source = Path(folder) / "try.cpp"
    source.write_text("extern \"C\" int f() { return 1; }\n")
    words = [*compiler, *flags, "-fPIC", "-shared", str(source), "-o", str(Path(folder) / "try.so")]
    return subprocess.run(words, capture_output=True).returncode == 0


def build_level(compiler, flags, target, pool):
    """Compiles every file and links them to `target`, which appears complete or not at all."""
    with tempfile.TemporaryDirectory(dir=BUILT, prefix="work-") as folder:
        sources = sorted(KERNELS.glob("*.cpp"))
        objects = [str(Path(folder) / f"{path.stem}.o") for path in sources]
        commands = [
            [*compiler, *FLAGS, *flags, *FLAGS_OF_FILE.get(path.stem, []), "-c", str(path), "-o", result]
            for path, result in zip(sources, objects)
        ]
        list(pool.map(run_compiler, commands))
        library = str(Path(folder) / "library.so")
        run_compiler([*compiler, *flags, "-shared", *objects, "-o", library])
        os.replace(library, target)
    for old in BUILT.glob(f"{target.name.split('-')[0]}-*.so"):
        if old != target:
            old.unlink(missing_ok=True)


def build(report=print):
    """Builds what is missing or out of date; returns the libraries' paths.

    Raises
    ------
    UserError
        without a compiler, when it fails, or when the folder cannot be written.
    """
    compiler = find_compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True).stdout
    try:
        BUILT.mkdir(exist_ok=True)
        (BUILT / ".gitignore").write_text("*\n")
    except OSError as error:
        raise UserError(f"cannot write {BUILT} ({error.strerror}); run {COMMAND} as the owner of the installation") from None
    of_sources, paths = sources_hash(), []
    with tempfile.TemporaryDirectory() as folder:
        openmp = [OPENMP] if compiles(compiler, [OPENMP], folder) else WITHOUT_OPENMP
        known = {name: flags for name, flags in levels().items() if compiles(compiler, flags, folder)}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for level, flags in known.items():
            target = BUILT / f"{level}-{of_sources}-{digest(version, repr((compiler, openmp)).encode())}.so"
            if target.exists():
                report(f"kernels {level}: up to date")
            else:
                build_level(compiler, [*openmp, *flags], target, pool)
                report(f"kernels {level}: built with {' '.join(compiler)}{'' if openmp == [OPENMP] else ', no OpenMP'}")
            paths.append(target)
    return paths


def main():
    try:
        build()
    except UserError as error:
        sys.exit(f"mpillm: error: {error}")


if __name__ == "__main__":
    main()
