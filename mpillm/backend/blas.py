"""The matrix product of the BLAS that NumPy itself has loaded, called by its C name.

np.matmul has no beta, so `out += a @ b` would cost a temporary and a pass over it. Where no symbol is found (NumPy
built on another BLAS), `find` returns None and NumPy's matmul serves.
"""

import ctypes

import numpy as np

# (name in the library, bits of its integers): NumPy's wheels rename OpenBLAS's symbols, other builds do not
SYMBOLS = (
    ("scipy_cblas_{}gemm64_", 64),
    ("cblas_{}gemm64_", 64),
    ("scipy_cblas_{}gemm", 32),
    ("cblas_{}gemm", 32),
)
ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112
LETTERS = {np.dtype(np.float32): "s", np.dtype(np.float64): "d"}


class Blas:
    """gemm of one loaded library.

    Attributes
    ----------
    gemms : dict, dtype -> its gemm, a ctypes function
    bits : 32 or 64, the width of the library's integers
    """

    def __init__(self, library, pattern, bits):
        self.bits = bits
        integer = ctypes.c_int64 if bits == 64 else ctypes.c_int32
        self.gemms = {}
        for dtype, letter in LETTERS.items():
            function = getattr(library, pattern.format(letter))
            number = ctypes.c_float if letter == "s" else ctypes.c_double
            pointer = ctypes.c_void_p
            function.argtypes = [ctypes.c_int] * 3 + [integer] * 3 + [number, pointer, integer, pointer, integer, number, pointer, integer]
            function.restype = None
            self.gemms[dtype] = function

    def matmul(self, a, b, out, accumulate):
        """out = a @ b (or +=) by one gemm call; False when the arrays do not fit one and nothing was done."""
        gemm = self.gemms.get(out.dtype)
        if gemm is None or a.dtype != out.dtype or b.dtype != out.dtype:
            return False
        (rows, inner), columns = a.shape, b.shape[1]
        if not (rows and inner and columns):
            return False
        of_a, of_b, of_out = layout(a), layout(b), layout(out)
        if of_a is None or of_b is None or of_out is None or of_out[0] == TRANSPOSED:
            return False
        gemm(
            ROW_MAJOR, of_a[0], of_b[0], rows, columns, inner,
            1.0, a.ctypes.data, of_a[1], b.ctypes.data, of_b[1],
            1.0 if accumulate else 0.0, out.ctypes.data, of_out[1],
        )  # fmt: skip
        return True


def layout(x):
    """(PLAIN or TRANSPOSED, leading dimension) of a 2-D array, or None when gemm cannot read it in place."""
    (rows, columns), (down, across), size = x.shape, x.strides, x.itemsize
    if (across == size or columns == 1) and (rows == 1 or (down % size == 0 and down >= columns * size)):
        return PLAIN, max(down // size, columns) if rows > 1 else columns
    if (down == size or rows == 1) and (columns == 1 or (across % size == 0 and across >= rows * size)):
        return TRANSPOSED, max(across // size, rows) if columns > 1 else rows
    return None


def find():
    """The gemm of the BLAS that NumPy has loaded, or None."""
    import threadpoolctl

    for library in threadpoolctl.threadpool_info():
        if library["user_api"] != "blas":
            continue
        loaded = ctypes.CDLL(library["filepath"])
        for pattern, bits in SYMBOLS:
            if hasattr(loaded, pattern.format("s")):
                return Blas(loaded, pattern, bits)
    return None
