"""Processes that wait for their turn: each side of a benchmark keeps its own memory and threads, and only one works at a time.

A worker is a program of one rank or several; each rank connects to a Unix socket, says what it is, and answers one JSON line
with another. A rank that waits sleeps in `read`: it takes no core from the others, as a rank waiting inside MPI would.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))   # this checkout's mpillm, installed or not
PRODUCT = 2048          # rows and columns of the matrices whose product is the machine's rate
START_SECONDS = 600     # to start, build the model and warm up
THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
TUNING = ("OPENBLAS_", "MKL_", "ATEN_CPU_CAPABILITY", "ONEDNN_", "DNNL_")     # names of variables that change what a library chooses


class WorkerFailed(Exception):
    """A worker ended by itself; what it said is on standard error already."""


def forced():
    """The variables of this process that would take the choice of kernels from BLAS or PyTorch: {name: value}."""
    return {name: value for name, value in os.environ.items() if name.startswith(TUNING) and name not in THREADS}


def environment(keep_forced):
    """Of a worker: one thread a rank, this repository's package, the programs of this Python's environment; libraries choose
    their kernels by themselves unless `keep_forced`."""
    own_bin = str(Path(sys.executable).parent)
    paths = [str(ROOT)] + [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    found = {name: "1" for name in THREADS} | {"PYTHONPATH": os.pathsep.join(paths), "PATH": own_bin + os.pathsep + os.environ.get("PATH", "")}
    if sys.prefix != sys.base_prefix:
        found["VIRTUAL_ENV"] = sys.prefix
    left_out = () if keep_forced else forced()
    return {name: value for name, value in os.environ.items() if name not in left_out} | found


class Worker:
    """The parent's end.

    Parameters
    ----------
    script : str
        A file of this folder; it is given the JSON of `spec` and the path of the socket.
    spec : dict
    python : str
        Interpreter that runs it.
    launcher : list of str
        What starts several ranks, such as ["mpirun", "-n", "2"]; [] for a plain process.
    num_ranks : int
    keep_forced : bool
        Whether it sees the variables of `forced()`.

    Attributes
    ----------
    info : dict, what rank 0 says of itself once it is ready
    cpus : list, the CPUs each rank may use
    """

    def __init__(self, script, spec, python=sys.executable, launcher=(), num_ranks=1, keep_forced=False):
        self.folder = tempfile.TemporaryDirectory(prefix="mpillm-bench-")
        path = os.path.join(self.folder.name, "socket")
        command = [*launcher, python, str(Path(__file__).parent / script), json.dumps(spec), path]
        if launcher:    # the launcher's settings of this repository
            command = ["bash", "-c", f'. "{ROOT}/jobs/environment.sh"; exec "$@"', "bash", *command]
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(num_ranks)
            listener.settimeout(0.2)
            self.process = subprocess.Popen(command, env=environment(keep_forced), stdin=subprocess.DEVNULL, stdout=sys.stderr)
            self.ranks = []
            try:
                deadline = time.monotonic() + START_SECONDS
                while len(self.ranks) < num_ranks:
                    self._accept(listener, script, deadline)
                hellos = sorted(([self._read(rank), rank] for rank in self.ranks), key=lambda pair: pair[0]["rank"])
            except BaseException:
                self.stop()
                raise
        self.info, self.ranks = hellos[0][0], [rank for _, rank in hellos]
        self.cpus = [hello["cpus"] for hello, _ in hellos]

    def _accept(self, listener, script, deadline):
        try:
            self.ranks.append(listener.accept()[0].makefile("rw"))
        except TimeoutError:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise WorkerFailed(f"{script} ended with code {self.process.poll()} before it was ready") from None

    def _read(self, rank):
        line = rank.readline()
        if not line:
            raise WorkerFailed(f"{self.process.args[-3]} ended in the middle of a benchmark")
        return json.loads(line)

    def send(self, **request):
        """Starts a turn on every rank."""
        for rank in self.ranks:
            rank.write(json.dumps(request) + "\n")
            rank.flush()

    def receive(self):
        """The answers of all ranks to the turn."""
        return [self._read(rank) for rank in self.ranks]

    def turn(self, **request):
        """Starts a turn and waits for it; the answers of all ranks."""
        self.send(**request)
        return self.receive()

    def stop(self):
        """Ends the worker: the ranks leave when their socket closes."""
        for rank in self.ranks:
            rank.close()
        try:
            self.process.wait(timeout=20 if self.ranks else 0)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait()
        self.folder.cleanup()


def serve(path, info, answers):
    """The worker's end: says `info`, then answers requests until the parent closes the socket.

    Parameters
    ----------
    path : str
        The parent's socket.
    info : dict
    answers : dict
        name -> function of the request's other fields, which returns a dict.
    """
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(path)
        lines = end.makefile("rw")
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        lines.write(json.dumps(info | {"cpus": cpus}) + "\n")
        lines.flush()
        for line in lines:
            request = json.loads(line)
            lines.write(json.dumps(answers[request.pop("do")](**request)) + "\n")
            lines.flush()


def timed_turn(step, multiply):
    """The answer to "step": one step of training between two measurements of the matrix product.

    Parameters
    ----------
    step : callable
        Does the step and returns its loss.
    multiply : callable
        One product of two square float32 matrices of PRODUCT rows.
    """
    before = product_rates(multiply)
    started, on_core = time.perf_counter(), time.process_time()
    loss = step()
    seconds, on_core = time.perf_counter() - started, time.process_time() - on_core
    after = product_rates(multiply)
    return {"seconds": seconds, "cpu_seconds": on_core, "loss": loss, "gemm_before": before[0], "gemm_after": after[0],
            "gemm_by_cpu": max(before[1], after[1])}


def product_rates(multiply, times=3):
    """FLOP/s of the fastest of several products: by the clock, and by CPU time (a core shared with others counts in part)."""
    best, best_cpu = float("inf"), float("inf")
    for _ in range(times):
        started, on_core = time.perf_counter(), time.process_time()
        multiply()
        best, best_cpu = min(best, time.perf_counter() - started), min(best_cpu, time.process_time() - on_core)
    return 2 * PRODUCT**3 / best, 2 * PRODUCT**3 / best_cpu
