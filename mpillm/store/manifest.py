"""`manifest.json`: what a checkpoint holds, with the hash of every tensor and, last, its own SHA-256.

Manifests are hostile until checked: sizes are bounded, tensor names are HDF5 names of four known groups, file names
are plain. The layout of the directory around it is in checkpoint.py.
"""

import hashlib
import json
import math
import os
import re

from ..config import UserError
from .errors import DamagedCheckpoint, unreadable
from .structure import regular_size

FORMAT = 1
NAME = "manifest.json"
STATE = "state.h5"
SIZE_LIMIT = 64 << 20       # bytes of a manifest
FILE_LIMIT = 256 << 20      # bytes of a file beside it, such as tokenizer.json
ELEMENT_LIMIT = 1 << 48     # elements of a tensor

WORD = r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}"
TENSOR_NAME = re.compile(rf"(masters|moment1|moment2|communication/{WORD})/{WORD}")
FILE_NAME = re.compile(WORD)
OWN_KEYS = ("format", "step", "tensors", "files", "sha256")


def digest(data):
    """SHA-256 of bytes, as bytes."""
    return hashlib.sha256(data).digest()


def canonical(manifest):
    """The bytes that are hashed: sorted keys, no spaces, ASCII."""
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def check_given(given, files):
    """What a caller wants in a manifest: JSON-able, no key of ours, plain file names."""
    taken = [key for key in OWN_KEYS if key in given]
    bad = [name for name in files if not FILE_NAME.fullmatch(name) or name in (NAME, STATE)]
    if taken or bad:
        raise ValueError(f"manifest keys {taken} belong to the store; file names {bad} are not plain names")
    canonical(given)


def encode(given, step, tensors, files):
    """The bytes of a manifest: `given` (kind, job, mesh, data, tokenizer, ...), the tensors and files, the hash.

    Parameters
    ----------
    given : dict
        JSON-able; `kind` is "state" when left out.
    tensors : dict
        Name -> {"shape", "dtype", "hash"}.
    files : dict
        Name -> bytes of the files beside it.
    """
    manifest = {"format": FORMAT, "kind": "state", **given, "step": step, "tensors": tensors, "files": {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}}
    manifest = json.loads(json.dumps(manifest, allow_nan=False))  # as a reader will see it: keys are strings
    manifest["sha256"] = hashlib.sha256(canonical(manifest)).hexdigest()
    return json.dumps(manifest, indent=1, allow_nan=False).encode()


def read_bounded(path, limit):
    """The bytes of a regular file of at most `limit` bytes; links are not followed."""
    if regular_size(path) > limit:
        raise DamagedCheckpoint(f"{path}: larger than {limit} bytes")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise DamagedCheckpoint(f"{path}: larger than {limit} bytes")
    return data


def read(directory):
    """The manifest of a checkpoint directory, checked.

    Raises
    ------
    DamagedCheckpoint
        Not there, altered, or with contents that no checkpoint has.
    UserError
        Written by a newer format.
    """
    path = os.path.join(directory, NAME)
    try:
        manifest = json.loads(read_bounded(path, SIZE_LIMIT))
        stated = manifest.pop("sha256")
        found = hashlib.sha256(canonical(manifest)).hexdigest()
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{directory}: has no {NAME}, so it is not a complete checkpoint") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise unreadable(path, "not a readable manifest", error) from error
    if stated != found:
        raise DamagedCheckpoint(f"{path}: was altered: its SHA-256 is {found[:12]}..., it states {str(stated)[:12]}...")
    if isinstance(manifest.get("format"), int) and manifest["format"] > FORMAT:
        raise UserError(f"{path}: format {manifest['format']}; this mpillm reads up to {FORMAT}: use a newer one")
    _check(manifest, path)
    return {**manifest, "sha256": stated}


def _check(manifest, path):
    """The parts of a manifest that the store itself relies on."""
    tensors, files, step = manifest.get("tensors"), manifest.get("files"), manifest.get("step")
    if manifest.get("format") != FORMAT or not _count(step, 10**15) or not isinstance(tensors, dict) or not isinstance(files, dict):
        raise DamagedCheckpoint(f"{path}: lacks a valid format, step, tensors or files")
    for name, tensor in tensors.items():
        if not TENSOR_NAME.fullmatch(name) or not _is_tensor(tensor):
            raise DamagedCheckpoint(f"{path}: {name[:80]!r} is not a tensor with shape, dtype and hash")
    for name, entry in files.items():
        if not FILE_NAME.fullmatch(name) or not isinstance(entry, dict) or not _count(entry.get("bytes"), FILE_LIMIT):
            raise DamagedCheckpoint(f"{path}: {name[:80]!r} is not a file with a plain name and a size up to {FILE_LIMIT}")


def _count(value, limit):
    return type(value) is int and 0 <= value <= limit


def _is_tensor(tensor):
    """Whether a manifest entry has a sane shape, type and hash."""
    shape = tensor.get("shape") if isinstance(tensor, dict) else None
    return (isinstance(shape, list) and 1 <= len(shape) <= 8 and all(_count(n, ELEMENT_LIMIT) and n for n in shape)
            and math.prod(shape) <= ELEMENT_LIMIT and tensor.get("dtype") in ("float32", "float64")
            and isinstance(tensor.get("hash"), str) and re.fullmatch(r"[0-9a-f]{16}", tensor["hash"]) is not None)


def read_file(directory, manifest, name):
    """The bytes of a file beside the manifest, as long and with the hash that it states."""
    if name not in manifest["files"]:
        raise UserError(f"{directory}: holds no file {name!r}; it has {sorted(manifest['files'])}")
    entry, path = manifest["files"][name], os.path.join(directory, name)
    try:
        data = read_bounded(path, entry["bytes"])
    except OSError as error:
        raise unreadable(path, "cannot be read", error) from error
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise DamagedCheckpoint(f"{path}: is not the file that the manifest describes (SHA-256 differs)")
    return data
