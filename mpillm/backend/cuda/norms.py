"""LayerNorm and RMSNorm on the GPU."""

from mpillm.backend.types import wide_of

BLOCK, BLOCK_WARPS = 256, 8
GENERAL_WAVES, FORWARD_WAVES, BACKWARD_WAVES = 16, 4, {4: 2, 8: 1}      # blocks of a multiprocessor at most; BACKWARD_WAVES by PACKS, else 3
MOST_PACKS = 4                              # of a lane, before a row takes more warps; 8 where it has all of a block


def form_of(width, itemsize, arrays):
    """{WARPS, PACKS} of norm.cuh for rows of `width`; PACKS 0 where only the general form can do them."""
    packs = width * itemsize // 16
    if width * itemsize % 16 or not packs or any(x is not None and x.data.ptr % 16 for x in arrays):
        return {"WARPS": 1, "PACKS": 0}
    warps = 1
    while warps < BLOCK_WARPS and packs > 32 * warps * MOST_PACKS:
        warps *= 2
    each = -(-packs // (32 * warps))
    if each > MOST_PACKS:
        each = 8 if each <= 8 else 0
    elif warps > 1:
        each = max(3, each)     # fewer kernels to compile
    return {"WARPS": warps if each else 1, "PACKS": each}


def shared_bytes(form, arrays):
    """Of a block, for its rows of so many arrays: two stages where a lane has few packs."""
    return 16 * BLOCK * form["PACKS"] * arrays * (2 if form["PACKS"] <= 4 else 1)


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
            form = form_of(width, x.itemsize, (x, weight, bias, residual))
            grid, shared = self._rows_at_once(form, rows, FORWARD_WAVES), shared_bytes(form, 1 if residual is None else 2)
            args = y, mean, rstd, x, residual, weight, bias, float(eps), rows, width
            self.device.launch(file, "forward", x.dtype, grid, BLOCK, args, shared=shared, **form)
        return y, mean, rstd

    def _rows_at_once(self, form, rows, waves):
        """Blocks: enough for all rows, at most `waves` a multiprocessor."""
        return min(-(-rows * form["WARPS"] // BLOCK_WARPS), waves * self.device.multiprocessors)

    def _norm_backward(self, file, dy, x, weight, mean, rstd, dweight, dbias, residual):
        (rows, width), wide = x.shape, wide_of(x.dtype)
        dx = self.device.empty(x.shape, x.dtype)
        if not x.size:
            return dx
        sums = 1 if dbias is None else 2
        form = form_of(width, x.itemsize, (dy, x, weight, residual))
        if form["PACKS"]:
            count = self._rows_at_once(form, rows, BACKWARD_WAVES.get(form["PACKS"], 3))
            parts = self.device.empty((count, sums, width), wide)
            args = dx, parts, dy, x, residual, weight, mean, rstd, rows, width
            self.device.launch(file, "backward", x.dtype, count, BLOCK, args, shared=shared_bytes(form, 2 if residual is None else 3), **form)
        else:
            grid = self._rows_at_once(form, rows, GENERAL_WAVES)
            self.device.launch(file, "backward", x.dtype, grid, BLOCK, (dx, dy, x, residual, weight, mean, rstd, rows, width), **form)
            count = min(rows, 64)
            parts = self.device.empty((count, sums, width), wide)
            self.device.launch(file, "column_sums", x.dtype, (-(-width // BLOCK), count), BLOCK, (parts, dy, x, mean, rstd, rows, width), **form)
        self.device.launch(file, "add_parts", x.dtype, (-(-width // 32), sums), BLOCK, (dweight, dbias, parts, count, width), **form)
        return dx
