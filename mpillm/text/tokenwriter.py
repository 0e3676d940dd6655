"""Writing a token file, all ranks at once: through parallel HDF5, or by offsets where h5py has no MPI."""

import io
import os

import numpy as np

from ..config import UserError

from .corpus import agreed, from_first
from .encode import token_type
from .order import mix
from .structure import load_h5py, read_structure
from .tokenfile import FORMAT, TokenFile


def check_output(path, group, overwrite):
    """Refuses a `path` that exists, before work is done for it; makes its folder. Collective."""
    def check():
        if os.path.isdir(path):
            raise UserError(f"{path}: is a folder; expected the name of a token file, such as {os.path.join(path, 'tokens.h5')}")
        if os.path.lexists(path) and not overwrite:
            raise UserError(f"{path}: exists already; give another name, or --overwrite")
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    from_first(group, check)


def write_token_file(path, part, tokenizer, group, overwrite=False, parallel=None):
    """Writes one token file from the parts of all ranks; collective.

    The file appears under its name when it is whole. Tokens and documents do not depend on the number of ranks.

    Parameters
    ----------
    path : str
    part : Part
        This rank's tokens (encode.py).
    tokenizer : Tokenizer
    overwrite : bool
        Whether a file of that name is replaced.
    parallel : bool or None
        Through parallel HDF5, or by offsets: rank 0 makes the datasets, then every rank writes at its place. None:
        the first where h5py has it and there are several ranks.

    Returns
    -------
    num_tokens, num_documents : int

    Raises
    ------
    UserError
        The file exists or cannot be written.
    """
    check_output(path, group, overwrite)
    if parallel is None:
        parallel = group.size > 1 and load_h5py().get_config().mpi
    counts = np.array(group.collect([part.num_tokens, len(part.ends)]), np.int64)      # (ranks, 2)
    first_token, first_document = counts[:group.rank].sum(0).tolist()
    num_tokens, num_documents = counts.sum(0).tolist()
    layout = {"tokens": (num_tokens, token_type(tokenizer.vocabulary)), "documents": (num_documents + 1, np.dtype(np.int64)),
              "tokenizer": (len(tokenizer.to_bytes()), np.dtype(np.uint8))}
    attributes = {"format": FORMAT, "vocabulary": tokenizer.vocabulary, "end": -1 if tokenizer.end is None else tokenizer.end,
                  "tokenizer_hash": tokenizer.hash, "documents": num_documents,
                  "sources_hash": sources_hash(part.values, first_document, group)}
    temporary = group.share(f"{path}.tmp-{os.getpid()}")

    def slabs():
        """(dataset, first element, array) of everything this rank writes."""
        if group.rank == 0:
            yield "documents", 0, np.zeros(1, np.int64)
            yield "tokenizer", 0, np.frombuffer(tokenizer.to_bytes(), np.uint8)
        yield "documents", first_document + 1, part.ends + first_token
        start = first_token
        for tokens in part.chunks():
            yield "tokens", start, tokens
            start += tokens.size
    try:
        offsets = from_first(group, lambda: create(temporary, layout, attributes), temporary)
        if parallel:
            _write_parallel(temporary, slabs, group)
        else:
            _write_offsets(temporary, slabs, group, offsets)
        from_first(group, lambda: _publish(temporary, path, overwrite))
    finally:
        if group.rank == 0 and os.path.exists(temporary):
            os.unlink(temporary)
    return num_tokens, num_documents


def sources_hash(values, first, group):
    """16 hexadecimal digits that stand for the documents in their order; `values` are those of documents first, first + 1, ..."""
    numbers = np.arange(first, first + len(values), dtype=np.uint64)
    total = np.array([mix(values ^ mix(numbers)).sum(dtype=np.uint64)], np.uint64)
    return f"{int(group.all_reduce(total)[0]):016x}"


class StagedFile(io.RawIOBase):
    """What HDF5 writes of a new file, kept in memory: HDF5 1.10 can crash when a disk fills up under it.

    Only metadata comes here, a few KB; the data of the datasets is allocated, and written by the ranks.
    """

    def __init__(self):
        self.writes, self.position, self.size = [], 0, 0

    def write(self, data):
        self.writes.append((self.position, bytes(data)))
        self.position += len(data)
        self.size = max(self.size, self.position)
        return len(data)

    def readinto(self, buffer):
        view = memoryview(buffer).cast("B")
        view[:] = bytes(len(view))
        for start, data in self.writes:
            first, stop = max(start, self.position), min(start + len(data), self.position + len(view))
            if first < stop:
                view[first - self.position:stop - self.position] = data[first - start:stop - start]
        self.position += len(view)
        return len(view)

    def seek(self, offset, whence=os.SEEK_SET):
        self.position = offset if whence == os.SEEK_SET else self.size + offset
        return self.position

    def tell(self):
        return self.position

    def truncate(self, size=None):
        self.size = size
        return size

    def save(self, path):
        """Writes the file under its name, which must be free."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            for start, data in self.writes:
                _write_all(descriptor, np.frombuffer(data, np.uint8), start)
            os.ftruncate(descriptor, self.size)
        finally:
            os.close(descriptor)


def create(path, layout, attributes):
    """Makes the file, on one rank, with all its datasets in place and their data still to be written.

    Returns
    -------
    dict
        Dataset -> offset of its data, bytes.
    """
    h5py, staged, offsets = load_h5py(), StagedFile(), {}
    with h5py.File(staged, "w") as file:
        for name, (size, dtype) in layout.items():
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_layout(h5py.h5d.CONTIGUOUS)
            properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            properties.set_obj_track_times(False)
            data = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), h5py.h5s.create_simple((size,)), properties)
            offsets[name] = data.get_offset()
        for name, value in attributes.items():
            file.attrs[name] = np.bytes_(value) if isinstance(value, str) else value
    staged.save(path)
    return offsets


def _write_parallel(path, slabs, group):
    """Every rank writes its slabs through parallel HDF5, independently."""
    file = agreed(group, lambda: load_h5py().File(path, "r+", driver="mpio", comm=group.handle), path)

    def write():
        for name, start, array in slabs():
            if array.size:
                file[name][start:start + array.size] = array
    try:
        agreed(group, write, path)
    except UserError:               # of all ranks alike, so all can close; any other error must not wait for them
        file.close()
        raise
    file.close()
    agreed(group, lambda: _flush(path), path)


def _write_offsets(path, slabs, group, offsets):
    """Every rank writes its slabs where their bytes lie."""
    def write():
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            for name, start, array in slabs():
                _write_all(descriptor, array, offsets[name] + start * array.itemsize)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    agreed(group, write, path)


def _write_all(descriptor, array, offset):
    data = memoryview(np.ascontiguousarray(array)).cast("B") if array.size else b""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _flush(path):
    """Brings what this node wrote to the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(temporary, path, overwrite):
    TokenFile(temporary, structure=read_structure(temporary)).close()
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{path}: appeared while its tokens were made; give another name, or --overwrite")
    os.replace(temporary, path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
