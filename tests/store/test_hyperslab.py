"""State files: both forms, any cut, any reader, and errors that reach every rank."""

import math
import os
import resource
import signal

import numpy as np
import pytest
from store_states import CUTS, SHAPES, assert_loaded, entries_of, forms, raised, values

from mpillm.backend.reference import Reference
from mpillm.layout.comm import Solo
from mpillm.layout.slab import Slab
from mpillm.layout import hdf5
from mpillm.store import hyperslab
from mpillm.store.errors import DamagedCheckpoint, SaveFailed
from mpillm.layout.hdf5 import load_h5py
from mpillm.store.structure import check_structure

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("how", CUTS)
def test_any_cut_reads_what_any_cut_wrote(group, shared_tmp, how):
    for form in forms(group):
        path = shared_tmp / f"{form}.h5"
        hyperslab.write_state(path, entries_of(group, how), group, form)
        with load_h5py().File(path, "r") as file:
            for name, shape in SHAPES.items():
                np.testing.assert_array_equal(file[name][...], values(name, shape))
        check_structure(path, {name: (shape, "float32") for name, shape in SHAPES.items()})
        for other in CUTS:
            entries = entries_of(group, other, fill=False)
            hyperslab.read_state(path, entries, group)
            assert_loaded(entries)
        alone = entries_of(Solo(), fill=False)
        hyperslab.read_state(path, alone, Solo())
        assert_loaded(alone)
        group.barrier()


def test_both_forms_and_all_cuts_give_the_same_hashes(group, shared_tmp):
    backend, seen = Reference(), []
    for form in forms(group):
        path = shared_tmp / f"{form}.h5"
        hyperslab.write_state(path, entries_of(group, "both"), group, form)
        for how in CUTS:
            shares = hyperslab.read_state(path, entries_of(group, how, fill=False), group, backend)
            seen.append(group.all_reduce(shares).tolist())
    whole = [hyperslab.slab_hash(backend, shape, Slab.whole(shape), values(name, shape)) for name, shape in SHAPES.items()]
    assert all(hashes == whole for hashes in seen)


def test_float64_and_conversion_between_types(group, shared_tmp):
    for form in forms(group):
        path = shared_tmp / f"{form}.h5"
        hyperslab.write_state(path, entries_of(group, "both", dtype="float64"), group, form)
        wide = entries_of(group, "columns", dtype="float64", fill=False)
        hyperslab.read_state(path, wide, group)
        assert_loaded(wide, dtype="float64")
        narrow = entries_of(group, "columns", fill=False)
        hyperslab.read_state(path, narrow, group)
        assert_loaded(narrow)


def test_arrays_need_not_be_contiguous(group, shared_tmp):
    for form in forms(group):
        path = shared_tmp / f"{form}.h5"
        slab = CUTS["rows"]((9, 6), group.rank, group.size)
        wide = np.zeros((slab.shape[0], 10), np.float32)
        wide[:, 2:8] = values("masters/x", (9, 6))[slab.slices()]
        hyperslab.write_state(path, [hyperslab.Entry("masters/x", (9, 6), slab, wide[:, 2:8])], group, form)
        back = np.zeros_like(wide)
        hyperslab.read_state(path, [hyperslab.Entry("masters/x", (9, 6), slab, back[:, 2:8])], group)
        np.testing.assert_array_equal(back, wide)


def test_large_slabs_go_in_pieces(group, shared_tmp, monkeypatch):
    monkeypatch.setattr(hyperslab, "PIECE", 100)
    for form in forms(group):
        path = shared_tmp / f"{form}.h5"
        hyperslab.write_state(path, entries_of(group, "both"), group, form)
        hyperslab.verify_written(path, entries_of(group, "both"), group)
        entries = entries_of(group, "rows", fill=False)
        hyperslab.read_state(path, entries, group)
        assert_loaded(entries)


@pytest.mark.parametrize("shape", [(11,), (5, 7), (3, 4, 5), (2, 3, 1, 4)])
def test_runs_are_the_slab_in_order(shape):
    numbers = np.arange(math.prod(shape)).reshape(shape)
    rng = np.random.default_rng(1)
    for _ in range(60):
        start = [int(rng.integers(0, extent + 1)) for extent in shape]
        slab = Slab(tuple(start), tuple(int(rng.integers(0, extent - first + 1)) for first, extent in zip(start, shape)))
        flat = numbers[slab.slices()].reshape(-1)
        stretches = list(hyperslab.runs(shape, slab))
        assert sum(length for _, _, length in stretches) == flat.size
        for to, at, length in stretches:
            np.testing.assert_array_equal(flat[at:at + length], np.arange(to, to + length))


def test_a_whole_slab_is_one_run():
    assert list(hyperslab.runs((4, 5, 6), Slab((1, 0, 0), (2, 5, 6)))) == [(30, 0, 60)]


def test_an_existing_file_is_not_touched(group, shared_tmp):
    for form in forms(group):
        path = shared_tmp / f"{form}.h5"
        if group.rank == 0:
            path.write_bytes(b"precious")
        group.barrier()
        raised(group, SaveFailed, lambda: hyperslab.write_state(path, entries_of(group), group, form))
        assert path.read_bytes() == b"precious"


def test_a_missing_directory_fails_on_all_ranks(group, shared_tmp):
    for form in forms(group):
        path = shared_tmp / "nowhere" / "state.h5"
        assert "nowhere" in raised(group, SaveFailed, lambda: hyperslab.write_state(path, entries_of(group), group, form))
        raised(group, DamagedCheckpoint, lambda: hyperslab.read_state(path, entries_of(group), group))


@pytest.mark.parametrize("culprit", ["first", "last", "all"])
@pytest.mark.parametrize("reserved", [True, False])
def test_a_full_disk_on_some_rank_fails_on_all(group, shared_tmp, monkeypatch, culprit, reserved):
    """A file size limit stands for the full disk: write gives EFBIG. Without `reserve` it shows while writing."""
    if not reserved:
        monkeypatch.setattr(hdf5, "reserve", lambda descriptor, path: None)
    shapes = {"masters/a": (300, 100), "masters/b": (4000, 500)}
    limited = {"first": group.rank == 0, "last": group.rank == group.size - 1, "all": True}[culprit]
    for form in forms(group):
        path = shared_tmp / f"{form}.h5"
        with file_size_limit(3_000_000 if limited else None):
            message = raised(group, SaveFailed, lambda: hyperslab.write_state(path, entries_of(group, "rows", shapes), group, form))
        assert str(path) in message and "\n" not in message


class file_size_limit:
    """No file of this process grows beyond `size` bytes inside the block."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


def test_short_writes_go_on(group, shared_tmp, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: whole(descriptor, data[:17], offset))
    path = shared_tmp / "state.h5"
    hyperslab.write_state(path, entries_of(group, "rows"), group, "offsets")
    hyperslab.verify_written(path, entries_of(group, "rows"), group)


def test_reading_back_finds_a_difference(group, shared_tmp):
    path = shared_tmp / "state.h5"
    hyperslab.write_state(path, entries_of(group), group)
    entries = entries_of(group)
    if group.rank == group.size - 1:
        entries[0].array[-1, -1] = 7.0
    message = raised(group, SaveFailed, lambda: hyperslab.verify_written(path, entries, group))
    assert "masters/embedding.tokens.weight" in message


def test_wrong_entries_are_refused_on_all_ranks(group, shared_tmp):
    wrong = [hyperslab.Entry("masters/x", (4, 4), Slab((3, 0), (2, 4)), np.zeros((2, 4), np.float32)),
             hyperslab.Entry("masters/x", (4, 4), Slab((0, 0), (2, 4)), np.zeros((2, 3), np.float32)),
             hyperslab.Entry("masters/x", (4,), Slab((0,), (4,)), np.zeros(4, np.int32))]
    good = hyperslab.Entry("masters/x", (4,), Slab((0,), (0,)), np.zeros(0, np.float32))
    for entry in wrong:
        mine = [entry if group.rank == group.size - 1 else good]
        assert "masters/x" in raised(group, SaveFailed, lambda: hyperslab.write_state(shared_tmp / "x.h5", mine, group, "offsets"))
