"""Every operation of the backend in plain NumPy: the definition of what the kernels compute.

Letters: N rows (tokens), C width, B batch, T queries, S keys, H heads, K kv heads, D head width, V vocabulary, E experts.
Arrays are of one type, float32 or float64, with a contiguous last dimension unless said; arguments named like results
(`out`, `dx`, `dweight`, ...) are written in place, weight gradients are added to.

A backend may also compute with 16-bit floats. Then activations and values of weights are of that type, and float32
(`wide_of`) are: gradients of weights, masters, moments, mean, rstd, lse, cos, sin, what belongs to routing, statistics
and `scale` of the loss. Every operation computes in float32 and rounds once.
"""

import contextlib
import math

import numpy as np

from mpillm.backend import philox, reference_attention, reference_routing

GELU_SCALE = 0.7978845608028654  # sqrt(2 / pi)
GELU_CUBE = 0.044715
HASH_BLOCK = 1 << 20  # elements hashed or squared at a time, which bounds the temporaries
U64 = np.uint64


class Reference:
    """The operations in NumPy. Stateless: any number of these may exist."""

    name = "numpy"
    note = ""  # one line for the user when something is slower than it could be
    # Logits of a chunk of the output table, at most: with 4 M the products of a 50,257-token table ran at 2/3 the speed.
    logit_elements = 16 * 2**20

    # -- memory -------------------------------------------------------------------------------------------------

    def empty(self, shape, dtype):
        return np.empty(shape, dtype)

    def zeros(self, shape, dtype):
        return np.zeros(shape, dtype)

    def from_host(self, array):
        return np.ascontiguousarray(array)

    def to_host(self, array):
        """The array in host memory: itself where it is there already."""
        return array

    def put(self, array, host):
        """The array becomes a copy of one in host memory, unless it is that one."""
        if array is not host:
            np.copyto(array, host)

    def fetch_start(self, array):
        """Starts bringing a contiguous array to host memory; calling the result gives it, when it is there."""
        return lambda: self.to_host(array)

    @property
    def host(self):
        """The backend of host memory."""
        return self

    def copy(self, dst, src):
        np.copyto(dst, src)

    def fill(self, x, value):
        """x[...] = value"""
        x[...] = value

    def send_ahead(self, array):
        """As `from_host`, without waiting for the work that the device is at; for what a later step reads."""
        return self.from_host(array)

    def constant(self, array):
        """As `from_host`, for tables that outlive a pass or are asked for again and again; not to be written to."""
        return self.from_host(array)

    def padding(self, columns, dtype):
        """Columns to add to so many of a matrix for products with it to be fast."""
        return 0

    def padded(self, shape, dtype):
        """As `empty` for (rows, columns), perhaps as a view with longer rows, where products are faster with them."""
        return self.empty(shape, dtype)

    def synchronize(self):
        """Waits for the device; the CPU has nothing to wait for."""

    def passing(self, shape, dtype):
        """As `empty`, for large arrays that come and go while others stay: their memory goes back to the system."""
        return self.empty(shape, dtype)

    def activations(self):
        """A context for arrays that all die within a pass: a device may keep memory for them."""
        return contextlib.nullcontext()

    capture = None  # on a device that can record operations: see Device.capture

    def range(self, name):
        """A context whose work profilers show under a name, where there are any."""
        return contextlib.nullcontext()

    def set_threads(self, num_threads):
        """Threads of BLAS and of the kernels in this process."""
        from mpillm.backend.threads import limit_blas

        limit_blas(num_threads)

    # -- products and sums --------------------------------------------------------------------------------------

    def matmul(self, a, b, out=None, accumulate=False):
        """out (M, N) = a (M, K) @ b (K, N), or += with `accumulate`. Transposed and row-strided views are welcome."""
        if out is None:
            return np.matmul(a, b)
        if accumulate:
            out += a @ b
        else:
            np.matmul(a, b, out=out)
        return out

    def linear(self, x, weight, bias=None, out=None):
        """y (N, O) = x (N, I) weight (O, I)^T + bias (O,), perhaps in `out`."""
        y = self.matmul(x, weight.T, out=out)
        if bias is not None:
            self.add_bias(y, bias)
        return y

    def linear_gelu(self, x, weight, bias):
        """hidden (N, O) = x (N, I) weight (O, I)^T + bias (O,), and GELU(hidden)."""
        hidden = self.matmul(x, weight.T)
        return hidden, self.gelu(hidden, bias)

    def add(self, y, x):
        """y += x"""
        np.add(y, x, out=y)

    def add_bias(self, y, bias):
        """y (N, C) += bias (C,)"""
        y += bias

    def sum_rows(self, dy, dbias):
        """dbias (C,) += column sums of dy (N, C)"""
        dbias += column_sums(dy)

    # -- norms --------------------------------------------------------------------------------------------------

    def rms_norm(self, x, weight, eps, residual=None):
        """y (N, C) = x rstd weight, rstd (N,) = 1 / sqrt(mean(x^2) + eps)  (Zhang & Sennrich 2019).

        With `residual` (N, C), x += residual first.
        """
        if residual is not None:
            self.add(x, residual)
        rstd = 1.0 / np.sqrt(np.square(x).mean(axis=1) + x.dtype.type(eps))
        return x * rstd[:, None] * weight, rstd

    def rms_norm_backward(self, dy, x, weight, rstd, dweight, residual=None):
        """dx (N, C), to which the gradient `residual` (N, C) is added; dweight (C,) +="""
        normed = x * rstd[:, None]
        dweight += column_sums(dy * normed)
        dnormed = dy * weight
        dx = rstd[:, None] * (dnormed - normed * (dnormed * normed).mean(axis=1)[:, None])
        return dx if residual is None else np.add(dx, residual, out=dx)

    def layer_norm(self, x, weight, bias, eps, residual=None):
        """y (N, C) = (x - mean) rstd weight + bias, mean (N,), rstd (N,)  (Ba et al. 2016).

        With `residual` (N, C), x += residual first.
        """
        if residual is not None:
            self.add(x, residual)
        mean = x.mean(axis=1)
        centred = x - mean[:, None]
        rstd = 1.0 / np.sqrt(np.square(centred).mean(axis=1) + x.dtype.type(eps))
        return centred * rstd[:, None] * weight + bias, mean, rstd

    def layer_norm_backward(self, dy, x, weight, mean, rstd, dweight, dbias, residual=None):
        """dx (N, C), to which the gradient `residual` (N, C) is added; dweight, dbias (C,) +="""
        normed = (x - mean[:, None]) * rstd[:, None]
        dweight += column_sums(dy * normed)
        dbias += column_sums(dy)
        dnormed = dy * weight
        inner = (dnormed * normed).mean(axis=1)[:, None]
        dx = rstd[:, None] * (dnormed - dnormed.mean(axis=1)[:, None] - normed * inner)
        return dx if residual is None else np.add(dx, residual, out=dx)

    # -- pointwise ----------------------------------------------------------------------------------------------

    def rope(self, x, cos, sin, inverse=False):
        """Turns the pairs (i, i + D/2) of x (B, T, H, D) in place; cos, sin (T, D/2)  (Su et al. 2021)."""
        half = x.shape[-1] // 2
        cos, sin = cos[:, None, :], (-sin if inverse else sin)[:, None, :]
        first, second = x[..., :half], x[..., half:]
        turned = first * cos - second * sin
        second[...] = second * cos + first * sin
        first[...] = turned

    def gelu(self, x, bias=None):
        """y = GELU(x + bias), tanh form; x (N, C) becomes x + bias  (Hendrycks & Gimpel 2016)."""
        if bias is not None:
            x += bias
        return 0.5 * x * (1.0 + np.tanh(GELU_SCALE * x * (1.0 + GELU_CUBE * x * x)))

    def gelu_backward(self, dy, x):
        """dx; x as `gelu` left it. May write over dy."""
        t = np.tanh(GELU_SCALE * x * (1.0 + GELU_CUBE * x * x))
        slope = 0.5 * (1.0 + t) + 0.5 * GELU_SCALE * x * (1.0 - t * t) * (1.0 + 3.0 * GELU_CUBE * x * x)
        return np.multiply(dy, slope, out=dy)

    def swiglu(self, gate, up):
        """y (N, F) = silu(gate) up, gate and up may be column halves of one buffer  (Shazeer 2020)."""
        return gate * sigmoid(gate) * up

    def swiglu_backward(self, dy, gate, up, dgate, dup):
        """Writes dgate, dup (N, F), which may be column halves of one buffer."""
        s = sigmoid(gate)
        dup[...] = dy * gate * s
        dgate[...] = dy * up * s * (1.0 + gate * (1.0 - s))

    def dropout(self, x, mask):
        """x (N, C) *= 0 or 1 / (1 - rate), in place; the same call on dy is the backward  (Srivastava et al. 2014)."""
        x *= philox.dropout_factors(mask, x.shape[1]).astype(x.dtype)

    # -- attention ----------------------------------------------------------------------------------------------

    def attention(self, q, k, v, scale, causal=True, dropout=None):
        """out (B, T, H, D) and lse (B, H, T) of q (B, T, H, D), k, v (B, S, K, D): see reference_attention."""
        return reference_attention.attention(q, k, v, scale, causal, dropout)

    def attention_backward(self, dout, q, k, v, out, lse, dq, dk, dv, scale, causal=True, dropout=None):
        """Writes dq, dk, dv (strided views of the shapes of q, k, v).

        With k, v a block of the keys, out and lse those of attention over all keys, these are the block's share of dq
        and the whole of its dk, dv.
        """
        reference_attention.attention_backward(dout, q, k, v, out, lse, dq, dk, dv, scale, causal, dropout)

    def attention_merge(self, out, lse, part_out, part_lse):
        """out (B, T, H, D), lse (B, H, T) take in attention of the same queries over further keys, in place."""
        reference_attention.attention_merge(out, lse, part_out, part_lse)

    # -- mixture of experts -------------------------------------------------------------------------------------

    def route(self, logits, k):
        """The k experts of each token  (Jiang et al. 2024, arXiv:2401.04088, section 2.1).

        Parameters
        ----------
        logits : (N, E)
        k : int, at most E

        Returns
        -------
        experts : (N, k) int64, by descending logit, ties to the lower number
        weights : (N, k), softmax over the logits of the chosen
        probabilities : (N, E), softmax over all
        lse : (N,), log of the sum of exp(logits)
        """
        return reference_routing.route(logits, k)

    def route_backward(self, dweights, dprobabilities, dlse, experts, weights, probabilities):
        """dlogits (N, E) from dweights (N, k), dprobabilities (N, E) or None, dlse (N,) or None."""
        return reference_routing.route_backward(dweights, dprobabilities, dlse, experts, weights, probabilities)

    def add_rows(self, y, rows, x, scale=None):
        """y (N, C)[rows[i]] += scale[i] x[i], i in order; rows (n,) int64, x (n, C), scale (n,) or None for 1.

        The gather that belongs to it is `embedding(rows, y)`.
        """
        np.add.at(y, rows, x if scale is None else x * scale[:, None])

    def scale_rows(self, x, scale):
        """x (n, C) *= scale (n,)"""
        x *= scale[:, None]

    def row_dot(self, a, b):
        """(n,): inner products of the rows of a and b (n, C)."""
        return np.einsum("nc,nc->n", a, b)

    # -- vocabulary ---------------------------------------------------------------------------------------------

    def cross_entropy(self, logits, targets, scale, loss, gradient=True):
        """loss (1,) float64 += the sum over rows of scale * nll; with `gradient`, logits (N, V) become its gradient.

        Every target (N,) is a column; scale (N,). Without `gradient`, the logits are used up.
        """
        row_max, row_sum, target_logit = self.cross_entropy_stats(logits, targets, 0)
        self.loss_sum(row_max, row_sum, target_logit, scale, loss)
        if gradient:
            self.cross_entropy_gradient(logits, targets, 1 / row_sum, scale, 0)

    def cross_entropy_stats(self, logits, targets, first):
        """Statistics of logits (N, V_local), columns first..first+V_local; logits become exp(logit - row_max).

        Returns
        -------
        row_max, row_sum, target_logit : (N,); target_logit is 0 where the target is not in this slab
        """
        rows, columns = logits.shape
        inside = (targets >= first) & (targets < first + columns)
        target_logit = np.zeros(rows, logits.dtype)
        target_logit[inside] = logits[inside, targets[inside] - first]
        if columns == 0:
            return np.full(rows, -np.inf, logits.dtype), np.zeros(rows, logits.dtype), target_logit
        row_max = logits.max(axis=1)
        with np.errstate(invalid="ignore"):
            logits -= row_max[:, None]
        np.exp(logits, out=logits)
        return row_max, logits.sum(axis=1), target_logit

    def softmax_parts(self, row_max, largest, row_sum, target_logit):
        """Sums of rows whose columns lie on several ranks, from `row_max` to the maximum `largest` over all; all (N,).

        Returns
        -------
        sums : (2, N), row_sum * shrink and target_logit
        shrink : (N,), exp(row_max - largest)
        """
        shrink = np.exp(row_max - largest)
        return np.stack([row_sum * shrink, target_logit]), shrink

    def softmax_factor(self, shrink, row_sum):
        """(N,): shrink / row_sum"""
        return shrink / row_sum

    def loss_sum(self, row_max, row_sum, target_logit, scale, loss):
        """loss (1,) float64 += the sum over rows of scale * (log(row_sum) + row_max - target_logit); all (N,)."""
        nll = np.log(row_sum, dtype=np.float64) + (row_max.astype(np.float64) - target_logit)
        loss += np.dot(nll, scale.astype(np.float64))

    def cross_entropy_gradient(self, exps, targets, factor, coefficient, first):
        """exps (N, V_local) become dlogits: exps * factor * coefficient, minus coefficient at the target."""
        exps *= (factor * coefficient)[:, None]
        inside = (targets >= first) & (targets < first + exps.shape[1])
        exps[inside, targets[inside] - first] -= coefficient[inside]

    def embedding(self, ids, table, first=0):
        """y (N, C): rows of table (V_local, C), which holds the ids first..; zeros for other ids. Gathers any rows."""
        y = np.zeros((len(ids), table.shape[1]), table.dtype)
        inside = (ids >= first) & (ids < first + len(table))
        y[inside] = table[ids[inside] - first]
        return y

    def embedding_backward(self, ids, dy, dtable, first=0):
        """dtable[id - first] += dy, in the order of the tokens."""
        inside = (ids >= first) & (ids < first + len(dtable))
        np.add.at(dtable, ids[inside] - first, dy[inside])

    # -- optimizer, initialisation, checks ----------------------------------------------------------------------

    def adamw(self, updates, rate, beta1, beta2, eps, step, scale):
        """One AdamW step on each `backend.Update` of a list, in place, with the gradient grad * scale; step counts from 1.

        Arithmetic of PyTorch's AdamW: decoupled decay, eps outside the square root  (Loshchilov & Hutter 2019).
        """
        for weight, grad, moment1, moment2, value, decay in updates:
            self._adamw(weight, grad, moment1, moment2, rate, beta1, beta2, eps, decay, step, scale)
            if value is not None:
                self.copy(value, weight)

    def _adamw(self, weight, grad, moment1, moment2, rate, beta1, beta2, eps, decay, step, scale):
        g = grad * weight.dtype.type(scale)
        weight *= 1.0 - rate * decay
        moment1 += (1.0 - beta1) * (g - moment1)
        moment2 *= beta2
        moment2 += (1.0 - beta2) * g * g
        denominator = np.sqrt(moment2) / math.sqrt(1.0 - beta2**step) + eps
        weight -= (rate / (1.0 - beta1**step)) * moment1 / denominator

    def square_sum(self, arrays):
        """Sum of squares of all elements of a list of arrays, accumulated in float64; NaN and inf come through."""
        return sum(map(self._square_sum, arrays), 0.0)

    def _square_sum(self, x):
        flat = x.reshape(-1)
        total = 0.0
        with np.errstate(over="ignore"):
            for start in range(0, flat.size, HASH_BLOCK):
                total += float(np.square(flat[start : start + HASH_BLOCK], dtype=np.float64).sum())
        return total

    def normal(self, out, key, row, column, columns, std):
        """Fills out (rows, cols) with the slab at (row, column) of a (any, columns) tensor of std * N(0, 1)."""
        rows, width = out.shape
        step = max(1, HASH_BLOCK // max(1, width))
        for start in range(0, rows, step):
            part = out[start : start + step]
            part[...] = std * philox.normal_rows(key, row + start, len(part), column, width)

    def tensor_hash(self, array, row, column, columns):
        """Hash of the 2-D slab at (row, column) of a (any, columns) tensor; the sum mod 2^64 over any cut is the same."""
        array = np.atleast_2d(array)
        rows, width = array.shape
        words = array.dtype.itemsize // 4
        step = max(1, HASH_BLOCK // max(1, width))
        total = 0
        for start in range(0, rows, step):
            part = np.ascontiguousarray(array[start : start + step])
            bits = part.view(np.uint32).reshape(len(part), width * words).astype(U64)
            starts = (np.arange(row + start, row + start + len(part), dtype=U64) * U64(columns) + U64(column)) * U64(words)
            index = starts[:, None] + np.arange(width * words, dtype=U64)
            total += int(splitmix64((bits << U64(32)) ^ index).sum(dtype=U64))
        return total & 0xFFFFFFFFFFFFFFFF


def column_sums(x):
    """Column sums of x (N, C): a matrix-vector product, which BLAS blocks."""
    return np.ones(len(x), x.dtype) @ x


def sigmoid(x):
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-x))


def splitmix64(x):
    """Steele, Lea & Flood 2014: the output function of SplitMix64 on the state x + golden ratio."""
    x = x + U64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))
