"""Where the datasets of a token file lie, read with care: token files are hostile until checked.

HDF5 can point at other files, name libraries to load and declare any size, and the library can crash on damaged or
crafted metadata. So one child process reads the structure, with limits, and prints it as JSON; from then on the file
is read with plain `pread` (tokenfile.py), and HDF5 is not needed any more.
"""

import os

from ..config import UserError
from ..layout.hdf5 import answer_apart, ask_apart, load_h5py

DATASETS = {"tokens": ("uint16", "uint32"), "documents": ("int64",), "tokenizer": ("uint8",)}
ATTRIBUTES = {"format": int, "vocabulary": int, "end": int, "documents": int, "tokenizer_hash": str, "sources_hash": str}
PREPARE = "make it with `mpillm prepare`"


def read_structure(path, question=None):
    """The structure of a token file, read in this process.

    Returns
    -------
    dict
        Dataset -> [offset in bytes, elements, type]; "attributes" -> dict. JSON-able.

    Raises
    ------
    UserError
        Not HDF5, damaged, or not what a token file holds.
    """
    h5py = load_h5py()
    size = os.stat(path).st_size
    if not h5py.is_hdf5(path):
        raise UserError(f"{path}: not an HDF5 file; expected a token file: {PREPARE}")
    try:
        with h5py.File(path, "r", locking=False) as file:
            found = {name: _dataset(h5py, file, path, name, size) for name in DATASETS}
            return {**found, "attributes": {name: _attribute(file, path, name) for name in ATTRIBUTES}}
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{path}: damaged or cut short ({line}); {PREPARE} again") from None


def _dataset(h5py, file, path, name, file_size):
    """[offset, elements, type] of a dataset that lies whole in this file and may be read."""
    def refuse(line):
        raise UserError(f"{path}: /{name} {line}")
    link = file.get(name, getlink=True) if name in file.keys() else None
    if link is None:
        raise UserError(f"{path}: no dataset /{name}; expected a token file: {PREPARE}")
    if not isinstance(link, h5py.HardLink):
        refuse("is a link to elsewhere, which is not followed")
    data = file[name]
    if not isinstance(data, h5py.Dataset) or data.ndim != 1:
        refuse(f"is not a one-dimensional dataset; expected a token file: {PREPARE}")
    if data.dtype.name not in DATASETS[name] or not data.dtype.isnative:
        refuse(f"has type {data.dtype.name}; expected {' or '.join(DATASETS[name])}")
    if data.is_virtual or data.external or data.chunks or data.compression:
        refuse(f"is not stored as one block of this file (it is virtual, external, chunked or compressed); {PREPARE}")
    offset = data.id.get_offset()
    if data.size and (offset is None or offset + data.size * data.dtype.itemsize > file_size):
        refuse(f"declares {data.size} elements that are not in the file; {PREPARE} again")
    return [offset or 0, data.size, data.dtype.name]


def _attribute(file, path, name):
    value = file.attrs[name] if name in file.attrs.keys() else None
    value = getattr(value, "item", lambda: value)()         # NumPy scalars
    value = value.decode("ascii", "replace") if isinstance(value, bytes) else value
    if type(value) is not ATTRIBUTES[name]:
        raise UserError(f"{path}: no attribute {name!r}; expected a token file: {PREPARE}")
    return value


def read_structure_apart(path):
    """`read_structure` in a child process, so that a file which crashes HDF5 costs only the child."""
    return ask_apart(__name__, read_structure, path, None, UserError)


if __name__ == "__main__":
    answer_apart(read_structure)
