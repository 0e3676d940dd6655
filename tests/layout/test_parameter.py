"""Parameters: what is held and owned on any mesh, initial values, buckets under ZeRO 0, 1 and 2."""

import itertools
import math

import numpy as np
import pytest

from mpillm.backend import open_backend
from mpillm.layout.mesh import Mesh
from mpillm.layout.parameter import Bucket, Constant, Normal, Parameter, Stack, key_of
from mpillm.layout.slab import Slab

OPS = open_backend("cpu")
MESHES = [{"dp": dp, "cp": cp, "tp": tp} for dp, cp, tp in itertools.product((1, 2, 3), (1, 2), (1, 2, 3, 4))]
TENSORS = [     # shape, axes, unit
    ((20, 7), ("tp", None), 4), ((20, 7), (None, "tp"), 1), ((31, 5), ("tp", None), 1), ((31, 5), None, 1),
    ((7,), None, 1), ((20,), ("tp",), 4), ((1,), None, 1), ((2, 3), ("tp", None), 1), ((1, 2), (None, "tp"), 1),
]


def ranks_of(sizes):
    return math.prod(sizes.values())


def plans(sizes):
    return [Mesh.plan(sizes, rank) for rank in range(ranks_of(sizes))]


@pytest.mark.parametrize("shape, axes, unit", TENSORS, ids=str)
def test_owned_slabs_cover_each_element_once(shape, axes, unit):
    for sizes in MESHES:
        count = np.zeros(shape, int)
        parameter = Parameter("p", shape, Constant(0.0), axes, unit)
        for mesh in plans(sizes):
            held = parameter.held_by(mesh)
            owned = parameter.owned_by(mesh, mesh.position(*parameter.replica_axes()))
            count[owned.slices()] += 1
            np.zeros(held.shape)[owned.within(held)] += 1           # lies within held
            assert all(index.start >= 0 and index.stop <= extent for index, extent in zip(owned.within(held), held.shape))
            for dim, axis in enumerate(parameter.axes):
                if axis is None:
                    assert held.shape[dim] == shape[dim]
            if axes and axes[0]:
                assert held.shape[0] % unit == 0
        assert (count == 1).all(), sizes


def test_every_stage_of_a_pipeline_cuts_alike():
    parameter = Parameter("p", (20, 7), Constant(0.0), ("tp", None), 4)
    sizes = {"pp": 2, "dp": 2, "cp": 1, "tp": 2}
    first, second = plans(sizes)[:4], plans(sizes)[4:]
    assert [parameter.held_by(mesh) for mesh in first] == [parameter.held_by(mesh) for mesh in second]
    assert all(mesh.position(*parameter.replica_axes()) < 2 for mesh in first + second)


def test_matrices_decay_and_vectors_do_not():
    assert Parameter("p", (2, 3), Constant(0.0)).decay and not Parameter("p", (3,), Constant(0.0)).decay
    assert not Parameter("p", (2, 3), Constant(0.0), decay=False).decay


def place(parameters, sizes=None, rank=0, zero=0, dtype=np.float64):
    bucket = Bucket("bucket", parameters)
    bucket.place(Mesh.plan(sizes or {}, rank), zero, OPS, dtype)
    return bucket


# -- initial values -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape, axes, unit", TENSORS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_initial_values_of_a_slab_are_that_slice_of_the_whole(shape, axes, unit, dtype):
    whole = Parameter("blocks.0.x.weight", shape, Normal(0.02), axes, unit)
    place([whole], dtype=dtype)
    whole.initialize(OPS, seed=3)
    assert np.abs(whole.value).max() > 0
    for sizes in ({"tp": 2}, {"tp": 3, "dp": 2}, {"tp": 8}):
        for rank in range(ranks_of(sizes)):
            part = Parameter("blocks.0.x.weight", shape, Normal(0.02), axes, unit)
            place([part], sizes, rank, dtype=dtype)
            part.initialize(OPS, seed=3)
            np.testing.assert_array_equal(part.value, whole.value[part.held.slices()])


def test_initial_values_depend_on_seed_and_name_and_have_their_spread():
    def values(name, seed):
        parameter = Parameter(name, (100, 100), Normal(0.02))
        place([parameter])
        parameter.initialize(OPS, seed)
        return parameter.value
    first = values("a", 1)
    np.testing.assert_array_equal(first, values("a", 1))
    assert abs(first.mean()) < 5 * 0.02 / 100 and abs(first.std() / 0.02 - 1) < 5 / math.sqrt(2e4)
    for other in (values("b", 1), values("a", 2)):
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.05
    assert key_of(1, "a") == key_of(1, "a") < 2**64 and key_of(1, "a") != key_of(1, "b") != key_of(2, "b")


def test_constant_initial_values():
    parameter = Parameter("norm.weight", (5,), Constant(1.0))
    place([parameter])
    parameter.initialize(OPS, 1)
    assert (parameter.value == 1.0).all()


# -- buckets ------------------------------------------------------------------------------------------------------

def some(split=False):
    axes = ("tp", None) if split else None
    return [Parameter("a", (20, 3), Normal(1.0), axes, 4), Parameter("b", (7, 2), Normal(1.0), axes),
            Parameter("c", (1, 2), Normal(1.0), axes), Parameter("d", (5,), Constant(0.0), axes and ("tp",))]


@pytest.mark.parametrize("sizes", [{}, {"dp": 2}, {"dp": 3, "cp": 2}, {"dp": 2, "tp": 3}, {"dp": 9}], ids=str)
@pytest.mark.parametrize("split", [False, True], ids=["same", "split"])
def test_pack_orders_by_owner_and_unpack_reverses_it(sizes, split):
    for rank in range(ranks_of(sizes)):
        bucket = place(some(split), sizes, rank, zero=1)
        held = np.arange(bucket.values.size, dtype=np.float64)
        packed = bucket.pack(held)
        assert sorted(packed) == list(held) and sum(bucket.counts) == held.size
        start = sum(bucket.counts[:bucket.group.rank])
        mine = packed[start:start + bucket.counts[bucket.group.rank]]
        expected = [bucket._part(held, p)[p.owned.within(p.held)].reshape(-1) for p in bucket.parameters]
        np.testing.assert_array_equal(mine, np.concatenate(expected))
        back = np.full_like(held, -1.0)
        bucket.unpack(packed, back)
        np.testing.assert_array_equal(back, held)


def test_values_lie_one_after_the_other_and_a_stack_is_one_matrix():
    query, key, bias = Parameter("q", (4, 3), Normal(1.0)), Parameter("k", (2, 3), Normal(1.0)), Parameter("b", (6,), Constant(0.0))
    bucket = place([query, key, bias])
    bucket.values[:] = np.arange(24)
    stack = Stack(query, key)
    np.testing.assert_array_equal(stack.value, np.concatenate([query.value, key.value]))
    assert np.shares_memory(stack.value, bucket.values) and np.shares_memory(query.value, bucket.values)
    stack.grad[...] = 5.0
    assert (query.grad == 5.0).all() and (key.grad == 5.0).all() and (bias.grad == 0.0).all()
    assert not Stack(query, key).accumulates() and Stack(query, key).accumulates()


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_a_rank_keeps(zero, rank):
    bucket = place(some(), {"dp": 3}, rank, zero)
    for parameter in bucket.parameters:
        assert parameter.held == Slab.whole(parameter.shape)
        assert parameter.owned == parameter.held.cut(0, 3, rank)
        assert parameter.updated == (parameter.held if zero == 0 else parameter.owned)
        for array in (parameter.master, parameter.moment1, parameter.moment2):
            assert array.shape == parameter.updated.shape
        assert not parameter.moment1.any() and not parameter.moment2.any()
        assert parameter.owned_grad.shape == parameter.updated.shape
        parameter.value[...] = 3.0
        assert (parameter.master == 3.0).all()
    if zero == 0:
        assert bucket.owned_grads is None
        assert all(np.shares_memory(p.owned_grad, bucket.grads) for p in bucket.parameters)
    else:
        assert bucket.owned_grads.size == bucket.counts[rank] == sum(p.owned.size for p in bucket.parameters)
        bucket.owned_grads[:] = np.arange(bucket.counts[rank])
        joined = np.concatenate([p.owned_grad.reshape(-1) for p in bucket.parameters])
        np.testing.assert_array_equal(joined, bucket.owned_grads)


def test_zero_on_one_replica_is_zero_0():
    bucket = place(some(True), {"tp": 2}, 1, zero=2)
    assert bucket.zero == 0 and bucket.owned_grads is None
    assert all(p.updated == p.held for p in bucket.parameters)


def test_freed_gradients_are_made_again_unwritten_when_asked_for():
    matrix, vector = Parameter("m", (3, 2), Normal(1.0)), Parameter("v", (2,), Constant(0.0))
    bucket = place([matrix, vector], {"dp": 2}, 0, zero=2)
    assert bucket._grads is None                # none before the first backward
    assert not matrix.accumulates()
    matrix.grad[...], vector.grad[...] = 1.0, 1.0
    assert matrix.accumulates()
    bucket.free_grads()
    assert bucket._grads is None
    assert (vector.grad == 0.0).all()           # vectors are always added to
    assert matrix.fresh and not matrix.accumulates()


def test_clear_makes_the_next_gradient_be_written():
    matrix, vector = Parameter("m", (3, 2), Normal(1.0)), Parameter("v", (2,), Constant(0.0))
    bucket = place([matrix, vector])
    bucket.grads[:] = 4.0
    matrix.accumulates()
    bucket.clear()
    assert matrix.fresh and (matrix.grad == 4.0).all() and (vector.grad == 0.0).all()


def test_parameters_of_a_bucket_are_replicated_alike():
    with pytest.raises(ValueError, match="b: parameters of bucket bucket are replicated over different axes"):
        place([Parameter("a", (4, 2), Normal(1.0), ("tp", None)), Parameter("b", (4, 2), Normal(1.0))], {"tp": 2})
