"""The mesh: coordinates and groups of any layout, planned without MPI and then really made."""

import itertools

import pytest

from mpillm.config import Mesh as MeshConfig, UserError
from mpillm.layout.comm import Solo
from mpillm.layout.mesh import AXES, Mesh, coordinates, sizes_of

LAYOUTS = [{"pp": pp, "dp": dp, "cp": cp, "tp": tp} for pp, dp, cp, tp in itertools.product((1, 2), (1, 2, 3), (1, 2), (1, 3))]
SUBSETS = [axes for count in range(1, 5) for axes in itertools.combinations(AXES, count)]


def planned_group(sizes, rank, axes):
    """The ranks of the group of `axes`, by comparing coordinates only."""
    def place(other):
        return [coordinates(sizes, other)[axis] for axis in AXES if axis not in axes]
    members = [other for other in range(sizes["pp"] * sizes["dp"] * sizes["cp"] * sizes["tp"]) if place(other) == place(rank)]
    return sorted(members, key=lambda other: [coordinates(sizes, other)[axis] for axis in axes])


def planned_experts(sizes, rank):
    """The ep group: consecutive ranks of the flattened (dp, cp) order of the same stage and tp place."""
    replicas = planned_group(sizes, rank, ("dp", "cp"))
    start = replicas.index(rank) // sizes["ep"] * sizes["ep"]
    return replicas[start:start + sizes["ep"]]


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_the_last_axis_is_innermost(sizes):
    order = itertools.product(*(range(sizes[axis]) for axis in AXES))
    for rank, place in enumerate(order):
        coords = coordinates(sizes, rank)
        assert tuple(coords[axis] for axis in AXES) == place
        assert Mesh.plan(sizes, rank).coords == coords


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_any_rank_plans_its_groups_without_mpi(sizes):
    num_ranks = sizes["pp"] * sizes["dp"] * sizes["cp"] * sizes["tp"]
    for rank, axes in itertools.product(range(num_ranks), SUBSETS):
        mesh = Mesh.plan(sizes, rank)
        members = planned_group(sizes, rank, axes)
        assert mesh.num_ranks == num_ranks and mesh.world.size == num_ranks and mesh.world.rank == rank
        assert mesh.size(*axes) == len(members)
        assert mesh.position(*axes) == members.index(rank)
        assert (mesh[axes].rank, mesh[axes].size) == (members.index(rank), len(members))
        assert [mesh.coords_of(other) for other in members] == [Mesh.plan(sizes, other).coords for other in members]


def test_axes_of_one_rank_are_solo_and_groups_are_made_once():
    mesh = Mesh.plan({"dp": 2}, 1)
    assert isinstance(mesh["tp"], Solo) and mesh["tp"].size == 1
    assert mesh["dp"] is mesh["dp"] and mesh["dp"] is mesh["dp",]
    assert mesh.sizes == {"pp": 1, "dp": 2, "cp": 1, "tp": 1, "ep": 1}


def test_expert_groups_are_consecutive_ranks_of_dp_x_cp():
    sizes = {"pp": 1, "dp": 2, "cp": 2, "tp": 1, "ep": 2}
    assert [coordinates(sizes, rank)["ep"] for rank in range(4)] == [0, 1, 0, 1]
    assert [planned_experts(sizes, rank) for rank in range(4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    sizes = {"pp": 2, "dp": 2, "cp": 2, "tp": 3, "ep": 4}
    for rank in range(24):
        members = planned_experts(sizes, rank)
        mesh = Mesh.plan(sizes, rank)
        assert mesh.coord("ep") == members.index(rank) and mesh["ep"].size == 4 and mesh["ep"].rank == members.index(rank)


def test_sizes_of_fills_in_the_rest():
    assert sizes_of(MeshConfig(), 6) == {"pp": 1, "dp": 6, "cp": 1, "tp": 1, "ep": 1}
    assert sizes_of(MeshConfig(dp=2, tp="rest"), 6) == {"pp": 1, "dp": 2, "cp": 1, "tp": 3, "ep": 1}
    assert sizes_of(MeshConfig(dp=2, cp=3, ep=6), 6)["ep"] == 6
    assert sizes_of(MeshConfig(tp=2), 2)["dp"] == 1


@pytest.mark.parametrize("config, num_ranks, line", [
    (MeshConfig(dp=2, tp=2), 6, 'mesh: dp=2 x tp=2 needs 4 ranks, this job has 6; start 4 ranks or set one axis to "rest"'),
    (MeshConfig(dp=1), 3, 'mesh: all axes 1 needs 1 ranks, this job has 3; start 1 ranks or set one axis to "rest"'),
    (MeshConfig(tp=4), 6, "mesh: tp=4 = 4 does not divide the 6 ranks of this job; start a multiple of 4 ranks"),
    (MeshConfig(pp=2, tp=2), 6, "mesh: pp=2 x tp=2 = 4 does not divide the 6 ranks of this job; start a multiple of 4 ranks"),
    (MeshConfig(tp="rest"), 6, 'mesh: dp and tp are both "rest"; only one axis may take the rest of the ranks'),
    (MeshConfig(ep=4), 6, "mesh: ep=4 does not divide dp x cp = 6; use ep of 1, 2, 3, 6"),
])
def test_sizes_that_do_not_fit_give_one_line_with_sizes_that_work(config, num_ranks, line):
    with pytest.raises(UserError) as error:
        sizes_of(config, num_ranks)
    assert str(error.value) == line


def factorings(number):
    """Every mesh of `number` ranks."""
    divisors = [size for size in range(1, number + 1) if number % size == 0]
    return [dict(zip(AXES, sizes)) for sizes in itertools.product(divisors, repeat=4)
            if sizes[0] * sizes[1] * sizes[2] * sizes[3] == number]


@pytest.mark.ranks
def test_groups_under_mpi_hold_the_planned_ranks(group):
    for sizes in factorings(group.size):
        mesh = Mesh(group, sizes)
        for axes in SUBSETS + [tuple(reversed(axes)) for axes in SUBSETS]:
            members = planned_group(sizes, group.rank, axes)
            assert mesh[axes].collect(group.rank) == members
            assert mesh[axes].rank == members.index(group.rank)
            assert mesh[axes] is mesh[axes]


@pytest.mark.ranks
def test_expert_groups_under_mpi(group):
    for sizes in factorings(group.size):
        replicas = sizes["dp"] * sizes["cp"]
        for experts in (size for size in range(1, replicas + 1) if replicas % size == 0):
            mesh = Mesh(group, sizes | {"ep": experts})
            assert mesh["ep"].collect(group.rank) == planned_experts(sizes | {"ep": experts}, group.rank)


@pytest.mark.ranks
def test_a_mesh_of_another_size_is_refused(group):
    with pytest.raises(ValueError, match=f"mesh pp=1 x dp={group.size + 1} x cp=1 x tp=1 = {group.size + 1}, "
                                         f"but the group has {group.size} ranks"):
        Mesh(group, {"dp": group.size + 1})
