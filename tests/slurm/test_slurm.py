"""The scripts of `mpillm submit` under a real Slurm: trained, stopped before the limit and queued again, cancelled, a node lost, a chain."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster, missing

from mpillm.run.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
VENV = Path(sys.executable).parent.parent
pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.timeout(400)]

JOB = """
[model]
family = "llama"
layers = 2
width = 32
heads = 2
context = 32
vocabulary = 64
[data]
train = "random"
[train]
steps = 60
batch = 4
[checkpoint]
every = 20
[run]
name = "unnamed"
"""


def mpi_type():
    """srun's kind of start-up for the MPI of this environment."""
    text = subprocess.run([sys.executable, "-c", "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"],
                          capture_output=True, text=True, check=True).stdout
    return "pmix" if "Open MPI" in text else "pmi2"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    with Cluster(folder) as cluster:
        yield cluster
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("jobs")
    (place / "job.toml").write_text(JOB)
    environment = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,tcp", "PYTHONPATH": str(ROOT), "OMPI_MCA_btl_tcp_if_include": "lo", "OMPI_MCA_mpi_yield_when_idle": "1", "CUDA_VISIBLE_DEVICES": ""}
    lines = ['description = "a test"', "cores = 4", "ranks = 2", f'mpi = "{mpi_type()}"', "[environment]", *(f'{key} = "{value}"' for key, value in environment.items())]
    (place / "site.toml").write_text("\n".join(lines) + "\n")
    return place


class Job:
    """A submitted job."""

    def __init__(self, cluster, place, name, *overrides, options=(), edit=lambda script: script):
        self.cluster, self.path, self.place = cluster, place / "runs" / name, place
        command = [sys.executable, "-m", "mpillm", "submit", "job.toml", f"run.name={name}", *overrides, "--site", "site.toml", "--venv", str(VENV), *options]
        script = subprocess.run(command, cwd=place, capture_output=True, text=True, check=True, env=cluster.environ | {"PYTHONPATH": str(ROOT)}).stdout
        self.number = cluster.call("sbatch", "--parsable", check=True, input=edit(script), cwd=place).strip()

    def state(self):
        return self.cluster.show(self.number).get("JobState", "")

    def step(self):
        try:
            steps = read_metrics(self.path / "metrics.jsonl")[0]
        except OSError:
            return 0
        return steps[-1]["step"] if steps else 0

    def status(self):
        return json.loads((self.path / "status.json").read_text())

    def output(self):
        return "".join(path.read_text(errors="replace") for path in sorted(self.place.glob(f"slurm-{self.path.name}-{self.number}*.out")))

    def until(self, condition, seconds=120):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{self.state()}\n{self.output()}"
            time.sleep(0.3)

    def ended(self, state="COMPLETED", seconds=120):
        self.until(lambda: self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), seconds)
        assert self.state() == state, self.output()

    def events(self, name):
        return [event for event in read_metrics(self.path / "metrics.jsonl")[1] if event["event"] == name]

    def newest(self):
        return max((path.name for path in (self.path / "checkpoints").glob("step-????????")), default=None)


def test_a_job_trains_and_a_refused_one_is_not_queued_again(cluster, place):
    one, wrong = Job(cluster, place, "trains"), Job(cluster, place, "refused", edit=lambda script: script.replace("train job.toml", "train job.toml data.validation=none.h5"))
    one.ended()
    assert one.status()["state"] == "finished" and one.step() == 60 and "mpillm train: finished, exit code 0" in one.output()
    wrong.ended("FAILED")
    assert "not queued again" in wrong.output() and wrong.output().count("mpillm: error:") == 1
    assert cluster.show(wrong.number)["ExitCode"] == "2:0"


def test_signalled_before_the_limit_it_saves_queues_itself_again_and_comes_to_its_end(cluster, place):
    """One job is signalled, one knows its limit by itself; both are slow at first, and have their time again once they were queued again."""
    def slow_at_first(script):
        return script.replace("USR1@180", "USR1@50").replace("code=0\n", 'code=0\n[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || export MPILLM_FAULT=data:0:*:sleep=0.5\n')
    signalled = Job(cluster, place, "signalled", "train.steps=60", "checkpoint.every=0", options=["--time", "1"], edit=slow_at_first)
    knows = Job(cluster, place, "knows", "train.steps=60", "checkpoint.every=0", "run.time_limit=25", edit=slow_at_first)
    for job, reason in ((signalled, "stopped by SIGUSR1"), (knows, "stopped by the time limit")):
        job.ended(seconds=200)
        assert f"{reason}; start again to go on" in job.output() and "queued again: stopped with a checkpoint" in job.output()
        stopped, resumed = job.events("stopped")[0], job.events("resumed")[0]
        assert stopped["step"] == resumed["step"] < 60 and cluster.show(job.number)["Restarts"] >= "1"
        assert job.step() == 60 and job.status()["state"] == "finished"


def test_a_cancelled_job_leaves_a_checkpoint_and_a_lost_node_only_costs_time(cluster, place):
    cancelled = Job(cluster, place, "cancelled", "train.steps=1000000")
    lost = Job(cluster, place, "lost", "train.steps=4000", "checkpoint.every=50")
    cancelled.until(lambda: cancelled.newest())
    cluster.call("scancel", cancelled.number)
    cancelled.ended("CANCELLED")
    lost.until(lambda: lost.newest())
    node = cluster.show(lost.number)["NodeList"]
    cluster.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test", check=True)
    lost.until(lambda: int(cluster.show(lost.number).get("Restarts", 0)) == 1, 30)
    cluster.call("scontrol", "update", f"NodeName={node}", "State=RESUME")      # refused where it has come back by itself
    lost.until(lambda: lost.events("resumed"), 90)
    assert lost.events("resumed")[0]["step"] >= 50
    cluster.call("scancel", lost.number)
    again = Job(cluster, place, "cancelled", f"train.steps={cancelled.step() + 50}")     # what was left is valid
    again.ended()
    assert again.events("resumed")[-1]["step"] > 0


def test_a_chain_of_four_links_trains_one_model(cluster, place):
    """Each link but the last is asked to stop; the last comes to the end."""
    job = Job(cluster, place, "chain", "train.steps=150", "checkpoint.every=0", options=["--links", "4"],
              edit=lambda script: script.replace("code=0\n", "code=0\nexport MPILLM_FAULT=between:0:$((40 * SLURM_ARRAY_TASK_ID)):usr1\n"))
    job.until(lambda: cluster.call("squeue", "--noheader", "--job", job.number).strip() == "", 180)
    assert job.step() == 150 and job.status()["state"] == "finished", job.output()
    steps = [event["step"] for event in job.events("resumed")]
    assert len(steps) == 3 and all(0 <= step - 40 * link <= 2 for link, step in enumerate(steps, 1)), steps
    assert job.output().count("the next link goes on: stopped with a checkpoint") == 3
