"""Requests to stop: what sets the flag, and that all ranks agree."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpillm.layout.comm import Solo
from mpillm.run import signals, walltime
from mpillm.run.signals import RETRY, WRITE_RATE, StopFlag
from mpillm.run.walltime import WallTime, seconds_of

LAUNCHERS = ("OMPI_", "PMI", "PMIX", "PRTE", "SLURM", "MPI_", "HYDRA", "PALS")


@pytest.fixture
def plain(monkeypatch):
    """No launcher's variables."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("number, reason", [(signal.SIGUSR1, "SIGUSR1"), (signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_signals_set_the_flag(plain, number, reason):
    with StopFlag(Solo()) as stop:
        assert not stop.requested and stop.wishes() == [0.0, 0.0] and not stop.agree()
        os.kill(os.getpid(), number)
        assert stop.requested and stop.reason == reason and stop.wishes() == [1.0, 0.0] and stop.agree() and stop.explain() == reason


def test_the_second_interrupt_stops_at_once(plain):
    with StopFlag(Solo()) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "Ctrl-C"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)]
    with StopFlag(Solo()):
        pass
    assert [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)] == before


def test_terminate_ends_the_rank_under_open_mpi(plain, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGTERM)
    with StopFlag(Solo()):
        assert signal.getsignal(signal.SIGTERM) is before


def test_usr2_shows_all_stacks_and_goes_on():
    code = ("import os, signal\nfrom mpillm.layout.comm import Solo\nfrom mpillm.run.signals import StopFlag\n"
            "def here():\n    os.kill(os.getpid(), signal.SIGUSR2)\n    print('on')\nwith StopFlag(Solo()): here()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0 and done.stdout == "on\n" and "in here" in done.stderr


def test_the_time_limit_leaves_room_for_a_checkpoint():
    now = [0.0]
    stop = StopFlag(Solo(), WallTime(100.0, {}), clock=lambda: now[0])
    stop.saved(7.0)
    while not stop.agree():
        now[0] += 2.0
    assert stop.reason == "the time limit" and 74.0 <= now[0] <= 79.0   # 100 - 5 - 2 steps of 2 s - 2 saves of 7 s


def test_a_short_limit_still_gives_time_to_work():
    now = [0.0]
    stop = StopFlag(Solo(), WallTime(8.0, {}), clock=lambda: now[0])
    while not stop.agree():
        now[0] += 0.5
    assert 4.0 <= now[0] <= 5.0


def test_a_stop_file_is_looked_for_now_and_then():
    now, looks = [0.0], []
    stop = StopFlag(Solo(), wished=lambda: looks.append(now[0]) or ("STOP" if now[0] > 5 else None), clock=lambda: now[0])
    while not stop.agree():
        now[0] += 0.1
    assert len(looks) <= 5 and stop.reason == "a file named STOP"


def test_a_colleague_gets_a_checkpoint_and_the_run_goes_on():
    now, files = [0.0], ["SAVE"]
    stop = StopFlag(Solo(), wished=lambda: files[0], clock=lambda: now[0])
    assert stop.wishes() == [0.0, 1.0]
    stop.saved(1.0)
    assert stop.wishes() == [0.0, 0.0]      # the next look is 2 s later
    now[0], files[0] = 3.0, "STOP"
    assert stop.wishes() == [1.0, 0.0]


def test_a_checkpoint_that_failed_is_not_tried_after_every_step():
    now = [0.0]
    stop = StopFlag(Solo(), wished=lambda: "SAVE", clock=lambda: now[0])
    assert stop.wishes() == [0.0, 1.0]
    stop.save_failed()
    asked = []
    while now[0] < 1.5 * RETRY:
        now[0] += 1.0
        asked.append(stop.wishes()[1])
    assert asked.index(1.0) + 1 == RETRY


def test_room_for_the_first_save_is_guessed_from_its_size_or_an_earlier_one():
    stop = StopFlag(Solo())
    stop.expect_save(10 * WRITE_RATE)
    assert stop.save_seconds == 10.0
    stop.expect_save(10 * WRITE_RATE, 25.0)
    assert stop.save_seconds == 25.0
    stop.saved(4.0)
    stop.saved(3.0)
    stop.expect_save(10 * WRITE_RATE)
    assert stop.save_seconds == 4.0


# ---- the time that is left ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, seconds", [("1-02:03:04", 93784), ("02:03:04", 7384), ("3:04", 184), ("0:00", 0), ("UNLIMITED\n", math.inf),
                                           ("NOT_SET", None), ("INVALID", None), ("", None), ("-1:00", None),
                                           ("90", 5400), ("1:2", 62), ("100:00", 6000), ("01:00:00", 3600), ("48:00:00", 172800), ("2-3", 183600), ("1-24", None), ("0:60", None),
                                           ("25:99:99", None), ("0", 0), ("-5", None), ("1-", None), ("1:2:3:4", None), ("1 0", None), ("\u0663", None)])
def test_slurms_durations(text, seconds):
    assert seconds_of(text) == seconds


def test_the_earlier_limit_counts_and_slurm_may_move_its_own():
    began = signals.clock()
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(time.time()) + 50)}
    assert WallTime(None, {}).limit() == (None, "") and WallTime(None, {"SLURM_JOB_END_TIME": "5"}).limit() == (None, "")
    assert WallTime(10.0, environ).limit() == (10.0, "the time limit")
    seconds, name = WallTime(1e6, environ).limit()
    assert name == "Slurm's time limit" and 48 <= seconds - began <= 52
    wall = WallTime(1e6, environ, ask=lambda job: 500 if job == "7" else None)
    wall.start()
    deadline = time.monotonic() + 5
    while wall.limit()[0] - began < 490 and time.monotonic() < deadline:
        time.sleep(0.01)
    wall.stop()
    assert 499 <= wall.limit()[0] - began <= 505


@pytest.mark.parametrize("answers, limit", [([None], "Slurm's time limit"), ([math.inf], ""), ([None, None, math.inf], ""), ([math.inf, None], "")])
def test_what_slurm_said_last_counts_and_no_answer_is_asked_for_again(monkeypatch, answers, limit):
    monkeypatch.setattr(walltime, "NO_ANSWER", 0.01)
    environ, left = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(time.time()) + 50)}, list(answers)
    wall = WallTime(None, environ, ask=lambda job: left.pop(0) if left else None)
    wall.start()
    time.sleep(0.2)
    wall.stop()
    assert left == ([None] if answers == [math.inf, None] else []) and wall.limit()[1] == limit    # after an answer there is time


@pytest.mark.parametrize("script, seconds", [("echo 1:30", 90), ("echo UNLIMITED", math.inf), ("echo INVALID", None), ("exit 1", None), (None, None)])
def test_squeue_is_asked(tmp_path, monkeypatch, script, seconds):
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        (tmp_path / "squeue").write_text(f'#!/bin/sh\ntest "$*" = "--noheader --job 7 --format %L" || exit 3\n{script}\n')
        (tmp_path / "squeue").chmod(0o755)
    assert walltime.ask_slurm("7") == seconds


# ---- signals while the main thread waits ----------------------------------------------------------------------------

WAITING = """
import ctypes, os, signal, sys, threading, time
from mpillm.layout.comm import Solo
from mpillm.run.signals import StopFlag
with StopFlag(Solo()) as stop:
    stop.on_signal(signal.SIGRTMIN + 2, lambda: os._exit(77))
    print("ready", flush=True)
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)      # for ever, as in a call of MPI: no handler of Python runs
"""


def test_signals_are_heard_while_the_main_thread_waits_in_c():
    process = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[2])
    with process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGUSR1)
        assert process.stderr.readline() == "mpillm: SIGUSR1: the run saves and stops after this step\n"
        process.send_signal(signal.SIGRTMIN + 2)
        assert process.wait(5) == 77


def test_a_request_to_stop_is_said_once(plain, capsys):
    """Also where the handler comes first, since the main thread does not wait."""
    with StopFlag(Solo()) as stop:
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR1):
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        assert stop.reason == "Ctrl-C"
    assert capsys.readouterr().err == "mpillm: Ctrl-C: the run saves and stops after this step\n"


@pytest.mark.ranks
def test_a_rank_hears_while_it_waits_for_a_message(group):
    if group.size == 1:
        return      # nobody to wait for
    teller, told = group.size - 1, []
    pid = group.share(os.getpid() if group.rank == 0 else None)
    with StopFlag(group) as stop:
        if group.rank == 0:
            stop.on_signal(signal.SIGRTMIN + 3, lambda: told.append(stop.reason))
        group.barrier()
        if group.rank == teller:
            os.kill(pid, signal.SIGUSR1)
            time.sleep(0.3)
            os.kill(pid, signal.SIGRTMIN + 3)
            time.sleep(0.3)
            group.handle.Send([bytearray(1), group.mpi.BYTE], 0, 7)
        elif group.rank == 0:
            group.handle.Recv([bytearray(1), group.mpi.BYTE], teller, 7)
            assert told == ["SIGUSR1"]      # before the message came
        assert stop.explain() == "SIGUSR1"


def test_the_thread_and_its_descriptor_are_put_back():
    before = signal.set_wakeup_fd(-1)
    assert signal.set_wakeup_fd(before) == -1
    with StopFlag(Solo()) as stop:
        heard = []
        stop.on_signal(signal.SIGRTMIN + 2, lambda: heard.append(1))
        os.kill(os.getpid(), signal.SIGRTMIN + 2)
        deadline = time.monotonic() + 5
        while not heard and time.monotonic() < deadline:
            time.sleep(0.01)
    assert heard == [1] and stop.thread is None and signal.set_wakeup_fd(before) == before
    assert signal.getsignal(signal.SIGRTMIN + 2) == signal.SIG_DFL


@pytest.mark.ranks
def test_one_rank_stops_all(group):
    import numpy as np
    stop = StopFlag(group)
    assert not stop.agree()
    if group.rank == group.size - 1:
        stop.request("SIGUSR1")
    assert group.all_reduce(np.array([stop.wishes()[0]]))[0] == 1.0
    assert stop.explain() == "SIGUSR1" and stop.agree()


def test_a_request_before_there_is_a_flag_is_kept(monkeypatch):
    monkeypatch.setattr(signals, "early", [])
    old = signal.getsignal(signal.SIGUSR1)
    try:
        signals.listen_early()
        os.kill(os.getpid(), signal.SIGUSR1)
        with StopFlag(Solo()) as stop:
            assert stop.requested and stop.reason == "SIGUSR1"
    finally:
        signal.signal(signal.SIGUSR1, old)
