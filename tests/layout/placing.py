"""Parameters placed on planned meshes, for the tests of parameters and of buckets."""

import math

import numpy as np

from mpillm.backend import open_backend
from mpillm.layout.mesh import Mesh
from mpillm.layout.parameter import Bucket, Constant, Normal, Parameter

OPS = open_backend("cpu")


def ranks_of(sizes):
    return math.prod(size for axis, size in sizes.items() if axis != "ep")


def plans(sizes):
    return [Mesh.plan(sizes, rank) for rank in range(ranks_of(sizes))]


def place(parameters, sizes=None, rank=0, zero=0, dtype=np.float64):
    bucket = Bucket("bucket", parameters)
    bucket.place(Mesh.plan(sizes or {}, rank), zero, OPS, dtype)
    return bucket


def some(split=False):
    axes = ("tp", None) if split else None
    return [Parameter("a", (20, 3), Normal(1.0), axes, 4), Parameter("b", (7, 2), Normal(1.0), axes),
            Parameter("c", (1, 2), Normal(1.0), axes), Parameter("d", (5,), Constant(0.0), axes and ("tp",))]


def some_experts():
    return [Parameter("e", (5, 7, 3), Normal(1.0), ("ep", "tp", None)), Parameter("f", (5, 3, 7), Normal(1.0), ("ep", None, "tp"))]
