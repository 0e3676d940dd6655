"""Matrix products by cuBLASLt: any mix of transposed and row-strided views, float32 sums of 16-bit products, biases fused."""

import functools

from mpillm.backend.cuda.cublaslt import BIAS, DEFAULT, GELU_AUX_BIAS, CublasLt, Problem


def form(x):
    """(transposed, ld) of a 2-D view: whether its columns are contiguous instead of its rows, and elements from one to the next."""
    (rows, columns), (down, across), size = x.shape, x.strides, x.itemsize
    if across == size or columns == 1:
        return False, columns if rows == 1 else down // size
    if down == size or rows == 1:
        return True, rows if columns == 1 else across // size
    raise ValueError(f"a product of a view of shape {x.shape} and strides {x.strides}: neither rows nor columns are contiguous")


def alignment(address):
    """Bytes by which an address can be divided, at most 256."""
    return min(256, address & -address)


class GemmOps:
    """Products; `reference.Reference` defines the operations.

    Attributes
    ----------
    tf32 : bool
        Whether float32 products may round their factors to 10 bits.
    """

    tf32 = False

    @functools.cached_property
    def library(self):
        return CublasLt(self.device)

    def matmul(self, a, b, out=None, accumulate=False):
        if out is None:
            out = self.device.empty((a.shape[0], b.shape[1]), a.dtype)
        self._product(a, b, out, accumulate)
        return out

    def linear(self, x, weight, bias=None, out=None):
        if out is None:
            out = self.device.empty((x.shape[0], weight.shape[0]), x.dtype)
        if bias is None:
            self._product(x, weight.T, out)
        elif not self._product(x, weight.T, out, epilogue=BIAS, bias=bias):
            self._product(x, weight.T, out)
            self.add_bias(out, bias)
        return out

    def linear_gelu(self, x, weight, bias):
        hidden = self.device.empty((x.shape[0], weight.shape[0]), x.dtype)
        if x.dtype.itemsize == 2:
            y = self.device.empty(hidden.shape, x.dtype)
            if self._product(x, weight.T, y, epilogue=GELU_AUX_BIAS, bias=bias, aux=hidden):
                return hidden, y
        self._product(x, weight.T, hidden)
        return hidden, self.gelu(hidden, bias)

    def _product(self, a, b, out, accumulate=False, epilogue=DEFAULT, bias=None, aux=None):
        """out = or += a b. False where cuBLASLt has not this epilogue; nothing is written then.

        Row-major out = a b is column-major out^T = b^T a^T, so the factors change places.
        """
        (rows, inner), columns = a.shape, b.shape[1]
        if not out.size:
            return True
        if not inner:
            if epilogue == DEFAULT and not accumulate:
                self.fill(out, 0)
            return epilogue == DEFAULT
        (a_turned, lda), (b_turned, ldb), (out_turned, ldd) = form(a), form(b), form(out)
        if out_turned:
            raise ValueError(f"a product into a view of shape {out.shape} and strides {out.strides}: its rows are not contiguous")
        addresses = b.data.ptr, a.data.ptr, out.data.ptr
        problem = Problem(columns, rows, inner, b_turned, a_turned, ldb, lda, ldd, a.dtype.name, out.dtype.name, accumulate, epilogue,
                          self.tf32, tuple(map(alignment, addresses)))
        done = self.library.run(problem, *addresses, None if bias is None else bias.data.ptr, None if aux is None else aux.data.ptr)
        if not done and epilogue == DEFAULT:
            raise RuntimeError(f"cuBLASLt has no algorithm for {problem}")
        return done
