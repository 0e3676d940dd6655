"""Element by element on the GPU: sums, activations, rotations, dropout, copies."""

import numpy as np

from mpillm.backend import philox
from mpillm.backend.types import wide_of

BLOCK, PARTS_BLOCK = 256, 1024     # threads
WAVES = 16                  # blocks of a multiprocessor at most: enough to hide latency, few enough to loop
CODES = {"float32": 1, "float64": 2, "bfloat16": 3, "float16": 4, "int64": 5}   # of cast.cu
INT64, UINT64 = 1 << 63, 1 << 64
FLOAT32 = np.dtype(np.float32)
ROW_PARTS = 64              # of a column sum


def row_stride(x):
    """Elements from row to row of a 2-D array with contiguous rows."""
    if x.shape[1] > 1 and x.strides[1] != x.itemsize:
        raise ValueError(f"an array of shape {x.shape} and strides {x.strides}: its rows are not contiguous")
    return x.strides[0] // x.itemsize if x.shape[0] > 1 else x.shape[1]


def four(values, filler):
    """A tuple of four: `values`, led by as many fillers as are missing."""
    return (filler,) * (4 - len(values)) + tuple(values)


class PointwiseOps:
    """`reference.Reference` defines the operations."""

    def _grid(self, items):
        """Blocks for so many items of a thread each."""
        return max(1, min(-(-items // BLOCK), WAVES * self.device.multiprocessors))

    def _run(self, file, kernel, x, items, *args):
        self.device.launch(file, kernel, x.dtype, self._grid(items), BLOCK, args)

    # -- memory -------------------------------------------------------------------------------------------------

    def copy(self, dst, src):
        if dst.shape != src.shape:
            raise ValueError(f"a copy from shape {src.shape} to {dst.shape}")
        if not dst.size:
            return
        codes = {"FROM": CODES[src.dtype.name], "TO": CODES[dst.dtype.name]}
        if dst.flags.c_contiguous and src.flags.c_contiguous:
            self.device.launch("cast", "copy_flat", FLOAT32, self._grid(-(-dst.size // 8)), BLOCK, (dst, src, dst.size), **codes)
            return
        shape, strides = _joined(dst.shape, dst.strides, src.strides)
        sizes = [four([stride // array.itemsize for stride in each], 0) for array, each in zip((dst, src), strides)]
        self.device.launch("cast", "copy_strided", FLOAT32, self._grid(dst.size), BLOCK, (dst, src, *four(shape, 1), *sizes[0], *sizes[1]), **codes)

    def fill(self, x, value):
        if not x.size:
            return
        code = CODES[x.dtype.name]
        if x.flags.c_contiguous:
            if value == 0:
                self.device.clear(x)
                return
            self.device.launch("cast", "fill_flat", FLOAT32, self._grid(x.size), BLOCK, (x, float(value), x.size), FROM=code, TO=code)
            return
        strides = [stride // x.itemsize for stride in x.strides]
        args = x, float(value), *four(x.shape, 1), *four(strides, 0)
        self.device.launch("cast", "fill_strided", FLOAT32, self._grid(x.size), BLOCK, args, FROM=code, TO=code)

    # -- sums ---------------------------------------------------------------------------------------------------

    def add(self, y, x):
        if y.shape != x.shape:
            if x.shape != y.shape[1:]:
                raise ValueError(f"add {x.shape} to {y.shape}")
            self.add_bias(y.reshape(y.shape[0], -1), x.reshape(-1))
            return
        if not y.size:
            return
        if not (y.flags.c_contiguous and x.flags.c_contiguous):
            whole = self.device.empty(y.shape, y.dtype)
            self.copy(whole, y)
            if not x.flags.c_contiguous:
                strided, x = x, self.device.empty(x.shape, x.dtype)
                self.copy(x, strided)
            self.add(whole, x)
            self.copy(y, whole)
            return
        self._run("add", "add", y, y.size * y.itemsize // 16 + 1, y, x, y.size)

    def add_bias(self, y, bias):
        if y.size:
            self._run("add", "add_bias", y, y.size * y.itemsize // 16 + 1, y, row_stride(y), bias, *y.shape)

    def sum_rows(self, dy, dbias):
        rows, width = dy.shape
        if not dy.size:
            return
        across = -(-width // (32 * (16 // dy.itemsize)))
        count = max(1, min(ROW_PARTS, -(-rows // 32), -(-4 * self.device.multiprocessors // across)))
        parts = self.device.empty((count, width), wide_of(dy.dtype))
        self.device.launch("add", "sum_rows", dy.dtype, (across, count), BLOCK, (dy, row_stride(dy), parts, rows, width))
        self.device.launch("add", "add_parts", dy.dtype, -(-width // 32), PARTS_BLOCK, (dbias, parts, count, width))

    # -- activations --------------------------------------------------------------------------------------------

    def gelu(self, x, bias=None):
        y = self.device.empty(x.shape, x.dtype)
        if x.size:
            self._run("gelu", "gelu", x, x.size * x.itemsize // 16 + 1, y, x, bias, x.shape[0], x.size // x.shape[0])
        return y

    def gelu_backward(self, dy, x):
        if x.size:
            self._run("gelu", "gelu_backward", x, x.size * x.itemsize // 16 + 1, dy, x, x.size)
        return dy

    def swiglu(self, gate, up):
        y = self.device.empty(gate.shape, gate.dtype)
        if y.size:
            self._run("swiglu", "swiglu", y, y.size * y.itemsize // 16 + 1, y, gate, row_stride(gate), up, row_stride(up), *y.shape)
        return y

    def swiglu_backward(self, dy, gate, up, dgate, dup):
        if dy.size:
            views = [item for x in (gate, up, dgate, dup) for item in (x, row_stride(x))]
            self._run("swiglu", "swiglu_backward", dy, dy.size * dy.itemsize // 16 + 1, dy, *views, *dy.shape)

    # -- positions and chance -----------------------------------------------------------------------------------

    def rope(self, x, cos, sin, inverse=False):
        if not x.size:
            return
        strides = [stride // x.itemsize for stride in x.strides[:3]]
        batch, tokens, heads, width = x.shape
        self._run("rope", "rope", x, x.size * x.itemsize // 32 + 1, x, *strides, cos, sin, int(inverse), batch, tokens, heads, width // 2)

    def dropout(self, x, mask):
        rows, width = x.shape
        if not x.size:
            return
        samples, positions = [self.device.constant(np.asarray(array, np.int64)) for array in (mask.samples, mask.positions)]
        key = (mask.key + INT64) % UINT64 - INT64
        self._run("dropout", "dropout", x, rows * (width // 4 + 2), x, key, int(philox.keep_threshold(mask.rate)),
                  1.0 / (1.0 - mask.rate), mask.step, samples, positions, mask.first, rows, width)


def _joined(shape, *strides):
    """Shape and strides of the same elements in four dims or fewer: neighbours that lie one after the other are joined."""
    if len(shape) <= 4:
        return shape, strides
    for dim in range(len(shape) - 1):
        if all(each[dim] == each[dim + 1] * shape[dim + 1] for each in strides):
            joined = shape[:dim] + (shape[dim] * shape[dim + 1],) + shape[dim + 2:]
            return _joined(joined, *(each[:dim] + each[dim + 1:] for each in strides))
    raise ValueError(f"a copy of shape {shape} with strides {strides}: at most four dims that cannot be joined")
