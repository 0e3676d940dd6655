"""State files are hostile until checked: the structure of the whole HDF5 file, before any data is read.

HDF5 can point a dataset at other files (external storage, external links, virtual datasets), load shared libraries
(filter plugins) and declare any size; none of that is allowed here. The library itself can crash on a crafted
file, so checkpoints are checked in a child process with limits (`check_structure_apart`). Damaged data is not found
here but by the tensor hashes (checkpoint.py).
"""

import math
import os
import stat

from ..layout.hdf5 import answer_apart, ask_apart, load_h5py
from .errors import DamagedCheckpoint, unreadable

DEFLATE, SHUFFLE, FLETCHER32 = 1, 2, 3   # HDF5 numbers of the filters that every library has
DEFLATE_RATIO = 1032     # the most that deflate can shrink anything


def check_structure(path, allowed):
    """Raises unless the HDF5 file holds exactly the tensors `allowed` in plain datasets and nothing else.

    Parameters
    ----------
    path : path-like
        The state file.
    allowed : dict
        Name -> (global shape, "float32" or "float64").

    Raises
    ------
    DamagedCheckpoint
        One line that names the file, the object and what was found.
    """
    h5py = load_h5py()
    try:
        size = regular_size(path)
        with h5py.File(path, "r") as file:
            walk = _Walk(h5py, path, allowed, size)
            walk.group(h5py.h5g.open(file.id, b"/"), "")
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, MemoryError, OverflowError) as error:
        raise unreadable(path, "not a readable state file", error) from error
    missing = sorted(allowed.keys() - walk.found)
    if missing:
        raise DamagedCheckpoint(f"{path}: lacks {len(missing)} of the {len(allowed)} tensors of its manifest, such as {missing[0]!r}")


def regular_size(path):
    """Bytes of a regular file; links are not followed."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise DamagedCheckpoint(f"{path}: not a regular file (links are not followed); copy the file itself there")
    return found.st_size


class _Walk:
    """One pass over a file: which of the allowed names were found, and how many bytes they declare."""

    def __init__(self, h5py, path, allowed, size):
        self.h5py, self.path, self.allowed, self.size = h5py, path, allowed, size
        self.groups = {name[:i] for name in allowed for i, letter in enumerate(name) if letter == "/"}
        self.found, self.bytes = set(), 0

    def refuse(self, name, reason):
        raise DamagedCheckpoint(f"{self.path}: {name!r} {reason}; mpillm does not read such files")

    def group(self, group, prefix):
        """All links of a group, which must be hard links to allowed groups and datasets."""
        h5py, count = self.h5py, 0
        for link in group:
            count += 1
            name = prefix + link.decode("utf-8", "replace")
            if count > len(self.allowed) + len(self.groups):
                self.refuse(prefix, "has more links than the manifest has tensors")
            if group.links.get_info(link).type != h5py.h5l.TYPE_HARD:
                self.refuse(name, "is a soft or external link")
            kind = h5py.h5o.get_info(group, link).type
            if name in self.allowed and name not in self.found and kind == h5py.h5o.TYPE_DATASET:
                self.dataset(h5py.h5d.open(group, link), name)
            elif name in self.groups and kind == h5py.h5o.TYPE_GROUP:
                self.group(h5py.h5g.open(group, link), name + "/")
            else:
                self.refuse(name, "is not in the manifest")

    def dataset(self, dataset, name):
        """A dataset of the declared shape and type whose bytes lie in this file."""
        h5py, (shape, dtype) = self.h5py, self.allowed[name]
        plain = {"float32": h5py.h5t.IEEE_F32LE, "float64": h5py.h5t.IEEE_F64LE}[dtype]
        plist = dataset.get_create_plist()
        if plist.get_layout() not in (h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED) or plist.get_external_count():
            self.refuse(name, "keeps its data elsewhere (external, virtual or compact storage)")
        if not dataset.get_type().equal(plain):
            self.refuse(name, f"is not of little-endian type {dtype}")
        if dataset.shape != tuple(shape):
            self.refuse(name, f"has shape {dataset.shape}, its manifest says {tuple(shape)}")
        bytes_declared = math.prod(shape) * (4 if dtype == "float32" else 8)
        if plist.get_layout() == h5py.h5d.CONTIGUOUS:
            offset = dataset.get_offset()
            if offset is None or offset + bytes_declared > self.size or dataset.get_storage_size() != bytes_declared:
                self.refuse(name, "has no data inside the file")
        ratio = self.chunks(plist, name, bytes_declared) if plist.get_layout() == h5py.h5d.CHUNKED else 1
        self.bytes += bytes_declared // ratio
        if self.bytes > self.size:
            self.refuse(name, f"declares more data than the file's {self.size} bytes can hold")
        self.found.add(name)

    def chunks(self, plist, name, bytes_declared):
        """The largest factor by which the chunks of a dataset may be compressed."""
        filters = {plist.get_filter(i)[0] for i in range(plist.get_nfilters())}
        if filters - {DEFLATE, SHUFFLE, FLETCHER32}:
            self.refuse(name, f"uses HDF5 filters {sorted(filters)}")
        if math.prod(plist.get_chunk()) > bytes_declared:
            self.refuse(name, f"has chunks of {plist.get_chunk()} elements, more than the tensor")
        return DEFLATE_RATIO if DEFLATE in filters else 1


def check_structure_apart(path, allowed):
    """`check_structure` in a child process, so that a file which crashes the HDF5 library costs only the child."""
    ask_apart(__name__, check_structure, path, allowed, DamagedCheckpoint)


if __name__ == "__main__":
    answer_apart(check_structure)
