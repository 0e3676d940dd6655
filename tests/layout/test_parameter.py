"""Parameters: what is held and owned on any mesh, which ranks are replicas, initial values."""

import itertools
import math

import numpy as np
import pytest

from mpillm.layout.mesh import Mesh
from mpillm.layout.parameter import Constant, Normal, Parameter, buckets_of, key_of
from placing import OPS, place, plans, ranks_of

MESHES = [{"dp": dp, "cp": cp, "tp": tp} for dp, cp, tp in itertools.product((1, 2, 3), (1, 2), (1, 2, 3, 4))]
TENSORS = [     # shape, axes, unit
    ((20, 7), ("tp", None), 4), ((20, 7), (None, "tp"), 1), ((31, 5), ("tp", None), 1), ((31, 5), None, 1),
    ((7,), None, 1), ((20,), ("tp",), 4), ((1,), None, 1), ((2, 3), ("tp", None), 1), ((1, 2), (None, "tp"), 1),
]
EXPERTS = [     # shape, axes
    ((5, 7, 3), ("ep", "tp", None)), ((5, 3, 7), ("ep", None, "tp")), ((6, 2, 3), ("ep", "tp", None)), ((6, 1, 2), ("ep", None, "tp")),
    ((1, 4, 3), ("ep", "tp", None)),
]


@pytest.mark.parametrize("shape, axes, unit", TENSORS, ids=str)
def test_owned_slabs_cover_each_element_once(shape, axes, unit):
    for sizes in MESHES:
        count = np.zeros(shape, int)
        parameter = Parameter("p", shape, Constant(0.0), axes, unit)
        for mesh in plans(sizes):
            held = parameter.held_by(mesh)
            owned = parameter.owned_by(mesh, mesh.members(parameter.shared).index(mesh.rank))
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
    for mesh in first + second:
        members = mesh.members(parameter.shared)
        assert len(members) == 2 and {mesh.coords_of(rank)["pp"] for rank in members} == {mesh.coord("pp")}


def check_cover(parameter, sizes, stages=(0,)):
    """Over the ranks of these stages: owned slabs cover each element once, and replicas are the ranks with an equal held slab."""
    count, meshes = np.zeros(parameter.shape, int), [mesh for mesh in plans(sizes) if mesh.coord("pp") in stages]
    for mesh in meshes:
        held, members = parameter.held_by(mesh), mesh.members(parameter.shared)
        owned = parameter.owned_by(mesh, members.index(mesh.rank))
        count[owned.slices()] += 1
        assert all(index.start >= 0 and index.stop <= extent for index, extent in zip(owned.within(held), held.shape))
        if held.size:
            assert members == [other.rank for other in meshes if parameter.held_by(other) == held]
    assert (count == 1).all(), sizes


@pytest.mark.parametrize("shape, axes", EXPERTS, ids=str)
def test_owned_slabs_of_experts_cover_each_element_once(shape, axes):
    for sizes, ep in itertools.product(MESHES, (1, 2, 3, 4, 6)):
        if sizes["dp"] * sizes["cp"] % ep == 0 and ep <= shape[0]:
            check_cover(Parameter("p", shape, Constant(0.0), axes), sizes | {"ep": ep})
            check_cover(Parameter("router", (shape[0], shape[2]), Constant(0.0), partial=True), sizes | {"ep": ep})


def test_replicas_share_the_rows_of_every_expert():
    """However few experts a rank has, what is owned is as even as its rows allow."""
    parameter, sizes = Parameter("p", (2, 8, 3), Constant(0.0), ("ep", None, None)), {"dp": 8, "ep": 2}
    assert [parameter.owned_by(mesh, mesh.members(parameter.shared).index(mesh.rank)).shape for mesh in plans(sizes)] == [(1, 2, 3)] * 8


@pytest.mark.parametrize("kv_heads, tp", [(1, 2), (1, 3), (1, 4), (2, 4), (2, 6), (3, 6), (4, 4), (4, 2), (1, 1)])
@pytest.mark.parametrize("width", [None, 5])
def test_key_value_heads_on_more_ranks_than_there_are(kv_heads, tp, width):
    """Each head on tp / kv_heads neighbours, whose owned parts of it cover it once."""
    shape, axes, d = (4 * kv_heads,) + ((width,) if width else ()), ("tp", None)[:1 + bool(width)], 4
    parameter = Parameter("key", shape, Constant(0.0), axes, d, copies=max(1, tp // kv_heads))
    assert parameter.partial == (tp > kv_heads)
    for dp, cp in itertools.product((1, 2, 3), (1, 2)):
        sizes = {"dp": dp, "cp": cp, "tp": tp}
        check_cover(parameter, sizes)
        for mesh in plans(sizes):
            held, first = parameter.held_by(mesh), mesh.coord("tp") * kv_heads // tp
            assert (held.start[0], held.shape[0]) == (d * first, d * max(1, kv_heads // tp))
            assert len(mesh.members(parameter.shared)) == dp * cp * max(1, tp // kv_heads)


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_a_tied_table_is_owned_once_by_the_two_ends(pp):
    for dp, cp, tp in itertools.product((1, 2, 3), (1, 2), (1, 2, 3)):
        sizes, table = {"pp": pp, "dp": dp, "cp": cp, "tp": tp}, Parameter("table", (31, 5), Constant(0.0), ("tp", None), tied=pp > 1)
        check_cover(table, sizes, stages={0, pp - 1})
        for mesh in plans(sizes):
            if mesh.coord("pp") in (0, pp - 1):
                members = mesh.members(table.shared)
                assert len(members) == dp * cp * len({0, pp - 1}) and {mesh.coords_of(rank)["pp"] for rank in members} == {0, pp - 1}


def test_axes_that_are_the_same_on_all_ranks_of_a_group_are_not_told_apart():
    """Under ep = 1 experts are replicated as any matrix that tp splits, so one bucket takes both."""
    experts, matrix = Parameter("e", (4, 6, 3), Constant(0.0), ("ep", "tp", None)), Parameter("m", (6, 3), Constant(0.0), ("tp", None))
    vector, copies = Parameter("v", (3,), Constant(0.0)), Parameter("k", (4, 3), Constant(0.0), ("tp", None), 4, copies=2)

    def names(**sizes):
        buckets = buckets_of("b", [experts, vector, matrix, copies], Mesh.plan(sizes, 0))
        return [[parameter.name for parameter in bucket.parameters] for bucket in buckets]
    assert names() == names(dp=4) == [["e", "v", "m", "k"]]
    assert names(dp=2, tp=2) == [["e", "m"], ["v", "k"]]        # two copies on two ranks: the same everywhere
    assert names(dp=2, tp=4) == [["e", "m"], ["v"], ["k"]]
    assert names(dp=2, ep=2) == [["e"], ["v", "m", "k"]]
    assert names(dp=2, ep=2, tp=4) == [["e"], ["v"], ["m"], ["k"]]


def test_matrices_decay_and_vectors_do_not():
    assert Parameter("p", (2, 3), Constant(0.0)).decay and not Parameter("p", (3,), Constant(0.0)).decay
    assert not Parameter("p", (2, 3), Constant(0.0), decay=False).decay


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


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("shape, axes", EXPERTS, ids=str)
def test_initial_values_of_experts(shape, axes, zero):
    meshes = [{"tp": 2}, {"dp": 2, "ep": min(2, shape[0])}, {"dp": 3, "cp": 2, "tp": 2}]
    check_initial_values(lambda: Parameter("e", shape, Normal(0.02), axes), meshes, zero)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_initial_values_of_copies_and_of_a_tied_table(zero):
    check_initial_values(lambda: Parameter("k", (8, 5), Normal(0.02), ("tp", None), 4, copies=2), [{"tp": 4, "dp": 2}], zero)
    check_initial_values(lambda: Parameter("t", (31, 5), Normal(0.02), ("tp", None), tied=True), [{"pp": 2, "tp": 3, "dp": 2}], zero)


def check_initial_values(make, meshes, zero):
    """What every rank of the meshes keeps against that slice of what one rank keeps."""
    whole = make()
    whole.copies = 1
    place([whole])
    whole.initialize(OPS, seed=3)
    assert len(np.unique(whole.value)) == whole.value.size
    for sizes in meshes:
        for rank in range(ranks_of(sizes)):
            part = make()
            bucket = place([part], sizes, rank, zero)
            part.initialize(OPS, seed=3)
            np.testing.assert_array_equal(part.master, whole.value[part.updated.slices()])
            if bucket.zero < 3:
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
