"""The run directory and its lock: one run at a time, nothing changed by those that are refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpillm.config import UserError
from mpillm.layout.comm import Solo
from mpillm.run import lock
from mpillm.run.directory import RunDirectory, write_atomic

HOLD = """
import sys, time
from mpillm.run import lock
from mpillm.config import UserError
while not __import__("os").path.exists(sys.argv[2]): time.sleep(0.001)
try:
    held = lock.acquire(sys.argv[1])
except UserError:
    print("refused", flush=True)
else:
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def start(path, go, seconds):
    return subprocess.Popen([sys.executable, "-c", HOLD, str(path), str(go), str(seconds)], stdout=subprocess.PIPE, text=True,
                            cwd=Path(__file__).resolve().parents[2])


def everything(path):
    """Every file below `path` with its bytes and time."""
    return {str(item): (item.lstat().st_mtime_ns, item.read_bytes() if item.is_file() else None) for item in sorted(path.rglob("*"))}


def files(path):
    return {name: item for name, item in everything(path).items() if item[1] is not None}


def write_lock(path, **changes):
    path.mkdir(parents=True, exist_ok=True)
    owner = lock.this_process() | changes
    (path / "lock").write_bytes(lock.encode(owner))
    return owner


def gone():
    """The id of a process that ran a moment ago."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_life_of_a_run(tmp_path):
    path = tmp_path / "runs" / "small"
    with RunDirectory(path, Solo()) as run:
        assert run.checkpoints.is_dir() and json.loads((path / "lock").read_text())["pid"] == os.getpid()
        run.write_job("[run]\n")
        run.status("running", step=0)
        run.heartbeat(7)
        run.status("finished", exit=0)
    assert not (path / "lock").exists() and (path / "job.toml").read_text() == "[run]\n"
    status = json.loads((path / "status.json").read_text())
    assert set(status) == {"state", "exit", "reason", "rank", "step", "time"}
    assert (status["state"], status["exit"], status["step"]) == ("finished", 0, 7)
    assert not [item for item in path.iterdir() if item.name.startswith(".")]


def test_wishes_of_colleagues(tmp_path):
    with RunDirectory(tmp_path / "run", Solo()) as run:
        assert run.wish() is None
        run.granted()
        (run.path / "SAVE").touch()
        assert run.wish() == "SAVE"
        run.granted()
        assert run.wish() is None
        (run.path / "SAVE").mkdir()     # granted once; it cannot be removed
        assert run.wish() == "SAVE"
        run.granted()
        assert run.wish() is None
        (run.path / "STOP").symlink_to("nowhere")
        assert run.wish() == "STOP"


def test_a_second_run_is_refused_before_it_changes_a_byte(tmp_path):
    with RunDirectory(tmp_path / "run", Solo()) as run:
        run.status("running", step=3)
        before = everything(tmp_path)
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on .*delete"):
            RunDirectory(tmp_path / "run", Solo())
        assert everything(tmp_path) == before


def test_a_refused_run_leaves_no_trace(tmp_path):
    with pytest.raises(UserError, match="^wrong model$"), RunDirectory(tmp_path / "runs" / "small", Solo()):
        raise UserError("wrong model")
    assert list(tmp_path.iterdir()) == []
    with RunDirectory(tmp_path / "run", Solo()) as run:
        run.status("finished", exit=0)
    before = files(tmp_path)
    with pytest.raises(UserError), RunDirectory(tmp_path / "run", Solo()):
        raise UserError("wrong model")
    assert files(tmp_path) == before


def test_a_failure_is_written_down_and_unlocks(tmp_path):
    with pytest.raises(ValueError), RunDirectory(tmp_path / "run", Solo()) as run:
        run.status("running", step=0)
        run.heartbeat(12)
        raise ValueError("broken\npipe")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status | {"time": 0} == {"state": "failed", "exit": 1, "reason": "ValueError: broken pipe", "rank": 0, "step": 12, "time": 0}
    assert not (tmp_path / "run" / "lock").exists()


class Place(Solo):
    """Rank 1 of two, told by rank 0 what came out."""
    rank, size = 1, 2

    def __init__(self, token):
        self.token = token

    def share(self, value, root=0):
        return [None, self.token, None]


def test_the_first_failing_rank_is_the_one_reported(tmp_path):
    first = RunDirectory(tmp_path / "run", Solo())
    first.status("running", step=0)
    with pytest.raises(ValueError), RunDirectory(tmp_path / "run", Place(first.token)) as second:
        second.heartbeat(5)
        raise ValueError("of rank 1")
    assert not (tmp_path / "run" / "lock").exists()     # rank 1 ends the job, rank 0 will not come to it
    first.status("running", step=1)                     # rank 0, which has not noticed yet
    first.__exit__(RuntimeError, RuntimeError("of rank 0, later"), None)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["rank"], status["reason"], status["step"]) == (1, "ValueError: of rank 1", 5)


def test_the_failure_of_an_earlier_run_is_replaced(tmp_path):
    for word in ("first", "second"):
        with pytest.raises(ValueError), RunDirectory(tmp_path / "run", Solo()):
            raise ValueError(word)
        assert json.loads((tmp_path / "run" / "status.json").read_text())["reason"] == f"ValueError: {word}"
    with RunDirectory(tmp_path / "run", Solo()) as run:
        run.status("running", step=0)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "running"


@pytest.mark.parametrize("make, line", [
    (lambda path: path.write_text("x"), "is a file, not a directory"),
    (lambda path: path.symlink_to(path.parent), "symbolic link"),
    (lambda path: (path.mkdir(), (path / "checkpoints").write_text("x")), "not a directory"),
    (lambda path: (path.mkdir(), (path / "metrics.jsonl").symlink_to("/etc/hosts")), "not a plain file"),
    (lambda path: (path.mkdir(), (path / "STOP").touch()), "told to stop; delete"),
    (lambda path: (path.mkdir(), (path / "lock").touch()), "names no owner"),
], ids=["file", "link", "checkpoints", "metrics", "stop", "empty lock"])
def test_unusable_directories(tmp_path, make, line):
    make(tmp_path / "run")
    before = everything(tmp_path)
    with pytest.raises(UserError, match=line):
        RunDirectory(tmp_path / "run", Solo())
    assert everything(tmp_path) == before


def test_a_path_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file: is a file, not a directory"):
        RunDirectory(tmp_path / "file" / "runs" / "small", Solo())
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(tmp_path):
    (tmp_path / "run").mkdir(mode=0o555)
    with pytest.raises(UserError, match="Permission denied"):
        RunDirectory(tmp_path / "run", Solo())


def test_a_file_system_without_writes():
    with pytest.raises(UserError, match="cannot be made or written to"):
        RunDirectory("/proc/mpillm/run", Solo())


def test_of_processes_that_race_one_gets_the_lock(tmp_path):
    for dead in (False, True):  # a free directory, and one whose owner was killed: all take over at once
        path = tmp_path / str(dead)
        path.mkdir()
        if dead:
            write_lock(path, pid=gone())
        runs = [start(path, path / "go", 0.7) for _ in range(4)]
        time.sleep(0.3)
        (path / "go").touch()
        said = sorted(run.communicate(timeout=20)[0].strip() for run in runs)
        assert said == ["held", "refused", "refused", "refused"]
        assert sorted(item.name for item in path.iterdir()) == ["go", "lock"]


def test_after_kill_the_next_run_takes_over(tmp_path):
    (tmp_path / "go").touch()
    run = start(tmp_path, tmp_path / "go", 60)
    assert run.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by process {run.pid} "):
        lock.acquire(tmp_path)
    run.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while lock.process_start(run.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    held = lock.acquire(tmp_path)  # not reaped yet: a process that only waits to be is dead
    run.communicate()
    held.release()
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("owner, dead", [
    ({}, False),                                                            # this very process
    ({"start": 1}, True),                                                   # its id was given to another process since
    ({"host": "elsewhere", "pid": 2**22 + 1}, False),                       # nobody can tell
    ({"namespace": "pid:[1]", "pid": 2**22 + 1}, False),                    # another container
    ({"pid": 2**22 + 1}, True),
    ({"boot": "before", "heartbeat": 0.0}, True),                           # this host was started anew since
    ({"boot": "before"}, False),                                            # a heartbeat just now: another host of that name?
    ({"pid": "x", "start": None}, False),                                   # damaged
])
def test_who_is_dead(owner, dead):
    me = lock.this_process()
    assert lock.is_dead(me | owner, me) is dead


def test_a_requeued_job_takes_its_own_lock(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue
    write_lock(tmp_path, host="elsewhere")
    with pytest.raises(UserError, match=r"on elsewhere \(job 77\)"):
        lock.acquire(tmp_path)      # another step of the same job may be running
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock.acquire(tmp_path).release()


@pytest.mark.parametrize("answer, dead", [
    ("exit 0", True), ("echo RUNNING", False), ("echo COMPLETING", False), ("echo COMPLETED", True), ("exit 1", False),
    ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True)])
def test_a_slurm_job_on_another_node(monkeypatch, tmp_path, answer, dead):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    me = lock.this_process() | {"slurm": "78", "cluster": "big"}
    assert lock.is_dead(me | {"slurm": "77", "host": "elsewhere"}, me) is dead
    assert not lock.is_dead(me | {"slurm": "77", "host": "elsewhere", "cluster": "other"}, me)


def test_a_run_that_lost_its_lock_stops(tmp_path):
    run = RunDirectory(tmp_path / "run", Solo())
    run.held.refreshed -= 60
    before = lock.read(run.held.path)["heartbeat"]
    run.heartbeat(1)
    assert lock.read(run.held.path)["heartbeat"] > before and run.held.path.stat().st_size == lock.SIZE
    os.unlink(run.held.path)
    other = RunDirectory(tmp_path / "run", Solo())
    run.held.refreshed -= 60
    with pytest.raises(RuntimeError, match="taken over"):
        run.heartbeat(2)
    run.close()
    assert lock.read(other.held.path)["token"] == other.token  # only its own lock is given back
    other.close()


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path):
    write_atomic(tmp_path / "file", b"old")
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "file", "no bytes")
    assert (tmp_path / "file").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.ranks
def test_all_ranks_get_the_same_answer(group, shared_tmp):
    run = RunDirectory(shared_tmp / "run", group)
    lines = []
    try:
        RunDirectory(shared_tmp / "run", group)
    except UserError as error:
        lines.append(str(error))
    assert len(lines) == 1 and len(set(group.collect(lines[0]))) == 1
    run.status("running", step=1)
    group.barrier()
    assert json.loads((shared_tmp / "run" / "status.json").read_text())["rank"] is None
    run.close()
    group.barrier()
    RunDirectory(shared_tmp / "run", group).close()
