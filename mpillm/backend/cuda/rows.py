"""Rows of a mixture of experts on the GPU."""

from mpillm.backend.cuda.pointwise import row_stride
from mpillm.backend.types import wide_of


class RowOps:
    """`reference.Reference` defines the operations."""

    def add_rows(self, y, rows, x, scale=None):
        if x.dtype != y.dtype:
            raise ValueError(f"add_rows of {x.dtype} to {y.dtype}: expected one type")
        n, width = x.shape
        if not x.size or not y.size:
            return
        order = self.row_order(rows, 0, len(y))
        grid = n, min(64, -(-width // 128))
        args = y, row_stride(y), order, x, scale, n, len(y), width
        self.device.launch("rows", "add_rows", y.dtype, grid, min(128, -(-width // 32) * 32), args)

    def scale_rows(self, x, scale):
        if x.size:
            self._run("rows", "scale_rows", x, x.size * x.itemsize // 16 + 1, x, scale, *x.shape)

    def row_dot(self, a, b):
        products = self.device.empty((len(a),), wide_of(a.dtype))
        if len(a):
            grid = min(-(-len(a) // 8), 16 * self.device.multiprocessors)
            self.device.launch("rows", "row_dot", a.dtype, grid, 256, (products, a, b, *a.shape))
        return products
