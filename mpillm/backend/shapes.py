"""The data-free form of the backend: arrays have a shape and a type but no elements.

A real step run on it tells what the step needs: bytes alive at the same time, and FLOPs. So the memory plan and
`--dry-run` come from the code that trains, not from a second description of it.
"""

import contextlib
import functools
import math
import weakref

import numpy as np

from .arena import Arena
from .reference import Reference
from .types import wide_of


ENDLESS = 1 << 60   # bytes: more than any GPU has


class Place(bytearray):
    """Where all elements of an array lie; it dies with the array and its views, which takes the bytes off the account."""

    __slots__ = ("account", "size", "lies")     # a Shapes, bytes of the array, its place in the arena of a GPU

    def __del__(self):
        self.account.live -= self.size


@functools.cache
def _layout(shape, dtype):
    """bytes of an array, its strides, its type, and the memory of an element that is 1: nothing is divided by zero."""
    dtype = np.dtype(dtype)
    return int(math.prod(shape)) * dtype.itemsize, (0,) * len(shape), dtype, np.ones(1, dtype).tobytes()


@functools.cache
def _balanced(tokens, k, experts):
    """Memory of (tokens, k) int64: every expert is chosen by as many tokens as any other, or one more."""
    return (np.arange(tokens * k, dtype=np.int64) % experts).tobytes()


class Shapes(Reference):
    """
    Attributes
    ----------
    live, peak : int
        Bytes of the arrays that exist now, and the most that did at one time.
    flops : int
        Multiplications and additions of the matrix products and attentions so far.
    """

    name = "shapes"

    def __init__(self):
        self.live = self.peak = self.flops = 0

    # -- memory -------------------------------------------------------------------------------------------------

    def empty(self, shape, dtype):
        """An array whose elements all lie in one place; views of it keep its bytes counted as alive. `shape`: a tuple.

        Made and freed in 1.1 us; with `weakref.finalize` on the place it took 5 us.
        """
        size, strides, dtype, one = _layout(shape, dtype)
        place = Place(one)
        place.account, place.size = self, size
        self._count(size)
        return np.ndarray(shape, dtype, place, 0, strides)

    def _count(self, size):
        """`size` more bytes are alive; fewer, where it is negative."""
        self.live = live = self.live + size
        if live > self.peak:
            self.peak = live

    def zeros(self, shape, dtype):
        return self.empty(shape, dtype)

    def _like(self, x):
        return self.empty(x.shape, x.dtype)

    def from_host(self, array):
        return self._like(np.asarray(array))

    def copy(self, dst, src):
        _same(dst, src)

    def fill(self, x, value):
        pass

    # -- products and sums --------------------------------------------------------------------------------------

    def matmul(self, a, b, out=None, accumulate=False):
        (rows, inner), (other, columns) = a.shape, b.shape
        if inner != other:
            raise ValueError(f"matmul of {a.shape} and {b.shape}")
        self.flops += 2 * rows * inner * columns
        if out is None:
            return self.empty((rows, columns), a.dtype)
        if out.shape != (rows, columns):
            raise ValueError(f"matmul of {a.shape} and {b.shape} into {out.shape}")
        return out

    def add(self, y, x):
        if x.shape != y.shape and x.shape != y.shape[1:] and np.broadcast_shapes(y.shape, x.shape) != y.shape:
            raise ValueError(f"add {x.shape} to {y.shape}")

    add_bias = add

    def sum_rows(self, dy, dbias):
        _equal(dy.shape[1:], dbias.shape)

    # -- layers -------------------------------------------------------------------------------------------------

    def rms_norm(self, x, weight, eps, residual=None):
        return self._like(x), self.empty(x.shape[:1], wide_of(x.dtype))

    def rms_norm_backward(self, dy, x, weight, rstd, dweight, residual=None):
        _same(dy, x)
        return self._like(x)

    def layer_norm(self, x, weight, bias, eps, residual=None):
        wide = wide_of(x.dtype)
        return self._like(x), self.empty(x.shape[:1], wide), self.empty(x.shape[:1], wide)

    def layer_norm_backward(self, dy, x, weight, mean, rstd, dweight, dbias, residual=None):
        _same(dy, x)
        return self._like(x)

    def rope(self, x, cos, sin, inverse=False):
        _equal((x.shape[1], x.shape[3] // 2), cos.shape)

    def gelu(self, x, bias=None):
        return self._like(x)

    def gelu_backward(self, dy, x):
        _same(dy, x)
        return dy

    def swiglu(self, gate, up):
        _same(gate, up)
        return self._like(gate)

    def swiglu_backward(self, dy, gate, up, dgate, dup):
        _same(dy, gate)

    def dropout(self, x, mask):
        _equal((len(mask.samples), len(mask.positions)), (len(x), len(x)))

    def attention(self, q, k, v, scale, causal=True, dropout=None):
        b, t, h, d = q.shape
        self.flops += 4 * b * h * t * k.shape[1] * d
        return self._like(q), self.empty((b, h, t), wide_of(q.dtype))

    def attention_backward(self, dout, q, k, v, out, lse, dq, dk, dv, scale, causal=True, dropout=None):
        b, t, h, d = q.shape
        _same(dout, q)
        self.flops += 8 * b * h * t * k.shape[1] * d

    def attention_merge(self, out, lse, part_out, part_lse):
        _same(out, part_out)
        _same(lse, part_lse)

    # -- mixture of experts -------------------------------------------------------------------------------------

    def route(self, logits, k):
        """`experts` are real integers, a balanced choice: the layer counts them to size its messages."""
        (n, experts), dtype = logits.shape, logits.dtype
        chosen = np.ndarray((n, k), np.int64, _balanced(n, k, experts))     # views of it keep it alive, not only the bytes
        self._count(chosen.nbytes)
        weakref.finalize(chosen, self._count, -chosen.nbytes)
        return chosen, self.empty((n, k), dtype), self._like(logits), self.empty((n,), dtype)

    def route_backward(self, dweights, dprobabilities, dlse, experts, weights, probabilities):
        _same(dweights, experts)
        return self._like(probabilities)

    def add_rows(self, y, rows, x, scale=None):
        _equal(x.shape, (len(rows), y.shape[1]))
        if scale is not None:
            _equal(scale.shape, rows.shape)

    def scale_rows(self, x, scale):
        _equal(x.shape[:1], scale.shape)

    def row_dot(self, a, b):
        _same(a, b)
        return self.empty(a.shape[:1], wide_of(a.dtype))

    # -- vocabulary ---------------------------------------------------------------------------------------------

    def cross_entropy_stats(self, logits, targets, first):
        return tuple(self.empty(logits.shape[:1], wide_of(logits.dtype)) for _ in range(3))

    def cross_entropy(self, logits, targets, scale, loss, gradient=True):
        _equal(logits.shape[:1], targets.shape)

    def softmax_parts(self, row_max, largest, row_sum, target_logit):
        return self.empty((2,) + row_max.shape, row_max.dtype), self._like(row_max)

    def softmax_factor(self, shrink, row_sum):
        return self._like(shrink)

    def loss_sum(self, row_max, row_sum, target_logit, scale, loss):
        pass

    def cross_entropy_gradient(self, exps, targets, factor, coefficient, first):
        pass

    def embedding(self, ids, table, first=0):
        return self.empty((len(ids), table.shape[1]), table.dtype)

    def embedding_backward(self, ids, dy, dtable, first=0):
        _equal(dy.shape, (len(ids), dtable.shape[1]))

    # -- optimizer and initialisation ---------------------------------------------------------------------------

    def adamw(self, updates, rate, beta1, beta2, eps, step, scale):
        for update in updates:
            _same(update.weight, update.grad)

    def square_sum(self, arrays):
        return 0.0

    def normal(self, out, key, row, column, columns, std):
        pass


class GpuShapes(Shapes):
    """Shapes of arrays on a GPU: where each lies in the memory that is reserved before the first step.

    Attributes
    ----------
    kept, passing_by : Arena
        Of arrays that stay, and of those that die within a pass (`activations`).
    """

    def __init__(self):
        super().__init__()
        from .cuda import Cuda

        self.logit_elements, self.row, self.padding = Cuda.logit_elements, Cuda.row_of, Cuda.padding
        self.kept, self.passing_by = Arena(ENDLESS), Arena(ENDLESS)
        self.arena, self._host = self.kept, Shapes()

    @property
    def host(self):
        return self._host

    def empty(self, shape, dtype):
        array = super().empty(shape, dtype)
        array.base.lies = self.arena.take(array.nbytes)
        return array

    def padded(self, shape, dtype):
        return self.empty((shape[0], self.row(shape[1], dtype)), dtype)[:, :shape[1]]

    def constant(self, array):
        before, self.arena = self.arena, self.kept
        copy = self.from_host(array)
        self.arena = before
        return copy

    @contextlib.contextmanager
    def activations(self):
        before, self.arena = self.arena, self.passing_by
        try:
            yield
        finally:
            self.arena = before


def _same(x, y):
    _equal(x.shape, y.shape)


def _equal(shape, other):
    if shape != other:
        raise ValueError(f"shapes {shape} and {other} differ")
