"""h5py: built against the parallel HDF5 of the machine where there is one, once, and proven; else the serial wheel."""

import glob
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from install import PROOF, Failure, result_of, run, step
from machine import Hdf5, apt_package, find_hdf5, missing_for_building

H5PY = "3.16.0"
BUILD_TOOLS = ["Cython>=3.0,<4", "pkgconfig>=1.5.5", "packaging>=23", "numpy>=2.1.2,<2.6"]
SERIAL = "checkpoints are written by offsets: same file, same reader, only h5py's own parallel driver is missing"


def plan(mpi, wanted, kept, offline):
    """What h5py is to be: {"found": Hdf5 or None, "why"}; installs Debian's package where it may and nothing fits.

    `kept` is what the last set-up of this environment kept: its choice stands.
    """
    if wanted == "serial":
        return {"found": None, "why": "asked for by --hdf5 serial"}
    if kept:
        found = Hdf5(**kept["found"]) if kept["found"] else None
        return {"found": found, "why": found.why if found else kept["why"]}
    missing = missing_for_building()
    found, why = find_hdf5(mpi)
    package = apt_package(mpi.family)
    if not found and package and not offline:
        with step(f"apt-get install {package}") as progress:
            try:
                install_package(package)
            except Failure as failure:
                progress.note(f"not installed: {failure.reason}")
        missing = missing_for_building()
        found, why = find_hdf5(mpi)
    if found and missing:
        return {"found": None, "why": f"HDF5 {found.version} is there ({found.why}), but {missing}"}
    return {"found": found, "why": found.why if found else why}


def install_package(package):
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "update", "-q"], "apt-get update", environ)
    run(["apt-get", "install", "-q", "-y", "--no-install-recommends", package, "gcc", "libc6-dev"], "apt-get install", environ)


def key_of(mpi, found):
    """Names the wheel of one Python, h5py, HDF5 and MPI."""
    place = hashlib.sha256(f"{found.library} {mpi.compiler}".encode()).hexdigest()[:8]
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    return f"{python}-{platform.machine()}-h5py{H5PY}-hdf5_{found.version}-{mpi.family}-{place}"


def cache():
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "mpillm" / "wheels"


class Build:
    """A build of the wheel that runs in the background; only `wheel` is set when it was built before."""

    def __init__(self, wheel=None, process=None, folder=None, key=None):
        self.wheel, self.process, self.folder, self.key = wheel, process, folder, key

    def kept(self):
        """Waits for the wheel and keeps it for the next environment, where the cache can be written; returns its path."""
        if self.wheel:
            return self.wheel
        code = self.process.wait()
        built = next(iter(glob.glob(os.path.join(self.folder, "h5py-*.whl"))), None)
        if code or not built:
            raise Failure("building h5py", Path(self.folder, "log").read_text())
        target = cache() / self.key
        try:
            target.mkdir(parents=True, exist_ok=True)
            partial = target / f".{os.getpid()}"
            shutil.copyfile(built, partial)
            self.wheel = str(target / os.path.basename(built))
            os.replace(partial, self.wheel)
        except OSError:
            self.wheel = built
        return self.wheel

    def stop(self):
        """Ends a build that is still running and removes its folder."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def start_build(venv, mpi, plan):
    """Starts building the wheel in the background, unless it is kept from before."""
    if not plan["found"]:
        return Build()
    key = key_of(mpi, plan["found"])
    wheel = next(iter(glob.glob(str(cache() / key / "h5py-*.whl"))), None)
    if wheel:
        return Build(wheel)
    venv.pip(*BUILD_TOOLS)
    folder = tempfile.mkdtemp(prefix="mpillm-h5py-")
    with open(os.path.join(folder, "extensions.cfg"), "w") as file:
        file.write(f"[build_ext]\nparallel={os.cpu_count() or 1}\n")
    source = ["--isolated", "wheel", "--no-index", "--find-links", str(venv.source)] if venv.source else ["wheel"]
    command = [venv.python, "-m", "pip", *source, "-q", "--no-deps", "--no-build-isolation", "--no-cache-dir",
               "--no-binary", "h5py", "-w", folder, f"h5py=={H5PY}"]
    print(f"           building h5py {H5PY} on HDF5 {plan['found'].version} meanwhile (about a minute, once)", flush=True)
    environ = {**venv.environ, **build_settings(venv, mpi, plan["found"], folder)}
    with open(os.path.join(folder, "log"), "w") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    return Build(None, process, folder, key)


def build_settings(venv, mpi, found, folder):
    """The environment of the build.

    The MPI wheel lies in VENV/lib. Each extension finds it from its own place ($ORIGIN), before the libmpi of the system that
    Debian's HDF5 would bring: whichever of h5py and mpi4py is imported first, there is one MPI in the process.
    """
    settings = {"HDF5_MPI": "ON", "HDF5_INCLUDEDIR": found.include, "HDF5_LIBDIR": found.library, "H5PY_SETUP_REQUIRES": "0",
                "CFLAGS": "-O0 -g0", "DIST_EXTRA_CONFIG": os.path.join(folder, "extensions.cfg"),
                "HDF5_DIR": "", "HDF5_PKGCONFIG_NAME": "", "CC": mpi.compiler or "cc"}
    if mpi.compiler:
        settings["LDFLAGS"] = f"-Wl,-rpath,{found.library}"
    else:
        include, library = venv.folder / "include", venv.folder / "lib"
        settings["CFLAGS"] += f" -I{include}"
        settings["LDFLAGS"] = (f"-Wl,--disable-new-dtags,-rpath,$ORIGIN/../../..,-rpath,{found.library} "
                               f"-L{library} -Wl,--no-as-needed -lmpi")
    return settings


def finish(venv, mpi_found, plan, build):
    """Installs the wheel and proves it; the serial h5py when there is none or it does not work. Returns what is kept."""
    why = plan["why"]
    if plan["found"]:
        with step(f"h5py {H5PY} with MPI: 2 ranks write a file") as progress:
            try:
                venv.pip("--force-reinstall", "--no-deps", build.kept())
                return {"form": "parallel", "found": asdict(plan["found"]), "why": f"{why}; {prove(venv, mpi_found)}",
                        "text": f"{plan['found'].version}, parallel (h5py {H5PY})"}
            except Failure as failure:
                why = progress.note(f"{why}, but {failure.what} failed (mpillm-setup.log): {failure.reason}")
                (venv.folder / "mpillm-setup.log").write_text(str(failure))
    with step("h5py, serial"):
        venv.pip("--force-reinstall", "--no-deps", f"h5py=={H5PY}")
        version = venv.run(["-c", "import h5py; print(h5py.version.hdf5_version)"]).stdout.strip()
    return {"form": "serial", "found": None, "why": why, "text": f"{version}, serial (h5py {H5PY})"}


def prove(venv, mpi_found):
    """Two ranks write one file, where ranks start on this node; returns what was seen."""
    if not mpi_found["runs"]:
        venv.run(["-c", "import h5py; assert h5py.get_config().mpi, 'h5py has no MPI'"])
        return "not tried: no ranks on this node"
    with tempfile.TemporaryDirectory(prefix="mpillm-proof-") as folder:
        done = venv.on_ranks(2, mpi_found["launcher"], [PROOF, "hdf5", os.path.join(folder, "proof.h5")])
    if (result_of(done) or {}).get("ranks") != 2:
        raise Failure("a file written by 2 ranks", done.stderr or done.stdout)
    return "2 ranks wrote one file"
