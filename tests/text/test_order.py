"""The order of samples: a bijection, every token once an epoch, and mixtures exact to the sample."""

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies

from mpillm.text.order import PERIOD, Mixture, Order, context_message, fits, keys_of, permute


@settings(max_examples=60, deadline=None)
@given(strategies.integers(1, 5000), strategies.integers(0, 2**63 - 1))
@example(1, 0)
@example(4096, 1)
@example(4097, 1)
def test_permute_is_a_bijection(size, seed):
    assert np.array_equal(np.sort(permute(np.arange(size), size, keys_of("test", seed))), np.arange(size))


def test_permute_of_huge_ranges():
    found = permute(np.arange(10**4) + 2**44, 2**45 - 7, keys_of("test", 1))
    assert len(np.unique(found)) == 10**4 and found.min() >= 0 and found.max() < 2**45 - 7


def test_permute_mixes():
    size = 2000
    found = permute(np.arange(size), size, keys_of("test", 5))
    assert abs(np.corrcoef(np.arange(size), found)[0, 1]) < 0.1
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.1
    assert not np.array_equal(found, permute(np.arange(size), size, keys_of("test", 6)))


def test_the_order_is_what_it_was():
    """A change here would make runs that exist repeat and skip."""
    assert permute(np.arange(8), 1000, keys_of("order", 1, 0)).tolist() == [250, 834, 164, 8, 63, 439, 967, 845]
    assert Mixture([0.7, 0.3], 1).corpora(0, 12).tolist() == [1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0]


def stream(order, first, count):
    """The positions in the file of the tokens of some samples."""
    starts, lengths = order.ranges(first, count)
    return np.concatenate([np.arange(start, start + length) for start, length in zip(starts, lengths)] or [np.zeros(0, int)])


@settings(max_examples=80, deadline=None)
@given(strategies.data())
def test_every_token_once_an_epoch(data):
    grain = data.draw(strategies.integers(1, 12))
    context = data.draw(strategies.integers(1, 30))
    num_tokens = data.draw(strategies.integers(max(grain, context) + 1, 300))
    order = Order(num_tokens, grain, context, seed=3)
    first, later = order.epoch_tokens
    assert first == (num_tokens - 1) // grain * grain
    epochs = 2 * -(-(first + 2 * later) // context)
    tokens = stream(order, 0, epochs)
    assert np.array_equal(np.sort(tokens[:first]), np.arange(first))
    for epoch in range(2):
        part = tokens[first + epoch * later:first + (epoch + 1) * later]
        assert np.array_equal(np.sort(part), np.arange(later))
    assert tokens.size == epochs * context and tokens.max() < num_tokens - 1


@settings(max_examples=40, deadline=None)
@given(strategies.data())
def test_stopping_anywhere_changes_nothing(data):
    grain, context = data.draw(strategies.sampled_from([(4, 4), (4, 12), (12, 4), (8, 12), (7, 5)]))
    num_tokens = data.draw(strategies.integers(14, 120))
    whole = stream(Order(num_tokens, grain, context, 1), 0, 60)
    order, done, found = Order(num_tokens, grain, context, 1), 0, []
    while done < 60:
        count = data.draw(strategies.integers(0, min(25, 60 - done)))
        count = min(count or 1, 60 - done)
        found += [stream(order, start, 1) for start in range(count)] if data.draw(strategies.booleans()) else [stream(order, 0, count)]
        epoch, consumed, now = order.cursor_after(count)
        order, done = Order(num_tokens, now, context, 1, epoch, consumed), done + count
    assert np.array_equal(np.concatenate(found), whole)


@pytest.mark.parametrize("contexts", [(8, 16, 4), (8, 24, 8), (8, 4, 16), (8, 12, 5)])
def test_another_context_neither_repeats_nor_skips(contexts):
    num_tokens, tokens, grain, epoch, consumed = 1000, [], contexts[0], 0, 0
    for context in contexts:
        order = Order(num_tokens, grain, context, 9, epoch, consumed)
        count = 25 if context != contexts[-1] else -(-(992 - consumed) // context)
        tokens.append(stream(order, 0, count))
        epoch, consumed, grain = order.cursor_after(count)
    epoch_tokens = 999 // contexts[0] * contexts[0]
    assert np.array_equal(np.sort(np.concatenate(tokens)[:epoch_tokens]), np.arange(epoch_tokens))


def test_samples_are_whole_grains_or_pieces_of_one():
    assert set(Order(1000, 8, 24, 1).ranges(3, 10)[1]) == {8} and Order(1000, 8, 24, 1).ranges(3, 10)[0].size == 30
    assert set(Order(1000, 24, 8, 1).ranges(3, 10)[1]) == {8}
    starts, lengths = Order(1000, 24, 8, 1).ranges(0, 3)
    assert starts.tolist() == [starts[0], starts[0] + 8, starts[0] + 16]
    assert Order(1000, 8, 8, 1).ranges(5, 0)[0].size == 0


def test_the_order_of_epochs_and_seeds_differs():
    first = Order(801, 8, 8, 1).ranges(0, 100)[0]
    assert not np.array_equal(first, Order(801, 8, 8, 1).ranges(100, 100)[0])
    assert not np.array_equal(first, Order(801, 8, 8, 2).ranges(0, 100)[0])


def test_a_context_that_does_not_fit_is_said():
    assert fits(8, 24) and fits(24, 8) and not fits(8, 12)
    assert context_message("a.h5", 8, 16) is None and context_message("a.h5", 8, 12).startswith("a.h5: context 12 ")


@settings(max_examples=40, deadline=None)
@given(strategies.lists(strategies.floats(0.01, 10), min_size=1, max_size=6), strategies.integers(0, 5000), strategies.integers(0, 3000))
def test_mixtures_are_exact(weights, first, count):
    mixture = Mixture(weights, seed=2)
    exact = np.array(weights) / np.sum(weights) * PERIOD
    assert mixture.quota.sum() == PERIOD and (abs(mixture.quota - exact) < 1).all()
    found = np.bincount(mixture.corpora(first, count), minlength=len(weights))
    assert np.array_equal(found, mixture.before(first + count) - mixture.before(first))
    assert np.array_equal(mixture.before(PERIOD), mixture.quota) and not mixture.before(0).any()
