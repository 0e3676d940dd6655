"""The arena: arrays never overlap, freed memory is taken again, gaps join; a step takes the same places each time."""

import numpy as np
import pytest

from mpillm.backend.arena import ALIGNMENT, Arena
from mpillm.backend.shapes import GpuShapes


def test_places_are_aligned_and_the_lowest_gap_is_taken():
    arena = Arena(10 * ALIGNMENT)
    first, second, third = arena.take(1), arena.take(ALIGNMENT + 1), arena.take(ALIGNMENT)
    assert [place.start for place in (first, second, third)] == [0, ALIGNMENT, 3 * ALIGNMENT]
    assert arena.peak == 4 * ALIGNMENT
    del second
    assert arena.take(3 * ALIGNMENT).start == 4 * ALIGNMENT      # too large for the gap; dies at once
    fourth = arena.take(2 * ALIGNMENT)
    assert fourth.start == ALIGNMENT and arena.peak == 7 * ALIGNMENT


def test_what_does_not_fit_is_refused_and_nothing_changes():
    arena = Arena(2 * ALIGNMENT)
    kept = arena.take(ALIGNMENT)
    assert arena.take(ALIGNMENT + 1) is None
    assert arena.take(ALIGNMENT).start == ALIGNMENT
    del kept
    assert arena.take(2 * ALIGNMENT).start == 0


@pytest.mark.parametrize("seed", range(5))
def test_random_lifetimes_never_overlap_and_leave_one_gap(seed):
    random, arena, alive = np.random.default_rng(seed), Arena(1 << 20), []
    for _ in range(2000):
        if alive and random.random() < 0.5:
            alive.pop(random.integers(len(alive)))
        else:
            alive += filter(None, [arena.take(int(random.integers(1, 9000)))])
        spans = sorted((place.start, place.start + place.size) for place in alive)
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:]))
        assert sum(arena.sizes) + sum(place.size for place in alive) == arena.capacity
    alive.clear()
    assert arena.starts == [0] and arena.sizes == [1 << 20]


def test_shapes_of_a_gpu_lie_in_two_arenas_and_views_keep_their_memory():
    ops = GpuShapes()
    weight = ops.empty((1000,), np.float32)
    with ops.activations():
        a, b = ops.empty((2000,), np.float32), ops.padded((10, 50257), np.float16)
        view = a[5:]
        del a
        c = ops.zeros((2000,), np.float32)
    assert ops.kept.peak == 4096 and weight.nbytes == 4000
    assert b.shape == (10, 50257)
    assert ops.passing_by.peak == 2 * 8192 + -(-10 * 50304 * 2 // ALIGNMENT) * ALIGNMENT
    del view, b, c, weight
    assert ops.passing_by.sizes == ops.kept.sizes == [1 << 60]
