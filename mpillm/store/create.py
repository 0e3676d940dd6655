"""The empty state file: made by rank 0, every dataset with its place in the file, no data yet.

HDF5 1.10 leaves dangling objects (and crashes later) when the disk fills up under it, and its collective form can
hang. So HDF5 writes through `CarefulFile`, which keeps the first error to itself until HDF5 has closed the file.
"""

import ctypes
import errno
import io
import os

import numpy as np

from .structure import load_h5py

ALIGNMENT = 4096          # bytes; datasets of 16 pages and more start on a page of the file
METADATA_BLOCK = 1 << 18  # bytes that HDF5 sets aside at once, so that metadata stays together
TYPES = {"float32": np.dtype("<f4"), "float64": np.dtype("<f8")}
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def create(path, entries):
    """Makes the file `path`, which must not exist, with one contiguous dataset an entry, and reserves its disk space.

    Returns
    -------
    offsets : list of int
        Where the bytes of each dataset start. They are not written: what was never written reads as zeros.
    """
    h5py = load_h5py()
    with CarefulFile(path) as target:
        with h5py.File(target, "w", alignment_threshold=16 * ALIGNMENT, alignment_interval=ALIGNMENT,
                       meta_block_size=METADATA_BLOCK) as file:
            offsets = [dataset.get_offset() for dataset in _create_datasets(h5py, file, entries)]
        target.check()
        reserve(target.descriptor, path)
    return offsets


def _create_datasets(h5py, file, entries):
    """Low-level datasets, their bytes set aside at once and never filled."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    return [h5py.h5d.create(file.id, entry.name.encode(), h5py.h5t.py_create(TYPES[entry.array.dtype.name]),
                            h5py.h5s.create_simple(tuple(entry.shape)), dcpl=layout, lcpl=links) for entry in entries]


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
    if fallocate(descriptor, 0, 0, os.fstat(descriptor).st_size):
        number = ctypes.get_errno()
        if number not in UNSUPPORTED:
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
