"""Tensors to and from one HDF5 file: a dataset per tensor with its global shape, a hyperslab per rank.

Rank 0 creates the file (create.py); then all ranks write, in one of two forms that give the same file. "parallel":
through parallel HDF5, independently (collective writes of Open MPI hang for ever on a full disk). "offsets": with
plain writes at the byte offsets that HDF5 told rank 0. Reading is serial on every rank and cannot tell the forms.
"""

import itertools
import math
import os
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from ..layout.agreement import agreed, on_root
from ..layout.hdf5 import create, load_h5py, sync, write_all
from ..layout.slab import Slab
from .errors import DamagedCheckpoint, SaveFailed, unreadable

TYPES = {"float32": np.dtype("<f4"), "float64": np.dtype("<f8")}
PIECE = 64 << 20  # bytes of one write or comparison, about


class Entry(NamedTuple):
    """A tensor in the file and the part of it that this rank holds.

    name : HDF5 path such as "masters/blocks.0.mlp.up.weight"; shape : global shape, the same on all ranks;
    slab : this rank's part, may be empty; array : NumPy array of shape `slab.shape`, float32 or float64.
    """
    name: str
    shape: tuple
    slab: Slab
    array: np.ndarray


# ---- slabs --------------------------------------------------------------------------------------------------------

def pieces(slab, itemsize):
    """Slabs of about PIECE bytes that make up `slab`, cut along the first dim."""
    row = max(1, slab.size // max(1, slab.shape[0]) * itemsize)  # bytes of one index of the first dim
    step = max(1, PIECE // row)
    for first in range(0, slab.shape[0] if slab.size else 0, step):
        count = min(step, slab.shape[0] - first)
        yield Slab((slab.start[0] + first,) + tuple(slab.start[1:]), (count,) + tuple(slab.shape[1:]))


def runs(shape, slab):
    """The stretches of `slab` that are contiguous in a row-major tensor of `shape`.

    Yields
    ------
    to, at, length : int
        First element in the tensor, first element in the slab's own array, number of elements.
    """
    dim = len(shape) - 1
    while dim > 0 and slab.shape[dim] == shape[dim]:
        dim -= 1
    inner = math.prod(shape[dim + 1:])
    length = slab.shape[dim] * inner
    strides = [math.prod(shape[d + 1:]) for d in range(dim)]
    rows = itertools.product(*(range(slab.start[d], slab.start[d] + slab.shape[d]) for d in range(dim)))
    for number, index in enumerate(rows if slab.size else ()):
        yield sum(i * s for i, s in zip(index, strides)) + slab.start[dim] * inner, number * length, length


def slab_hash(backend, shape, slab, array):
    """This slab's share of the tensor hash, an int below 2^64; shares of slabs that cover a tensor add up.

    A 1-D tensor counts as one row; more than two dims count as rows of the last one.
    """
    if not slab.size:
        return 0
    columns, width = shape[-1], slab.shape[-1]
    if len(shape) == 1:
        return backend.tensor_hash(array.reshape(1, width), 0, slab.start[0], columns)
    total = 0
    for outer in itertools.product(*(range(extent) for extent in slab.shape[:-2])):
        row = 0
        for i, start, extent in zip(outer, slab.start, shape):
            row = row * extent + start + i
        total += backend.tensor_hash(array[outer], row * shape[-2] + slab.start[-2], slab.start[-1], columns)
    return total % 2**64


# ---- writing ------------------------------------------------------------------------------------------------------

def write_state(path, entries, group, form=None):
    """Writes the new file `path`, durable on return; raises `SaveFailed` on all ranks alike. Collective.

    Parameters
    ----------
    path : path-like
        Must not exist.
    entries : list of Entry
        The same names, shapes and types in the same order on all ranks; the slabs cover every tensor once.
    group : Group or Solo
    form : "parallel", "offsets" or None
        None: parallel where h5py and the group have MPI.
    """
    form = form or default_form(group)
    with agreed(group, SaveFailed, f"{path}: checking the tensors"):
        for entry in entries:
            check_entry(entry)
    offsets = on_root(group, SaveFailed, f"{path}: creating it", lambda: create(path, {entry.name: (entry.shape, TYPES[entry.array.dtype.name]) for entry in entries}))
    if form == "parallel":
        _write_parallel(path, entries, group)
    else:
        _write_offsets(path, entries, offsets, group)
    with agreed(group, SaveFailed, f"{path}: flushing to disk"):
        sync(path)


def default_form(group):
    """"parallel" if h5py has MPI on every rank and the group has a communicator, else "offsets"."""
    able = bool(load_h5py().get_config().mpi) and group.handle is not None
    return "parallel" if group.all_reduce(np.array([able], np.int64), "min")[0] else "offsets"


def check_entry(entry):
    """A slab inside its tensor, an array of the slab's shape, a type that is written."""
    inside = all(0 <= start and start + extent <= whole for start, extent, whole in zip(*entry.slab, entry.shape))
    if not entry.shape or min(entry.shape) < 1 or not len(entry.shape) == len(entry.slab.start) == len(entry.slab.shape) or not inside:
        raise ValueError(f"{entry.name}: slab {entry.slab} does not lie in a tensor of shape {entry.shape}")
    if entry.array.shape != tuple(entry.slab.shape) or entry.array.dtype.name not in TYPES:
        raise ValueError(f"{entry.name}: array {entry.array.shape} {entry.array.dtype}; "
                         f"expected {tuple(entry.slab.shape)} of float32 or float64")


def _write_parallel(path, entries, group):
    """Every rank writes its slabs through parallel HDF5, independently: the collective close has nothing to write."""
    h5py = load_h5py()
    with agreed(group, SaveFailed, f"{path}: opening it with MPI"), group.outside("opening by HDF5"):
        file = h5py.File(path, "r+", driver="mpio", comm=group.handle)
    try:
        with agreed(group, SaveFailed, f"{path}: writing"):
            for entry in entries:
                dataset = h5py.h5d.open(file.id, entry.name.encode())
                for piece, data in _data(entry):
                    where = dataset.get_space()
                    where.select_hyperslab(piece.start, piece.shape)
                    dataset.write(h5py.h5s.create_simple(piece.shape), where, data)
                    group.journal.progress()
    finally:
        with group.outside("closing by HDF5"):
            file.close()


def _write_offsets(path, entries, offsets, group):
    """Every rank writes its runs where the bytes of each dataset lie."""
    with agreed(group, SaveFailed, f"{path}: writing"):
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            for entry in entries:
                for piece, data in _data(entry):
                    flat = data.reshape(-1)
                    for to, at, length in runs(entry.shape, piece):
                        write_all(descriptor, flat[at:at + length].data.cast("B"), offsets[entry.name] + to * data.itemsize)
                    group.journal.progress()
        finally:
            os.close(descriptor)


def _data(entry):
    """The pieces of an entry's slab, each with its values as they go to the file."""
    for piece in pieces(entry.slab, entry.array.itemsize):
        yield piece, np.ascontiguousarray(entry.array[piece.within(entry.slab)], TYPES[entry.array.dtype.name])


# ---- reading ------------------------------------------------------------------------------------------------------

def read_slab(dataset, slab, out):
    """The `slab` of an open h5py dataset into the contiguous array `out` of its shape and of the file's type."""
    if slab.size:
        dataset.read_direct(out, slab.slices(), tuple(slice(0, extent) for extent in slab.shape))


def read_state(path, entries, group, backend=None):
    """Each rank's slabs from the file into `entry.array`; every rank opens the file by itself.

    Check the structure of the file first (structure.py). A stored type other than the array's is converted.
    Raises `DamagedCheckpoint` on all ranks if any cannot read.

    Returns
    -------
    hashes : (len(entries),) uint64, or None without a backend
        `slab_hash` of what was read, in the stored type.
    """
    hashes = None if backend is None else np.zeros(len(entries), np.uint64)
    with agreed(group, RuntimeError, f"{path}: reading"):
        with _open(path) as file:
            for i, entry in enumerate(entries):
                check_entry(entry)
                stored = _read_entry(file, entry)
                group.journal.progress()
                if backend is not None:
                    hashes[i] = slab_hash(backend, entry.shape, entry.slab, stored)
    return hashes


@contextmanager
def _open(path):
    """The file for reading; what HDF5 objects to inside the block is damage."""
    try:
        with load_h5py().File(path, "r") as file:
            yield file
    except (OSError, KeyError, EOFError) as error:
        raise unreadable(path, "cannot be read", error) from error


def _read_entry(file, entry):
    """Fills `entry.array`; returns the values in the type of the file."""
    dataset = file[entry.name]
    if dataset.shape != tuple(entry.shape):
        raise DamagedCheckpoint(f"{entry.name} has shape {dataset.shape} in the file, {tuple(entry.shape)} expected")
    direct = dataset.dtype == entry.array.dtype and entry.array.flags.c_contiguous
    stored = entry.array if direct else np.empty(entry.slab.shape, dataset.dtype)
    read_slab(dataset, entry.slab, stored)
    if not direct:
        entry.array[...] = stored
    return stored


def verify_written(path, entries, group):
    """Reads every rank's slabs back and compares them bit by bit with memory; `SaveFailed` names the tensor."""
    with agreed(group, SaveFailed, f"{path}: reading it back"):
        with load_h5py().File(path, "r") as file:
            for entry in entries:
                for piece in pieces(entry.slab, entry.array.itemsize):
                    back = np.empty(piece.shape, entry.array.dtype)
                    read_slab(file[entry.name], piece, back)
                    group.journal.progress()
                    words = np.ascontiguousarray(entry.array[piece.within(entry.slab)]).reshape(-1).view(np.uint32)
                    if not np.array_equal(back.reshape(-1).view(np.uint32), words):
                        raise SaveFailed(f"{path}: {entry.name!r} reads back other than it was written; is the disk failing?")
