"""The directory that holds the checkpoints, seen by rank 0: room made, a new one published, old ones removed.

Nothing here communicates; checkpoint.py calls it on rank 0 and shares the outcome.
"""

import os
import re
import shutil
import socket
import time
import uuid
from pathlib import Path

import numpy as np

from ..config import UserError
from ..layout.hdf5 import sync
from . import manifest as manifests
from .errors import SaveFailed

STEP_DIRECTORY = re.compile(r"step-(\d{8,15})(\.old-\w+)?")   # .old: set aside while a new one of its step takes its place
TEMPORARY = re.compile(r"step-\d{8,15}\.tmp-(?P<host>.+)-(?P<process>\d+)-[0-9a-f]{8}")
HINT = "latest.tmp-"
ABANDONED = 3600          # seconds after which an unfinished save of another host counts as dead
LEAST_KEPT = 2            # the newest may turn out damaged
OVERHEAD = 1 << 20        # bytes of a state file beside the tensors
OVERHEAD_OF_TENSOR = 8192  # bytes: its header, its alignment, its lines in the manifest


def step_directories(directory):
    """The checkpoint directories in `directory`, newest step first, damaged ones included."""
    try:
        found = [path for path in Path(directory).iterdir() if STEP_DIRECTORY.fullmatch(path.name) and path.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(found, key=lambda path: (-int(STEP_DIRECTORY.fullmatch(path.name)[1]), path.name))


def prepare(directory, name, entries, manifest, files):
    """Checks what can be checked early, frees and measures the disk, makes the temporary directory."""
    manifests.check_given(manifest, files)
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.iterdir():
        if _is_dead(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
        elif leftover.name.startswith(HINT):    # of a run that was killed: only one writes here
            leftover.unlink(missing_ok=True)
    needed = bytes_needed(entries, files)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise SaveFailed(f"{directory / name}: needs {needed} bytes, {free} are free on this disk; "
                         "free some, or lower checkpoint.keep")
    temporary = directory / f"{name}.tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    return str(temporary)


def bytes_needed(entries, files):
    """Disk space of a checkpoint, a little more than it will take."""
    tensors = sum(int(np.prod(entry.shape, dtype=object)) * entry.array.itemsize for entry in entries)
    return tensors + OVERHEAD + OVERHEAD_OF_TENSOR * len(entries) + sum(map(len, files.values()))


def _is_dead(path):
    """Whether `path` is an unfinished save whose process is gone."""
    match = TEMPORARY.fullmatch(path.name)
    if not match:
        return False
    try:
        touched = max(entry.stat().st_mtime for entry in (path, *path.iterdir()))
        if match["host"] == socket.gethostname() and int(match["process"]) != os.getpid():
            os.kill(int(match["process"]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return time.time() - touched > ABANDONED


def give_up(temporary, entries, files):
    """Removes an unfinished checkpoint; a line for the message about the space that it met."""
    free = shutil.disk_usage(temporary.parent).free
    shutil.rmtree(temporary, ignore_errors=True)
    return f"it needs {bytes_needed(entries, files)} bytes, {free} were free; earlier checkpoints are intact"


def publish(temporary, final, encoded, files):
    """Files, then the manifest, then the directory, each durable before the next; then the name."""
    for name, data in files.items():
        _write_durable(temporary / name, data)
    _write_durable(temporary / manifests.NAME, encoded)
    sync(temporary)
    aside = None
    if final.exists():  # an earlier save of this step, such as a damaged one that a resume went back behind
        aside = final.with_name(f"{final.name}.old-{uuid.uuid4().hex[:8]}")
        os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except OSError:
        if aside:
            os.rename(aside, final)
        raise
    sync(final.parent)


def _write_durable(path, data):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def tidy(directory, newest, keep):
    """After `newest` is published: the hint, then all but the `keep` newest valid checkpoints. Never fails."""
    try:
        hint = directory / f"{HINT}{uuid.uuid4().hex[:8]}"
        _write_durable(hint, f"{newest}\n".encode())
        os.replace(hint, directory / "latest")
    except OSError:
        hint.unlink(missing_ok=True)  # a hint only
    kept = 1
    for path in step_directories(directory):
        if path.name == newest:
            continue
        stem, old, _ = path.name.partition(".old-")
        if kept >= max(keep, LEAST_KEPT) or old and (directory / stem).exists():
            _remove(path)
        elif _has_manifest(path):
            kept += 1


def set_aside(paths):
    """Renames damaged checkpoints to names that nobody takes for checkpoints; lines that tell where they are."""
    lines = []
    for path in paths:
        aside = path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}")
        try:
            os.rename(path, aside)
            lines.append(f"set aside as {aside.name}; delete it when you have looked at it")
        except OSError as error:
            lines.append(f"{path}: cannot be set aside: {error.strerror}")
    return lines


def _has_manifest(path):
    try:
        return bool(manifests.read(path))
    except UserError:
        return False


def _remove(path):
    """Removes a checkpoint, its manifest first: what is left of an interrupted removal is never taken for one."""
    try:
        (path / manifests.NAME).unlink(missing_ok=True)
    except OSError:
        return
    shutil.rmtree(path, ignore_errors=True)
