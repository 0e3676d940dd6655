"""Checkpoints: saved whole or not at all, kept, found again, and never loaded damaged."""

import json
import os
import shutil
import time
from collections import namedtuple

import numpy as np
import pytest
from store_states import CUTS, SHAPES, assert_loaded, entries_of, forms, raised
from test_hyperslab import file_size_limit

from mpillm.backend.reference import Reference
from mpillm.config import UserError
from mpillm.layout.comm import Solo
from mpillm.layout.slab import Slab
from mpillm.store import checkpoint as checkpoints
from mpillm.store import directory as directories
from mpillm.store import manifest as manifests
from mpillm.store.errors import DamagedCheckpoint, SaveFailed
from mpillm.store.hyperslab import Entry
from mpillm.layout.hdf5 import load_h5py
from mpillm.store.structure import check_structure

pytestmark = pytest.mark.ranks

BACKEND = Reference()
MANIFEST = {"job": {"model": {"width": 12}}, "mesh": {"dp": 2}, "data": {"epoch": 0, "tokens": 123}, "rate": 1e-3}
FILES = {"tokenizer.json": b'{"model": "bytes"}'}


def save(directory, step, group, how="rows", **options):
    """A checkpoint whose tensors are their values plus `step`."""
    return checkpoints.save(directory, step, entries_of(group, how, change=step), MANIFEST, FILES, group, BACKEND, **options)


def load_newest(directory, group, how="rows"):
    """(checkpoint, entries, reports) of the newest one that loads."""
    reports, tried = [], []

    def make_entries(checkpoint):
        tried.append(entries_of(group, how, fill=False))
        return tried[-1]
    found = checkpoints.load_newest(directory, make_entries, group, BACKEND, reports.append)
    return found, tried[-1] if tried else None, group.share(reports)


@pytest.fixture
def quick(monkeypatch):
    """Structure is checked in this process: starting a child for each of many openings is slow."""
    monkeypatch.setattr(checkpoints, "check_structure_apart", check_structure)


def on_rank_0(group, work):
    """`work()` on rank 0, the others wait for it."""
    if group.rank == 0:
        work()
    group.barrier()


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("how", CUTS)
def test_what_is_saved_is_loaded_on_any_layout(group, shared_tmp, quick, how):
    for form in forms(group):
        path = save(shared_tmp / form, 100, group, how, form=form)
        assert path == shared_tmp / form / "step-00000100"
        checkpoint = checkpoints.open_checkpoint(path, group)
        assert checkpoint.step == 100 and checkpoint.files("tokenizer.json") == FILES["tokenizer.json"]
        assert {key: checkpoint.manifest[key] for key in MANIFEST} == MANIFEST and checkpoint.manifest["kind"] == "state"
        for other in CUTS:
            entries = entries_of(group, other, fill=False)
            checkpoint.load(entries, group, BACKEND)
            assert_loaded(entries, 100)
        alone = entries_of(Solo(), fill=False)
        checkpoint.load(alone, Solo(), BACKEND)
        assert_loaded(alone, 100)
    tensors = [json.loads((shared_tmp / form / "step-00000100" / "manifest.json").read_bytes())["tensors"] for form in forms(group)]
    assert tensors[0] == tensors[-1] and set(tensors[0]) == set(SHAPES)


def test_replicas_may_read_the_same_slabs_and_some_tensors_only(group, shared_tmp):
    checkpoint = checkpoints.open_checkpoint(save(shared_tmp, 1, group), group)
    everywhere = entries_of(Solo(), fill=False)[:2]
    checkpoint.load(everywhere, group, BACKEND)
    assert_loaded(everywhere, 1)


def test_float64_state_loads_into_float32(group, shared_tmp):
    entries = entries_of(group, "both", dtype="float64")
    path = checkpoints.save(shared_tmp, 3, entries, {}, {}, group, BACKEND)
    narrow = entries_of(group, "rows", fill=False)
    checkpoints.open_checkpoint(path, group).load(narrow, group, BACKEND)
    assert_loaded(narrow)


def test_the_newest_are_kept_and_named_by_the_hint(group, shared_tmp):
    for step in (1, 2, 3, 4):
        save(shared_tmp, step, group, keep=2)
    assert names(shared_tmp) == ["latest", "step-00000003", "step-00000004"]
    assert (shared_tmp / "latest").read_text() == "step-00000004\n"
    save(shared_tmp, 5, group, keep=0)  # two at least
    assert names(shared_tmp) == ["latest", "step-00000004", "step-00000005"]


def test_damaged_ones_do_not_count_as_kept(group, shared_tmp):
    for step in (1, 2, 3):
        save(shared_tmp, step, group, keep=3)
    on_rank_0(group, lambda: (shared_tmp / "step-00000002" / "manifest.json").write_text("{}"))
    save(shared_tmp, 4, group, keep=3)
    assert names(shared_tmp) == ["latest"] + [f"step-0000000{step}" for step in (1, 2, 3, 4)]


def test_a_step_saved_again_replaces_the_old_one(group, shared_tmp):
    save(shared_tmp, 1, group)
    on_rank_0(group, lambda: flip(shared_tmp / "step-00000001" / "manifest.json", 400, 3))
    save(shared_tmp, 1, group)
    assert names(shared_tmp) == ["latest", "step-00000001"]
    assert load_newest(shared_tmp, group)[0].step == 1


def test_one_set_aside_by_a_killed_save_is_still_found(group, shared_tmp):
    save(shared_tmp, 1, group)
    on_rank_0(group, lambda: (shared_tmp / "step-00000001").rename(shared_tmp / "step-00000001.old-1234abcd"))
    found, entries, _ = load_newest(shared_tmp, group)
    assert found.step == 1
    assert_loaded(entries, 1)
    save(shared_tmp, 1, group)
    assert names(shared_tmp) == ["latest", "step-00000001"]


def test_nothing_saved_is_none_and_nothing_valid_is_an_error(group, shared_tmp):
    assert load_newest(shared_tmp / "nowhere", group)[0] is None
    assert checkpoints.newest_valid(shared_tmp, group) is None
    save(shared_tmp, 1, group)
    on_rank_0(group, lambda: (shared_tmp / "step-00000001" / "manifest.json").unlink())
    assert "none of its 1" in raised(group, DamagedCheckpoint, lambda: load_newest(shared_tmp, group))
    assert "none of its 1" in raised(group, DamagedCheckpoint, lambda: checkpoints.newest_valid(shared_tmp, group))


def damages(directory):
    """Ways to damage a checkpoint, by name; each runs on rank 0."""
    state, manifest = directory / "state.h5", directory / "manifest.json"

    def edit(old, new):
        text = manifest.read_text()
        assert old in text
        manifest.write_text(text.replace(old, new))
    return {
        "no manifest": manifest.unlink,
        "manifest edited": lambda: edit('"tokens": 123', '"tokens": 124'),
        "manifest cut": lambda: os.truncate(manifest, 300),
        "manifest not JSON": lambda: manifest.write_bytes(b"\x80\x04."),
        "manifest of nested lists": lambda: manifest.write_bytes(b"[" * 200_000),
        "state cut": lambda: os.truncate(state, os.path.getsize(state) - 40),
        "state cut to nothing": lambda: os.truncate(state, 0),
        "no state": state.unlink,
        "state of zeros": lambda: state.write_bytes(bytes(os.path.getsize(state))),
        "data flipped": lambda: flip(state, data_offset(state, "masters/norm.weight") + 2, 6),
        "state of another step": lambda: shutil.copy(directory.parent / "step-00000001" / "state.h5", state),
        "state is a link": lambda: (state.rename(directory / "real.h5"), state.symlink_to("real.h5")),
    }


@pytest.mark.parametrize("damage", damages(directories.Path(".")))
def test_a_damaged_checkpoint_is_passed_over_with_a_line(group, shared_tmp, quick, damage):
    for step in (1, 2):
        save(shared_tmp, step, group)
    newest = shared_tmp / "step-00000002"
    on_rank_0(group, lambda: damages(newest)[damage]())
    found, entries, reports = load_newest(shared_tmp, group, "both")
    assert found.step == 1
    assert_loaded(entries, 1)
    assert len(reports) == 2 and "step-00000002" in reports[0] and "\n" not in reports[0]
    assert reports[1].startswith("set aside as step-00000002.damaged-") and not newest.exists()

    def named():
        checkpoints.open_checkpoint(newest, group).load(entries_of(group, fill=False), group, BACKEND)
    raised(group, UserError, named)


def flip(path, offset, bit):
    """Flips one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def data_offset(path, name):
    with load_h5py().File(path, "r") as file:
        return file[name].id.get_offset()


def flip_everywhere(group, shared_tmp, choose, count):
    """How many of `count` flips were found; the others must not change what is loaded."""
    original = save(shared_tmp, 1, group) / "state.h5"
    state = shared_tmp / "copy" / "state.h5"
    on_rank_0(group, lambda: shutil.copytree(original.parent, state.parent))
    found = 0
    for offset, bit in group.share(choose(original, count) if group.rank == 0 else None):
        on_rank_0(group, lambda: (shutil.copy(original, state), flip(state, offset, bit)))
        entries = entries_of(group, fill=False)
        try:
            checkpoints.open_checkpoint(state.parent, group).load(entries, group, BACKEND)
            assert_loaded(entries, 1)
        except DamagedCheckpoint:
            found += 1
        group.barrier()
    return found


def in_data(path, count):
    """(offset, bit) pairs in the tensors of a state file."""
    return choose_bits(np.flatnonzero(holds_data(path)), count)


def in_metadata(path, count):
    """(offset, bit) pairs in what HDF5 wrote around the tensors; unused space is left out."""
    content = np.frombuffer(path.read_bytes(), np.uint8)
    return choose_bits(np.flatnonzero(~holds_data(path) & (content != 0)), count)


def choose_bits(offsets, count):
    rng = np.random.default_rng(5)
    return [(int(offset), int(rng.integers(8))) for offset in rng.choice(offsets, count)]


def holds_data(path):
    """Whether each byte of a state file belongs to a tensor."""
    data = np.zeros(path.stat().st_size, bool)
    with load_h5py().File(path, "r") as file:
        for name in SHAPES:
            start = file[name].id.get_offset()
            data[start:start + file[name].id.get_storage_size()] = True
    return data


def test_every_flipped_bit_of_the_tensors_is_found(group, shared_tmp, quick):
    assert flip_everywhere(group, shared_tmp, in_data, 50) == 50


def test_flipped_bits_of_the_metadata_are_found_or_harmless(group, shared_tmp):
    """In a child each: about one such flip in 4000 crashes HDF5 1.10.8."""
    assert flip_everywhere(group, shared_tmp, in_metadata, 10) > 0


def test_copied_and_renamed_directories_load(group, shared_tmp):
    save(shared_tmp / "run" / "checkpoints", 7, group)
    other = shared_tmp / "my favourite"
    on_rank_0(group, lambda: shutil.copytree(shared_tmp / "run" / "checkpoints" / "step-00000007", other))
    entries = entries_of(group, "both", fill=False)
    checkpoint = checkpoints.open_checkpoint(checkpoints.resolve(other, group), group)
    checkpoint.load(entries, group, BACKEND)
    assert checkpoint.step == 7
    assert_loaded(entries, 7)


def test_resolve_takes_runs_directories_and_steps(group, shared_tmp):
    steps = shared_tmp / "run" / "checkpoints"
    for step in (1, 2):
        save(steps, step, group)
    assert checkpoints.resolve(shared_tmp / "run", group) == steps / "step-00000002"
    assert checkpoints.resolve(steps, group) == steps / "step-00000002"
    assert checkpoints.resolve(steps / "step-00000001", group) == steps / "step-00000001"
    on_rank_0(group, lambda: (steps / "step-00000002" / "manifest.json").unlink())
    assert checkpoints.resolve(shared_tmp / "run", group) == steps / "step-00000001"
    assert "not a complete" in raised(group, UserError, lambda: checkpoints.resolve(steps / "step-00000002", group))
    on_rank_0(group, lambda: ((shared_tmp / "hf").mkdir(), (shared_tmp / "hf" / "config.json").write_text("{}")))
    assert "Hugging Face" in raised(group, UserError, lambda: checkpoints.resolve(shared_tmp / "hf", group))
    assert "does not exist" in raised(group, UserError, lambda: checkpoints.resolve(shared_tmp / "x", group))
    assert "is a file" in raised(group, UserError, lambda: checkpoints.resolve(shared_tmp / "hf" / "config.json", group))
    assert "no checkpoint" in raised(group, UserError, lambda: checkpoints.resolve(shared_tmp, group))


def test_leftovers_of_dead_saves_are_removed(group, shared_tmp):
    save(shared_tmp, 1, group)
    host = directories.socket.gethostname()
    leftovers = {f"step-00000002.tmp-{host}-999999999-0123abcd": 0,        # this host, no such process
                 "step-00000002.tmp-elsewhere-1-0123abcd": 2 * directories.ABANDONED,
                 "step-00000003.tmp-elsewhere-1-0123abcd": 0,              # may be alive
                 "step-00000004.tmp-mine": 2 * directories.ABANDONED}      # not a name of ours

    def litter():
        for name, age in leftovers.items():
            (shared_tmp / name).mkdir()
            (shared_tmp / name / "state.h5").write_bytes(b"half")
            for path in (shared_tmp / name / "state.h5", shared_tmp / name):
                os.utime(path, (time.time() - age,) * 2)
    on_rank_0(group, litter)
    assert load_newest(shared_tmp, group)[0].step == 1
    save(shared_tmp, 2, group)
    assert names(shared_tmp) == ["latest", "step-00000001", "step-00000002", *list(leftovers)[2:]]


def test_too_small_a_disk_is_refused_before_writing(group, shared_tmp, monkeypatch):
    save(shared_tmp, 1, group)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(directories.shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1234, 1234))
    message = raised(group, SaveFailed, lambda: save(shared_tmp, 2, group))
    assert "1234 are free" in message and str(directories.bytes_needed(entries_of(group), FILES)) in message
    assert names(shared_tmp) == ["latest", "step-00000001"]


@pytest.mark.parametrize("culprit", ["first", "last"])
def test_a_disk_that_fills_up_leaves_the_old_checkpoint(group, shared_tmp, monkeypatch, culprit):
    save(shared_tmp, 1, group)
    limited = group.rank == (0 if culprit == "first" else group.size - 1)
    for form in forms(group):
        with file_size_limit(2000 if limited else None):
            message = raised(group, SaveFailed, lambda: save(shared_tmp, 2, group, form=form))
        assert "were free" in message
        group.barrier()
        assert names(shared_tmp) == ["latest", "step-00000001"]
    found, entries, reports = load_newest(shared_tmp, group)
    assert found.step == 1 and not reports
    assert_loaded(entries, 1)


@pytest.mark.parametrize("function", ["_write_durable", "sync"])
def test_a_failure_while_publishing_leaves_nothing_behind(group, shared_tmp, monkeypatch, function):
    def fail(*_):
        raise OSError(122, "Disk quota exceeded")
    save(shared_tmp, 1, group)
    with monkeypatch.context() as patch:
        patch.setattr(directories, function, fail)
        assert "quota" in raised(group, SaveFailed, lambda: save(shared_tmp, 2, group))
    group.barrier()
    assert names(shared_tmp) == ["latest", "step-00000001"]


def test_a_directory_that_cannot_be_written(group, shared_tmp):
    on_rank_0(group, lambda: (shared_tmp / "file").write_text("not a directory"))
    raised(group, SaveFailed, lambda: save(shared_tmp / "file", 1, group))
    raised(group, SaveFailed, lambda: save(shared_tmp / "file" / "checkpoints", 1, group))


def test_slabs_that_do_not_cover_are_refused(group, shared_tmp):
    for slab in (Slab((0,), (3,)), Slab((1,), (3,))):
        mine = slab if group.rank == 0 else Slab((0,), (0,))
        entry = Entry("masters/x", (4,), mine, np.zeros(mine.shape, np.float32))
        assert "masters/x" in raised(group, ValueError, lambda: checkpoints.save(shared_tmp, 1, [entry], {}, {}, group, BACKEND))
    twice = Entry("masters/x", (4,), Slab((0,), (4,)), np.zeros(4, np.float32))
    if group.size > 1:
        raised(group, ValueError, lambda: checkpoints.save(shared_tmp, 1, [twice], {}, {}, group, BACKEND))
        entry = twice._replace(name=f"masters/x{group.rank}")
        assert "different tensors" in raised(group, ValueError, lambda: checkpoints.save(shared_tmp, 1, [entry], {}, {}, group, BACKEND))
    assert names(shared_tmp) == []


def test_another_model_is_a_users_mistake_not_damage(group, shared_tmp):
    checkpoint = checkpoints.open_checkpoint(save(shared_tmp, 1, group), group)
    for entry in (Entry("masters/other", (2,), Slab((0,), (0,)), np.zeros(0, np.float32)),
                  Entry("masters/norm.weight", (6,), Slab((0,), (0,)), np.zeros(0, np.float32))):
        with pytest.raises(UserError) as caught:
            checkpoint.load([entry], group, BACKEND)
        assert type(caught.value) is UserError and entry.name in str(caught.value)
    with pytest.raises(UserError):
        checkpoint.files("nothing")


HOSTILE = [
    {"format": 2}, {"format": "1"}, {"step": -1}, {"step": "1"}, {"tensors": []}, {"files": None},
    {"tensors": {"../x": {"shape": [1], "dtype": "float32", "hash": "0" * 16}}},
    {"tensors": {"masters/..": {"shape": [1], "dtype": "float32", "hash": "0" * 16}}},
    {"tensors": {"masters/x": {"shape": [0], "dtype": "float32", "hash": "0" * 16}}},
    {"tensors": {"masters/x": {"shape": [2**40, 2**40], "dtype": "float32", "hash": "0" * 16}}},
    {"tensors": {"masters/x": {"shape": [True], "dtype": "float32", "hash": "0" * 16}}},
    {"tensors": {"masters/x": {"shape": [1], "dtype": "object", "hash": "0" * 16}}},
    {"tensors": {"masters/x": {"shape": [1], "dtype": ["float32"], "hash": "0" * 16}}},
    {"tensors": {"masters/x": {"shape": [1], "dtype": "float32", "hash": "xyz"}}},
    {"files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}},
    {"files": {"tokenizer.json": {"bytes": 1 << 60, "sha256": ""}}},
]


def test_hostile_manifests_with_a_right_hash_are_refused(group, shared_tmp):
    """Their author can state any SHA-256; what they say is checked too."""
    path = save(shared_tmp, 1, group)
    manifest = json.loads((path / "manifest.json").read_bytes())
    del manifest["sha256"]
    group.barrier()

    def rewrite(change):
        changed = {**manifest, **change}
        digest = manifests.digest(manifests.canonical(changed)).hex()
        (path / "manifest.json").write_text(json.dumps({**changed, "sha256": digest}))
    for change in HOSTILE:
        on_rank_0(group, lambda: rewrite(change))
        raised(group, UserError, lambda: checkpoints.open_checkpoint(path, group))
    on_rank_0(group, lambda: rewrite({}))
    assert checkpoints.open_checkpoint(path, group).step == 1


def test_an_oversized_manifest_is_not_read(group, shared_tmp):
    path = save(shared_tmp, 1, group)
    on_rank_0(group, lambda: os.truncate(path / "manifest.json", manifests.SIZE_LIMIT + 1))
    assert "larger than" in raised(group, DamagedCheckpoint, lambda: checkpoints.open_checkpoint(path, group))


def test_a_changed_tokenizer_is_found(group, shared_tmp):
    path = save(shared_tmp, 1, group)
    checkpoint = checkpoints.open_checkpoint(path, group)
    on_rank_0(group, lambda: (path / "tokenizer.json").write_bytes(b'{"model": "bytez"}'))
    raised(group, DamagedCheckpoint, lambda: checkpoint.files("tokenizer.json"))


def test_files_with_unsafe_names_and_taken_keys_are_not_saved(group, shared_tmp):
    for manifest, files in (({}, {"../x": b""}), ({}, {"state.h5": b""}), ({"step": 3}, {}), ({"x": float("nan")}, {}), ({"x": b""}, {})):
        raised(group, SaveFailed, lambda: checkpoints.save(shared_tmp, 1, entries_of(group), manifest, files, group, BACKEND))
    assert names(shared_tmp) == []
