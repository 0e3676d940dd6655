"""Opening a backend, building the kernels, and the environment of BLAS."""

import os
import subprocess
import sys

import numpy as np
import pytest
from backend_cases import CPU, needs_kernels

from mpillm.backend import build, library, open_backend, threads
from mpillm.config import UserError


def test_only_the_cpu_is_there():
    assert open_backend("cpu").name == "cpu"
    with pytest.raises(UserError, match='device = "gpu"'):
        open_backend("gpu")


def test_without_a_library_the_numpy_forms_serve(monkeypatch):
    monkeypatch.setattr(library, "find_library", lambda: None)
    backend = open_backend("cpu")
    assert build.COMMAND in backend.note and "\n" not in backend.note
    y, rstd = backend.rms_norm(np.ones((2, 3)), np.ones(3), 0.0)
    assert np.allclose(y, 1) and rstd.shape == (2,)


def test_without_a_compiler_the_way_out_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler.*CXX"):
        build.build()


@needs_kernels
def test_every_level_this_cpu_runs_is_loadable():
    assert build.COMMAND not in CPU.note
    assert build.find_library().name.startswith(tuple(build.usable_levels()))


def test_levels_follow_the_features(monkeypatch):
    for flags, best in (("", "baseline"), (build.LEVELS["v3"][1], "v3"), (f"{build.LEVELS['v3'][1]} {build.LEVELS['v4'][1]}", "v4")):
        monkeypatch.setattr(build, "first_cpu", lambda flags=flags: {"flags": flags})
        assert build.usable_levels()[0] == best


def test_environment_keeps_what_the_user_set(monkeypatch):
    for variable in threads.THREAD_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    threads.prepare_environment(3)
    assert [os.environ[variable] for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")] == ["3", "3", "5"]


def test_forced_slow_blas_kernels_are_named(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setattr(threads, "first_cpu", lambda: {"flags": "avx2 avx512f"})
    assert "OPENBLAS_CORETYPE=Haswell" in threads.slow_blas_note()
    monkeypatch.setattr(threads, "first_cpu", lambda: {"flags": "avx2"})
    assert threads.slow_blas_note() == ""


def test_importing_the_environment_imports_no_numpy():
    code = "import sys, mpillm.backend, mpillm.backend.threads, mpillm.backend.build; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
