"""Philox against its authors' known answers, and the properties of what is drawn from it."""

import numpy as np
import pytest
from backend_cases import CPU, DTYPES, REFERENCE, needs_kernels, random

from mpillm.backend import Dropout, philox

ONES = 0xFFFFFFFF
KNOWN = [  # counter, key (low, high), words: kat_vectors of Random123
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_known_answers(counter, key, words):
    assert tuple(int(w) for w in philox.philox4x32(counter, key[0] | key[1] << 32)) == words


def test_log_and_turn_are_accurate():
    words = np.concatenate([np.random.default_rng(0).integers(0, 2**32, 10000, dtype=np.uint32), np.array([0, ONES], np.uint32)])
    exact = np.log((words + 0.5) / 2**32)
    assert np.abs(philox.log_of_word(words) / exact - 1).max() < 1e-15
    sine, cosine = philox.turn_of_word(words)
    assert np.abs(sine - np.sin(words * (2 * np.pi / 2**32))).max() < 2e-15
    assert np.abs(cosine - np.cos(words * (2 * np.pi / 2**32))).max() < 2e-15


def test_normal_moments():
    x = np.empty((1000, 301))
    CPU.normal(x, 7, 0, 0, 301, 1.0)
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01 and abs((x**4).mean() - 3) < 0.1


@pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=["numpy", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slab_of_normal_is_slice_of_whole(backend, dtype):
    whole = np.empty((20, 1030), dtype)
    backend.normal(whole, 2**63 + 11, 0, 0, 1030, 0.02)
    for row, column, rows, columns in [(0, 0, 1, 1), (3, 5, 7, 600), (19, 1029, 1, 1), (2, 2, 0, 4), (2, 3, 4, 0), (1, 257, 3, 773)]:
        slab = np.empty((rows, columns), dtype)
        backend.normal(slab, 2**63 + 11, row, column, 1030, 0.02)
        assert np.array_equal(slab, whole[row : row + rows, column : column + columns])


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_normal_is_bitwise_the_same_in_both_forms(dtype):
    a, b = np.empty((100, 901), dtype), np.empty((100, 901), dtype)
    for backend, out in ((CPU, a), (REFERENCE, b)):
        backend.normal(out, 0x123456789ABCDEF0, 2**32 - 50, 3, 10000, 0.02)
    assert np.array_equal(a, b)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first, channels", [(0, 1), (0, 1030), (6, 13), (3, 515), (0, 0)])
def test_dropout_is_the_same_in_both_forms(dtype, first, channels):
    mask = Dropout(0.3, 2**63 + 5, 2**32 + 1, np.array([3, 3, 2**33, 4, 3]), np.array([0, 5, 1000, 0, 1]), first)
    x = random(0, 5, channels, dtype=dtype)
    a, b = x.copy(), x.copy()
    CPU.dropout(a, mask)
    REFERENCE.dropout(b, mask)
    assert np.array_equal(a, b)


@pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=["numpy", "cpu"])
def test_dropout_depends_on_the_element_only(backend):
    samples, positions = np.repeat(np.arange(5), 9), np.tile(np.arange(9), 5)
    whole = np.ones((45, 50))
    backend.dropout(whole, Dropout(0.25, 99, 4, samples, positions))
    rows = np.array([44, 3, 17, 18, 0])
    part = np.ones((5, 21))
    backend.dropout(part, Dropout(0.25, 99, 4, samples[rows], positions[rows], 7))
    assert np.array_equal(part, whole[rows, 7:28])
    assert set(np.unique(whole)) == {0.0, 1 / 0.75} and abs(whole.mean() - 1) < 0.1


@pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=["numpy", "cpu"])
def test_dropout_counts_step_sample_position_and_channel(backend):
    x = np.ones((2, 11))
    backend.dropout(x, Dropout(0.5, 99, 4, np.array([8, 9]), np.array([70, 60]), 2))
    for (row, channel), value in np.ndenumerate(x):
        word = philox.philox4x32((4, 8 + row, 70 - 10 * row, (2 + channel) // 4), 99)[(2 + channel) % 4]
        assert value == (2.0 if word >= 2**31 else 0.0)


def test_no_dropout_keeps_everything():
    x = np.ones((2, 8))
    CPU.dropout(x, Dropout(0.0, 1, 1, np.zeros(2, np.int64), np.arange(2)))
    assert np.array_equal(x, np.ones((2, 8)))


@pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=["numpy", "cpu"])
def test_dropout_needs_a_sample_and_a_position_for_every_row(backend):
    with pytest.raises(ValueError):
        backend.dropout(np.ones((6, 8)), Dropout(0.5, 1, 1, np.arange(2), np.arange(3)))
