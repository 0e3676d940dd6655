"""The monitors of two nodes on one machine, with processes that stand for ranks: alarms, suspended jobs, ranks that go on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mpillm.run import lock

RANK = """
import faulthandler, json, os, signal, sys, tempfile, threading, time
from mpillm.layout.comm import Solo
from mpillm.layout.journal import Journal
from mpillm.layout.record import Record
from mpillm.run.lock import process_start
from mpillm.run.monitor import DUMP, END

kind, limit = sys.argv[1], float(sys.argv[2])
journal = Journal()
journal.record = Record()
stacks = tempfile.NamedTemporaryFile("w", delete=False)
faulthandler.register(DUMP, file=stacks, all_threads=True)
if kind == "recovers":
    signal.signal(DUMP, lambda *_: journal.phase("data", 6))
signal.signal(END, lambda *_: os._exit(77))
if kind == "deaf":
    signal.signal(END, signal.SIG_IGN)
journal.phase("data", 5)
if kind == "waits":
    journal.phase("reduce")
    journal.enter(Solo(), "reduce_scatter", None, 0)
journal.record.limit(limit)
print(json.dumps({"pid": os.getpid(), "start": process_start(os.getpid()), "record": journal.record.path, "stacks": stacks.name}), flush=True)
while True:
    time.sleep(0.05)
    if kind == "works":
        journal.progress()
"""


BEFORE = '{"state": "failed", "exit": 1}'       # of an earlier run


@pytest.fixture
def start(tmp_path):
    """Starts ranks of a kind, and monitors for lists of them; ends what is left."""
    processes = []

    def rank(kind, limit=1.0):
        process = subprocess.Popen([sys.executable, "-c", RANK, kind, str(limit)], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        process.config = json.loads(process.stdout.readline())
        return process

    def monitors(*nodes):
        found, number, size = [], 0, sum(map(len, nodes))
        for node, ranks in enumerate(nodes):
            config = {"ranks": [each.config | {"rank": number + place} for place, each in enumerate(ranks)], "host": f"n{node}", "node": node,
                      "nodes": len(nodes), "num_ranks": size, "directory": str(tmp_path), "stamp": "now", "token": "mine",
                      "status": BEFORE}
            number += len(ranks)
            process = subprocess.Popen([sys.executable, "-m", "mpillm.run.monitor"], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
            process.stdin.write(json.dumps(config).encode() + b"\n")
            process.stdin.flush()
            processes.append(process)
            found.append(process)
        return found
    yield rank, monitors
    for process in processes:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                stream.close()


def test_two_nodes_name_the_rank_of_the_other_one(start, tmp_path):
    rank, monitors = start
    (tmp_path / "lock").write_bytes(lock.encode({"token": "mine"}))
    first, second = [rank("waits"), rank("waits")], [rank("busy"), rank("waits")]
    watching = monitors(first, second)
    assert [each.wait(20) for each in [*first, *second]] == [77] * 4
    said = watching[0].communicate(timeout=10)[1].decode()
    assert "rank 2 (node n1) is in step 5, reading data" in said and "ranks 0-1, 3 wait in reduce_scatter 1 over one rank" in said
    assert watching[1].communicate(timeout=10)[1] == b""
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit"], status["rank"], status["step"]) == ("failed", 77, 2, 5)
    folder = tmp_path / "hang-now"
    assert sorted(path.name for path in folder.iterdir()) == ["ended", "node-0.json", "node-1.json", "report.txt", "stacks.txt"]
    assert not (tmp_path / "lock").exists() and "rank 2 (node n1)" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("own", [True, False])
def test_what_a_rank_failed_of_stays(start, tmp_path, own):
    rank, monitors = start
    text = '{"state": "failed", "exit": 1, "reason": "why the others wait"}' if own else BEFORE
    (tmp_path / "status.json").write_text(text)
    waiting = rank("waits")
    monitors([waiting])
    assert waiting.wait(20) == 77 and ((tmp_path / "status.json").read_text() == text) == own


def test_a_rank_that_does_not_hear_is_killed(start):
    rank, monitors = start
    deaf, waiting = rank("deaf"), rank("waits")
    monitors([waiting, deaf])
    assert (deaf.wait(20), waiting.wait(20)) == (-signal.SIGKILL, 77)


def test_a_suspended_job_is_no_alarm(start, tmp_path):
    rank, monitors = start
    ranks = [rank("works"), rank("works")]
    monitor, = monitors(ranks)
    for each in ranks:
        os.kill(each.pid, signal.SIGSTOP)
    time.sleep(2.5)
    assert monitor.poll() is None and not (tmp_path / "hang-now").exists()
    for each in ranks:
        os.kill(each.pid, signal.SIGCONT)
    time.sleep(1.5)
    assert monitor.poll() is None and not (tmp_path / "hang-now").exists()


def test_ranks_that_go_on_meanwhile_are_left_alone(start, tmp_path):
    rank, monitors = start
    one = rank("recovers")
    monitor, = monitors([one])
    deadline = time.monotonic() + 10
    while not list(tmp_path.glob("hang-now-over-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert one.poll() is None and "then the ranks went on" in (tmp_path / "log.txt").read_text() and not (tmp_path / "status.json").exists()


def test_no_alarm_while_ranks_work_or_have_no_limit_and_an_end_with_them(start, tmp_path):
    rank, monitors = start
    ranks = [rank("works", 0.5), rank("busy", 0.0)]
    monitor, = monitors(ranks)
    time.sleep(2)
    assert monitor.poll() is None and not (tmp_path / "hang-now").exists()
    monitor.stdin.close()           # its parent died; the ranks live on
    time.sleep(0.5)
    assert monitor.poll() is None
    for each in ranks:
        each.kill()
        each.wait()
    assert monitor.wait(5) == 0


def test_ranks_that_go_on_without_a_dead_one_are_left_alone(start, tmp_path):
    """Its parent died, so nobody tells this monitor; the rank that lives is watched by another one."""
    rank, monitors = start
    dead, alive = rank("busy"), rank("closed", -1.0)
    monitor, = monitors([dead, alive])
    monitor.stdin.close()
    dead.kill()
    dead.wait()
    assert monitor.wait(5) == 0 and alive.poll() is None and not (tmp_path / "hang-now").exists()


def test_it_ends_when_the_run_does(start):
    rank, monitors = start
    monitor, = monitors([rank("works")])
    monitor.stdin.write(b"end")
    monitor.stdin.flush()
    assert monitor.wait(5) == 0
