"""What is read from launchers' variables: pure functions of an environment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import command_runs
import pytest

from mpillm.layout import launcher
from mpillm.run import launch

MANY = set(range(16))


def cores(cpus):
    return max(1, len(cpus))


def threads(environ, own, node=MANY):
    return launch.num_threads(environ, own, node, cores)


def test_ranks_of_every_launcher():
    assert launch.rank({}) == 0 and not launch.launched({})
    assert launch.rank({"OMPI_COMM_WORLD_RANK": "3", "SLURM_PROCID": "1"}) == 3
    assert launch.rank({"PMI_RANK": "2"}) == 2 and launch.launched({"PMI_RANK": "2", "PMI_SIZE": "4"})
    assert not launch.launched({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"})


def test_a_batch_script_is_no_launched_rank():
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert not launch.launched(batch)
    assert launch.launched(batch | {"SLURM_STEP_NUM_TASKS": "8"})
    assert launch.rank({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}) == 5


def test_local_size():
    assert launch.local_size({}) == 1
    assert launch.local_size({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}) == 4
    assert launch.local_size({"MPI_LOCALNRANKS": "3"}) == 3
    step = {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}
    assert launch.local_size(step | {"SLURM_NODEID": "2"}) == 2
    assert launch.local_size(step | {"SLURM_NODEID": "3"}) == 1
    assert launch.tasks_of_nodes("2(x3),1") == [2, 2, 2, 1] and launch.tasks_of_nodes("x") == []


def test_threads_divide_the_node_once():
    four = {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "4"}
    assert threads({}, MANY) == 16                          # alone
    assert threads(four, MANY) == 4                         # unbound: all ranks share the node
    assert threads(four, {0, 1, 2, 3}) == 4                 # bound to its own cores: divided already
    assert threads(four, {0}) == 1                          # bound to one core
    assert threads(four, set(range(8))) == 4                # bound to a socket that two ranks share
    assert threads(four, {0, 1}, {0, 1}) == 1               # more ranks than cores


def test_threads_in_a_part_of_a_node():
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_CPUS_ON_NODE": "8"}
    assert threads(slurm, MANY) == 4                        # the job has half of the node, unbound
    assert threads(slurm, {0, 1, 2}) == 3


def test_hardware_threads_of_a_core_count_once(tmp_path):
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(siblings + "\n")
    assert launch.physical_cores({0, 1, 2, 3}, tmp_path) == 2
    assert launch.physical_cores({0, 2}, tmp_path) == 1
    assert launch.physical_cores({0, 1}, tmp_path / "missing") == 2


def test_terminate_saves_except_under_open_mpi():
    assert launch.ends_on_terminate({"OMPI_COMM_WORLD_SIZE": "2"})
    assert not launch.ends_on_terminate({"PMI_RANK": "0"}) and not launch.ends_on_terminate({})


@pytest.mark.parametrize("environ, found", [
    ({}, (1, "")), ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, (1, "")), ({"SLURM_STEP_NUM_TASKS": "4"}, (4, "srun")),
    ({"SLURM_STEP_NUM_TASKS": "4", "PMI_SIZE": "4"}, (4, "srun")), ({"PMI_SIZE": "3"}, (3, "mpiexec")),
    ({"SLURM_STEP_NUM_TASKS": "2", "OMPI_COMM_WORLD_SIZE": "8"}, (8, "mpirun of Open MPI")), ({"OMPI_COMM_WORLD_SIZE": "1"}, (1, "mpirun of Open MPI"))])
def test_what_a_launcher_started(environ, found):
    number, name = launcher.started(environ)
    assert (number, name if found[1] else "") == found


OPEN_MPI, MPICH = "Open MPI v5.0.11, package: Open MPI root@host\0", "MPICH Version:      5.0.2\nMPICH Release date: x\nMPICH configure:    --with-pm=hydra\n"
CRAY = "MPI VERSION    : CRAY MPICH version 8.1.28.29 (ANL base 3.4a2)\n"


@pytest.mark.parametrize("version, name, way, own", [
    (OPEN_MPI, "Open MPI v5.0.11", "srun --mpi=pmix", "mpirun"), (MPICH, "MPICH 5.0.2", "srun --mpi=pmi2", "mpiexec"),
    (CRAY, "CRAY MPICH 8.1.28.29", "srun --mpi=cray_shasta", None),
    ("Intel(R) MPI Library 2021.11 for Linux* OS\n", "Intel(R) MPI Library 2021.11 for Linux* OS", "I_MPI_PMI_LIBRARY", None)])
def test_each_mpi_has_its_way_to_start(tmp_path, version, name, way, own):
    assert launcher.short_library(version) == name and way in launcher.right_launcher(version, str(tmp_path))
    for program in ("mpirun", "mpiexec"):
        (tmp_path / program).touch()
    assert launcher.right_launcher(version, str(tmp_path)).partition(str(tmp_path))[2] == (f"/{own})" if own else "")


@pytest.mark.parametrize("version, environ, libraries, surely", [
    (OPEN_MPI, {"PMI_RANK": "0"}, "libpmix.so.2", True), (OPEN_MPI, {}, "", True), (OPEN_MPI, {"PMIX_NAMESPACE": "slurm.pmix.1.0"}, "", False),
    (OPEN_MPI.replace("v5", "v4"), {"PMI_RANK": "0"}, "", False),
    (MPICH, {"PMIX_NAMESPACE": "slurm.pmix.1.0"}, "libmpi.so.12", True), (MPICH, {"PMIX_NAMESPACE": "x", "PMI_RANK": "0"}, "libmpi.so.12", False),
    (MPICH, {"PMIX_NAMESPACE": "x"}, "libmpi.so.12\nlibpmix.so.2", False),
    (MPICH.replace("--with-pm=hydra", "--with-pmix=/usr"), {"PMIX_NAMESPACE": "x"}, "libmpi.so.12", False),
    (MPICH, {"PMIX_NAMESPACE": "x"}, "", False), (MPICH, {}, "libmpi.so.12", False), (CRAY, {"PMIX_NAMESPACE": "x"}, "libmpi.so.12", False)])
def test_what_surely_does_not_join(version, environ, libraries, surely):
    assert launcher.cannot_join(version, environ, libraries) == surely


def test_one_task_of_srun_needs_no_mpi():
    """MPICH 5 would abort where Slurm's default is PMIx; an mpirun below that task counts for itself."""
    task = {"SLURM_STEP_NUM_TASKS": "1", "PMIX_NAMESPACE": "slurm.pmix.7.0", "PMIX_RANK": "0"}
    assert not launch.launched(task) and launch.launched(task | {"SLURM_STEP_NUM_TASKS": "2"})
    assert launch.launched(task | {"OMPI_COMM_WORLD_SIZE": "4"}) and launch.launched(task | {"PMIX_NAMESPACE": "prterun-n1-7@1"})


def test_ranks_that_mpi_does_not_join_are_refused_once(tmp_path):
    """As under srun with a start-up that this MPI does not know: each process is a job of its own."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_COMM", "PMI", "PMIX", "PRTE", "SLURM"))}
    environ |= {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    ranks = [subprocess.Popen([sys.executable, "-m", "mpillm", "train", "job.toml"], env=environ | {"SLURM_PROCID": str(rank)}, cwd=tmp_path,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(2)]
    said = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2] and said[1] == ""
    assert said[0].startswith("mpillm: error: 2 processes were started by srun, but MPI cannot join them into one job: mpi4py uses ")
    assert said[0].count("\n") == 1 and list(tmp_path.iterdir()) == []


def is_hydra(mpirun):
    """Whether it is MPICH's (or Intel's), not Open MPI's."""
    return "HYDRA" in subprocess.run([mpirun, "--version"], capture_output=True, text=True).stdout


def foreign_mpirun():
    """mpirun of another kind than that of the tests: of a second environment beside theirs, or of the machine; None where there is none."""
    found = [*map(str, Path(sys.prefix).parent.glob(".venv*/bin/mpirun")), shutil.which("mpirun", path=os.defpath)]
    own = command_runs.launcher()
    return next((each for each in found if own and each and is_hydra(each) != is_hydra(own)), None)


def test_the_mpirun_of_another_mpi_is_refused(tmp_path):
    """MPI_Init is not called: of these pairs some abort there, and others print banners."""
    mpirun = foreign_mpirun()
    if mpirun is None:
        pytest.skip("no mpirun of a second MPI")
    done = subprocess.run([mpirun, *command_runs.command(["train", "job.toml"], ranks=3)[1:]], env=command_runs.environment(), cwd=tmp_path,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    ours = [line for line in done.stdout.splitlines() if line.startswith("mpillm")]
    assert done.returncode == 2 and len(ours) == 1, done.stdout
    assert ours[0].startswith("mpillm: error: 3 processes were started by mp") and "PMI_Init" not in done.stdout and "no-pmix" not in done.stdout
    assert list(tmp_path.iterdir()) == []
