"""The data-free form of the backend: arrays have a shape and a type but no elements.

A real step run on it tells what the step needs: bytes alive at the same time, and FLOPs. So the memory plan and
`--dry-run` come from the code that trains, not from a second description of it.
"""

import math
import weakref

import numpy as np

from .reference import Reference


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
        """An array whose elements all lie in one place; views of it keep its bytes counted as alive."""
        dtype = np.dtype(dtype)
        place = np.ones(1, dtype)      # ones: nothing is divided by zero
        size = math.prod(shape) * dtype.itemsize
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(place, self._freed, size)
        return np.ndarray(shape, dtype, place, strides=(0,) * len(shape))

    def _freed(self, size):
        self.live -= size

    zeros = empty

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
        if np.broadcast_shapes(y.shape, x.shape) != y.shape:
            raise ValueError(f"add {x.shape} to {y.shape}")

    add_bias = add

    def sum_rows(self, dy, dbias):
        _same(dy[0], dbias)

    # -- layers -------------------------------------------------------------------------------------------------

    def rms_norm(self, x, weight, eps):
        return self._like(x), self.empty(x.shape[:1], x.dtype)

    def rms_norm_backward(self, dy, x, weight, rstd, dweight):
        _same(dy, x)
        return self._like(x)

    def layer_norm(self, x, weight, bias, eps):
        return self._like(x), self.empty(x.shape[:1], x.dtype), self.empty(x.shape[:1], x.dtype)

    def layer_norm_backward(self, dy, x, weight, mean, rstd, dweight, dbias):
        _same(dy, x)
        return self._like(x)

    def rope(self, x, cos, sin, inverse=False):
        _same(x[0, :, 0, ::2], cos)

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
        pass

    def attention(self, q, k, v, scale, causal=True, dropout=None):
        b, t, h, d = q.shape
        self.flops += 4 * b * h * t * k.shape[1] * d
        return self._like(q), self.empty((b, h, t), q.dtype)

    def attention_backward(self, dout, q, k, v, out, lse, dq, dk, dv, scale, causal=True, dropout=None):
        b, t, h, d = q.shape
        _same(dout, q)
        self.flops += 8 * b * h * t * k.shape[1] * d

    # -- vocabulary ---------------------------------------------------------------------------------------------

    def cross_entropy_stats(self, logits, targets, first):
        return tuple(self.empty(logits.shape[:1], logits.dtype) for _ in range(3))

    def loss_sum(self, row_max, row_sum, target_logit, scale):
        return 0.0

    def cross_entropy_gradient(self, exps, targets, factor, coefficient, first):
        pass

    def embedding(self, ids, table, first=0):
        return self.empty((len(ids), table.shape[1]), table.dtype)

    def embedding_backward(self, ids, dy, dtable, first=0):
        _same(dy[0], dtable[0])

    # -- optimizer and initialisation ---------------------------------------------------------------------------

    def adamw(self, weight, grad, moment1, moment2, rate, beta1, beta2, eps, decay, step, scale):
        _same(weight, grad)

    def square_sum(self, x):
        return 0.0

    def normal(self, out, key, row, column, columns, std):
        pass


def _same(x, y):
    if x.shape != y.shape:
        raise ValueError(f"shapes {x.shape} and {y.shape} differ")
