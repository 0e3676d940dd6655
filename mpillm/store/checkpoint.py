"""Checkpoints: directories `step-00000100/` with `state.h5`, `manifest.json` and small files such as `tokenizer.json`.

A checkpoint is written under a temporary name, flushed, read back on all ranks, described by its manifest, and only
then renamed; `latest` is a hint for people. Readers take the newest directory that proves whole. Every decision is
made on rank 0 or agreed upon, so it is the same on all ranks. Which tensors there are is the caller's matter.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import UserError
from ..layout.agreement import agreed, on_root
from ..layout.comm import Group, Solo
from . import manifest as manifests
from .directory import STEP_DIRECTORY, give_up, prepare, publish, set_aside, step_directories, tidy
from .errors import DamagedCheckpoint, SaveFailed
from .hyperslab import read_state, slab_hash, verify_written, write_state
from .structure import check_structure_apart


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest and file structure were checked; the data is checked as it is loaded."""
    directory: Path
    manifest: dict
    group: Group | Solo

    @property
    def step(self):
        return self.manifest["step"]

    @property
    def tensors(self):
        """Name -> {"shape": list, "dtype": str, "hash": str}."""
        return self.manifest["tensors"]

    def files(self, name):
        """The bytes of a file beside the manifest, such as "tokenizer.json". Collective."""
        data = b""
        with agreed(self.group, DamagedCheckpoint, f"{self.directory / name}: reading"):
            if self.group.rank == 0:
                data = manifests.read_file(self.directory, self.manifest, name)
        length = self.group.share(len(data))
        array = np.frombuffer(data, np.uint8).copy() if self.group.rank == 0 else np.empty(length, np.uint8)
        return self.group.broadcast(array).tobytes()

    def load(self, entries, group, backend):
        """Fills the arrays of `entries`, which may be any of the tensors, and proves them by their hashes. Collective.

        Over all ranks the slabs of a tensor must cover each element equally often: once when they are `owned`,
        k times when k replicas read the same `held` slabs. Arrays of another float type get converted values.

        Raises
        ------
        UserError
            A tensor is not in the checkpoint or has another shape.
        DamagedCheckpoint
            A tensor's data is not what was saved; the arrays are then worthless.
        """
        for entry in entries:
            stored = self.tensors.get(entry.name)
            if stored is None:
                raise UserError(f"{self.directory}: has no tensor {entry.name!r} among its {len(self.tensors)}; is it of another model?")
            if stored["shape"] != list(entry.shape):
                raise UserError(f"{self.directory}: {entry.name!r} has shape {stored['shape']}, the job needs {list(entry.shape)}; set [model] to that checkpoint's sizes")
        hashes = read_state(self.directory / manifests.STATE, entries, group, backend)
        hashes, copies = _sum_over_ranks(hashes, entries, group)
        for entry, found, count in zip(entries, hashes, copies):
            expected = int(self.tensors[entry.name]["hash"], 16) * count % 2**64
            if found != expected:
                raise DamagedCheckpoint(f"{self.directory}: {entry.name!r} is damaged: its data is not what was saved (hash differs); use an older checkpoint")


def _sum_over_ranks(hashes, entries, group):
    """Whole-tensor hashes and how often the ranks' slabs cover each tensor, by one reduction of uint64."""
    sizes = np.array([entry.slab.size for entry in entries], np.uint64)
    sums = group.all_reduce(np.concatenate([hashes, sizes]))  # MPI's sum of uint64 wraps as the hash does
    copies = []
    for entry, covered in zip(entries, sums[len(entries):].tolist()):
        copy, rest = divmod(covered, int(np.prod(entry.shape, dtype=object)))
        if rest or not copy:
            raise ValueError(f"{entry.name}: the ranks' slabs hold {covered} elements in all, no multiple of shape {tuple(entry.shape)}")
        copies.append(copy)
    return sums[:len(entries)].tolist(), copies


# ---- saving -------------------------------------------------------------------------------------------------------

def save(checkpoints_dir, step, entries, manifest, files, group, backend, keep=2, form=None):
    """Writes `step-XXXXXXXX`, proves it, publishes it, then removes all but the newest `keep` valid ones. Collective.

    Parameters
    ----------
    checkpoints_dir : path-like
        Made if missing; only one run writes here (run/directory.py holds the lock).
    step : int
    entries : list of Entry
        The same tensors in the same order on all ranks; the slabs cover every element exactly once.
    manifest : dict
        What else to record (job, mesh, data, tokenizer hash, kind); the store adds step, tensors, files and hash.
    files : dict
        Plain name -> bytes, such as {"tokenizer.json": ...}. Rank 0's are written.
    backend : object
        Its `tensor_hash` is used, on host arrays.
    keep : int
        At least 2 are kept.
    form : "parallel", "offsets" or None
        See `write_state`.

    Returns
    -------
    Path of the new checkpoint directory.

    Raises
    ------
    SaveFailed
        On all ranks alike, with one line; earlier checkpoints are intact and nothing is left behind.
    """
    directory = Path(checkpoints_dir)
    final = directory / f"step-{step:08d}"
    _same_everywhere(entries, group)
    temporary = Path(on_root(group, SaveFailed, f"{final}: preparing",
                             lambda: prepare(directory, final.name, entries, manifest, files)))
    try:
        tensors = _describe(entries, group, backend)
        group.journal.phase("write")
        write_state(temporary / manifests.STATE, entries, group, form)
        group.journal.phase("verify")
        verify_written(temporary / manifests.STATE, entries, group)
        group.journal.phase("publish")
        on_root(group, SaveFailed, f"{final}: publishing",
                lambda: publish(temporary, final, manifests.encode(manifest, step, tensors, files), files))
    except SaveFailed as error:
        space = on_root(group, SaveFailed, f"{final}: giving up", lambda: give_up(temporary, entries, files))
        raise SaveFailed(f"{error}; {space}") from error
    except Exception:
        if group.rank == 0:
            give_up(temporary, entries, files)
        raise
    on_root(group, SaveFailed, f"{directory}: removing old checkpoints", lambda: tidy(directory, final.name, keep))
    return final


def _same_everywhere(entries, group):
    """Refuses lists of tensors that differ between ranks: the collectives to come would not match."""
    text = "\n".join(f"{entry.name} {tuple(entry.shape)} {entry.array.dtype}" for entry in entries)
    word = int.from_bytes(manifests.digest(text.encode())[:7], "little")
    low_high = group.all_reduce(np.array([word, -word], np.int64), "min")
    if low_high[0] != -low_high[1]:
        raise ValueError("the ranks list different tensors to save; names, shapes, types and order must be the same")


def _describe(entries, group, backend):
    """The manifest's line for each tensor; also proves that the slabs cover each tensor once."""
    with agreed(group, SaveFailed, "hashing the tensors"):
        hashes = np.array([slab_hash(backend, entry.shape, entry.slab, entry.array) for entry in entries], np.uint64)
    hashes, copies = _sum_over_ranks(hashes, entries, group)
    for entry, count in zip(entries, copies):
        if count != 1:
            raise ValueError(f"{entry.name}: the ranks' slabs cover it {count} times; save from `owned` slabs")
    return {entry.name: {"shape": list(entry.shape), "dtype": entry.array.dtype.name, "hash": f"{value:016x}"}
            for entry, value in zip(entries, hashes)}


# ---- reading ------------------------------------------------------------------------------------------------------

def check_directory(directory):
    """The manifest of a checkpoint directory, after checking it and the structure of the whole state file. One rank."""
    manifest = manifests.read(directory)
    check_structure_apart(Path(directory) / manifests.STATE,
                          {name: (tensor["shape"], tensor["dtype"]) for name, tensor in manifest["tensors"].items()})
    return manifest


def open_checkpoint(path, group):
    """The checkpoint in the directory `path`, whatever its name; `UserError` or `DamagedCheckpoint` if it is none. Collective."""
    manifest = on_root(group, DamagedCheckpoint, f"{path}: opening", lambda: check_directory(path))
    return Checkpoint(Path(path), manifest, group)


def newest_valid(checkpoints_dir, group, report=lambda line: None):
    """The newest checkpoint whose manifest and structure are whole; None where there is no checkpoint at all. Collective.

    The data itself is checked on loading (`load_newest`). `report` is called on rank 0 with a line for each one
    passed over. Raises `DamagedCheckpoint` if there are checkpoints but none is valid: a job must not start anew
    over the remains of an old one without being told.
    """
    names = on_root(group, UserError, f"{checkpoints_dir}: listing",
                    lambda: [path.name for path in step_directories(checkpoints_dir)])
    return _first([Path(checkpoints_dir) / name for name in names], group, report, lambda checkpoint: checkpoint)


def load_newest(checkpoints_dir, make_entries, group, backend, report=lambda line: None):
    """The newest checkpoint that loads and proves whole, loaded; None where there is none. Collective.

    Newer ones that did not are renamed: they count no longer, neither for the next resume nor among those kept.

    Parameters
    ----------
    make_entries : callable
        checkpoint -> list of Entry to fill; called anew for each checkpoint that is tried.
    report : callable
        As in `newest_valid`, which also tells what is raised.
    """
    names = on_root(group, UserError, f"{checkpoints_dir}: listing",
                    lambda: [path.name for path in step_directories(checkpoints_dir)])
    paths = [Path(checkpoints_dir) / name for name in names]
    found = _first(paths, group, report, _loader(make_entries, group, backend))
    if found:
        passed_over = paths[:paths.index(found.directory)]
        for line in on_root(group, UserError, f"{checkpoints_dir}: setting damaged checkpoints aside", lambda: set_aside(passed_over)):
            if group.rank == 0:
                report(line)
    return found


def load_named(path, make_entries, group, backend, report=lambda line: None):
    """As `load_newest`, of what `path` of a command line means: a step directory, or the newest of a run that proves whole.

    Raises `UserError` where `path` means no checkpoint.
    """
    paths = on_root(group, UserError, f"{path}: looking for a checkpoint", lambda: [str(found) for found in _named(Path(path))])
    load = _loader(make_entries, group, backend)
    if len(paths) == 1:
        return load(open_checkpoint(paths[0], group))
    return _first([Path(found) for found in paths], group, report, load)


def _loader(make_entries, group, backend):
    def load(checkpoint):
        checkpoint.load(make_entries(checkpoint), group, backend)
        return checkpoint
    return load


def _first(directories, group, report, use):
    """The first checkpoint, newest first, that opens and that `use` takes without finding damage."""
    for directory in directories:
        try:
            return use(open_checkpoint(directory, group))
        except DamagedCheckpoint as error:
            if group.rank == 0:
                report(f"checkpoint passed over: {error}")
    if directories:
        raise DamagedCheckpoint(f"{directories[0].parent}: none of its {len(directories)} checkpoints is valid; "
                                "restore one, or move them away to start anew")
    return None


def resolve(path, group):
    """The step directory that `path` of a command line means: itself, or the newest of a run whose structure is whole. Collective.

    Raises `UserError` for anything else, Hugging Face directories included.
    """
    return Path(on_root(group, UserError, f"{path}: looking for a checkpoint", lambda: str(_resolve(Path(path)))))


def _resolve(path):
    directories = _named(path)
    for directory in directories[:-1]:
        try:
            check_directory(directory)
            return directory
        except DamagedCheckpoint:
            continue
    return directories[-1]


def _named(path):
    """The step directories that `path` means, newest first; at least one."""
    wanted = "give a run directory, its checkpoints directory, or a step directory"
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path}: {found}; {wanted}")
    if (path / manifests.NAME).exists():
        return [path]
    if STEP_DIRECTORY.fullmatch(path.name):
        raise UserError(f"{path}: has no {manifests.NAME}, so it is not a complete checkpoint; {wanted}")
    for directory in (path / "checkpoints", path):
        found = step_directories(directory)
        if found:
            return found
    if (path / "config.json").exists() or any(path.glob("*.safetensors")):
        raise UserError(f"{path}: is a Hugging Face directory; those are not read yet: {wanted}")
    raise UserError(f"{path}: holds no checkpoint; {wanted}")
