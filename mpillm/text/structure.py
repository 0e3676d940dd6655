"""Where the datasets of a token file lie, read with care: token files are hostile until checked.

HDF5 can point at other files, name libraries to load and declare any size, and the library can crash on damaged or
crafted metadata. So one child process reads the structure, with limits, and prints it as JSON; from then on the file
is read with plain `pread` (tokenfile.py), and HDF5 is not needed any more.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from ..config import UserError

DATASETS = {"tokens": ("uint16", "uint32"), "documents": ("int64",), "tokenizer": ("uint8",)}
ATTRIBUTES = {"format": int, "vocabulary": int, "end": int, "documents": int, "tokenizer_hash": str, "sources_hash": str}
PREPARE = "make it with `mpillm prepare`"
MEMORY_LIMIT = 8 << 30      # bytes of address space of the child
SECONDS_LIMIT = 300         # it may take on a slow shared file system


def load_h5py():
    """The h5py module with plugin loading off: a file must not choose the libraries that we run."""
    os.environ["HDF5_PLUGIN_PRELOAD"] = "::"
    import h5py
    return h5py


def read_structure(path):
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
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OPENBLAS_NUM_THREADS": "1"}
    try:
        child = subprocess.run([sys.executable, "-P", "-m", __name__, os.fspath(path)], stdin=subprocess.DEVNULL,
                               capture_output=True, env=environment, timeout=SECONDS_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{path}: reading its structure took over {SECONDS_LIMIT} s; is its file system in order?") from None
    except OSError:         # no new process may be started here
        return read_structure(path)
    if child.returncode:
        last = child.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise UserError(f"{path}: damaged: reading its structure ended with code {child.returncode} ({last or 'crashed'}); {PREPARE} again")
    answer = json.loads(child.stdout)
    if "error" in answer:
        raise UserError(answer["error"])
    return answer


def main():
    """The child: a path as its argument, the structure or an objection on standard output."""
    for limit, value in ((resource.RLIMIT_AS, MEMORY_LIMIT), (resource.RLIMIT_CPU, SECONDS_LIMIT), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    try:
        answer = read_structure(sys.argv[1])
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
