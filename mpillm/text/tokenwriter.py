"""Writing a token file, all ranks at once: through parallel HDF5, or by offsets where h5py has no MPI."""

import os

import numpy as np

from ..config import UserError
from ..layout.agreement import agreed, on_root
from ..layout.hdf5 import create, load_h5py, sync, write_all
from .encode import token_type
from .order import mix
from .structure import read_structure
from .tokenfile import FORMAT, TokenFile


def check_output(path, group, overwrite):
    """Refuses a `path` that exists, or that cannot be made, before work is done for it. Collective."""
    def check():
        if os.path.isdir(path):
            raise UserError(f"{path}: is a folder; expected the name of a token file, such as {os.path.join(path, 'tokens.h5')}")
        if os.path.lexists(path) and not overwrite:
            raise UserError(f"{path}: exists already; give another name, or --overwrite")
        folder = os.path.dirname(os.path.abspath(path))
        while not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        if not os.path.isdir(folder):
            raise UserError(f"{path}: {folder} is a file, not a folder; give another name")
        if not os.access(folder, os.W_OK):
            raise UserError(f"{path}: nothing may be written into {folder}; give another name")
    on_root(group, UserError, f"{path}: looking at it", check)


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
    layout = {"tokens": ((num_tokens,), token_type(tokenizer.vocabulary)), "documents": ((num_documents + 1,), np.dtype(np.int64)),
              "tokenizer": ((len(tokenizer.to_bytes()),), np.dtype(np.uint8))}
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
        offsets = on_root(group, UserError, f"{temporary}: creating it", lambda: _create(temporary, layout, attributes))
        if parallel:
            _write_parallel(temporary, slabs, group)
        else:
            _write_offsets(temporary, slabs, group, offsets)
        on_root(group, UserError, f"{path}: renaming the finished file", lambda: _publish(temporary, path, overwrite))
    finally:
        if group.rank == 0 and os.path.exists(temporary):
            os.unlink(temporary)
    return num_tokens, num_documents


def _create(path, layout, attributes):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    return create(path, layout, attributes)


def sources_hash(values, first, group):
    """16 hexadecimal digits that stand for the documents in their order; `values` are those of documents first, first + 1, ..."""
    numbers = np.arange(first, first + len(values), dtype=np.uint64)
    total = np.array([mix(values ^ mix(numbers)).sum(dtype=np.uint64)], np.uint64)
    return f"{int(group.all_reduce(total)[0]):016x}"


def _write_parallel(path, slabs, group):
    """Every rank writes its slabs through parallel HDF5, independently."""
    with agreed(group, UserError, f"{path}: opening it with MPI"):
        file = load_h5py().File(path, "r+", driver="mpio", comm=group.handle)
    with file, agreed(group, UserError, f"{path}: writing"):
        for name, start, array in slabs():
            if array.size:
                file[name][start:start + array.size] = array
    with agreed(group, UserError, f"{path}: flushing to disk"):
        sync(path)


def _write_offsets(path, slabs, group, offsets):
    """Every rank writes its slabs where their bytes lie."""
    with agreed(group, UserError, f"{path}: writing"):
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            for name, start, array in slabs():
                write_all(descriptor, np.ascontiguousarray(array).data.cast("B") if array.size else b"", offsets[name] + start * array.itemsize)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(temporary, path, overwrite):
    TokenFile(temporary, structure=read_structure(temporary)).close()
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{path}: appeared while its tokens were made; give another name, or --overwrite")
    os.replace(temporary, path)
    sync(os.path.dirname(path) or ".")
