"""Batches: the right tokens and targets, and the same samples after any stop, on any batch, context or mixture."""

import json
import time

import numpy as np
import pytest
from text_files import make_file, raised

from mpillm.text.batches import Batches, RandomBatches, check_same_tokenizer, open_batches, validation_windows
from mpillm.text.tokenizer import train_bpe

CONTEXT = 16


@pytest.fixture
def files(tmp_path):
    return [make_file(tmp_path / f"{size}.h5", size, seed)[0] for seed, size in enumerate((400, 1000, 700))]


def batches(files, cursor=None, weights=(5, 3, 2), context=CONTEXT):
    cursor = json.loads(json.dumps(cursor))
    return Batches(files, weights[:len(files)], context, 7, cursor)


def tokens_of(source, first, count):
    return np.stack(source.samples(first, count)[:2])       # (2, count, T)


@pytest.mark.parametrize("context", [16, 48, 4, 24])
def test_targets_are_the_next_tokens(tmp_path, context):
    """In a file whose tokens count up, every target is one more than its token."""
    file, _ = make_file(tmp_path / "a.h5", 250)
    file.gather = lambda starts, lengths: np.concatenate([np.arange(a, a + b) for a, b in zip(starts, lengths)]) % 250
    cursor = Batches([file], [1], 16, 1).cursor_after(3)
    tokens, targets, weights = Batches([file], [1], context, 1, cursor).samples(0, 5)
    assert tokens.shape == targets.shape == weights.shape == (5, context)
    assert (tokens.dtype, targets.dtype, weights.dtype) == (np.int32, np.int32, np.float32)
    assert np.array_equal(targets, tokens + 1) and weights.min() == 1


def test_an_epoch_reads_every_token_once(tmp_path):
    file, ids = make_file(tmp_path / "a.h5", 16 * 20 + 9)
    found = tokens_of(batches([file]), 0, 20)
    assert np.array_equal(np.sort(found[0].ravel()), np.sort(ids[:320])) and np.array_equal(np.sort(found[1].ravel()), np.sort(ids[1:321]))


def test_no_samples(files):
    assert [part.shape for part in batches(files).samples(5, 0)] == [(0, CONTEXT)] * 3
    assert [part.shape for part in batches(files[:1]).samples(5, 0)] == [(0, CONTEXT)] * 3


@pytest.mark.parametrize("number", [1, 3])
def test_stops_change_nothing(files, number):
    """Three stops within the epoch of every file and one over the edge, each time with another batch."""
    files = files[:number]
    whole, done, cursor = tokens_of(batches(files), 0, 160), 0, None
    for count, batch in ((7, 7), (5, 2), (9, 3), (99, 11), (40, 40)):
        source = batches(files, cursor)
        found = np.concatenate([tokens_of(source, first, min(batch, count - first)) for first in range(0, count, batch)], axis=1)
        assert source.first == done and not source.messages
        assert np.array_equal(found, whole[:, done:done + count])
        cursor, done = source.cursor_after(count), done + count
    assert cursor["samples"] == 160 and cursor == batches(files).cursor_after(160)


def test_samples_do_not_depend_on_how_they_are_asked_for(files):
    source = batches(files)
    whole = tokens_of(source, 1000, 64)         # over the end of a period
    assert np.array_equal(whole, np.concatenate([tokens_of(source, 1000 + n, 1) for n in range(64)], axis=1))


def epoch_of(file, cursor):
    entry = next(entry for entry in cursor["corpora"] if entry["file"] == file.path)
    return entry["epoch"] * ((file.num_tokens - 1) // CONTEXT) + entry["tokens"] // CONTEXT


def test_another_mixture_goes_on_in_every_file(files):
    first = batches(files)
    cursor = first.cursor_after(50)
    second = batches(files, cursor, weights=(1, 1, 6))
    assert second.first == 50 and "mixture of the files changed" in second.messages[0]
    after = second.cursor_after(20)
    counts = [epoch_of(file, after) for file in files]
    assert sum(counts) == 70
    for file, count in zip(files, counts):
        alone = Batches([file], [1], CONTEXT, 7)
        expected = {row.tobytes() for row in tokens_of(alone, 0, count)[0]}
        found = [row.tobytes() for source, number in ((first, 50), (second, 20)) for row in tokens_of(source, 0, number)[0]]
        assert expected <= set(found)
    assert batches(files, after, weights=(1, 1, 6)).messages == []


def test_a_file_that_left_comes_back_where_it_was(files):
    cursor = batches(files).cursor_after(40)
    fewer = batches(files[:2], cursor)
    again = batches(files, fewer.cursor_after(10))
    assert epoch_of(files[2], again.cursor_after(0)) == epoch_of(files[2], cursor)
    new = batches([*files[:2], files[2]], batches(files[:2]).cursor_after(10))
    assert any("is new to this run" in line for line in new.messages)


def test_a_file_is_known_by_its_content(files, tmp_path):
    cursor = batches(files[:1]).cursor_after(11)
    (tmp_path / "400.h5").rename(tmp_path / "moved.h5")
    moved = batches([str(tmp_path / "moved.h5")], cursor)
    assert not moved.messages and np.array_equal(tokens_of(moved, 0, 9), tokens_of(batches(files[:1]), 11, 9))


@pytest.mark.parametrize(("context", "said"), [(32, 0), (8, 0), (24, 1)])
def test_another_context(files, context, said):
    cursor = batches(files[1:2]).cursor_after(10)
    source = batches(files[1:2], cursor, context=context)
    assert len(source.messages) == said
    rest = tokens_of(batches(files[1:2]), 10, 30)
    assert np.array_equal(tokens_of(source, 0, 480 // context).reshape(2, -1), rest.reshape(2, -1))


def test_mistakes(files, tmp_path):
    small, _ = make_file(tmp_path / "small.h5", CONTEXT)
    assert "16 tokens; a sample needs 17" in raised(lambda: batches([small]))
    assert "16 tokens; a validation window needs 17" in raised(lambda: validation_windows(small, CONTEXT, 3))
    assert "less than 1/2048" in raised(lambda: batches(files, weights=(1, 1, 1e-5)))
    assert "mpillm prepare" in raised(lambda: open_batches("none.h5", CONTEXT, 1))
    assert "model.vocabulary" in raised(lambda: open_batches("random", CONTEXT, 1))
    assert "cursor of version 9" in raised(lambda: batches(files, {"version": 9}))
    other, _ = make_file(tmp_path / "bpe.h5", 500, tokenizer=train_bpe(["some words " * 9], 258))
    assert "another tokenizer" in raised(lambda: check_same_tokenizer([files[0], other]))


def test_validation_windows(tmp_path):
    file, ids = make_file(tmp_path / "a.h5", 100)
    count, samples = validation_windows(file, CONTEXT, 50)
    tokens, targets, weights = samples(1, count - 1)
    assert count == 6 and weights.shape == (5, CONTEXT)
    assert np.array_equal(tokens.ravel(), ids[16:96]) and np.array_equal(targets.ravel(), ids[17:97])
    assert samples(6, 0)[0].shape == (0, CONTEXT) and validation_windows(file, CONTEXT, 2)[0] == 2


def test_random_batches():
    whole = tokens_of(RandomBatches(1000, CONTEXT, 1), 0, 50)
    later = open_batches("random", CONTEXT, 1, RandomBatches(1000, CONTEXT, 1).cursor_after(20), vocabulary=1000)
    assert np.array_equal(tokens_of(later, 0, 30), whole[:, 20:]) and later.first == 20
    assert np.array_equal(whole[0, :, 1:], whole[1, :, :-1]) and 0 <= whole.min() and whole.max() < 1000
    assert len(np.unique(whole)) > 500 and not np.array_equal(whole, tokens_of(RandomBatches(1000, CONTEXT, 2), 0, 50))


def test_loading_is_fast(tmp_path):
    file, _ = make_file(tmp_path / "a.h5", 4_000_000)
    source = Batches([file], [1], 1024, 1)
    seconds = []
    for step in range(20):
        started = time.perf_counter()
        source.samples(step * 32, 32)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.003         # 0.4 ms where the machine is idle
