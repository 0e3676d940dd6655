"""The pairs of calls that layers use: each is the other's adjoint, <F x, y> = <x, F* y>."""

import numpy as np
import pytest

from comm_cases import HALVES, lengths, numbers, of_all
from mpillm.layout.slab import cut

pytestmark = pytest.mark.ranks


def total(ranks, *values):
    """Sum over the ranks of this rank's inner product."""
    return float(sum(ranks.collect(float(sum(values)))))


def inner(a, b):
    return float(np.vdot(a, b))


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: np.dtype(dtype).name)
def test_identity_and_all_reduce_are_adjoint(ranks, dtype):
    x = numbers((5, 3), 10, dtype=dtype)                        # same
    y = numbers((5, 3), 11, ranks.rank, dtype)                  # partial
    assert total(ranks, inner(x, y)) == inner(x, ranks.all_reduce(y.copy()))
    partial, same = numbers((5, 3), 12, ranks.rank, dtype), numbers((5, 3), 13, dtype=dtype)
    assert inner(ranks.all_reduce(partial.copy()), same) == total(ranks, inner(partial, same))


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: np.dtype(dtype).name)
def test_a_shift_and_the_rest_of_the_way_round_are_adjoint(ranks, dtype):
    """The gradient of what went one rank on comes home by going on."""
    x, dy = numbers((5, 3), 12, ranks.rank, dtype), numbers((5, 3), 13, ranks.rank, dtype)
    y, dx = np.zeros_like(x), dy.copy()
    ranks.shift_start(x, y).wait()
    for _ in range(ranks.size - 1):
        out = np.zeros_like(dx)
        ranks.shift_start(dx, out).wait()
        dx = out
    assert total(ranks, inner(y, dy)) == total(ranks, inner(x, dx))


def test_all_to_all_is_its_own_adjoint_with_the_counts_swapped(ranks):
    send = [(ranks.rank + 2 * to) % 3 for to in range(ranks.size)]
    receive = [(source + 2 * ranks.rank) % 3 for source in range(ranks.size)]
    x, dy = numbers((sum(send),), 14, ranks.rank), numbers((sum(receive),), 15, ranks.rank)
    y = ranks.all_to_all(x, send, receive, np.zeros(sum(receive)))
    dx = ranks.all_to_all(dy, receive, send, np.zeros(sum(send)))
    assert total(ranks, inner(y, dy)) == total(ranks, inner(x, dx))


def shape_with(dim, extent):
    shape = [2, 3, 4]
    shape[dim] = extent
    return tuple(shape)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("unit", [1, 2])
def test_gather_and_scatter_sum_are_adjoint(ranks, max_count, dim, unit):
    for length in [unit * n for n in lengths(ranks)]:
        start, size = cut(length, ranks.size, ranks.rank, unit)
        mine = [slice(None)] * 3
        mine[dim] = slice(start, start + size)
        whole = numbers(shape_with(dim, length), 14)
        x = np.ascontiguousarray(whole[tuple(mine)])            # split
        gathered = ranks.gather(x, dim, length, unit)           # same
        np.testing.assert_array_equal(gathered, whole)
        y = numbers(gathered.shape, 15, ranks.rank)             # partial
        summed = ranks.scatter_sum(y, dim, length, unit)        # split
        np.testing.assert_array_equal(summed, of_all(ranks, whole.shape, 15).sum(0)[tuple(mine)])
        assert total(ranks, inner(gathered, y)) == total(ranks, inner(x, summed))
        assert total(ranks, inner(summed, x)) == total(ranks, inner(y, ranks.gather(x, dim, length, unit)))


@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: np.dtype(dtype).name)
def test_gather_scatter_sum_and_exchange_of_half_precision(ranks, dtype):
    start, size = cut(7, ranks.size, ranks.rank)
    whole = numbers((3, 7), 16, dtype=dtype)
    gathered = ranks.gather(whole[:, start:start + size], 1, 7)
    assert gathered.dtype == dtype
    np.testing.assert_array_equal(gathered, whole)
    summed = ranks.scatter_sum(numbers((3, 7), 17, ranks.rank, dtype), 1, 7)
    np.testing.assert_array_equal(summed.astype(float), of_all(ranks, (3, 7), 17).sum(0)[:, start:start + size])
    np.testing.assert_array_equal(ranks.exchange(whole[:, start:start + size], 0, 1, 3, 7),
                                  whole[slice(*np.cumsum(cut(3, ranks.size, ranks.rank)))])


def test_gather_of_an_empty_other_dim(ranks):
    start, size = cut(5, ranks.size, ranks.rank)
    assert ranks.gather(np.zeros((size, 0)), 0, 5).shape == (5, 0)
    assert ranks.scatter_sum(np.zeros((5, 0)), 0, 5).shape == (size, 0)


@pytest.mark.parametrize("dims", [(0, 1), (1, 0), (2, 0), (-1, 1)], ids=str)
def test_exchange_is_its_own_adjoint_with_the_dims_swapped(ranks, dims):
    split_dim, joined_dim = dims
    for split_length, joined_length in [(7, 5), (1, 6), (5, 1), (0, 3), (ranks.size, ranks.size + 1)]:
        shape = [2, 2, 2]
        shape[split_dim], shape[joined_dim] = split_length, joined_length
        whole = numbers(shape, 18)

        def part(dim, length):
            start, size = cut(length, ranks.size, ranks.rank)
            index = [slice(None)] * 3
            index[dim] = slice(start, start + size)
            return tuple(index)
        x = whole[part(joined_dim, joined_length)]
        y = ranks.exchange(x, split_dim, joined_dim, split_length, joined_length)
        np.testing.assert_array_equal(y, whole[part(split_dim, split_length)])
        dy = numbers(y.shape, 19, ranks.rank)
        dx = ranks.exchange(dy, joined_dim, split_dim, joined_length, split_length)
        assert dx.shape == x.shape
        assert total(ranks, inner(y, dy)) == total(ranks, inner(x, dx))
        np.testing.assert_array_equal(ranks.exchange(y, joined_dim, split_dim, joined_length, split_length), x)
