"""The CPU backend: the operations of `Reference` by C++ kernels and by BLAS called directly.

Each method checks that its arrays have the form the kernel reads; others, and everything where no kernels are built,
take the NumPy form.
"""

import ctypes

import numpy as np

from mpillm.backend import blas, library, memory, philox, threads
from mpillm.backend.reference import Reference

PLAIN = (np.dtype(np.float32), np.dtype(np.float64))
MASK64 = 0xFFFFFFFFFFFFFFFF


def address(x):
    return x.__array_interface__["data"][0]


def is_plain(dtype, *arrays):
    """Whether all are contiguous and of this type."""
    return all(x.dtype == dtype and x.flags.c_contiguous for x in arrays)


def row_stride(x, dtype):
    """Elements from row to row of a 2-D array whose rows are contiguous; None for any other."""
    if x.ndim != 2 or x.dtype != dtype:
        return None
    down, across = x.strides
    size = x.itemsize
    if x.shape[1] > 1 and across != size:
        return None
    if x.shape[0] <= 1:
        return x.shape[1]
    return down // size if down >= 0 and down % size == 0 else None


def head_strides(x):
    """(batch, token, head) strides in elements of a (B, T, H, D) view with contiguous last dimension, or None."""
    size = x.itemsize
    if (x.shape[3] > 1 and x.strides[3] != size) or any(stride % size for stride in x.strides[:3]):
        return None
    return [stride // size for stride in x.strides[:3]]


def as_int64(x):
    return np.ascontiguousarray(x, np.int64)


class Cpu(Reference):
    """The operations on the CPU, as fast as it is built for.

    Attributes
    ----------
    note : one line for the user when something keeps this process slow (kernels not built, ...), else ""
    """

    name = "cpu"

    def __init__(self):
        memory.keep_freed_pages()
        self.kernels, note = library.load()
        self.note = "; ".join(line for line in (note, threads.slow_blas_note()) if line)
        self.blas = blas.find()

    def passing(self, shape, dtype):
        return memory.passing(shape, dtype)

    def set_threads(self, num_threads):
        super().set_threads(num_threads)
        if self.kernels:
            self.kernels["set_threads"](num_threads)

    # -- products and sums --------------------------------------------------------------------------------------

    def matmul(self, a, b, out=None, accumulate=False):
        if out is None:
            out = np.empty((a.shape[0], b.shape[1]), a.dtype)
        if self.blas is not None and self.blas.matmul(a, b, out, accumulate):
            return out
        return super().matmul(a, b, out, accumulate)

    def add(self, y, x):
        kernel = self.kernels.get(("add", y.dtype))
        if kernel is None or y.shape != x.shape or not is_plain(y.dtype, y, x):
            return super().add(y, x)
        kernel(address(y), address(x), y.size)

    def add_bias(self, y, bias):
        kernel, stride = self.kernels.get(("add_bias", y.dtype)), row_stride(y, y.dtype)
        if kernel is None or stride is None or not is_plain(y.dtype, bias):
            return super().add_bias(y, bias)
        kernel(address(y), stride, address(bias), *y.shape)

    def sum_rows(self, dy, dbias):
        kernel, stride = self.kernels.get(("sum_rows", dy.dtype)), row_stride(dy, dy.dtype)
        if kernel is None or stride is None or not is_plain(dy.dtype, dbias):
            return super().sum_rows(dy, dbias)
        kernel(address(dy), stride, address(dbias), *dy.shape)

    # -- norms --------------------------------------------------------------------------------------------------

    def rms_norm(self, x, weight, eps, residual=None):
        kernel = self.kernels.get(("rms_norm", x.dtype))
        if kernel is None or not is_plain(x.dtype, x, weight):
            return super().rms_norm(x, weight, eps, residual)
        if residual is not None:
            self.add(x, residual)
        y, rstd = np.empty_like(x), np.empty(len(x), x.dtype)
        kernel(address(y), address(rstd), address(x), address(weight), eps, *x.shape)
        return y, rstd

    def rms_norm_backward(self, dy, x, weight, rstd, dweight, residual=None):
        kernel = self.kernels.get(("rms_norm_backward", x.dtype))
        arrays = dweight, dy, x, weight, rstd
        if kernel is None or not is_plain(x.dtype, *arrays):
            return super().rms_norm_backward(dy, x, weight, rstd, dweight, residual)
        dx = np.empty_like(x)
        kernel(address(dx), *map(address, arrays), *x.shape)
        return self._plus(dx, residual)

    def _plus(self, dx, residual):
        if residual is not None:
            self.add(dx, residual)
        return dx

    def layer_norm(self, x, weight, bias, eps, residual=None):
        kernel = self.kernels.get(("layer_norm", x.dtype))
        if kernel is None or not is_plain(x.dtype, x, weight, bias):
            return super().layer_norm(x, weight, bias, eps, residual)
        if residual is not None:
            self.add(x, residual)
        y, mean, rstd = np.empty_like(x), np.empty(len(x), x.dtype), np.empty(len(x), x.dtype)
        kernel(*map(address, (y, mean, rstd, x, weight, bias)), eps, *x.shape)
        return y, mean, rstd

    def layer_norm_backward(self, dy, x, weight, mean, rstd, dweight, dbias, residual=None):
        kernel = self.kernels.get(("layer_norm_backward", x.dtype))
        arrays = dweight, dbias, dy, x, weight, mean, rstd
        if kernel is None or not is_plain(x.dtype, *arrays):
            return super().layer_norm_backward(dy, x, weight, mean, rstd, dweight, dbias, residual)
        dx = np.empty_like(x)
        kernel(address(dx), *map(address, arrays), *x.shape)
        return self._plus(dx, residual)

    # -- pointwise ----------------------------------------------------------------------------------------------

    def rope(self, x, cos, sin, inverse=False):
        kernel, strides = self.kernels.get(("rope", x.dtype)), head_strides(x)
        if kernel is None or strides is None or not is_plain(x.dtype, cos, sin):
            return super().rope(x, cos, sin, inverse)
        kernel(address(x), *strides, address(cos), address(sin), inverse, *x.shape)

    def gelu(self, x, bias=None):
        kernel = self.kernels.get(("gelu", x.dtype))
        if kernel is None or not is_plain(x.dtype, x) or (bias is not None and not is_plain(x.dtype, bias)):
            return super().gelu(x, bias)
        y = np.empty_like(x)
        kernel(address(y), address(x), None if bias is None else address(bias), len(x), x.size // max(1, len(x)))
        return y

    def gelu_backward(self, dy, x):
        kernel = self.kernels.get(("gelu_backward", x.dtype))
        if kernel is None or not is_plain(x.dtype, dy, x):
            return super().gelu_backward(dy, x)
        kernel(address(dy), address(x), x.size)
        return dy

    def swiglu(self, gate, up):
        kernel = self.kernels.get(("swiglu", gate.dtype))
        strides = row_stride(gate, gate.dtype), row_stride(up, gate.dtype)
        if kernel is None or None in strides:
            return super().swiglu(gate, up)
        y = np.empty(gate.shape, gate.dtype)
        kernel(address(y), address(gate), strides[0], address(up), strides[1], *gate.shape)
        return y

    def swiglu_backward(self, dy, gate, up, dgate, dup):
        kernel = self.kernels.get(("swiglu_backward", gate.dtype))
        rows = [(x, row_stride(x, gate.dtype)) for x in (gate, up, dgate, dup)]
        if kernel is None or not is_plain(gate.dtype, dy) or any(stride is None for _, stride in rows):
            return super().swiglu_backward(dy, gate, up, dgate, dup)
        kernel(address(dy), *(value for x, stride in rows for value in (address(x), stride)), *gate.shape)

    def dropout(self, x, mask):
        kernel, samples, positions = self.kernels.get(("dropout", x.dtype)), as_int64(mask.samples), as_int64(mask.positions)
        if kernel is None or not is_plain(x.dtype, x) or not samples.shape == positions.shape == x.shape[:1]:
            return super().dropout(x, mask)
        kernel(
            address(x), mask.key & MASK64, int(philox.keep_threshold(mask.rate)), 1.0 / (1.0 - mask.rate),
            mask.step & 0xFFFFFFFF, address(samples), address(positions), mask.first, *x.shape,
        )  # fmt: skip

    def scale_rows(self, x, scale):
        kernel = self.kernels.get(("scale_rows", x.dtype))
        if kernel is None or not is_plain(x.dtype, x, scale):
            return super().scale_rows(x, scale)
        kernel(address(x), address(scale), *x.shape)

    def row_dot(self, a, b):
        kernel = self.kernels.get(("row_dot", a.dtype))
        if kernel is None or not is_plain(a.dtype, a, b):
            return super().row_dot(a, b)
        y = np.empty(len(a), a.dtype)
        kernel(address(y), address(a), address(b), *a.shape)
        return y

    # -- attention ----------------------------------------------------------------------------------------------

    def attention(self, q, k, v, scale, causal=True, dropout=None):
        kernel = self.kernels.get(("attention", q.dtype))
        (batch, queries, heads, width), (keys, kv_heads) = q.shape, k.shape[1:3]
        out, lse = np.empty(q.shape, q.dtype), np.empty((batch, heads, queries), q.dtype)
        views = out, q, k, v
        strides = [head_strides(x) for x in views]
        if kernel is None or None in strides or any(x.dtype != q.dtype for x in views):
            return super().attention(q, k, v, scale, causal, dropout)
        sizes = np.array([batch, queries, keys, heads, kv_heads, width, causal], np.int64)
        strides = np.array(strides, np.int64)
        dropped = probability_dropout(dropout, keys)
        kernel(
            address(out), address(lse), address(q), address(k), address(v), scale,
            address(sizes), address(strides), ctypes.addressof(dropped),
        )  # fmt: skip
        return out, lse

    def attention_backward(self, dout, q, k, v, out, lse, dq, dk, dv, scale, causal=True, dropout=None):
        kernel = self.kernels.get(("attention_backward", q.dtype))
        views, lse = (dout, q, k, v, out, dq, dk, dv), np.ascontiguousarray(lse)
        strides = [head_strides(x) for x in views]
        if kernel is None or None in strides or not is_plain(q.dtype, lse) or any(x.dtype != q.dtype for x in views):
            return super().attention_backward(dout, q, k, v, out, lse, dq, dk, dv, scale, causal, dropout)
        sizes = np.array([*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], causal], np.int64)
        strides = np.array(strides, np.int64)
        dropped = probability_dropout(dropout, k.shape[1])
        arrays = dout, q, k, v, out, lse, dq, dk, dv
        kernel(*map(address, arrays), scale, address(sizes), address(strides), ctypes.addressof(dropped))

    def attention_merge(self, out, lse, part_out, part_lse):
        kernel, views = self.kernels.get(("attention_merge", out.dtype)), (out, lse, part_out, part_lse)
        strides = [head_strides(x if x.ndim == 4 else x[..., None]) for x in views]
        if kernel is None or None in strides or any(x.dtype != out.dtype for x in views):
            return super().attention_merge(out, lse, part_out, part_lse)
        sizes, strides = np.array(out.shape, np.int64), np.array(strides, np.int64)
        kernel(*map(address, views), address(sizes), address(strides))

    # -- vocabulary ---------------------------------------------------------------------------------------------

    def cross_entropy_stats(self, logits, targets, first):
        kernel, stride = self.kernels.get(("cross_entropy_stats", logits.dtype)), row_stride(logits, logits.dtype)
        if kernel is None or stride is None:
            return super().cross_entropy_stats(logits, targets, first)
        targets = as_int64(targets)
        stats = np.empty((3, len(logits)), logits.dtype)
        kernel(address(logits), stride, address(targets), first, *map(address, stats), *logits.shape)
        return tuple(stats)

    def cross_entropy_gradient(self, exps, targets, factor, coefficient, first):
        kernel, stride = self.kernels.get(("cross_entropy_gradient", exps.dtype)), row_stride(exps, exps.dtype)
        if kernel is None or stride is None or not is_plain(exps.dtype, factor, coefficient):
            return super().cross_entropy_gradient(exps, targets, factor, coefficient, first)
        targets = as_int64(targets)
        kernel(address(exps), stride, address(targets), address(factor), address(coefficient), first, *exps.shape)

    def embedding(self, ids, table, first=0):
        kernel, stride = self.kernels.get(("embedding", table.dtype)), row_stride(table, table.dtype)
        if kernel is None or stride is None:
            return super().embedding(ids, table, first)
        ids = as_int64(ids)
        y = np.empty((len(ids), table.shape[1]), table.dtype)
        kernel(address(y), address(ids), address(table), stride, first, len(ids), *table.shape)
        return y

    def embedding_backward(self, ids, dy, dtable, first=0):
        kernel, stride = self.kernels.get(("embedding_backward", dtable.dtype)), row_stride(dtable, dtable.dtype)
        if kernel is None or stride is None or not is_plain(dtable.dtype, dy):
            return super().embedding_backward(ids, dy, dtable, first)
        ids = as_int64(ids)
        kernel(address(dtable), stride, address(ids), address(dy), first, len(ids), *dtable.shape)

    def add_rows(self, y, rows, x, scale=None):
        kernel, stride = self.kernels.get(("add_rows", y.dtype)), row_stride(y, y.dtype)
        arrays = (x,) if scale is None else (x, scale)
        if kernel is None or stride is None or not is_plain(y.dtype, *arrays):
            return super().add_rows(y, rows, x, scale)
        rows = as_int64(rows)
        kernel(address(y), stride, address(rows), address(x), None if scale is None else address(scale), len(rows), *y.shape)

    # -- optimizer, initialisation, checks ----------------------------------------------------------------------

    def _adamw(self, weight, grad, moment1, moment2, rate, beta1, beta2, eps, decay, step, scale):
        kernel = self.kernels.get(("adamw", weight.dtype))
        arrays = weight, grad, moment1, moment2
        if kernel is None or not is_plain(weight.dtype, *arrays):
            return super()._adamw(weight, grad, moment1, moment2, rate, beta1, beta2, eps, decay, step, scale)
        pace, correction = rate / (1.0 - beta1**step), (1.0 - beta2**step) ** -0.5
        kernel(*map(address, arrays), beta1, beta2, 1.0 - rate * decay, pace, correction, eps, scale, weight.size)

    def _square_sum(self, x):
        kernel = self.kernels.get(("square_sum", x.dtype))
        if kernel is None or not is_plain(x.dtype, x):
            return super()._square_sum(x)
        return kernel(address(x), x.size)

    def normal(self, out, key, row, column, columns, std):
        kernel, stride = self.kernels.get(("normal", out.dtype)), row_stride(out, out.dtype)
        if kernel is None or stride is None:
            return super().normal(out, key, row, column, columns, std)
        kernel(address(out), stride, key & MASK64, row, column, std, *out.shape)

    def tensor_hash(self, array, row, column, columns):
        array = np.atleast_2d(array)
        kernel, stride = self.kernels.get("tensor_hash"), row_stride(array, array.dtype)
        if kernel is None or stride is None or array.dtype.itemsize not in (4, 8):
            return super().tensor_hash(array, row, column, columns)
        words = array.dtype.itemsize // 4
        start = (row * columns + column) * words
        return kernel(address(array), stride * words, start, columns * words, len(array), array.shape[1] * words)


def probability_dropout(mask, keys):
    """The dropout of attention over `keys` keys for the kernels; the arrays live as long as the structure."""
    if mask is None:
        return library.ProbabilityDropout()
    samples, positions = as_int64(mask.samples), as_int64(mask.positions)
    result = library.ProbabilityDropout(
        mask.key & MASK64, int(philox.keep_threshold(mask.rate)), 1.0 / (1.0 - mask.rate), mask.step & 0xFFFFFFFF,
        address(samples), address(positions), mask.first, mask.first_key, keys if mask.keys is None else mask.keys,
    )  # fmt: skip
    result.arrays = samples, positions
    return result
