"""Threads and the environment of BLAS in one process. Standard library only: it runs before NumPy is imported."""

import os

THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
WITHOUT_AVX512 = {"haswell", "zen", "sandybridge", "nehalem", "core2", "prescott", "barcelona", "bulldozer", "piledriver", "steamroller", "excavator"}


def prepare_environment(num_threads):
    """Sets the thread variables of BLAS and OpenMP; call it before NumPy is imported. What the user has set stays.

    The kernels of OpenBLAS are left to its own choice: in NumPy's wheels (2.0.2: Cooperlake, 2.4.6: SkylakeX) it takes the
    AVX-512 ones on a Zen 5, 222-243 GF/s per core in sgemm. See `slow_blas_note` for a forced choice.
    """
    for variable in THREAD_VARIABLES:
        os.environ.setdefault(variable, str(num_threads))


def slow_blas_note():
    """One line when OPENBLAS_CORETYPE forces kernels without AVX-512 onto a CPU that has it, else "".

    Haswell kernels reach 124 GF/s per core on a Zen 5 where SkylakeX ones reach 243 (sgemm, OpenBLAS 0.3.31).
    """
    forced = os.environ.get("OPENBLAS_CORETYPE", "")
    if forced.lower() not in WITHOUT_AVX512 or "avx512f" not in first_cpu().get("flags", "").split():
        return ""
    return f"OPENBLAS_CORETYPE={forced} keeps OpenBLAS from AVX-512, about half the speed; unset it unless that is meant"


def first_cpu(cpuinfo="/proc/cpuinfo"):
    """The fields of the first CPU; {} where there is no such file."""
    fields = {}
    try:
        with open(cpuinfo) as lines:
            for line in lines:
                name, colon, value = line.partition(":")
                if not colon:
                    break
                fields[name.strip()] = value.strip()
    except OSError:
        pass
    return fields


def limit_blas(num_threads):
    """Limits the BLAS libraries already loaded into this process."""
    import threadpoolctl

    threadpoolctl.threadpool_limits(limits=num_threads, user_api="blas")
