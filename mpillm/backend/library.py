"""The compiled kernels as Python functions: one table of names and argument types, loaded by ctypes."""

import ctypes

import numpy as np

from mpillm.backend.build import COMMAND, find_library

# p = address, i = int64, d = double, u = uint64, w = uint32, n = int; each exists for float32 and float64
SIGNATURES = {
    "add": "ppi",
    "add_bias": "pipii",
    "sum_rows": "pipii",
    "rms_norm": "ppppdii",
    "rms_norm_backward": "ppppppii",
    "layer_norm": "ppppppdii",
    "layer_norm_backward": "ppppppppii",
    "rope": "piiippniiii",
    "gelu": "pppii",
    "gelu_backward": "ppi",
    "swiglu": "ppipiii",
    "swiglu_backward": "ppipipipiii",
    "attention": "pppppdppp",
    "attention_backward": "pppppppppdppp",
    "attention_merge": "pppppp",
    "dropout": "puudwppiii",
    "cross_entropy_stats": "pipipppii",
    "cross_entropy_gradient": "pipppiii",
    "embedding": "pppiiiii",
    "embedding_backward": "pippiiii",
    "add_rows": "pipppiii",
    "scale_rows": "ppii",
    "row_dot": "pppii",
    "adamw": "ppppdddddddi",
    "square_sum": "pi",
    "normal": "piuuudii",
}
TYPES = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int64,
    "d": ctypes.c_double,
    "u": ctypes.c_uint64,
    "w": ctypes.c_uint32,
    "n": ctypes.c_int,
}
RESULTS = {"square_sum": ctypes.c_double}
SUFFIXES = {np.dtype(np.float32): "f32", np.dtype(np.float64): "f64"}


class ProbabilityDropout(ctypes.Structure):
    """The dropout of attention as the kernels read it; scale 0 means none."""

    _fields_ = [
        ("key", ctypes.c_uint64),
        ("threshold", ctypes.c_uint64),
        ("scale", ctypes.c_double),
        ("step", ctypes.c_uint32),
        ("samples", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("first_head", ctypes.c_int64),
        ("first_key", ctypes.c_int64),
        ("keys", ctypes.c_int64),
    ]


def load():
    """The kernels of this CPU.

    Returns
    -------
    kernels : dict, (name, dtype) -> function; "set_threads" and "tensor_hash" stand alone; {} where nothing is built
    note : one line for the user when nothing is built, else ""
    """
    path = find_library()
    if path is None:
        return {}, f"C++ kernels not built (or out of date): NumPy forms, slower; run {COMMAND}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return {}, f"C++ kernels not loaded ({error}): NumPy forms, slower; run {COMMAND}"
    kernels = {}
    for name, letters in SIGNATURES.items():
        for dtype, suffix in SUFFIXES.items():
            function = getattr(library, f"mpillm_{name}_{suffix}")
            function.argtypes = [TYPES[letter] for letter in letters]
            function.restype = RESULTS.get(name)
            kernels[name, dtype] = function
    library.mpillm_set_threads.argtypes, library.mpillm_set_threads.restype = [ctypes.c_int], None
    library.mpillm_tensor_hash.argtypes = [TYPES[letter] for letter in "piuuii"]
    library.mpillm_tensor_hash.restype = ctypes.c_uint64
    kernels["set_threads"], kernels["tensor_hash"] = library.mpillm_set_threads, library.mpillm_tensor_hash
    return kernels, ""
