"""Real commands in processes of their own: how they end, what they print, what they leave on the disk."""

import hashlib
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60            # a command that takes longer hangs

# What a launcher leaves in the environment of the tests must not reach the commands that they start.
LAUNCHERS = ("OMPI_COMM", "OMPI_UNIVERSE", "OMPI_APP", "OMPI_FILE", "OMPI_FIRST", "OMPI_NUM", "OMPI_WORLD", "OMPI_ARGV", "OMPI_COMMAND",
             "OMPI_MCA_orte", "PMI", "PMIX", "PRTE_LAUNCHED", "SLURM", "MPI_LOCAL", "HYDRA", "PALS")
# Read by Open MPI alone: root in containers, more ranks than cores.
ALLOWED = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1",
           "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
THREADS = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
# The Open MPI wheel looks for fabrics for seconds otherwise; ranks that wait leave their core to others.
WHEEL = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp", "OMPI_MCA_mpi_yield_when_idle": "1"}

MODEL = """
[model]
family = "llama"
layers = 1
width = 8
heads = 2
context = 8
"""


def launcher():
    """mpirun of the environment that runs the tests, else of the path; None where there is none."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def environment():
    values = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    values |= ALLOWED | THREADS | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}     # no GPU, whatever the machine has
    return values | (WHEEL if str(launcher()).startswith(str(Path(sys.executable).parent)) else {})


def command(arguments, ranks=None, program=("-m", "mpillm")):
    """The command line of `mpillm ARGUMENTS`; without `ranks` no launcher starts it."""
    start = [launcher(), "-n", str(ranks)] if ranks else []
    return [*start, sys.executable, *map(str, program), *map(str, arguments)]


class Done(NamedTuple):
    """How a command ended."""
    code: int
    out: str
    err: str
    seconds: float

    @property
    def text(self):
        return self.out + self.err

    @property
    def ours(self):
        """Our lines among those of the launcher."""
        return [line for line in self.text.splitlines() if line.startswith("mpillm:")]


def run(*arguments, cwd, ranks=None, seconds=SECONDS, program=("-m", "mpillm")):
    """Runs a command to its end."""
    with Running(*arguments, cwd=cwd, ranks=ranks, program=program) as running:
        return running.wait(seconds)


class Running:
    """A command under way, in a process group of its own; leaving the block ends what is left of it."""

    def __init__(self, *arguments, cwd, ranks=None, program=("-m", "mpillm")):
        self.started = time.monotonic()
        self.process = subprocess.Popen(command(arguments, ranks, program), cwd=cwd, env=environment(), stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.end()
            self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            stream.close()

    def wait(self, seconds=SECONDS):
        try:
            out, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.end()
            out, err = self.process.communicate()
            raise AssertionError(f"still running after {seconds} s; so far:\n{_text(out)}{_text(err)}") from None
        return Done(self.process.returncode, _text(out), _text(err), time.monotonic() - self.started)

    def until(self, condition, seconds=SECONDS):
        """Waits for `condition()` while the command runs; asserts that it comes true."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                done = self.wait()
                raise AssertionError(f"ended with {done.code} before what was waited for:\n{done.text}")
            assert time.monotonic() < deadline, "what was waited for does not come"
            time.sleep(0.003)

    def ranks(self):
        """Process ids of the ranks, or of the one process that no launcher started."""
        return ranks_below(self.process.pid)

    def end(self):
        """Ends every process of the command, the launcher first."""
        for process in [self.process.pid, *descendants(self.process.pid)]:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass


def children(process):
    """Process ids of the children."""
    found = []
    for threads in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += map(int, threads.read_text().split())
        except OSError:     # it ended meanwhile
            pass
    return found


def descendants(process):
    return [one for child in children(process) for one in [child, *descendants(child)]]


def ranks_below(process):
    """The uppermost Python processes of a tree: a rank may have a child that looks into a file."""
    try:
        python = "python" in os.readlink(f"/proc/{process}/exe")
    except OSError:
        return []
    return [process] if python else [rank for child in children(process) for rank in ranks_below(child)]


def _text(data):
    return data.decode(errors="replace").replace("\0", "").replace("\r\n", "\n")


def tree(folder):
    """Everything below a folder: type and mode; of files the bytes, hashed, and when they were last changed."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        about = path.lstat()
        what = (stat.filemode(about.st_mode),)
        if path.is_symlink():
            what += (os.readlink(path),)
        elif path.is_file():
            what += (hashlib.sha256(path.read_bytes()).hexdigest(), about.st_mtime_ns)
        found[str(path.relative_to(folder))] = what
    return found


def changed(before, after):
    """Names that are new, gone or different."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def write_texts(folder, documents=12, words=60, seed=0):
    """A corpus of small text files."""
    folder.mkdir(parents=True)
    choose = random.Random(seed)
    for number in range(documents):
        text = " ".join(choose.choice(["alpha", "beta", "gamma", "delta", "the", "of"]) for _ in range(words))
        (folder / f"{number}.txt").write_text(text + "\n")


def write_job(path, train="", **sections):
    """A job file: a tiny model, more lines of [train], and further sections as TOML text."""
    text = MODEL + f'[data]\ntrain = "train.h5"\n[train]\nsteps = 4\nbatch = 6\n{train}\n'
    path.write_text(text + "".join(f"[{name}]\n{lines}\n" for name, lines in sections.items()))


def flip(path, offset):
    """Changes one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x10]))
