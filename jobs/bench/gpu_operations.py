"""Single operations on a GPU: microseconds, bytes that must move over the time, share of the measured copy bandwidth, and
of that of a copy which moves as many bytes: a launch and its ends cost a copy of 50 MB some microseconds too.

    python jobs/bench/gpu_operations.py [--out FILE.json]

Ceilings are measured first: a device-to-device copy, and a bfloat16 matrix product of random numbers. Each figure is the
median of ROUNDS rounds of REPEATS launches between two events, after a warm-up; arrays are larger than the cache.
"""

import argparse
import statistics

import ml_dtypes
import numpy as np

from gpu_record import about, save, table
from mpillm.backend import open_backend
from mpillm.backend.types import Update

ROUNDS, REPEATS = 5, 20
BF16 = np.dtype(ml_dtypes.bfloat16)


class Timer:
    def __init__(self, ops):
        self.ops, self.cuda = ops, ops.device.cupy.cuda

    def __call__(self, work):
        """Microseconds of a call: (median, least, most) of the rounds."""
        for _ in range(3):
            work()
        self.ops.synchronize()
        found = []
        for _ in range(ROUNDS):
            begin, end = self.cuda.Event(), self.cuda.Event()
            begin.record(self.ops.device.stream)
            for _ in range(REPEATS):
                work()
            end.record(self.ops.device.stream)
            end.synchronize()
            found.append(self.cuda.get_elapsed_time(begin, end) * 1e3 / REPEATS)
        return statistics.median(found), min(found), max(found)


def random(ops, shape, dtype=BF16):
    """Normal numbers on the device, of 16 MB made on the host and repeated."""
    size = int(np.prod(shape))
    some = np.random.default_rng(0).normal(size=min(size, 1 << 22)).astype(np.float32)
    host = np.resize(some, shape).astype(dtype)
    return ops.from_host(host)


class Copy:
    """Device to device; calling it gives the bandwidth (bytes/s read and written) of a copy that moves `moved` bytes."""

    def __init__(self, ops, time):
        self.ops, self.time, self.arrays = ops, time, [ops.empty((1 << 30,), np.uint8) for _ in range(2)]

    def __call__(self, moved):
        runtime, pointers = self.ops.device.runtime, [array.data.ptr for array in self.arrays]
        return moved / self.time(lambda: runtime.memcpyAsync(*pointers, int(moved) // 2, runtime.memcpyDeviceToDevice, self.ops.device.stream.ptr))[0] * 1e6


def product_rate(ops, time):
    """FLOP/s of a bfloat16 matrix product."""
    n = 8192
    x, y, z = random(ops, (n, n)), random(ops, (n, n)), ops.empty((n, n), BF16)
    return 2 * n**3 / time(lambda: ops.matmul(x, y.T, out=z))[0] * 1e6


def cases(ops):
    """name -> (work, bytes that must move)"""
    rows, width, vocabulary = 32768, 768, 50257
    x, dy, other = (random(ops, (rows, width)) for _ in range(3))
    weight, bias = random(ops, (width,)), random(ops, (width,))
    sums = [ops.zeros((width,), np.float32) for _ in range(2)]
    y, mean, rstd = ops.layer_norm(x, weight, bias, 1e-5)
    size = x.nbytes
    yield "LayerNorm forward", lambda: ops.layer_norm(x, weight, bias, 1e-5), 2 * size
    yield "LayerNorm forward with residual", lambda: ops.layer_norm(x, weight, bias, 1e-5, other), 4 * size
    yield "LayerNorm backward", lambda: ops.layer_norm_backward(dy, x, weight, mean, rstd, *sums), 3 * size
    yield "LayerNorm backward with residual", lambda: ops.layer_norm_backward(dy, x, weight, mean, rstd, *sums, other), 4 * size
    yield "RMSNorm forward", lambda: ops.rms_norm(x, weight, 1e-5), 2 * size
    yield "RMSNorm backward", lambda: ops.rms_norm_backward(dy, x, weight, rstd, sums[0]), 3 * size
    wide_x, wide_dy, wide_weight = random(ops, (8192, 2048)), random(ops, (8192, 2048)), random(ops, (2048,))
    wide_sum, wide_rstd = ops.zeros((2048,), np.float32), ops.rms_norm(wide_x, wide_weight, 1e-5)[1]
    yield "RMSNorm forward, width 2048", lambda: ops.rms_norm(wide_x, wide_weight, 1e-5), 2 * wide_x.nbytes
    yield "RMSNorm backward, width 2048", lambda: ops.rms_norm_backward(wide_dy, wide_x, wide_weight, wide_rstd, wide_sum), 3 * wide_x.nbytes
    yield "add", lambda: ops.add(x, other), 3 * size
    hidden, dhidden, hidden_sums = random(ops, (rows, 4 * width)), random(ops, (rows, 4 * width)), ops.zeros((4 * width,), np.float32)
    yield "GELU forward", lambda: ops.gelu(hidden), 2 * hidden.nbytes
    yield "GELU backward", lambda: ops.gelu_backward(dhidden, hidden), 3 * hidden.nbytes
    yield "column sums", lambda: ops.sum_rows(dhidden, hidden_sums), hidden.nbytes
    halves = [hidden[:, :2 * width], hidden[:, 2 * width:], dhidden[:, :2 * width], dhidden[:, 2 * width:]]
    slope = random(ops, (rows, 2 * width))
    yield "SwiGLU forward", lambda: ops.swiglu(*halves[:2]), 3 * slope.nbytes
    yield "SwiGLU backward", lambda: ops.swiglu_backward(slope, *halves), 5 * slope.nbytes
    qkv = random(ops, (32, 1024, 36, 64))
    tables = [ops.from_host(np.ones((1024, 32), np.float32)) for _ in range(2)]
    yield "RoPE", lambda: ops.rope(qkv[:, :, :24], *tables), 2 * qkv.nbytes * 2 // 3
    del qkv, hidden, dhidden, halves, slope
    query, keys, values = random(ops, (8, 1, 32, 128)), random(ops, (8, 8192, 8, 128)), random(ops, (8, 8192, 8, 128))
    yield "attention of 1 query over 8,192 keys", lambda: ops.attention(query, keys, values, 0.1), keys.nbytes + values.nbytes
    del keys, values
    ids = ops.from_host(np.random.default_rng(0).zipf(1.3, rows) % vocabulary)
    table_, dtable = random(ops, (vocabulary, width)), ops.zeros((vocabulary, width), np.float32)
    yield "embedding forward", lambda: ops.embedding(ids, table_), 2 * size
    yield "embedding backward", lambda: ops.embedding_backward(ids, dy, dtable), size + 2 * dtable.nbytes * min(1.0, len(np.unique(ops.to_host(ids))) / vocabulary)
    logits = ops.padded((8192, vocabulary), BF16)
    ops.fill(logits, 0.5)
    targets, scale, loss = ids[:8192], ops.from_host(np.full(8192, 1e-4, np.float32)), ops.zeros((1,), np.float64)
    yield "classifier", lambda: ops.cross_entropy(logits, targets, scale, loss), 2 * logits.nbytes
    del logits
    n = 124_439_808
    updates = [Update(*(ops.zeros((n,), np.float32) for _ in range(4)), ops.zeros((n,), BF16), 0.1)]
    yield "AdamW, 124M", lambda: ops.adamw(updates, 1e-3, 0.9, 0.95, 1e-8, 3, 1.0), n * (4 * 7 + 2)
    yield "global norm, 124M", lambda: ops.square_sum([updates[0].grad]), n * 4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    ops = open_backend("gpu")
    time = Timer(ops)
    copy_of, product, rows = Copy(ops, time), product_rate(ops, time), []
    copy = copy_of(2 << 30)
    for name, work, moved in cases(ops):
        middle, least, most = time(work)
        rate = moved / middle * 1e6
        rows.append({"operation": name, "microseconds": middle, "least": least, "most": most, "GB_per_second": rate / 1e9,
                     "share_of_copy": rate / copy, "share_of_equal_copy": rate / copy_of(min(moved, 2 << 30))})
    result = about(ops) | {"copy_GB_per_second": copy / 1e9, "bfloat16_product_TFLOP_per_second": product / 1e12, "operations": rows}
    print(f"copy {copy / 1e9:.0f} GB/s, bfloat16 product {product / 1e12:.0f} TFLOP/s ({ops.device.name})")
    print(table(rows))
    save(arguments.out, result)


if __name__ == "__main__":
    main()
