"""Buckets: the flat buffers of parameters that are replicated alike, under ZeRO 0 to 3, planned and on real ranks."""

import numpy as np
import pytest

from comm_cases import numbers
from mpillm.layout.mesh import Mesh
from mpillm.layout.parameter import Bucket, Constant, Normal, Parameter, Stack
from mpillm.layout.slab import Slab
from placing import OPS, place, ranks_of, some, some_experts


MESHES = [{}, {"dp": 2}, {"dp": 3, "cp": 2}, {"dp": 2, "tp": 3}, {"dp": 9}, {"dp": 2, "cp": 2, "tp": 2, "ep": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["same", "split", "experts"])
def test_ranges_are_the_owned_slabs_of_all_replicas(sizes, kind):
    for rank in range(ranks_of(sizes)):
        bucket = place(some_experts() if kind == "experts" else some(kind == "split"), sizes, rank, zero=1)
        held = np.arange(bucket.values.size, dtype=np.float64)
        covered = [np.concatenate([held[:0]] + [held[start:stop] for start, stop in bucket.ranges(replica)])
                   for replica in range(bucket.group.size)]
        assert [part.size for part in covered] == list(bucket.counts)
        assert sorted(np.concatenate(covered)) == list(held)
        expected = [bucket._part(held, p)[p.owned.within(p.held)].reshape(-1) for p in bucket.parameters]
        np.testing.assert_array_equal(covered[bucket.group.rank], np.concatenate(expected))


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


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
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
        if zero < 3:
            parameter.value[...] = 3.0
            assert (parameter.master == 3.0).all()
        else:
            parameter.master[...] = 3.0
    assert bucket.kept.size == (sum(p.owned.size for p in bucket.parameters) if zero == 3 else bucket.size)
    assert (bucket.kept == 3.0).all() and (bucket.values is None) == (zero == 3)
    if zero == 0:
        assert bucket.owned_grads is None
        assert all(np.shares_memory(p.owned_grad, bucket.grads) for p in bucket.parameters)
    else:
        assert bucket.owned_grads.size == bucket.counts[rank] == sum(p.owned.size for p in bucket.parameters)
        bucket.owned_grads[:] = np.arange(bucket.counts[rank])
        joined = np.concatenate([p.owned_grad.reshape(-1) for p in bucket.parameters])
        np.testing.assert_array_equal(joined, bucket.owned_grads)


@pytest.mark.parametrize("zero", [2, 3])
def test_zero_on_one_replica_is_zero_0(zero):
    bucket = place(some(True), {"tp": 2}, 1, zero)
    assert bucket.zero == 0 and bucket.owned_grads is None and bucket.values is bucket.kept
    assert all(p.updated == p.held for p in bucket.parameters)
    bucket.fetch()
    bucket.release()
    assert bucket.values is bucket.kept


def test_zero_3_of_what_two_stages_hold_is_zero_2():
    """Neither end can wait for the other's part of the values."""
    for sizes, zero in (({"pp": 2, "dp": 2}, 2), ({"dp": 2}, 3)):       # one stage is both ends
        assert place([Parameter("t", (31, 5), Normal(1.0), ("tp", None), tied=True)], sizes, 1, zero=3).zero == zero


def test_values_that_were_not_fetched_are_not_used():
    bucket = place(some(), {"dp": 3}, 1, zero=3)
    for parameter in bucket.parameters:
        with pytest.raises(RuntimeError, match=f"{parameter.name} is used before its values were fetched from their owners"):
            parameter.value
    with pytest.raises(RuntimeError, match="used before its values were fetched"):
        Stack(*bucket.parameters[:2]).value


def test_fetched_values_hold_the_masters_and_are_let_go():
    bucket = place(some(), {"dp": 3}, 1, zero=3)
    for parameter in bucket.parameters:
        parameter.master[...] = 5.0
    for _ in range(2):                          # as often as they are wanted
        bucket.fetch_start()
        values = bucket.values
        bucket.fetch_start()                    # nothing while they are under way or here
        bucket.fetch()
        bucket.fetch()
        assert bucket.values is values
        for parameter in bucket.parameters:
            assert parameter.value.shape == parameter.held.shape and (parameter.value[parameter.owned.within(parameter.held)] == 5.0).all()
            assert not np.shares_memory(parameter.value, parameter.master)
        bucket.release()
        assert bucket.values is None and all((parameter.master == 5.0).all() for parameter in bucket.parameters)


# -- gradients ----------------------------------------------------------------------------------------------------

def test_before_a_reduction_what_was_not_written_is_zero():
    bucket = place(some(), {"dp": 2}, 0, zero=2)
    bucket.grads.fill(np.nan)
    bucket.clear()
    for parameter in bucket.parameters[1:]:
        parameter.accumulates()
        parameter.grad[...] = 2.0
    bucket.ready_to_reduce()
    assert [set(parameter.grad.reshape(-1)) for parameter in bucket.parameters] == [{0.0}, {2.0}, {2.0}, {2.0}]


def test_gradients_that_are_equal_on_all_tp_ranks_count_on_the_first_only():
    """Those of what tp does not split and whose gradients are no parts of a sum."""
    for rank in range(2):
        equal, partial = Parameter("equal", (4, 3), Normal(1.0)), Parameter("partial", (5,), Constant(0.0), partial=True)
        bucket = place([equal, partial, Parameter("vector", (5,), Constant(0.0))], {"tp": 2}, rank, zero=1)
        split = place([Parameter("split", (6, 3), Normal(1.0), ("tp", None))], {"dp": 2, "tp": 2}, rank, zero=1)
        kv = place([Parameter("kv", (4, 3), Normal(1.0), ("tp", None), 4, copies=2)], {"tp": 2}, rank, zero=1)
        for each in (bucket, split, kv):
            for parameter in each.parameters:
                parameter.accumulates()
                parameter.grad[...] = 2.0
            each.ready_to_reduce()
        found = {parameter.name: set(parameter.grad.reshape(-1)) for each in (bucket, split, kv) for parameter in each.parameters}
        counted = {2.0} if rank == 0 else {0.0}
        assert found == {"equal": counted, "vector": counted, "partial": {2.0}, "split": {2.0}, "kv": {2.0}}


def test_gradients_of_weights_can_be_put_off():
    matrix, other = Parameter("m", (3, 2), Normal(1.0)), Parameter("o", (2, 2), Normal(1.0))
    bucket = place([matrix, other])
    dy, x = np.random.default_rng(1).normal(size=(5, 3)), np.random.default_rng(2).normal(size=(5, 2))
    matrix.add_product(OPS, dy, x)              # at once
    np.testing.assert_array_equal(matrix.grad, dy.T @ x)
    bucket.clear()
    bucket.defer()
    matrix.add_product(OPS, dy, x)
    matrix.add_product(OPS, 2 * dy, x)
    other.later(lambda: other.grad.fill(7.0 + other.accumulates()))
    assert matrix.fresh and other.fresh
    work = bucket.deferred_work()
    assert len(work) == 3
    for each in work:
        each()
    np.testing.assert_allclose(matrix.grad, 3 * dy.T @ x, rtol=1e-14)
    assert (other.grad == 7.0).all() and not other.fresh
    matrix.add_product(OPS, dy, x)              # at once again, and added
    np.testing.assert_allclose(matrix.grad, 4 * dy.T @ x, rtol=1e-14)


def test_gradients_of_a_stack_can_be_put_off():
    query, key = Parameter("q", (4, 3), Normal(1.0)), Parameter("k", (2, 3), Normal(1.0))
    bucket, dy, x = place([query, key]), np.ones((5, 6)), np.ones((5, 3))
    bucket.defer()
    Stack(query, key).add_product(OPS, dy, x)
    work, = bucket.deferred_work()
    work()
    assert (query.grad == 5.0).all() and (key.grad == 5.0).all()


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


# -- on real ranks ------------------------------------------------------------------------------------------------

def buckets_on(group, zero):
    """(mesh, Bucket) of parameters of every kind, on meshes of this launch's ranks."""
    n = group.size
    sizes = [{"dp": n}, {"cp": n}, {"tp": n}, {"pp": n}, {"dp": n, "ep": n}]
    if n == 4:
        sizes += [{"tp": 2, "dp": 2}, {"cp": 2, "dp": 2, "ep": 2}, {"pp": 2, "dp": 2}]
    for each in sizes:
        mesh = Mesh(group, each)
        if mesh.coord("pp") not in (0, mesh.size("pp") - 1):
            continue        # a stage in between has no tied table
        kinds = {"same": some(), "split": some(True), "experts": some_experts(),
                 "vectors": [Parameter("v", (3,), Constant(0.0), partial=True)],
                 "tied": [Parameter("t", (31, 5), Normal(1.0), ("tp", None), tied=True)],
                 "copies": [Parameter("k", (8, 5), Normal(1.0), ("tp", None), 8, copies=mesh.size("tp"))]}
        for kind, parameters in kinds.items():
            bucket = Bucket(kind, parameters)
            bucket.place(mesh, zero, OPS, np.float64)
            yield mesh, bucket


def whole(parameter):
    return numbers(parameter.shape, 70)


def set_owned(bucket):
    """Gives each owned slab its part of the whole; the rest of what is held has no value yet."""
    bucket.kept.fill(np.nan)
    for parameter in bucket.parameters:
        own = parameter.owned.within(parameter.updated)
        parameter.master[own] = whole(parameter)[parameter.owned.slices()]


def check_values(bucket):
    for parameter in bucket.parameters:
        np.testing.assert_array_equal(parameter.value, whole(parameter)[parameter.held.slices()])


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_gather_makes_whole_what_each_owner_has(group, zero):
    for _, bucket in buckets_on(group, zero):
        set_owned(bucket)
        bucket.gather(bucket.values)
        check_values(bucket)


@pytest.mark.ranks
def test_fetch_gathers_values_from_their_owners_and_release_lets_them_go(group):
    for mesh, bucket in buckets_on(group, 3):
        assert bucket.zero == (0 if bucket.group.size == 1 else 2 if bucket.name == "tied" and mesh.size("pp") > 1 else 3)
        set_owned(bucket)
        if bucket.zero < 3:
            bucket.gather(bucket.values)
        for _ in range(2):
            bucket.fetch()
            check_values(bucket)
            bucket.release()
            assert (bucket.values is None) == (bucket.zero == 3)
    assert any(bucket.zero == 3 for _, bucket in buckets_on(group, 3)) == (group.size > 1)


@pytest.mark.ranks
def test_values_are_fetched_anew_after_the_owners_changed_them(group):
    for _, bucket in buckets_on(group, 3):
        if bucket.zero == 3:
            bucket.kept.fill(np.nan)
            bucket.fetch()
            bucket.release()
            set_owned(bucket)
            bucket.fetch()
            check_values(bucket)


@pytest.mark.ranks
def test_values_of_several_buckets_may_be_on_their_way(group):
    buckets = [bucket for _, bucket in buckets_on(group, 3)]
    for bucket in buckets:
        set_owned(bucket)
        if bucket.zero < 3:
            bucket.gather(bucket.values)
    for bucket in buckets:
        bucket.fetch_start()
    for bucket in reversed(buckets):
        bucket.fetch()
        check_values(bucket)


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_owners_get_the_sum_of_the_gradients_of_all_replicas(group, zero):
    for mesh, bucket in buckets_on(group, zero):
        if bucket.group.size == 1:
            continue
        for number, parameter in enumerate(bucket.parameters):
            parameter.accumulates()
            parameter.grad[...] = numbers(parameter.held.shape, 80 + number, mesh.rank)
        bucket.group.reduce_scatter_start(bucket.grads, bucket.ranges, bucket.owned_grads).wait()
        for number, parameter in enumerate(bucket.parameters):
            expected = sum(numbers(parameter.held.shape, 80 + number, rank) for rank in mesh.members(parameter.shared))
            np.testing.assert_array_equal(parameter.owned_grad, expected[parameter.owned.within(parameter.held)])
