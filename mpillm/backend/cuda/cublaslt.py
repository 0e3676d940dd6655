"""The part of cuBLASLt that products need, by ctypes: CuPy has cuBLAS only, which knows no epilogues.

Names and numbers are those of cublasLt.h (CUDA 12 and 13). Matrices are column-major here, as there.
"""

import ctypes
from typing import NamedTuple

from mpillm.config import UserError

TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}      # cudaDataType_t
COMPUTE_32F, COMPUTE_32F_FAST_TF32, COMPUTE_64F = 68, 77, 70            # cublasComputeType_t
DEFAULT, BIAS, GELU_AUX_BIAS = 1, 4, 164                                # cublasLtEpilogue_t
TRANSA, TRANSB, EPILOGUE, BIAS_POINTER, AUX_POINTER, AUX_LD, BIAS_TYPE = 3, 4, 7, 8, 11, 12, 26     # cublasLtMatmulDescAttributes_t
MAX_WORKSPACE, REDUCTION_SCHEMES, ALIGNMENT_A = 1, 3, 5                 # cublasLtMatmulPreferenceAttributes_t; B, C, D follow A
ORDERED_REDUCTIONS = 2 | 4      # splits of k are summed in the workspace, in an order of their own, not in the output as they come
NOT_SUPPORTED = 15              # cublasStatus_t
NAMES = "libcublasLt.so.13", "libcublasLt.so.12"


class Problem(NamedTuple):
    """D (m, n) = op(A) op(B) + beta D, column-major; all that a plan depends on."""

    m: int
    n: int
    k: int
    a_transposed: bool      # A lies as (k, m)
    b_transposed: bool      # B lies as (n, k)
    lda: int
    ldb: int
    ldd: int
    dtype: str              # of A and B
    out_dtype: str          # of D
    accumulate: bool        # beta = 1
    epilogue: int = DEFAULT
    tf32: bool = False
    alignments: tuple = (16, 16, 16)    # bytes by which the addresses of A, B, D can be divided, at most 256


class HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algo", ctypes.c_uint64 * 8), ("workspace", ctypes.c_size_t), ("state", ctypes.c_int), ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]  # fmt: skip


class Plan(NamedTuple):
    """What a call of cublasLtMatmul takes beside the matrices."""

    desc: object
    layouts: tuple      # of A, B, D
    algo: object
    one: object         # alpha, in memory
    beta: object
    bias: object        # where the address of the bias is written before a call; None without
    aux: object


def load():
    """The library, of the toolkit that CuPy uses or of the system."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return ctypes.CDLL(load_nvidia_dynamic_lib("cublasLt").abs_path)
    except Exception:   # not found, or a pathfinder of another age: the loader's own search may do
        pass
    for name in NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise UserError('device = "gpu": no libcublasLt is found; load a CUDA 12 or 13 module, or install the extra gpu-cuda12 or gpu-cuda13')


class CublasLt:
    """
    Parameters
    ----------
    device : Device
    """

    def __init__(self, device):
        self.device, self.library, self.plans = device, load(), {}
        self.handle = ctypes.c_void_p()
        self._check(self.library.cublasLtCreate(ctypes.byref(self.handle)), "cublasLtCreate")
        self.workspace_size = (32 if device.arch.startswith(("9", "10", "12")) else 8) << 20     # bytes
        self.matmul = self.library.cublasLtMatmul
        pointer = ctypes.c_void_p
        self.matmul.argtypes = [pointer] * 14 + [ctypes.c_size_t, pointer]

    def _check(self, status, what):
        if status:
            raise RuntimeError(f"cuBLASLt: {what} gave status {status}")

    def run(self, problem, a, b, d, bias=None, aux=None):
        """Does a product on addresses; False where cuBLASLt has no way to do it."""
        plan = self.plans.get(problem)
        if plan is None:
            if problem in self.plans:
                return False
            plan = self.plans[problem] = self._plan(problem)
            if plan is None:
                return False
        if plan.bias is not None:
            self._set_pointer(plan.desc, BIAS_POINTER, plan.bias, bias)
        if plan.aux is not None:
            self._set_pointer(plan.desc, AUX_POINTER, plan.aux, aux)
        layout_a, layout_b, layout_d = plan.layouts
        status = self.matmul(self.handle, plan.desc, plan.one, a, layout_a, b, layout_b, plan.beta, d, layout_d, d, layout_d,
                             plan.algo, self.device.workspace(self.workspace_size), self.workspace_size, self.device.stream_pointer)
        if status == NOT_SUPPORTED and problem.epilogue != DEFAULT:     # the heuristic promised too much
            self.plans[problem] = None
            return False
        self._check(status, f"{problem}")
        return True

    def _set_pointer(self, desc, attribute, cell, address):
        if cell.value != address:
            cell.value = address
            self._set(self.library.cublasLtMatmulDescSetAttribute, desc, attribute, cell)

    def _set(self, setter, target, attribute, value):
        self._check(setter(target, attribute, ctypes.byref(value), ctypes.sizeof(value)), f"attribute {attribute}")

    def _plan(self, problem):
        lib, p = self.library, problem
        compute = COMPUTE_64F if p.dtype == "float64" else COMPUTE_32F_FAST_TF32 if p.tf32 and p.dtype == "float32" else COMPUTE_32F
        scale = "float64" if p.dtype == "float64" else "float32"
        number = ctypes.c_double if scale == "float64" else ctypes.c_float
        desc = ctypes.c_void_p()
        self._check(lib.cublasLtMatmulDescCreate(ctypes.byref(desc), compute, TYPES[scale]), "cublasLtMatmulDescCreate")
        setter = lib.cublasLtMatmulDescSetAttribute
        for attribute, transposed in ((TRANSA, p.a_transposed), (TRANSB, p.b_transposed)):
            self._set(setter, desc, attribute, ctypes.c_int32(int(transposed)))
        bias = aux = None
        if p.epilogue != DEFAULT:
            self._set(setter, desc, EPILOGUE, ctypes.c_uint32(p.epilogue))
            self._set(setter, desc, BIAS_TYPE, ctypes.c_int32(TYPES[p.out_dtype]))
            bias = ctypes.c_void_p(0)
        if p.epilogue == GELU_AUX_BIAS:
            self._set(setter, desc, AUX_LD, ctypes.c_int64(p.ldd))
            aux = ctypes.c_void_p(0)
        layouts = (self._layout(p.dtype, *((p.k, p.m) if p.a_transposed else (p.m, p.k)), p.lda),
                   self._layout(p.dtype, *((p.n, p.k) if p.b_transposed else (p.k, p.n)), p.ldb),
                   self._layout(p.out_dtype, p.m, p.n, p.ldd))
        algo = self._algorithm(p, desc, layouts)
        return None if algo is None else Plan(desc, layouts, algo, ctypes.pointer(number(1)), ctypes.pointer(number(p.accumulate)), bias, aux)

    def _layout(self, dtype, rows, columns, ld):
        layout = ctypes.c_void_p()
        status = self.library.cublasLtMatrixLayoutCreate(ctypes.byref(layout), TYPES[dtype], ctypes.c_uint64(rows), ctypes.c_uint64(columns),
                                                         ctypes.c_int64(ld))
        self._check(status, "cublasLtMatrixLayoutCreate")
        return layout

    def _algorithm(self, problem, desc, layouts):
        """The first choice of the heuristic among algorithms that give the same bits each time; None where there is none."""
        lib, preference = self.library, ctypes.c_void_p()
        self._check(lib.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)), "cublasLtMatmulPreferenceCreate")
        setter = lib.cublasLtMatmulPreferenceSetAttribute
        self._set(setter, preference, MAX_WORKSPACE, ctypes.c_size_t(self.workspace_size))
        self._set(setter, preference, REDUCTION_SCHEMES, ctypes.c_uint32(ORDERED_REDUCTIONS))
        a, b, d = problem.alignments
        for index, bytes_ in enumerate((a, b, d, d)):
            self._set(setter, preference, ALIGNMENT_A + index, ctypes.c_uint32(bytes_))
        result, found = HeuristicResult(), ctypes.c_int(0)
        layout_a, layout_b, layout_d = layouts
        status = lib.cublasLtMatmulAlgoGetHeuristic(self.handle, desc, layout_a, layout_b, layout_d, layout_d, preference, 1,
                                                    ctypes.byref(result), ctypes.byref(found))
        lib.cublasLtMatmulPreferenceDestroy(preference)
        if status or not found.value or result.state:
            return None
        return ctypes.pointer(result)       # algo is its first member
