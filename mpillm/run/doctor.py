"""Is this allocation fit to run? Each check fills a part of what is known; run/diagnosis.py judges it."""

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

from ..config import UserError
from ..layout import measure
from ..layout.agreement import agreed
from ..layout.hdf5 import load_h5py
from ..layout.launcher import started
from ..layout.node import gather_on_node
from ..layout.probe import is_cuda_aware
from ..layout.slab import Slab
from ..store.errors import SaveFailed
from ..store.hyperslab import Entry, default_form, verify_written, write_state
from . import ending, launch
from .account import gemm_rate
from .session import open_device

DEADLINE = 180.0        # seconds after which a stage that hangs ends the job
WRITTEN = 16 << 20      # bytes that each rank writes


class Deadline:
    """Ends the job where it comes to no end, and names the stage: a thread, since a rank that waits in MPI runs no handler."""

    def __init__(self, rank, seconds=DEADLINE):
        self.rank, self.stage = rank, "start"
        self.timer = threading.Timer(seconds, self._over)
        self.timer.daemon = True
        self.timer.start()

    def _over(self):
        ending.say(f"mpillm: rank {self.rank} on {socket.gethostname()}: the check \"{self.stage}\" hangs\n")
        os._exit(ending.HANG)

    def cancel(self):
        self.timer.cancel()


def examine(group, device, directory):
    """Everything that is measured, the same on all ranks: a JSON-able dict in SI units. Collective.

    Parameters
    ----------
    group : Group or Solo
    device : str
        As `run.device`.
    directory : str
        Where runs write.
    """
    begun, deadline = launch.since_start(), Deadline(group.rank)
    known = {"version": 1, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "num_ranks": group.size, "mpi": measure.mpi_facts(group),
             "launcher": started()[1], "python": sys.version.split()[0]}
    deadline.stage = "device and matrix product"
    ops = open_device(device, group=group)
    rank = {"rank": group.rank, "host": socket.gethostname(), "start_seconds": begun, "cpus": sorted(launch.affinity(0)), "threads": int(os.environ.get("OMP_NUM_THREADS") or 1),
            "gpu": ops.device.address if ops.host is not ops else None, "memory_bytes": memory_bytes(), "gemm_flops": gemm_rate(ops, np.dtype(np.float32))}
    deadline.stage = "GPU-aware MPI"
    rank["gpu_aware_mpi"] = gpu_aware(group, rank["gpu"] is not None)
    deadline.stage = "clocks"
    group.barrier()
    rank["clock"] = time.time()
    hosts = group.collect(rank["host"])
    deadline.stage = "messages between ranks"
    rank |= messages(group, hosts)
    deadline.stage = "sums over all ranks"
    known["all_reduce"] = measure.all_reduce_times(group) if group.size > 1 else []
    deadline.stage = "writing in the run directory"
    known["file_system"] = file_system(group, directory)
    known["ranks"] = group.collect(rank)
    deadline.cancel()
    known["seconds"] = launch.since_start()
    return known


def memory_bytes():
    """Memory of the node; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def gpu_aware(group, on_gpu):
    """Whether MPI takes device memory on this node, asked by one rank of it in a child process; None without GPUs."""
    of_node, place = gather_on_node(group, on_gpu)
    answer = is_cuda_aware() if on_gpu and not any(of_node[:place]) else None
    return next((each for each in gather_on_node(group, answer)[0] if each is not None), None)


def messages(group, hosts):
    """Latency (s) and bandwidth (bytes/s) to a neighbour on the node, and to a neighbouring node; None where there is none."""
    found = {}
    for kind, partner in (measure.pairs(hosts, group.rank) if group.size > 1 else {"within": None, "across": None}).items():
        group.barrier()
        latency, bandwidth = (None, None) if partner is None else measure.exchange(group, partner)
        found |= {f"latency_{kind}": latency, f"bandwidth_{kind}": bandwidth}
    return found


def file_system(group, directory):
    """A checkpoint-like file of all ranks in `directory`, written, flushed, read back and removed; what the file system is."""
    place = Path(group.share(str(Path(directory) / f".doctor-{uuid.uuid4().hex[:12]}")))
    made = None
    with agreed(group, UserError, f"--dir {directory}: making it"):
        if group.rank == 0:
            made = next((str(folder) for folder in [Path(directory), *Path(directory).parents][::-1] if not folder.exists()), None)
            place.mkdir(parents=True)
    try:
        found = write_test(group, place)
        return found | group.share(describe(place) if group.rank == 0 else None)
    finally:
        group.barrier()
        if group.rank == 0:
            shutil.rmtree(place, ignore_errors=True)
            if made:
                shutil.rmtree(made, ignore_errors=True)


def write_test(group, place):
    """Form, bytes and seconds of a write and of reading it back."""
    rows = WRITTEN // 4096
    data = np.random.default_rng(group.rank).integers(0, 2**31, (rows, 1024), np.int32).view(np.float32)
    np.nan_to_num(data, copy=False)
    entries = [Entry("values", (rows * group.size, 1024), Slab((rows * group.rank, 0), (rows, 1024)), data)]
    form, error = default_form(group), None
    try:
        group.barrier()
        begun = time.perf_counter()
        write_state(place / "state.h5", entries, group)
        written = time.perf_counter()
        verify_written(place / "state.h5", entries, group)
        read = time.perf_counter()
    except SaveFailed as failure:
        return {"error": str(failure), "form": form, "parallel_hdf5": bool(load_h5py().get_config().mpi)}
    size = WRITTEN * group.size
    return {"error": error, "form": form, "parallel_hdf5": bool(load_h5py().get_config().mpi), "bytes": size,
            "write_rate": size / (written - begun), "read_rate": size / (read - written)}


def describe(place):
    """Type, free bytes and stripes of the file system of a folder."""
    stats = os.statvfs(place)
    stripes = None
    if shutil.which("lfs"):
        answer = subprocess.run(["lfs", "getstripe", "--stripe-count", "--directory", str(place)], capture_output=True, text=True, timeout=20, check=False)
        stripes = int(answer.stdout) if answer.stdout.strip().lstrip("-").isdigit() else None
    return {"type": mount_type(place), "free_bytes": stats.f_bavail * stats.f_frsize, "stripe_count": stripes}


def mount_type(place, mounts="/proc/mounts"):
    """The type of the file system that a folder lies in: of the mount with the longest path above it."""
    found, longest, place = "?", -1, str(Path(place).resolve())
    try:
        with open(mounts, encoding="utf-8", errors="replace") as file:
            for line in file:
                _, where, kind = line.split()[:3]
                if (place == where or place.startswith(where.rstrip("/") + "/")) and len(where) > longest:
                    found, longest = kind, len(where)
    except OSError:
        pass
    return found
