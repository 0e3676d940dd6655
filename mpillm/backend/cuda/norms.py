"""LayerNorm and RMSNorm on the GPU."""

from mpillm.backend.types import wide_of

BLOCK, BLOCK_WARPS, PARTS_BLOCK = 256, 8, 1024
GENERAL_WAVES = 16          # blocks of a multiprocessor at most
BACKWARD_WAVES = {1: 3, 2: 3, 3: 2, 4: 1, 8: 1}     # by PACKS: about as many as have room at a time, as each leaves sums of columns
# (WARPS, PACKS) of norm.cuh: the first that has room for a row is taken. More warps a row wait for each other, and the
# backward has no registers for many packs.
FORWARD = (1, 1), (1, 2), (1, 3), (1, 4), (1, 8), (2, 8), (4, 8), (8, 8)
BACKWARD = (1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (4, 2), (4, 3), (8, 2), (8, 3), (8, 4), (8, 8)
GENERAL = {"WARPS": 1, "PACKS": 0}


def form_of(forms, width, itemsize, arrays):
    """{WARPS, PACKS} for rows of `width`; PACKS 0 where only the general form can do them."""
    packs, rest = divmod(width * itemsize, 16)
    if rest or any(x is not None and x.data.ptr % 16 for x in arrays):
        return GENERAL
    return next(({"WARPS": warps, "PACKS": each} for warps, each in forms if packs <= 32 * warps * each), GENERAL)


class NormOps:
    """`reference.Reference` defines the operations."""

    def rms_norm(self, x, weight, eps, residual=None):
        y, _, rstd = self._norm("rms_norm", x, weight, None, eps, residual)
        return y, rstd

    def rms_norm_backward(self, dy, x, weight, rstd, dweight, residual=None):
        return self._norm_backward("rms_norm", dy, x, weight, None, rstd, dweight, None, residual)

    def layer_norm(self, x, weight, bias, eps, residual=None):
        return self._norm("layer_norm", x, weight, bias, eps, residual)

    def layer_norm_backward(self, dy, x, weight, mean, rstd, dweight, dbias, residual=None):
        return self._norm_backward("layer_norm", dy, x, weight, mean, rstd, dweight, dbias, residual)

    def _norm(self, file, x, weight, bias, eps, residual):
        (rows, width), wide = x.shape, wide_of(x.dtype)
        y, rstd = self.device.empty(x.shape, x.dtype), self.device.empty((rows,), wide)
        mean = None if bias is None else self.device.empty((rows,), wide)
        if x.size:
            form = form_of(FORWARD, width, x.itemsize, (x, weight, bias, residual))
            grid = -(-rows * form["WARPS"] // BLOCK_WARPS)
            args = y, mean, rstd, x, residual, weight, bias, float(eps), rows, width
            self.device.launch(file, "forward", x.dtype, grid, BLOCK, args, **form)
        return y, mean, rstd

    def _norm_backward(self, file, dy, x, weight, mean, rstd, dweight, dbias, residual):
        (rows, width), wide = x.shape, wide_of(x.dtype)
        dx = self.device.empty(x.shape, x.dtype)
        if not x.size:
            return dx
        sums = 1 if dbias is None else 2
        form = form_of(BACKWARD, width, x.itemsize, (dy, x, weight, residual))
        if form["PACKS"]:
            groups = BLOCK_WARPS // form["WARPS"]
            count = min(-(-rows // groups), BACKWARD_WAVES[form["PACKS"]] * self.device.multiprocessors)
            parts = self.device.empty((count, sums, width), wide)
            args = dx, parts, dy, x, residual, weight, mean, rstd, rows, width
            self.device.launch(file, "backward", x.dtype, count, BLOCK, args, shared=groups * width * wide.itemsize, **form)
        else:
            grid = min(-(-rows // BLOCK_WARPS), GENERAL_WAVES * self.device.multiprocessors)
            self.device.launch(file, "backward", x.dtype, grid, BLOCK, (dx, dy, x, residual, weight, mean, rstd, rows, width), **form)
            count = min(rows, 64)
            parts = self.device.empty((count, sums, width), wide)
            self.device.launch(file, "column_sums", x.dtype, (-(-width // BLOCK), count), BLOCK, (parts, dy, x, mean, rstd, rows, width), **form)
        self.device.launch(file, "add_parts", x.dtype, (-(-width // 32), sums), PARTS_BLOCK, (dweight, dbias, parts, count, width), **form)
        return dx
