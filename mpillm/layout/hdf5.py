"""HDF5 with care: files of others may crash the library or point elsewhere, and a full disk may break it.

What stands here is for token files and checkpoints alike: the module without plugins, questions about a file asked in
a child process, and new files whose datasets lie contiguous at known offsets, their bytes still to be written by all ranks.
"""

import contextlib
import ctypes
import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

from ..config import UserError

MEMORY_LIMIT = 8 << 30    # bytes of address space of the child that looks into a file
SECONDS_LIMIT = 300       # time it may take, a slow shared file system included
ALIGNMENT = 4096          # bytes; datasets of 16 pages and more start on a page of the file
METADATA_BLOCK = 1 << 18  # bytes that HDF5 sets aside at once, so that metadata stays together
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)   # of the library, on a damaged file
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def load_h5py():
    """The h5py module with plugin loading off, for a file must not choose the libraries that we run; with MPI as it is.

    A parallel h5py imports mpi4py, which starts MPI; outside of a job, on login nodes, some MPIs abort then.
    """
    with contextlib.suppress(ImportError):
        import mpi4py
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True      # as `start_mpi` has it
    os.environ["HDF5_PLUGIN_PRELOAD"] = "::"
    os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")  # shared file systems without locks refuse to open
    import h5py
    for _ in range(h5py.h5pl.size()):
        h5py.h5pl.remove(0)
    return h5py


# ---- looking into a file ------------------------------------------------------------------------------------------

def ask_apart(module, work, path, question, refusal):
    """`work(path, question)` in a child process, so that a file which crashes the HDF5 library costs only the child.

    Parameters
    ----------
    module : str
        The module of `work`; run as a program it calls `answer_apart(work)`.
    work : callable
        Question and answer are JSON-able; a `UserError` of it is an objection to the file.
    refusal : exception type
        What a crash is raised as; objections keep their kind.
    """
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OPENBLAS_NUM_THREADS": "1"}
    for _ in range(2):      # an ending that says nothing about the file (a killed child, no memory) is asked again
        try:
            child = subprocess.run([sys.executable, "-P", "-m", module, os.fspath(path)], input=json.dumps(question).encode(),
                                   capture_output=True, env=environment, timeout=SECONDS_LIMIT, check=False,
                                   start_new_session=True)      # signals that ask the job to stop are not for the child
        except subprocess.TimeoutExpired as error:
            raise refusal(f"{path}: reading its HDF5 structure took over {SECONDS_LIMIT} s; is its file system in order?") from error
        except OSError:  # no new process may be started here
            return work(path, question)
        if child.returncode == 0 or -child.returncode in CRASHES:
            break
    if -child.returncode in CRASHES:
        raise refusal(f"{path}: damaged: HDF5 crashed on reading its structure (signal {-child.returncode}); restore it or make it again")
    if child.returncode:
        last = child.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"{path}: the process that looks into the file ended with code {child.returncode} ({last or 'nothing said'})")
    reply = json.loads(child.stdout)
    if "objection" in reply:
        raise (refusal if reply["kind"] == refusal.__name__ else UserError)(reply["objection"])
    return reply["answer"]


def answer_apart(work):
    """The child of `ask_apart`: a path as its argument, the question on standard input."""
    for limit, value in ((resource.RLIMIT_AS, MEMORY_LIMIT), (resource.RLIMIT_CPU, SECONDS_LIMIT), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    try:
        reply = {"answer": work(sys.argv[1], json.load(sys.stdin))}
    except UserError as error:
        reply = {"objection": str(error), "kind": type(error).__name__}
    print(json.dumps(reply))


# ---- new files ----------------------------------------------------------------------------------------------------

def create(path, datasets, attributes=None):
    """Makes the file `path`, which must not exist, with contiguous datasets, and reserves its disk space. One rank.

    HDF5 1.10 leaves dangling objects (and crashes later) when the disk fills up under it, and its collective form
    can hang; so HDF5 writes through `CarefulFile`, which keeps the first error to itself until HDF5 has closed.

    Parameters
    ----------
    path : path-like
    datasets : dict
        Name -> (shape, NumPy type).
    attributes : dict or None
        Of the file: int or ASCII str.

    Returns
    -------
    dict
        Name -> where the bytes of the dataset start. They are not written: what was never written reads as zeros.
    """
    h5py = load_h5py()
    with CarefulFile(path) as target:
        with h5py.File(target, "w", alignment_threshold=16 * ALIGNMENT, alignment_interval=ALIGNMENT,
                       meta_block_size=METADATA_BLOCK) as file:
            offsets = {name: dataset.get_offset() for name, dataset in _create_datasets(h5py, file, datasets)}
            for name, value in (attributes or {}).items():
                file.attrs[name] = value.encode() if isinstance(value, str) else value
        target.check()
        reserve(target.descriptor, path)
    return offsets


def _create_datasets(h5py, file, datasets):
    """(name, low-level dataset), its bytes set aside at once and never filled."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    return [(name, h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), h5py.h5s.create_simple(tuple(shape)),
                                   dcpl=layout, lcpl=links)) for name, (shape, dtype) in datasets.items()]


class CarefulFile(io.RawIOBase):
    """A new file for h5py's file-object driver; the first OSError is raised by `check`, not inside HDF5."""

    def __init__(self, path):
        self.path, self.error, self.position = path, None, 0
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)

    def _attempt(self, call, *arguments):
        try:
            call(self.descriptor, *arguments)
        except OSError as error:
            self.error = self.error or OSError(error.errno, error.strerror, os.fspath(self.path))

    def write(self, data):
        self._attempt(write_all, memoryview(data).cast("B"), self.position)
        self.position += len(data)
        return len(data)

    def readinto(self, buffer):
        """Fills `buffer`; what lies beyond the end reads as zeros."""
        view = memoryview(buffer).cast("B")
        data = os.pread(self.descriptor, len(view), self.position)
        view[:] = data + bytes(len(view) - len(data))
        self.position += len(view)
        return len(view)

    def seek(self, offset, whence=os.SEEK_SET):
        self.position = offset if whence == os.SEEK_SET else os.fstat(self.descriptor).st_size + offset
        return self.position

    def tell(self):
        return self.position

    def truncate(self, size=None):
        self._attempt(os.ftruncate, size)
        return size

    def check(self):
        """Raises what went wrong."""
        if self.error:
            raise self.error

    def close(self):
        if not self.closed:
            os.close(self.descriptor)
        super().close()


def reserve(descriptor, path):
    """Sets the disk space of the whole file aside, so that a full disk or a quota shows before data is written.

    Plain fallocate(2): the emulation in `os.posix_fallocate` would write every block. File systems without it are
    left to fail while writing.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:
        return
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while fallocate(descriptor, 0, 0, os.fstat(descriptor).st_size):
        number = ctypes.get_errno()
        if number in UNSUPPORTED:
            return
        if number != errno.EINTR:       # a signal, such as the request to stop
            raise OSError(number, os.strerror(number), os.fspath(path))


def write_all(descriptor, data, offset):
    """All bytes of the memoryview `data` at `offset`; `os.pwrite` may write fewer."""
    while data:
        count = os.pwrite(descriptor, data[:1 << 30], offset)
        data, offset = data[count:], offset + count


def sync(path):
    """Makes a file, or the entries of a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
