"""cuBLASLt in NumPy: the same problems on the same addresses, for the fake device."""

import ctypes

import ml_dtypes
import numpy as np

from mpillm.backend.cuda.cublaslt import BIAS, DEFAULT, GELU_AUX_BIAS

DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "float16")} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


def matrix(address, rows, columns, ld, dtype):
    """A column-major (rows, columns) view of memory with `ld` elements from column to column."""
    assert ld >= rows, f"leading dimension {ld} of a matrix with {rows} rows"
    dtype = DTYPES[dtype]
    size = ((columns - 1) * ld + rows) * dtype.itemsize
    memory = np.frombuffer((ctypes.c_ubyte * size).from_address(address), np.uint8)
    return np.ndarray((rows, columns), dtype, memory, 0, (dtype.itemsize, ld * dtype.itemsize))


class NumpyLt:
    """`CublasLt` on a CPU: `run` alone."""

    workspace_size = 0

    def __init__(self, device):
        self.device = device

    def run(self, problem, a, b, d, bias=None, aux=None):
        p = problem
        if p.epilogue != DEFAULT and p.dtype == "float64":
            return False
        for address, divisor in zip((a, b, d), p.alignments):
            assert address % divisor == 0
        self.device.do(lambda: self._run(p, a, b, d, bias, aux))
        return True

    def _run(self, p, a, b, d, bias, aux):
        wide = np.float64 if p.dtype == "float64" else np.float32
        left = matrix(a, p.k, p.m, p.lda, p.dtype).T if p.a_transposed else matrix(a, p.m, p.k, p.lda, p.dtype)
        right = matrix(b, p.n, p.k, p.ldb, p.dtype).T if p.b_transposed else matrix(b, p.k, p.n, p.ldb, p.dtype)
        out = matrix(d, p.m, p.n, p.ldd, p.out_dtype)
        y = left.astype(wide) @ right.astype(wide)
        if p.accumulate:
            y += out.astype(wide)
        if p.epilogue in (BIAS, GELU_AUX_BIAS):
            y += matrix(bias, p.m, 1, p.m, p.out_dtype).astype(wide)
        if p.epilogue == GELU_AUX_BIAS:
            matrix(aux, p.m, p.n, p.ldd, p.out_dtype)[...] = y
            y = 0.5 * y * (1.0 + np.tanh(0.7978845608028654 * y * (1.0 + 0.044715 * y * y)))
        out[...] = y
