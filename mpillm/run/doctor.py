"""Is this allocation fit to run? Each check fills a part of what is known; run/diagnosis.py judges it."""

import contextlib
import faulthandler
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy as np

from ..backend.threads import slow_blas_note
from ..layout import measure
from ..layout.hdf5 import load_h5py
from ..layout.launcher import started
from ..layout.node import gather_on_node
from ..layout.probe import is_cuda_aware
from ..layout.slab import Slab
from ..store.errors import SaveFailed
from ..store.hyperslab import Entry, default_form, verify_written, write_state
from . import ending, launch
from .account import gemm_rate
from .session import TYPES, open_device

STAGE = 120.0           # seconds after which a check that hangs ends the job
LATER = 2.0             # seconds in which all ranks say so; the launcher ends the job with the first one that is gone
LAST_RESORT = 10.0      # seconds more, where a library hangs and keeps Python from saying anything
WRITTEN = 16 << 20      # bytes that each rank writes
MOST_WRITTEN = 4 << 30  # bytes that all of them write
ROW = 4096              # bytes of a row of what is written
COPIED = 64 << 20       # bytes of a copy to a GPU and back
LFS_TIMEOUT = 20        # seconds


class Deadline:
    """Ends the job where a check comes to no end, and names it: by a thread, since a rank that waits in MPI runs no handler."""

    def __init__(self, rank, seconds=STAGE):
        self.rank, self.seconds, self.timer, self.number = rank, seconds, None, 0

    def enter(self, check):
        """The next check begins."""
        self.leave()
        self.number += 1
        self.timer = threading.Timer(self.seconds, self._over, [self.number, check])
        self.timer.daemon = True
        self.timer.start()
        faulthandler.dump_traceback_later(self.seconds + LAST_RESORT, exit=True)

    def leave(self):
        if self.timer:
            self.timer.cancel()
            faulthandler.cancel_dump_traceback_later()

    def _over(self, number, check):
        ending.say(f"mpillm: rank {self.rank} (node {node_name()}) came to no end of check {number}, {check}, in {self.seconds:.0f} s; "
                   "the others wait for the rank that names the earliest check or says nothing\n")
        time.sleep(LATER)
        os._exit(ending.HANG)


def examine(group, device, directory, entered, imported):
    """Everything that is measured, the same on all ranks: a JSON-able dict in SI units. Collective.

    Parameters
    ----------
    group : Group or Solo
    device : str
        As `run.device`.
    directory : str
        Where runs write.
    entered, imported : float
        Seconds from the start of the process to the command, and of its imports.
    """
    deadline = Deadline(group.rank)
    deadline.enter("what runs here")
    known = about_job(group)
    rank = {"rank": group.rank, "host": node_name(), **start_times(entered, imported)}
    deadline.enter("opening the device")
    ops = open_device(device, group=group)
    rank |= resources(ops)
    known["notes"] = [note for note in (slow_blas_note(), getattr(ops, "note", "")) if note]
    deadline.enter("matrix products")
    rank |= products(group, ops) | copies(ops)
    deadline.enter("device memory in MPI")
    rank["gpu_aware_mpi"] = gpu_aware(group, rank["gpu"] is not None)
    deadline.enter("the clocks")
    group.barrier()
    rank["clock"] = time.time()
    deadline.enter("messages between two ranks")
    rank |= messages(group, group.collect(rank["host"]))
    deadline.enter("sums over all ranks")
    known["all_reduce"] = measure.all_reduce_times(group) if group.size > 1 else []
    deadline.enter(f"writing in {directory}")
    known["file_system"] = file_system(group, directory)
    deadline.enter("collecting the results")
    known |= {"ranks": group.collect(rank), "seconds": launch.since_start()}
    known = group.share(known)      # times differ between ranks, but all have to come to one verdict
    deadline.leave()
    return known


def about_job(group):
    """What all ranks have in common."""
    return {"version": 1, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "num_ranks": group.size, "mpi": measure.mpi_facts(group),
            "launcher": started()[1] if group.size > 1 else None, "python": sys.version.split()[0]}


# ---- one rank -----------------------------------------------------------------------------------------------------

def node_name():
    """This node as Slurm calls it, as a rule: without its domain. (SLURMD_NODENAME may be that of the node where mpiexec was called.)"""
    return socket.gethostname().partition(".")[0]


def start_times(entered, imported):
    """Seconds of Python's start and of imports on this rank, which wait for no other rank, and of MPI_Init (with the import of NumPy), which does."""
    started_python = launch.since_start() - (time.monotonic() - launch.STARTED)
    begun = time.perf_counter()
    load_h5py()
    return {"start_seconds": started_python, "mpi_seconds": entered - started_python, "import_seconds": imported + time.perf_counter() - begun}


def resources(ops):
    """Cores, threads, memory and GPU of this rank."""
    blas, threads = blas_threads()
    gpu = None if ops.host is ops else ops.device
    return {"cpus": sorted(launch.affinity(0)), "threads": threads, "blas": blas, "memory_bytes": memory_bytes(), "gpu": gpu and gpu.address,
            "gpu_name": gpu and gpu.name, "gpu_free_bytes": gpu and gpu.free_bytes()}


def blas_threads():
    """(name of NumPy's BLAS or None, threads that it uses)."""
    import threadpoolctl

    for library in threadpoolctl.threadpool_info():
        if library["user_api"] == "blas":
            words = (library["internal_api"], library.get("version"), library.get("architecture"))
            return " ".join(filter(None, words)), library["num_threads"]
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return None, int(threads) if threads.isdigit() else 1


def memory_bytes():
    """Memory of the node; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def products(group, ops):
    """FLOP/s of matrix products of this rank, all ranks at once; None for types that its device does not multiply fast."""
    on_gpu = ops.host is not ops
    group.barrier()
    return {f"gemm_{name}": gemm_rate(ops, TYPES[name], *((4096, 10) if on_gpu else (1024, 5))) if on_gpu or name != "bfloat16" else None
            for name in ("float32", "float64", "bfloat16")}


def copies(ops):
    """Bytes/s from host memory to the GPU and back; None on a CPU."""
    if ops.host is ops:
        return {"to_gpu": None, "from_gpu": None}
    host, there, back = np.ones(COPIED // 4, np.float32), [], []
    for _ in range(4):
        begun = time.perf_counter()
        array = ops.from_host(host)
        ops.synchronize()
        sent = time.perf_counter()
        ops.to_host(array)
        there.append(sent - begun)
        back.append(time.perf_counter() - sent)
    return {"to_gpu": COPIED / min(there), "from_gpu": COPIED / min(back)}


# ---- several ranks ------------------------------------------------------------------------------------------------

def gpu_aware(group, on_gpu):
    """Whether MPI takes device memory on this node, asked by one rank of it in a child process; None without GPUs."""
    of_node, place = gather_on_node(group, on_gpu)
    answer = is_cuda_aware() if on_gpu and not any(of_node[:place]) else None
    return next((each for each in gather_on_node(group, answer)[0] if each is not None), None)


def messages(group, hosts):
    """Latency (s) and bandwidth (bytes/s, while the other ranks exchange too) to the better of two neighbours on the node, and of two
    neighbouring nodes; None where there is none."""
    met = {"within": [], "across": []}
    for turn in range(measure.ROUNDS if group.size > 1 else 0):
        for kind, partner in measure.partners(hosts, group.rank, turn).items():
            group.barrier()
            if partner is not None:
                met[kind].append(measure.exchange(group, partner))
    found = {}
    for kind, results in met.items():
        found |= {f"latency_{kind}": min((latency for latency, _ in results), default=None),
                  f"bandwidth_{kind}": max((bandwidth for _, bandwidth in results), default=None)}
    return found


# ---- the file system ----------------------------------------------------------------------------------------------

def file_system(group, directory):
    """A checkpoint-like file of all ranks in `directory`, written, flushed, read back and removed; what the file system is."""
    place, made, error = Path(directory).absolute() / f".doctor-{uuid.uuid4().hex[:12]}", [], None
    if group.rank == 0:
        made, error = make(place)
    place, error = group.share((str(place), error))
    found = {"directory": str(directory), "error": error, "form": default_form(group), "parallel_hdf5": bool(load_h5py().get_config().mpi)}
    try:
        found |= {} if error else write_test(group, Path(place), found["form"])
        about = describe(place) if group.rank == 0 else None
        group.barrier()     # all have closed the file
    finally:
        if group.rank == 0:
            remove(place, made)
    return found | group.share(about)


def make(place):
    """Makes the folder of the test. Returns the folders that were not there, innermost first, and what is in the way, or None."""
    missing = []
    try:
        missing += [folder for folder in (place, *place.parents) if not folder.exists()]
        place.mkdir(parents=True)
    except OSError as error:
        return missing, f"{error.filename}: {error.strerror}"
    return missing, None


def remove(place, made):
    """Deletes what the test wrote and the folders that it made, but for those that a run uses meanwhile."""
    shutil.rmtree(place, ignore_errors=True)
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()      # only an empty one


def write_test(group, place, form):
    """Bytes, bytes/s of writing and of reading back (which may come from memory of the node); or the error."""
    rows = max(1, min(WRITTEN, MOST_WRITTEN // group.size) // ROW)
    shape = (rows * group.size, ROW // 4)
    data = np.random.default_rng(group.rank).random((rows, ROW // 4), np.float32)    # does not compress
    entries = [Entry("values", shape, Slab((rows * group.rank, 0), data.shape), data)]
    size = rows * ROW * group.size
    group.barrier()
    begun = time.perf_counter()
    try:
        write_state(place / "state.h5", entries, group, form)
        written = time.perf_counter()
        verify_written(place / "state.h5", entries, group)
    except SaveFailed as failure:       # on all ranks alike
        return {"error": str(failure)}
    return {"bytes": size, "write_rate": size / (written - begun), "read_rate": size / (time.perf_counter() - written)}


def describe(place):
    """Type, free bytes and stripes of the file system that a path lies in; None for what cannot be told."""
    folder = next(folder for folder in (Path(place), *Path(place).parents) if folder.exists())
    stats = os.statvfs(folder)
    return {"type": mount_type(folder), "free_bytes": stats.f_bavail * stats.f_frsize, "stripe_count": stripe_count(folder)}


def stripe_count(folder):
    """Over how many servers Lustre spreads a new file of a folder (-1: all of them); None where there is no Lustre."""
    try:
        answer = subprocess.run(["lfs", "getstripe", "--stripe-count", "--directory", str(folder)], capture_output=True, text=True,
                                timeout=LFS_TIMEOUT, check=False)
        return int(answer.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def mount_type(place, mounts="/proc/mounts"):
    """The type of the file system that a folder lies in: of the mount with the longest path above it."""
    found, longest, place = "?", -1, str(Path(place).resolve())
    try:
        with open(mounts, encoding="utf-8", errors="replace") as file:
            for line in file:
                _, where, kind = line.split()[:3]
                if (place == where or place.startswith(where.rstrip("/") + "/")) and len(where) >= longest:    # of two at one place the later one is on top
                    found, longest = kind, len(where)
    except OSError:
        pass
    return found
