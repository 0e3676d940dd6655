"""Block arithmetic: parts cover without gap or overlap, and slabs are indices of each other."""

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from mpillm.layout.slab import Slab, cut, sizes_of_cut, token_ranges


@given(units=st.integers(0, 200), parts=st.integers(1, 40), unit=st.integers(1, 7))
def test_parts_cover_without_gap_or_overlap(units, parts, unit):
    blocks = [cut(units * unit, parts, index, unit) for index in range(parts)]
    end = 0
    for start, size in blocks:
        assert start == end and size >= 0 and size % unit == 0
        end += size
    assert end == units * unit


@given(units=st.integers(0, 200), parts=st.integers(1, 40), unit=st.integers(1, 7))
def test_parts_differ_by_at_most_a_unit_and_the_first_are_larger(units, parts, unit):
    sizes = [cut(units * unit, parts, index, unit)[1] for index in range(parts)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] in (0, unit)


def test_known_cuts():
    assert [cut(7, 3, index) for index in range(3)] == [(0, 3), (3, 2), (5, 2)]
    assert [cut(2, 4, index) for index in range(4)] == [(0, 1), (1, 1), (2, 0), (2, 0)]
    assert [cut(20, 3, index, unit=4) for index in range(3)] == [(0, 8), (8, 8), (16, 4)]
    assert cut(0, 2, 1) == (0, 0)


@pytest.mark.parametrize("length", [1, 7, 9])
def test_a_unit_that_does_not_fit_is_refused(length):
    with pytest.raises(ValueError, match=f"length {length} is not a multiple of unit 4"):
        cut(length, 2, 0, unit=4)


@given(units=st.integers(0, 200), parts=st.integers(1, 40), unit=st.integers(1, 7))
def test_sizes_of_cut_are_those_of_its_blocks(units, parts, unit):
    sizes = sizes_of_cut(units * unit, parts, unit)
    assert sizes.dtype == np.int64 and list(sizes) == [cut(units * unit, parts, index, unit)[1] for index in range(parts)]


# -- tokens of context-parallel ranks -----------------------------------------------------------------------------

FORMS = st.sampled_from(["ring", "ulysses"])


@given(length=st.integers(0, 200), parts=st.integers(1, 12), form=FORMS)
def test_tokens_are_held_once_and_ascend(length, parts, form):
    found = [token_ranges(length, parts, index, form) for index in range(parts)]
    tokens = [[token for start, size in ranges for token in range(start, start + size)] for ranges in found]
    assert all(row == sorted(row) for row in tokens) and sorted(sum(tokens, [])) == list(range(length))
    assert all(size >= 0 and start >= 0 for ranges in found for start, size in ranges)
    assert {len(ranges) for ranges in found} == ({2} if form == "ring" and parts > 1 else {1})


@given(length=st.integers(0, 200), parts=st.integers(1, 12), form=FORMS)
def test_ranks_hold_almost_as_many_tokens_as_each_other(length, parts, form):
    sizes = [sum(size for _, size in token_ranges(length, parts, index, form)) for index in range(parts)]
    assert max(sizes) - min(sizes) <= 1


@given(blocks=st.integers(1, 20), parts=st.integers(1, 12))
def test_zig_zag_ranks_see_as_many_keys_as_each_other(blocks, parts):
    """Under a causal mask token i sees i + 1 keys; with equal blocks every rank has the same to do."""
    length = 2 * parts * blocks
    for index in range(parts):
        seen = sum(token + 1 for start, size in token_ranges(length, parts, index) for token in range(start, start + size))
        assert seen * parts == length * (length + 1) // 2


def test_known_token_ranges():
    assert [token_ranges(8, 2, index) for index in range(2)] == [((0, 2), (6, 2)), ((2, 2), (4, 2))]
    assert [token_ranges(9, 2, index) for index in range(2)] == [((0, 3), (7, 2)), ((3, 2), (5, 2))]
    assert [token_ranges(3, 2, index) for index in range(2)] == [((0, 1), (3, 0)), ((1, 1), (2, 1))]
    assert [token_ranges(9, 2, index, "ulysses") for index in range(2)] == [((0, 5),), ((5, 4),)]
    assert token_ranges(9, 1, 0) == token_ranges(9, 1, 0, "ulysses") == ((0, 9),)


# -- slabs --------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 6), min_size=1, max_size=3).map(tuple)


@given(shape=shapes, data=st.data())
def test_slabs_cut_twice_cover_the_tensor_once(shape, data):
    dims = [data.draw(st.integers(0, len(shape) - 1)) for _ in range(2)]
    parts = [data.draw(st.integers(1, 5)) for _ in range(2)]
    count = np.zeros(shape, int)
    for first in range(parts[0]):
        for second in range(parts[1]):
            slab = Slab.whole(shape).cut(dims[0], parts[0], first).cut(dims[1], parts[1], second)
            count[slab.slices()] += 1
            assert count[slab.slices()].shape == slab.shape
            assert slab.size == math.prod(slab.shape)
    assert (count == 1).all()


@given(shape=shapes, data=st.data())
def test_within_is_the_index_relative_to_the_outer_slab(shape, data):
    whole = np.arange(math.prod(shape)).reshape(shape)
    outer = Slab.whole(shape)
    for dim in range(len(shape)):
        parts = data.draw(st.integers(1, 4))
        outer = outer.cut(dim, parts, data.draw(st.integers(0, parts - 1)))
    dim, parts = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(1, 4))
    inner = outer.cut(dim, parts, data.draw(st.integers(0, parts - 1)))
    held = whole[outer.slices()]
    np.testing.assert_array_equal(held[inner.within(outer)], whole[inner.slices()])
    assert outer.within(outer) == tuple(slice(0, extent) for extent in outer.shape)


def test_cut_keeps_units_together():
    slabs = [Slab.whole((20, 3)).cut(0, 3, index, unit=4) for index in range(3)]
    assert slabs == [Slab((0, 0), (8, 3)), Slab((8, 0), (8, 3)), Slab((16, 0), (4, 3))]
