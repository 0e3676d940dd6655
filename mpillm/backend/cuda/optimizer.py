"""AdamW, global norms, initial weights and hashes on the GPU."""

import math
import operator

import numpy as np

# Elements of a chunk, which one block of a launch over many tensors takes: many more than a block starts with, and many chunks.
ADAMW_LENGTH, SQUARE_LENGTH = 1 << 13, 1 << 15
INT64, UINT64 = 1 << 63, 1 << 64


def signed(value):
    """An integer taken mod 2^64, as the two's complement that a kernel's long long holds."""
    return (value + INT64) % UINT64 - INT64


def cut(counts, length):
    """Chunks of tensors with `counts` elements: the tensor of each, (chunks,) int32, and the first of each tensor, (tensors,)."""
    chunks = -(-np.array(counts, np.int64) // length)
    return np.repeat(np.arange(len(counts), dtype=np.int32), chunks), np.cumsum(chunks) - chunks


class OptimizerOps:
    """What treats parameters as numbers in a row; `reference.Reference` defines the operations."""

    _listed = [], []    # the last list of updates, and its groups as `_groups` makes them

    def adamw(self, updates, rate, beta1, beta2, eps, step, scale):
        listed, groups = self._listed
        if len(listed) != len(updates) or not all(map(operator.is_, listed, updates)):
            groups = self._groups(updates)
            self._listed = list(updates), groups
        pace, correction = rate / (1.0 - beta1**step), 1.0 / math.sqrt(1.0 - beta2**step)
        scalars = [float(value) for value in (rate, beta1, beta2, eps, pace, correction, scale)]
        for dtype, tensors, owners in groups:
            self.device.launch("adamw", "adamw", dtype, owners.size, 256, (tensors, owners, ADAMW_LENGTH, *scalars))

    def _groups(self, updates):
        """Updates by the type of their values: that type, the tensors (n, 8) int64 and the owners of the chunks, on the device."""
        by_dtype = {}
        for update in updates:
            if update.weight.size:
                written = update.weight if update.value is None else update.value
                by_dtype.setdefault(written.dtype, []).append(update)
        return [(dtype, *self._tables(group)) for dtype, group in by_dtype.items()]

    def _tables(self, updates):
        owners, first_chunks = cut([update.weight.size for update in updates], ADAMW_LENGTH)
        rows = np.zeros((len(updates), 8), np.int64)
        for row, update in zip(rows, updates):
            row[:5] = [0 if array is None else array.data.ptr for array in update[:5]]
            row[5] = update.weight.size
        rows[:, 6] = first_chunks
        rows[:, 7] = np.array([update.decay for update in updates], np.float64).view(np.int64)
        return self.device.constant(rows), self.device.constant(owners)

    def square_sum(self, arrays):
        by_dtype = {}
        for array in arrays:
            if array.size:
                by_dtype.setdefault(array.dtype, []).append(array)
        if not by_dtype:
            return 0.0
        cuts = [cut([array.size for array in group], SQUARE_LENGTH) for group in by_dtype.values()]
        sums = self.device.empty((sum(owners.size for owners, _ in cuts),), np.float64)
        start = 0
        for (dtype, group), (owners, first_chunks) in zip(by_dtype.items(), cuts):
            rows = np.array([[array.data.ptr for array in group], [array.size for array in group], first_chunks], np.int64).T
            args = sums[start:], self.device.constant(rows), self.device.constant(owners), SQUARE_LENGTH
            self.device.launch("square_sum", "square_sum", dtype, owners.size, 256, args)
            start += owners.size
        total = self.device.empty((1,), np.float64)
        self.device.launch("square_sum", "add_sums", np.dtype(np.float64), 1, 1024, (total, sums, sums.size))
        return float(self.device.to_host(total)[0])

    def normal(self, out, key, row, column, columns, std):
        rows, width = out.shape
        counters = rows * ((column % 4 + width + 3) // 4)   # of four numbers each
        if out.size:
            args = out, out.strides[0] // out.itemsize, signed(key), row, column, float(std), rows, width
            self.device.launch("normal", "normal", out.dtype, -(-counters // 128), 128, args)

    def tensor_hash(self, array, row, column, columns):
        rows, width = array.shape if array.ndim == 2 else (1, array.size)
        if not array.size:
            return 0
        words = array.itemsize // 4
        blocks = min(8 * self.device.multiprocessors, rows * -(-width * words // 4096))
        sums, total = self.device.empty((blocks,), np.uint64), self.device.empty((1,), np.uint64)
        stride = array.strides[0] // 4 if array.ndim == 2 else 0
        launch, dtype = self.device.launch, np.dtype(np.float32)
        start = signed((row * columns + column) * words)
        launch("tensor_hash", "tensor_hash", dtype, blocks, 256, (sums, array, stride, start, columns * words, rows, width * words))
        launch("tensor_hash", "add_hashes", dtype, 1, 1024, (total, sums, blocks))
        return int(self.device.to_host(total)[0])
