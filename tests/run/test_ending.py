"""Real jobs of three ranks: an error is said once, and no rank outlives another."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("OMPI_COMM", "OMPI_UNIVERSE", "OMPI_APP", "OMPI_FILE", "OMPI_FIRST", "OMPI_NUM", "OMPI_WORLD", "OMPI_ARGV", "OMPI_COMMAND",
             "OMPI_MCA_orte", "PMI", "PMIX", "PRTE_LAUNCHED", "SLURM", "MPI_LOCAL", "HYDRA", "PALS")
ALLOWED = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1",
           "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_btl": "self,sm,tcp", "OPENBLAS_NUM_THREADS": "1"}

STAND_IN = '''
"""A command that goes wrong in the way it is told, on the ranks it is told."""
import os, sys, time, types

def run(arguments):
    import numpy as np
    from mpillm.config import UserError
    from mpillm.layout.comm import world
    from mpillm.run.directory import RunDirectory
    group = world()
    kind, ranks = arguments.what.split(":")
    with RunDirectory(os.environ["RUN"], group) as directory:
        if kind != "refuse":
            directory.status("running", step=0)
        if str(group.rank) in ranks:
            if kind == "refuse":
                raise UserError("data.train: found this, expected that")
            if kind == "raise":
                raise ValueError("broken")
            if kind == "exit":
                sys.exit(3)
            os.kill(os.getpid(), 9)
        group.all_reduce(np.ones(4))
        time.sleep(60)

module = types.ModuleType("mpillm.commands.train")
module.run, module.add_arguments = run, lambda parser: parser.add_argument("what")
sys.modules["mpillm.commands.train"] = module
from mpillm.__main__ import main
sys.exit(main())
'''


def launcher():
    """mpirun of the environment that runs the tests, else of the path."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


pytestmark = pytest.mark.skipif(launcher() is None, reason="no mpirun")


@pytest.fixture
def job(tmp_path):
    """Runs `mpillm train WHAT` on three ranks; returns its exit code, standard error, seconds and run directory."""
    (tmp_path / "job.py").write_text(STAND_IN)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    environ |= ALLOWED | {"PYTHONPATH": str(ROOT), "RUN": str(tmp_path / "run")}

    def run(*arguments):
        started = time.monotonic()
        done = subprocess.run([launcher(), "-n", "3", sys.executable, str(tmp_path / "job.py"), *arguments], env=environ,
                              capture_output=True, timeout=40, cwd=tmp_path)
        text = (done.stderr + done.stdout).decode(errors="replace").replace("\0", "")
        return done.returncode, text, time.monotonic() - started, tmp_path / "run"
    return run


def ours(text):
    return [line for line in text.splitlines() if line.startswith("mpillm:")]


@pytest.mark.parametrize("ranks", ["012", "12"])
def test_a_user_error_is_one_line(job, ranks):
    code, text, seconds, run = job("train", f"refuse:{ranks}")
    assert ours(text) == ["mpillm: error: data.train: found this, expected that"], text
    assert code == 2 and "Traceback" not in text and seconds < 15
    assert not (run / "status.json").exists()


def test_an_exception_on_one_rank_ends_all(job):
    code, text, seconds, run = job("train", "raise:1")
    assert ours(text) == ["mpillm: rank 1 failed: ValueError: broken"] and "Traceback" in text, text
    assert code == 1 and seconds < 10
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and status["rank"] == 1 and status["exit"] == 1 and "broken" in status["reason"]
    assert not (run / "lock").exists()


def test_an_exit_on_one_rank_ends_all(job):
    code, text, seconds, _ = job("train", "exit:2")
    assert code == 3 and seconds < 10, text


def test_after_a_kill_the_directory_can_be_used_again(job):
    code, _, _, run = job("train", "kill:0")
    assert code != 0 and (run / "lock").exists()
    code, text, _, _ = job("train", "refuse:012")
    assert code == 2 and "found this" in text and not (run / "lock").exists()


def test_an_unknown_command_is_one_line(job):
    code, text, seconds, _ = job("trian")
    assert ours(text) == ["mpillm: error: unknown command 'trian'; did you mean 'train'?"] and code == 2 and seconds < 10
