"""16-bit floats on a CPU, by rounding: every operation computes in float32 and rounds what it gives.

Slower than float32. It is there so that a job in bfloat16 or float16 has the same numbers, to the rounding of single
operations, on a CPU as on a GPU: for tests, for ranks without a GPU, for a look at a job on a laptop.
"""

import functools
import inspect

import numpy as np

from mpillm.backend.cpu import Cpu

# Arguments that an operation writes.
WRITTEN = {
    "matmul": ("out",), "linear": ("out",), "add": ("y",), "add_bias": ("y",), "sum_rows": ("dbias",),
    "rms_norm": ("x",), "layer_norm": ("x",), "rms_norm_backward": ("dweight",), "layer_norm_backward": ("dweight", "dbias"),
    "rope": ("x",), "gelu": ("x",), "gelu_backward": ("dy",), "swiglu": (), "swiglu_backward": ("dgate", "dup"), "linear_gelu": (),
    "dropout": ("x",), "attention": (), "attention_backward": ("dq", "dk", "dv"), "attention_merge": ("out", "lse"),
    "add_rows": ("y",), "scale_rows": ("x",), "row_dot": (),
    "cross_entropy": ("logits", "loss"), "cross_entropy_stats": ("logits",), "cross_entropy_gradient": ("exps",),
    "embedding": (), "embedding_backward": ("dtable",),
}  # fmt: skip
ROUNDED = {  # operations with results of their own, and which of these are 16-bit floats
    "matmul": (0,), "linear": (0,), "linear_gelu": (0, 1), "rms_norm": (0,), "layer_norm": (0,), "rms_norm_backward": (0,),
    "layer_norm_backward": (0,), "gelu": (0,), "gelu_backward": (0,), "swiglu": (0,), "attention": (0,), "embedding": (0,),
}  # fmt: skip


def is_half(x):
    return isinstance(x, np.ndarray) and x.dtype.itemsize == 2 and x.dtype.kind in "fV"


def rounding(name):
    """The operation `name` of `Cpu` for arrays of which some are 16-bit floats."""
    operation = getattr(Cpu, name)
    parameters = tuple(inspect.signature(operation).parameters)[1:]

    @functools.wraps(operation)
    def rounded(self, *args, **kwargs):
        given = dict(zip(parameters, args)) | kwargs
        halves = {key: x for key, x in given.items() if is_half(x)}
        if not halves:
            return operation(self, **given)
        wide = {key: x.astype(np.float32) for key, x in halves.items()}
        results = operation(self, **(given | wide))
        half = next(iter(halves.values())).dtype
        with np.errstate(over="ignore"):    # what is too large becomes inf, as on a GPU
            for key in WRITTEN[name]:
                if key in halves:
                    halves[key][...] = wide[key]
            return _rounded(results, given, wide, ROUNDED.get(name, ()), half)

    return rounded


def _rounded(results, given, wide, which, half):
    """What an operation gives back: the caller's own array where it is one, else new ones, rounded where they are 16-bit floats."""
    several = isinstance(results, tuple)
    found = []
    for index, result in enumerate(results if several else (results,)):
        own = next((given[key] for key, x in wide.items() if x is result), None)
        if own is None:
            own = given["out"] if given.get("out") is result and result is not None else None
        if own is not None:
            found.append(own)
        else:
            found.append(result.astype(half) if index in which else result)
    return tuple(found) if several else found[0]


class HalfCpu(Cpu):
    """The operations of `Cpu` on 16-bit floats; other arrays are taken as `Cpu` takes them."""

    name = "cpu, 16-bit floats by rounding"


for _name in WRITTEN:
    setattr(HalfCpu, _name, rounding(_name))
