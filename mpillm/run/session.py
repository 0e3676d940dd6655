"""From a job to a model that stands on its ranks; from its parameters to a checkpoint's tensors, and back."""

import os
import sys
from typing import NamedTuple

import numpy as np

from ..backend import open_backend
from ..config import UserError, job_from_dict, job_to_dict, read_job
from ..layout.compose import check_layout
from ..layout.mesh import Mesh, sizes_of
from ..layout.slab import Slab
from ..model.shape import Layout, Shape
from ..model.transformer import Transformer
from ..layout.agreement import on_root
from ..store.checkpoint import load_named
from ..store.hyperslab import Entry

TYPES = {"float32": np.float32, "float64": np.float64}


class Session(NamedTuple):
    """A placed model."""
    job: object
    ops: object         # backend
    mesh: Mesh
    model: Transformer


def shared_job(path, overrides, group):
    """The job of a file, read and checked by rank 0 alone, on every rank."""
    values = on_root(group, UserError, f"{path}: reading", lambda: job_to_dict(read_job(path, overrides)))
    return job_from_dict(values, str(path))


def open_device(name):
    """The backend of a device, with the threads of this rank (OMP_NUM_THREADS, which `launch` set where the user did not)."""
    ops = open_backend(name)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    ops.set_threads(int(threads) if threads.isdigit() and int(threads) else 1)
    return ops


def check_vocabulary(job, vocabulary):
    """Refuses a model whose table is smaller than the tokenizer."""
    if job.model.vocabulary is not None and job.model.vocabulary < vocabulary:
        raise UserError(f"model.vocabulary={job.model.vocabulary} is less than the {vocabulary} tokens of the tokenizer of the "
                        "token file; raise it to at least that, or leave it out")


def build(job, mesh, vocabulary, ops=None, recompute=None):
    """A Session with values not yet initialised.

    Parameters
    ----------
    job : Job
    mesh : Mesh
    vocabulary : int
        The tokenizer's; the model's where the job gives none.
    ops : backend or None
        The job's device when None.
    """
    check_vocabulary(job, vocabulary)
    ops = ops or open_device(job.run.device)
    layout = Layout(job.mesh.sequence, job.mesh.cp_form, job.mesh.chunks, tuple(job.mesh.stages or ()))
    model = Transformer(ops, Shape.of(job.model, vocabulary), TYPES[job.precision.compute], job.train.seed,
                        job.train.recompute if recompute is None else recompute, mesh, layout)
    model.place(job.mesh.zero)
    return Session(job, ops, mesh, model)


def entries(model, moments):
    """The model's tensors as this rank owns them, for the checkpoint: masters, and moments if asked."""
    tables = ["masters"] + (["moment1", "moment2"] if moments else [])
    found, nothing = [], np.empty(0, model.dtype)
    for table in tables:
        for parameter in model.every_parameter():
            if parameter.bucket is None:        # of another stage
                slab = Slab((0,) * len(parameter.shape), (0,) * len(parameter.shape))
                found.append(Entry(f"{table}/{parameter.name}", parameter.shape, slab, nothing.reshape(slab.shape)))
                continue
            array = parameter.master if table == "masters" else getattr(parameter, table)
            own = parameter.owned.within(parameter.updated)
            found.append(Entry(f"{table}/{parameter.name}", parameter.shape, parameter.owned, array[own]))
    return found


def gather_loaded(model, moments):
    """After the owned parts were read: makes whole what this rank holds."""
    for bucket in model.buckets:
        if bucket.zero < 3:
            bucket.gather(bucket.values)
        if moments and bucket.zero == 0:
            for moment in bucket.moments:
                bucket.gather(moment)


def check_manifest(checkpoint):
    """Refuses a checkpoint whose manifest lacks what a run records."""
    kinds = {"job": dict, "tokenizer": (str, type(None)), "samples": int, "tokens": int, "cursor": dict, "changes": list}
    for key, kind in kinds.items():
        if key not in checkpoint.manifest or not isinstance(checkpoint.manifest[key], kind):
            raise UserError(f"{checkpoint.directory}: its manifest has no {key!r}; expected a checkpoint that `mpillm train` wrote")


def open_model(path, group, precision=None, mesh=None):
    """The model of a CHECKPOINT on a command line, data-parallel over all ranks unless `mesh` says otherwise.

    Parameters
    ----------
    path : str
        A run, a checkpoints directory or a step directory.
    precision : str or None
        "float32" or "float64"; as it was trained when None.
    mesh : dict or None
        Keys of a [mesh] section.

    Returns
    -------
    Session, Checkpoint, bytes of tokenizer.json
    """
    ops, opened = open_device("cpu"), {}

    def make_entries(checkpoint):
        check_manifest(checkpoint)
        values = checkpoint.manifest["job"] | {"mesh": {"zero": 0} | (mesh or {})}
        if precision:
            values["precision"] = {"compute": precision}
        job = job_from_dict(values, f"{checkpoint.directory}: the job in the manifest")
        sizes = sizes_of(job.mesh, group.size)
        check_layout(job, sizes)
        opened["session"] = build(job, Mesh(group, sizes), job.model.vocabulary, ops, recompute="none")
        return entries(opened["session"].model, moments=False)
    checkpoint = load_named(path, make_entries, group, ops, lambda line: print(line, file=sys.stderr))
    gather_loaded(opened["session"].model, moments=False)
    return opened["session"], checkpoint, checkpoint.files("tokenizer.json")
