"""From a job to a model that stands on its ranks; from its parameters to a checkpoint's tensors, and back."""

import collections
import os
import socket
import sys
from typing import NamedTuple

import numpy as np
from ml_dtypes import bfloat16

from ..backend import open_backend, wide_of
from ..config import UserError, job_from_dict, job_to_dict, read_job
from ..layout.comm import Solo
from ..layout.compose import check_layout
from ..layout.mesh import Mesh, sizes_of
from ..layout.slab import Slab
from ..model.shape import Layout, Shape
from ..model.transformer import Transformer
from ..layout.agreement import on_root
from ..layout.node import gather_on_node
from ..store.checkpoint import load_named
from .connect import connect
from ..store.hyperslab import Entry
from ..train.scaling import LossScale

TYPES = {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64), "float16": np.dtype(np.float16), "bfloat16": np.dtype(bfloat16)}


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


def _addresses(name):
    """(of the GPUs that this rank sees, what is wrong)"""
    if name == "cpu":
        return [], None
    try:
        from ..backend.cuda.device import addresses
        found = addresses()
    except UserError as error:
        return [], None if name == "auto" else str(error)
    problem = (f'device = "gpu": no GPU is seen on {socket.gethostname()}; check the driver and CUDA_VISIBLE_DEVICES, or use device "cpu"'
               if name == "gpu" and not found else None)
    return found, problem


def dealt(seen, rank, sharing):
    """Which of its GPUs a rank takes, or None where all are taken; with `sharing` the one that fewest have taken.

    Parameters
    ----------
    seen : list of lists
        Addresses of the GPUs that each rank of the node sees: all of them, or those that a launcher bound it to.
    """
    taken = collections.Counter()
    for place, own in enumerate(seen):
        chosen = min(own, key=taken.__getitem__, default=None)
        if chosen is not None and taken[chosen] and not sharing:
            chosen = None
        if place == rank:
            return None if chosen is None else own.index(chosen)
        taken[chosen] += 1


def open_device(name, compute="float32", group=Solo()):
    """The backend of this rank, with its threads (OMP_NUM_THREADS, which `launch` set where the user did not).

    Parameters
    ----------
    name : str
        "cpu", "gpu", or "auto": a GPU for each rank while there are some, then CPUs.
    compute : str
        Type of the job.
    group : Group
        All ranks: those of a node share out its GPUs.

    Raises
    ------
    UserError
        on all ranks alike, where one cannot have its device.
    """
    found, problem = _addresses(name)
    index = dealt(*gather_on_node(group, found), sharing=name == "gpu")
    ops = where = None
    if not problem:
        try:
            ops = open_backend("cpu" if index is None else "gpu", index or 0, TYPES[compute])
            where = None if index is None else (socket.gethostname(), ops.device.address)
        except UserError as error:
            problem = str(error)
    everybody = group.collect((problem, where))
    problem = next((text for text, _ in everybody if text), None)
    if problem:
        raise UserError(problem)
    places = collections.Counter(place and tuple(place) for _, place in everybody)     # JSON knows no tuples
    on_cpu = places.pop(None, 0)
    if places and max(places.values()) > 1:
        ops.note = f"{max(places.values())} ranks share one GPU: they take turns, and each has its own copy of the weights"
    elif places and on_cpu:
        ops.note = f"{on_cpu} of {group.size} ranks compute on CPUs: there are {len(places)} GPUs for them"
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
    ops = ops or open_device(job.run.device, job.precision.compute)
    layout = Layout(job.mesh.sequence, job.mesh.cp_form, job.mesh.chunks, tuple(job.mesh.stages or ()))
    model = Transformer(ops, Shape.of(job.model, vocabulary), TYPES[job.precision.compute], job.train.seed,
                        job.train.recompute if recompute is None else recompute, mesh, layout)
    model.place(job.mesh.zero, job.train.offload == "optimizer")
    return Session(job, ops, mesh, model)


def entries(model, moments):
    """The model's tensors as this rank owns them, for the checkpoint: masters, and moments if asked."""
    tables = ["masters"] + (["moment1", "moment2"] if moments else [])
    found, nothing = [], np.empty(0, wide_of(model.dtype))
    for table in tables:
        for parameter in model.every_parameter():
            if parameter.bucket is None:        # of another stage
                slab = Slab((0,) * len(parameter.shape), (0,) * len(parameter.shape))
                found.append(Entry(f"{table}/{parameter.name}", parameter.shape, slab, nothing.reshape(slab.shape)))
                continue
            found.append(Entry(f"{table}/{parameter.name}", parameter.shape, parameter.owned, parameter.bucket.state.to_host(_owned(parameter, table))))
    return found


def _owned(parameter, table):
    """A view of what this rank owns of a master or moment."""
    array = parameter.master if table == "masters" else getattr(parameter, table)
    return array[parameter.owned.within(parameter.updated)]


def gather_loaded(model, loaded, moments):
    """After the owned parts were read into the entries `loaded`: makes whole what this rank holds."""
    parameters = {parameter.name: parameter for parameter in model.parameters()}
    for entry in loaded:
        table, name = entry.name.split("/", 1)
        if name in parameters and entry.array.size:
            parameters[name].bucket.state.put(_owned(parameters[name], table), entry.array)
    for bucket in model.buckets:
        bucket.refresh()
        if moments and bucket.zero == 0:
            for moment in bucket.moments:
                bucket.gather(moment)


def check_manifest(checkpoint):
    """Refuses a checkpoint whose manifest lacks what a run records."""
    kinds = {"job": dict, "tokenizer": (str, type(None)), "samples": int, "tokens": int, "cursor": dict, "changes": list}
    for key, kind in kinds.items():
        if key not in checkpoint.manifest or not isinstance(checkpoint.manifest[key], kind):
            raise UserError(f"{checkpoint.directory}: its manifest has no {key!r}; expected a checkpoint that `mpillm train` wrote")
    scale = checkpoint.manifest.get("loss_scale")
    if scale is not None and not LossScale.could_be(scale):
        raise UserError(f"{checkpoint.directory}: its manifest has loss_scale {str(scale)[:40]}; expected a power of two and a number of steps")


def open_model(path, group, precision=None, mesh=None, device="cpu"):
    """The model of a CHECKPOINT on a command line, data-parallel over all ranks unless `mesh` says otherwise.

    Parameters
    ----------
    path : str
        A run, a checkpoints directory or a step directory.
    precision : str or None
        A type; as it was trained when None.
    device : str
        As `run.device`.
    mesh : dict or None
        Keys of a [mesh] section.

    Returns
    -------
    Session, Checkpoint, bytes of tokenizer.json
    """
    opened = {}

    def make_entries(checkpoint):
        check_manifest(checkpoint)
        values = checkpoint.manifest["job"] | {"mesh": {"zero": 0} | (mesh or {})}
        values["run"] = values.get("run", {}) | {"device": device}
        if precision:
            values["precision"] = {"compute": precision}
        job = job_from_dict(values, f"{checkpoint.directory}: the job in the manifest")
        sizes = sizes_of(job.mesh, group.size)
        check_layout(job, sizes)
        ops = open_device(job.run.device, job.precision.compute, group)
        ranks, _ = connect(group, ops, "auto")
        opened["session"] = build(job, Mesh(ranks, sizes), job.model.vocabulary, ops, recompute="none")
        opened["entries"] = entries(opened["session"].model, moments=False)
        return opened["entries"]
    checkpoint = load_named(path, make_entries, group, open_backend("cpu"), lambda line: print(line, file=sys.stderr))
    gather_loaded(opened["session"].model, opened["entries"], moments=False)
    return opened["session"], checkpoint, checkpoint.files("tokenizer.json")
