"""The emulator runs kernels as CUDA does, and finds what would hang a GPU or write where it must not."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from emulator import KernelError, is_usable, launch

pytestmark = pytest.mark.skipif(not is_usable(), reason="no C++ compiler for the emulator")
KERNELS = Path(__file__).with_name("emulated_kernels.cu")
TYPES = {"float32": np.float32, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def run(kernel, grid, block, *args, dtype="float32", shared=0):
    launch(KERNELS, kernel, dtype, grid, block, [arg.ctypes.data if isinstance(arg, np.ndarray) else arg for arg in args], shared)


def test_warps_shuffle_and_vote():
    sums, ballots = np.zeros(128, np.float32), np.zeros(4, np.int32)
    run("shuffles", 2, 64, sums, ballots, 70, 0.5)
    values = np.where(np.arange(128) < 70, np.arange(128) * 0.5, 0)
    neighbour = np.minimum(np.arange(128) % 32 + 1, 31)
    np.testing.assert_array_equal(sums, np.repeat(values.reshape(4, 32).sum(axis=1), 32) + neighbour)
    np.testing.assert_array_equal(ballots.view(np.uint32), 0xAAAAAAAA)


@pytest.mark.parametrize("dtype", TYPES)
def test_blocks_exchange_by_dynamic_shared_memory_and_threads_may_return_early(dtype):
    x = np.arange(1, 91).astype(TYPES[dtype])
    y = np.zeros_like(x)
    run("reverse", 2, 64, y, x, 90, dtype=dtype, shared=64 * x.itemsize)
    np.testing.assert_array_equal(y, np.concatenate([x[:64][::-1], x[64:][::-1]]))


def test_blocks_sum():
    x = np.random.default_rng(0).integers(-50, 50, (3, 96)).astype(np.float32)
    sums, largest = np.zeros_like(x), np.zeros_like(x)
    run("block_sums", 3, 96, sums, largest, x)
    np.testing.assert_array_equal(sums, np.repeat(x.sum(axis=1), 96).reshape(3, 96))
    np.testing.assert_array_equal(largest, np.repeat(x.max(axis=1), 96).reshape(3, 96))


def test_a_missing_barrier_shows():
    y = np.zeros(64, np.float32)
    run("race", 1, 64, y)
    assert y[0] == 7 and (y[1:] == -1).all()


def test_shared_memory_begins_as_nan_in_every_block():
    y = np.zeros((32, 3), np.float32)
    run("unwritten", 3, 32, y, shared=128)
    assert np.isnan(y).all()


@pytest.mark.parametrize("kernel, words", [("divergent", "not all 32 lanes"), ("half_barrier", "not all 32 lanes")])
def test_threads_that_would_wait_for_ever_are_an_error(kernel, words):
    with pytest.raises(KernelError, match=rf"{kernel} of .*{words}"):
        run(kernel, 1, 64, np.zeros(64, np.float32))


def test_writes_past_shared_memory_are_an_error():
    y = np.zeros(4, np.float32)
    run("write", 1, 32, y, 1, 99, shared=100)
    with pytest.raises(KernelError, match="shared memory"):
        run("write", 1, 32, y, 1, 100, shared=100)


@pytest.mark.parametrize("dtype", TYPES)
def test_rounding_is_that_of_numpy(dtype):
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.standard_normal(2000) * 10.0 ** rng.integers(-9, 9, 2000), [0.0, -0.0, np.inf, -np.inf, np.nan, 65504,
                        65519.9, 65520, 2**-24, 2**-25, 1.5 * 2**-24, 2**-14, 2**-14 - 2**-26, 1 + 2**-11, 1 + 3 * 2**-11, 5e-324]])
    x = np.concatenate([x, np.zeros(-len(x) % 1024)])
    y = np.empty(len(x), TYPES[dtype])
    for start in range(0, len(x), 256):
        run("rounded", 1, 128, y[start : start + 256], x[start : start + 256], 256, dtype=dtype)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float32).astype(TYPES[dtype]) if dtype == "bfloat16" else x.astype(TYPES[dtype])
    np.testing.assert_array_equal(y.astype(np.float64), expected.astype(np.float64))


def test_writes_outside_of_an_array_are_an_error():
    pytest.importorskip("cupy", exc_type=ImportError)
    from fake import FakeDevice

    device = FakeDevice()
    array = device.zeros((5,), np.float32)
    run("write", 1, 32, array.data.ptr, 4, 0, shared=16)
    np.testing.assert_array_equal(device.to_host(array), [0, 0, 0, 0, 3])
    for index in (-1, 5):
        other = device.zeros((5,), np.float32)
        run("write", 1, 32, other.data.ptr, index, 0, shared=16)
        with pytest.raises(KernelError, match="before or behind"):
            device.to_host(other)
