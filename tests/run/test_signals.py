"""Requests to stop: what sets the flag, and that all ranks agree."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpillm.layout.comm import Solo
from mpillm.run import signals
from mpillm.run.signals import StopFlag

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
        assert not stop.requested and stop.local() == 0.0 and not stop.agree()
        os.kill(os.getpid(), number)
        assert stop.requested and stop.reason == reason and stop.local() == 1.0 and stop.agree() and stop.explain() == reason


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
    stop = StopFlag(Solo(), time_limit=100.0, clock=lambda: now[0])
    stop.saved(7.0)
    while not stop.agree():
        now[0] += 2.0
    assert stop.reason == "the time limit" and 74.0 <= now[0] <= 79.0   # 100 - 5 - 2 steps of 2 s - 2 saves of 7 s


def test_a_short_limit_still_gives_time_to_work():
    now = [0.0]
    stop = StopFlag(Solo(), time_limit=8.0, clock=lambda: now[0])
    while not stop.agree():
        now[0] += 0.5
    assert 4.0 <= now[0] <= 5.0


def test_a_stop_file_is_looked_for_now_and_then():
    now, looks = [0.0], []
    stop = StopFlag(Solo(), stop_requested=lambda: looks.append(now[0]) or now[0] > 5, clock=lambda: now[0])
    while not stop.agree():
        now[0] += 0.1
    assert len(looks) <= 5 and stop.reason == "a file named stop"


@pytest.mark.ranks
def test_one_rank_stops_all(group):
    import numpy as np
    stop = StopFlag(group)
    assert not stop.agree()
    if group.rank == group.size - 1:
        stop.request("SIGUSR1")
    assert group.all_reduce(np.array([stop.local()]))[0] == 1.0
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
