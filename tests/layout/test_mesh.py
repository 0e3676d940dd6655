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


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_has_a_group_of_its_own_even_where_all_ranks_lie_along_it(axis):
    mesh = Mesh.plan({axis: 3}, 1)
    assert mesh[axis] is not mesh.world and (mesh.world.name, mesh[axis].name) == ("world", axis)


def test_expert_groups_are_consecutive_ranks_of_dp_x_cp():
    sizes = {"pp": 1, "dp": 2, "cp": 2, "tp": 1, "ep": 2}
    assert [coordinates(sizes, rank)["ep"] for rank in range(4)] == [0, 1, 0, 1]
    assert [planned_experts(sizes, rank) for rank in range(4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    sizes = {"pp": 2, "dp": 2, "cp": 2, "tp": 3, "ep": 4}
    for rank in range(24):
        members = planned_experts(sizes, rank)
        mesh = Mesh.plan(sizes, rank)
        assert mesh.coord("ep") == members.index(rank) and mesh["ep"].size == 4 and mesh["ep"].rank == members.index(rank)


# -- groups by what their members share ---------------------------------------------------------------------------

SHARED = [("pp",), ("ends",), ("pp", "tp"), ("ends", "tp"), ("pp", ("tp", 2)), ("pp", "ep"), ("pp", "ep", "tp"), ("pp", "ep_group", "tp"),
          ("dp", "cp", "tp"), ("pp", "dp", "cp"), ("pp", "cp", "tp"), ()]
MESHES = [{"pp": pp, "dp": dp, "cp": cp, "tp": tp, "ep": ep}
          for pp, dp, cp, tp, ep in itertools.product((1, 2, 3), (1, 2, 3), (1, 2), (1, 2, 4), (1, 2, 3, 6)) if dp * cp % ep == 0]


def place_of(sizes, rank, key):
    """What a key of `shared` says about a rank."""
    coords = coordinates(sizes, rank)
    replica = coords["dp"] * sizes["cp"] + coords["cp"]
    if not isinstance(key, str):
        return coords[key[0]] // key[1]
    places = {"ends": coords["pp"] % (sizes["pp"] - 1 or 1), "ep": replica % sizes["ep"], "ep_group": replica // sizes["ep"]}
    return (coords | places)[key]


def sharing(sizes, rank, shared):
    """The ranks that share all of `shared` with `rank`."""
    num_ranks = sizes["pp"] * sizes["dp"] * sizes["cp"] * sizes["tp"]
    return [other for other in range(num_ranks) if all(place_of(sizes, other, key) == place_of(sizes, rank, key) for key in shared)]


@pytest.mark.parametrize("shared", SHARED, ids=str)
def test_planned_groups_by_what_is_shared(shared):
    for sizes in MESHES:
        keys = {}
        for rank in range(sizes["pp"] * sizes["dp"] * sizes["cp"] * sizes["tp"]):
            mesh, members = Mesh.plan(sizes, rank), sharing(sizes, rank, shared)
            found = mesh.group(shared)
            assert mesh.members(shared) == members == mesh.members(mesh.canonical(shared))
            assert (found.rank, found.size) == (members.index(rank), len(members))
            assert found is mesh.group(shared) is mesh.group(mesh.canonical(shared))
            if found.size > 1:
                assert keys.setdefault(found.key, members) == members       # a key names one group
        assert len(keys) == len({tuple(members) for members in keys.values()})


def test_the_replicas_of_experts_and_the_ep_groups_meet_in_one_rank():
    for sizes in MESHES:
        for rank in range(sizes["pp"] * sizes["dp"] * sizes["cp"] * sizes["tp"]):
            mesh = Mesh.plan(sizes, rank)
            replicas, experts = mesh.members(("pp", "ep", "tp")), mesh.members(("pp", "ep_group", "tp"))
            assert set(replicas) & set(experts) == {rank}
            assert len(replicas) * len(experts) == mesh.size("dp", "cp") and len(experts) == sizes["ep"]
            assert sorted(mesh.coords_of(other)["ep"] for other in experts) == list(range(sizes["ep"]))


def test_what_names_the_same_groups_is_equal():
    mesh = Mesh.plan({"dp": 2, "tp": 2}, 0)
    assert mesh.canonical(("ends",)) == mesh.canonical(("pp",)) == mesh.canonical(("pp", "cp")) == mesh.canonical(("pp", "ep")) == ("pp",)
    assert mesh.canonical(("pp", ("tp", 2))) == ("pp",) and mesh.canonical(("pp", ("tp", 1))) == ("pp", ("tp", 1))
    assert mesh.canonical(("ends", "tp")) == mesh.canonical(("pp", "cp", "tp")) == ("pp", "tp")
    mesh = Mesh.plan({"pp": 2, "dp": 2, "tp": 4, "ep": 2}, 0)
    for shared in (("ends",), ("pp", "ep"), ("pp", "tp"), ("pp", ("tp", 2)), ("pp", "ep", "tp")):
        assert mesh.canonical(shared) == shared


def test_names_of_groups():
    mesh = Mesh.plan({"pp": 2, "dp": 2, "cp": 2, "tp": 4, "ep": 2}, 0)
    names = {("pp", "dp", "cp"): "tp", ("pp", "tp"): "dpxcp", ("pp",): "dpxcpxtp", ("ends", "dp", "cp", "tp"): "pp",
             ("pp", "dp", "cp", ("tp", 2)): "2 of tp", ("pp", "ep_group", "tp"): "ep", ("pp", "ep", "tp"): "experts' replicas"}
    assert {shared: mesh.group(shared).name for shared in names} == names
    assert mesh["tp"].name == "tp" and mesh["dp", "cp"].name == "dpxcp" and mesh["ep"].name == "ep"


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
        for axes in SUBSETS:
            members = planned_group(sizes, group.rank, axes)
            assert mesh[axes].collect(group.rank) == members
            assert mesh[axes].rank == members.index(group.rank)
            assert mesh[axes] is mesh[axes] is mesh[tuple(reversed(axes))]      # always in the order of ranks


@pytest.mark.ranks
def test_expert_groups_under_mpi(group):
    for sizes in factorings(group.size):
        replicas = sizes["dp"] * sizes["cp"]
        for experts in (size for size in range(1, replicas + 1) if replicas % size == 0):
            mesh = Mesh(group, sizes | {"ep": experts})
            assert mesh["ep"].collect(group.rank) == planned_experts(sizes | {"ep": experts}, group.rank)


@pytest.mark.ranks
def test_groups_under_mpi_hold_the_ranks_that_share(group):
    for sizes in factorings(group.size):
        replicas = sizes["dp"] * sizes["cp"]
        for sizes in (sizes | {"ep": ep} for ep in range(1, replicas + 1) if replicas % ep == 0):
            mesh = Mesh(group, sizes)
            for shared in SHARED:
                members = sharing(sizes, group.rank, shared)
                found, planned = mesh.group(shared), Mesh.plan(sizes, group.rank).group(shared)
                assert found.collect(group.rank) == members == mesh.members(shared)
                assert (found.rank, found.size, found.name) == (planned.rank, planned.size, planned.name)
                assert found is mesh.group(mesh.canonical(shared))


@pytest.mark.ranks
def test_a_stage_may_ask_for_groups_that_other_stages_never_ask_for(group):
    """The ends for theirs, the stages between for none; each stage in an order of its own."""
    mesh = Mesh(group, {"pp": group.size})
    if mesh.coord("pp") in (0, group.size - 1):
        assert mesh.group(("ends", "tp")).collect(group.rank) == sorted({0, group.size - 1})
    for stage in range(group.size):
        if mesh.coord("pp") == stage:
            for shared in ([("pp", "tp"), ("pp", ("tp", 2))][::1 if stage % 2 else -1]):
                assert mesh.group(shared).size == 1
    if group.size == 4:
        mesh = Mesh(group, {"pp": 2, "dp": 2, "ep": 2})
        for stage, shared in ((0, ("pp", "dp")), (1, ("pp", "ep_group", "tp"))):        # the other stage is never in the call
            if mesh.coord("pp") == stage:
                assert mesh.group(shared).collect(group.rank) == sharing(mesh.sizes, group.rank, shared)
        assert mesh.group(("ends",)).collect(group.rank) == [0, 1, 2, 3]
        assert mesh["dp"].collect(group.rank) == sharing(mesh.sizes, group.rank, ("pp",))


@pytest.mark.ranks
def test_an_axis_under_mpi_has_a_communicator_of_its_own(group):
    if group.size == 1:
        pytest.skip("needs ranks")
    for axis in AXES:
        mesh = Mesh(group, {axis: group.size})
        assert mesh[axis].name == axis and mesh[axis].handle != mesh.world.handle
        assert mesh[axis].collect(group.rank) == list(range(group.size))


@pytest.mark.ranks
def test_a_mesh_of_another_size_is_refused(group):
    with pytest.raises(ValueError, match=f"mesh pp=1 x dp={group.size + 1} x cp=1 x tp=1 = {group.size + 1}, "
                                         f"but the group has {group.size} ranks"):
        Mesh(group, {"dp": group.size + 1})
