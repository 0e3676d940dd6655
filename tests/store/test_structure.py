"""Hostile state files: refused before any data is read, with one line, and never at the cost of the process."""

import errno
import os
import sys

import numpy as np
import pytest

from mpillm.store import structure
from mpillm.store.errors import DamagedCheckpoint
from mpillm.config import UserError
from mpillm.layout import hdf5
from mpillm.layout.hdf5 import load_h5py
from mpillm.store.structure import check_structure, check_structure_apart

pytestmark = pytest.mark.ranks

ALLOWED = {"masters/a": ((8, 4), "float32"), "moment1/a": ((8, 4), "float32"), "masters/b": ((6,), "float64")}
DATA = np.arange(32, dtype=np.float32).reshape(8, 4)


def write(path, leave_out=(), **others):
    """A file as allowed, less the tensors left out, plus what the functions in `others` add."""
    h5py = load_h5py()
    with h5py.File(path, "w") as file:
        for name, (shape, dtype) in ALLOWED.items():
            if name not in leave_out:
                file[name] = np.ones(shape, dtype)
        for add in others.values():
            add(h5py, file)


def external_link(h5py, file):
    file["masters/a"] = h5py.ExternalLink("secret.h5", "/masters/a")


def soft_link(h5py, file):
    file["masters/a"] = h5py.SoftLink("/moment1/a")


def soft_cycle(h5py, file):
    file["masters/a"] = h5py.SoftLink("/masters/a")


def external_storage(h5py, file):
    file.create_dataset("masters/a", (8, 4), "f4", external=[("secret.h5", 0, 128)])


def virtual(h5py, file):
    layout = h5py.VirtualLayout((8, 4), "f4")
    layout[...] = h5py.VirtualSource("secret.h5", "masters/a", (8, 4))
    file.create_virtual_dataset("masters/a", layout)


def compact(h5py, file):
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    h5py.h5d.create(file["masters"].id, b"a", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((8, 4)), plist)


def never_written(h5py, file):
    file.create_dataset("masters/a", (8, 4), "f4")


def unknown_filter(h5py, file):
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((8, 4))
    plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
    h5py.h5d.create(file["masters"].id, b"a", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((8, 4)), plist)


def of_type(dtype):
    return lambda h5py, file: file.create_dataset("masters/a", (8, 4), dtype)


REPLACED = {   # what stands for masters/a
    "external link": external_link, "soft link": soft_link, "soft cycle": soft_cycle, "external storage": external_storage,
    "virtual": virtual, "compact": compact, "never written": never_written, "unknown filter": unknown_filter,
    "a group": lambda h5py, file: file.create_group("masters/a"),
    "a type": lambda h5py, file: file.__setitem__("masters/a", np.dtype("f4")),
    "other shape": lambda h5py, file: file.create_dataset("masters/a", data=DATA.T),
    "other rank": lambda h5py, file: file.create_dataset("masters/a", data=DATA.reshape(-1)),
    "scalar": lambda h5py, file: file.create_dataset("masters/a", data=np.float32(1)),
    "nothing": lambda h5py, file: None,
    **{f"type {dtype}": of_type(dtype) for dtype in (">f4", "f8", "i4", "f2", "V4", "S4", "(2,)f4", "c8")},
    "variable length": lambda h5py, file: file.create_dataset("masters/a", (8, 4), h5py.vlen_dtype(np.float32)),
    "references": lambda h5py, file: file.create_dataset("masters/a", (8, 4), h5py.ref_dtype),
    "strings": lambda h5py, file: file.create_dataset("masters/a", (8, 4), h5py.string_dtype()),
}

ADDED = {   # what stands beside the allowed tensors
    "a tensor": lambda h5py, file: file.create_dataset("masters/c", data=DATA),
    "a tensor elsewhere": lambda h5py, file: file.create_dataset("other/a", data=DATA),
    "a tensor at the root": lambda h5py, file: file.create_dataset("a", data=DATA),
    "a group": lambda h5py, file: file.create_group("masters/more"),
    "a group at the root": lambda h5py, file: file.create_group("secrets"),
    "a cycle of groups": lambda h5py, file: file["masters"].__setitem__("loop", file["/"]),
    "an external link": lambda h5py, file: file.__setitem__("x", h5py.ExternalLink("/etc/passwd", "/")),
}


@pytest.mark.parametrize("what", REPLACED)
def test_a_tensor_that_is_not_plain(group, shared_tmp, what):
    path = shared_tmp / f"{group.rank}.h5"
    write(shared_tmp / f"secret{group.rank}.h5")
    write(path, ["masters/a"], replace=REPLACED[what])
    with pytest.raises(DamagedCheckpoint, match="masters/a") as caught:
        check_structure(path, ALLOWED)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("what", ADDED)
def test_something_beside_the_tensors(group, shared_tmp, what):
    path = shared_tmp / f"{group.rank}.h5"
    write(path, add=ADDED[what])
    with pytest.raises(DamagedCheckpoint, match="is not in the manifest|link"):
        check_structure(path, ALLOWED)


def test_honest_files_pass_also_when_rewritten_by_other_tools(group, shared_tmp):
    path = shared_tmp / f"{group.rank}.h5"
    write(path)
    check_structure(path, ALLOWED)
    for options in ({"chunks": (3, 4)}, {"chunks": (2, 2), "compression": "gzip", "shuffle": True, "fletcher32": True}):
        write(path, ["masters/a"], add=lambda h5py, file: file.create_dataset("masters/a", data=DATA, **options))
        check_structure(path, ALLOWED)


@pytest.mark.parametrize("options", [{}, {"chunks": (1 << 10, 1 << 10)}, {"chunks": (1 << 10, 1 << 10), "compression": "gzip"}])
def test_a_small_file_does_not_declare_terabytes(group, shared_tmp, options):
    """The manifest of a hostile checkpoint agrees with it."""
    path, shape = shared_tmp / f"{group.rank}.h5", (1 << 20, 1 << 20)
    write(path, ["masters/a"], add=lambda h5py, file: file.create_dataset("masters/a", shape, "f4", **options))
    with pytest.raises(DamagedCheckpoint, match="no data inside|more data than"):
        check_structure(path, {**ALLOWED, "masters/a": (shape, "float32")})


def test_links_directories_and_pipes_are_not_opened(group, shared_tmp):
    real, link, pipe = (shared_tmp / f"{group.rank}.{end}" for end in ("h5", "link", "pipe"))
    write(real)
    link.symlink_to(real)
    os.mkfifo(pipe)
    for path in (link, pipe, shared_tmp, shared_tmp / "nothing.h5"):
        with pytest.raises(DamagedCheckpoint, match="not a re"):
            check_structure(path, ALLOWED)


def test_text_is_not_hdf5(group, shared_tmp):
    path = shared_tmp / f"{group.rank}.h5"
    path.write_text("not HDF5")
    with pytest.raises(DamagedCheckpoint, match="not a readable state file"):
        check_structure(path, ALLOWED)


def test_the_child_says_the_same(group, shared_tmp):
    if group.rank:
        return
    path = shared_tmp / "state.h5"
    write(path)
    check_structure_apart(path, ALLOWED)
    write(path, ["masters/a"], replace=external_link)
    with pytest.raises(DamagedCheckpoint, match="soft or external link"):
        check_structure_apart(path, ALLOWED)


@pytest.mark.parametrize(("end", "error", "words"), [
    ("os.kill(os.getpid(), 11)", DamagedCheckpoint, "crashed"),
    ("sys.exit(3)", RuntimeError, "code 3"),
    ("os.kill(os.getpid(), 9)", RuntimeError, "code -9"),
    ("raise ImportError('no h5py here')", RuntimeError, "no h5py here")])
def test_only_a_crash_of_the_child_is_damage(group, shared_tmp, monkeypatch, end, error, words):
    path = shared_tmp / f"{group.rank}.h5"
    write(path)
    run, calls = hdf5.subprocess.run, []

    def other_child(command, **options):
        calls.append(command)
        return run([sys.executable, "-c", f"import os, sys; {end}"], **options)
    monkeypatch.setattr(hdf5.subprocess, "run", other_child)
    with pytest.raises(error, match=words):
        check_structure_apart(path, ALLOWED)
    assert len(calls) == (1 if error is DamagedCheckpoint else 2)       # asked again before giving up


def test_a_signal_to_the_group_of_processes_does_not_reach_the_child(group, shared_tmp, monkeypatch):
    path = shared_tmp / f"{group.rank}.h5"
    write(path)
    run, sessions = hdf5.subprocess.run, []
    monkeypatch.setattr(hdf5.subprocess, "run", lambda command, **options: sessions.append(options["start_new_session"]) or run(command, **options))
    check_structure_apart(path, ALLOWED)
    assert sessions == [True]


def test_a_file_that_only_cannot_be_read_is_not_damaged(group, shared_tmp, monkeypatch):
    path = shared_tmp / f"{group.rank}.h5"
    write(path)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    monkeypatch.setattr(structure, "regular_size", refuse)
    with pytest.raises(UserError, match="not known to be damaged") as raised:
        check_structure(path, ALLOWED)
    assert not isinstance(raised.value, DamagedCheckpoint)


def test_without_child_processes_the_check_runs_here(group, shared_tmp, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("no new processes")
    path = shared_tmp / f"{group.rank}.h5"
    write(path, ["masters/a"], replace=soft_link)
    monkeypatch.setattr(hdf5.subprocess, "run", refuse)
    with pytest.raises(DamagedCheckpoint, match="soft or external link"):
        check_structure_apart(path, ALLOWED)


def test_fuzzed_files_are_refused(group, shared_tmp):
    """Random bytes at random places of the metadata: the child may crash, this process may not."""
    path = shared_tmp / f"{group.rank}.h5"
    write(path)
    original, rng = path.read_bytes(), np.random.default_rng(1)
    places = np.flatnonzero(np.frombuffer(original, np.uint8))
    for _ in range(5 if group.rank == 0 else 0):
        content = bytearray(original)
        for place in rng.choice(places, 20):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        with pytest.raises(DamagedCheckpoint):
            check_structure_apart(path, ALLOWED)


def test_plugins_are_off(group):
    h5py = load_h5py()
    assert h5py.h5pl.size() == 0 and os.environ["HDF5_PLUGIN_PRELOAD"] == "::"
