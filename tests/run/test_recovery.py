"""A rank is killed and the run goes on: the same samples in the same order, the same losses, the same weights as the uninterrupted run.

5 kills of random ranks at random moments here, 20 with `tests/run.sh --long`. Needs Open MPI 5 (`mpirun --with-ft ulfm`).
"""

import functools
import gc
import json
import operator
import random
import re
import subprocess
import sys
import time
import types
import weakref

import numpy as np
import pytest
from command_runs import environment, launcher, run
from test_faults import JOB, full, gone, time_of_fault, train

from mpillm.layout import ulfm
from mpillm.run import recovery, training
from mpillm.run.metrics import read_metrics
from mpillm.run.recovery import State, common_step, complete_replicas

STEPS = 60
DOUBLE = ("precision.compute=float64", "checkpoint.every=10", "run.hang_timeout=20")


def with_ulfm():
    """Whether the launcher knows fault tolerance."""
    if launcher() is None:
        return False
    done = subprocess.run([launcher(), "--version"], capture_output=True, text=True, env=environment(), check=False)
    return "Open MPI) 5" in done.stdout or "PRRTE" in done.stdout or "(Open MPI) 5." in done.stdout


needs_ulfm = pytest.mark.skipif(not with_ulfm(), reason="the launcher is not that of Open MPI 5: no fault tolerance")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("recovery")
    (place / "job.toml").write_text(JOB)
    return place


@pytest.fixture
def fault_tolerant(monkeypatch):
    """Launches with `--with-ft ulfm`."""
    import command_runs
    plain = command_runs.command
    monkeypatch.setattr(command_runs, "command", lambda *arguments, **more: [part for word in plain(*arguments, **more)
                                                                            for part in ([word, "--with-ft", "ulfm"] if word == launcher() else [word])])


@pytest.fixture(scope="module")
def whole(place):
    """Losses of the uninterrupted run; on one rank, for the layout does not change them."""
    done = run("train", "job.toml", "run.name=whole", *DOUBLE, cwd=place)
    assert done.code == 0, done.text
    return losses(place, "whole")


def losses(place, name):
    return np.array([line["loss"] for line in read_metrics(place / "runs" / name / "metrics.jsonl")[0]])


def went_on(place, name):
    return [event for event in read_metrics(place / "runs" / name / "metrics.jsonl")[1] if event["event"] == "went on"]


def finished(place, name, whole, done, kills=1):
    """Asserts that the run came to its end as the uninterrupted one; the events of going on."""
    status, events = json.loads((place / "runs" / name / "status.json").read_text()), went_on(place, name)
    assert status["state"] == "finished" and status["exit"] == 0 and status["step"] == STEPS, done.text
    found = losses(place, name)
    assert len(found) == STEPS and np.abs(found / whole - 1).max() < 1e-10, done.text      # the goal is 1e-5
    assert len(events) == kills and all(event["seconds"] < 5 for event in events), events
    saved = {event["step"] for event in read_metrics(place / "runs" / name / "metrics.jsonl")[1] if event["event"] == "checkpoint"}
    saved |= {event["step"] for event in events if event["source"] == "checkpoint" and event["step"]}      # the death came when it was there, before it was told of
    assert saved == set(range(10, STEPS + 1, 10))           # also where the death came before a save, or in it
    assert not (place / "runs" / name / "lock").exists() and not list((place / "runs" / name).glob("hang-*"))
    return events


PHASES = ("data", "forward", "backward", "reduce", "optimizer", "between", "save", "write", "verify", "publish")


@needs_ulfm
@pytest.mark.parametrize("number", full(20))
def test_a_run_goes_on_without_a_rank_that_was_killed(place, fault_tolerant, whole, number):
    draw = random.Random(number)
    phase = PHASES[number % len(PHASES)]
    rank, step = draw.randrange(4) if number else 0, draw.choice([20, 30, 40]) if phase in PHASES[6:] else draw.randrange(3, 55)
    zero = (0, 0, 1, 0, 2)[number % 5]
    name = f"killed-{number}"
    done, _ = train(place, name, f"{phase}:{rank}:{step}:kill", "run.on_failure=continue", f"mesh.zero={zero}", *DOUBLE)
    event, = finished(place, name, whole, done)
    assert event["ranks"] == 3 and event["source"] == ("memory" if zero == 0 else "checkpoint") and f"rank {rank} (node " in done.text and ") died after step " in done.text


@needs_ulfm
@pytest.mark.parametrize("layout, ranks", [(("mesh.tp=2", "mesh.zero=0"), 2), (("mesh.pp=2", "mesh.zero=1", "train.micro_batch=2"), 2)])
def test_what_is_left_of_a_replica_leaves(place, fault_tolerant, whole, layout, ranks):
    name = layout[0].replace("=", "-")
    done, _ = train(place, name, "forward:0:33:kill", "run.on_failure=continue", *layout, *DOUBLE)
    assert finished(place, name, whole, done)[0]["ranks"] == ranks


@needs_ulfm
def test_two_ranks_die_one_after_the_other(place, fault_tolerant, whole):
    done, _ = train(place, "twice", "forward:3:15:kill,reduce:1:44:kill", "run.on_failure=continue", "mesh.zero=0", *DOUBLE)
    assert [event["ranks"] for event in finished(place, "twice", whole, done, kills=2)] == [3, 2]


@needs_ulfm
def test_without_a_complete_replica_the_run_ends(place, fault_tolerant):
    done, _ = train(place, "none-left", "forward:1:20:kill", "run.on_failure=continue", "mesh.tp=4", "model.heads=4", *DOUBLE)
    assert done.code != 0 and "no complete replica is left" in done.text
    assert json.loads((place / "runs" / "none-left" / "status.json").read_text())["state"] == "failed"


@needs_ulfm
def test_experts_that_the_replicas_left_cannot_share_end_the_run(place, fault_tolerant):
    """ep = 2 does not divide 3 replicas: going on would train wrong weights."""
    done, _ = train(place, "experts", "forward:3:15:kill", "run.on_failure=continue", "mesh.ep=2", "model.experts=4", *DOUBLE)
    found = json.loads((place / "runs" / "experts" / "status.json").read_text())
    assert done.code == 1 and found["state"] == "failed" and "ep=2 does not divide dp x cp = 3" in found["reason"], done.text
    assert not went_on(place, "experts")


@needs_ulfm
@pytest.mark.parametrize("dead", [pytest.param((0, 2), marks=pytest.mark.long), (0, 3)], ids=str)
def test_ranks_that_get_other_experts_do_not_take_them_from_memory(place, fault_tolerant, dead):
    """Of four replicas with two groups of experts, 1 and 3 had the same ones, 1 and 2 stand in another order now than before."""
    moe = ("mesh.ep=2", "model.experts=4", "mesh.zero=0", *DOUBLE)
    name = f"experts-{dead[1]}"
    whole = run("train", "job.toml", f"run.name={name}-whole", *moe[1:], cwd=place)
    assert whole.code == 0, whole.text
    done, _ = train(place, name, ",".join(f"forward:{rank}:23:kill" for rank in dead), "run.on_failure=continue", *moe)
    assert finished(place, name, losses(place, f"{name}-whole"), done)[0]["source"] == "checkpoint"


@needs_ulfm
@pytest.mark.parametrize("ranks, action, code, on_failure, phase, rank", [
    (2, "exception", 1, "continue", "forward", 1), (4, "exception", 1, "continue", "save", 0), (4, "exit", 3, "continue", "reduce", 3), (4, "exception", 1, "end", "backward", 0),
    (4, "exit", 3, "end", "forward", 1)])
def test_a_rank_that_ends_by_itself_ends_all(place, fault_tolerant, ranks, action, code, on_failure, phase, rank):
    """That is no death to go on after, and MPI_Abort would leave some of four ranks waiting."""
    name = f"ends-{ranks}-{action}-{on_failure}-{phase}"
    done, end = train(place, name, f"{phase}:{rank}:20:{action}", f"run.on_failure={on_failure}", *DOUBLE, ranks=ranks)
    found = json.loads((place / "runs" / name / "status.json").read_text())
    assert (done.code, found["state"], found["exit"], found["rank"]) == (code, "failed", code, rank), done.text
    assert end - time_of_fault(done) < 5 and gone(place)
    assert not went_on(place, name)
    assert done.text.count("Traceback") == (action == "exception")


@needs_ulfm
def test_a_dead_rank_is_said_where_the_run_is_to_end(place, fault_tolerant):
    done, end = train(place, "dead", "forward:2:20:kill", *DOUBLE)
    found = json.loads((place / "runs" / "dead" / "status.json").read_text())
    assert (done.code, found["state"], found["exit"]) == (1, "failed", 1) and end - time_of_fault(done) < 5, done.text
    assert done.text.count("mpillm: rank 2 (node ") == 1 and ") died; start again" in done.text and "Traceback" not in done.text
    assert "rank 2" in found["reason"]


# ---- two failures at once -------------------------------------------------------------------------------------------

@needs_ulfm
@pytest.mark.parametrize("number", full(20, usual=3))
def test_a_rank_raises_while_another_dies(place, fault_tolerant, number):
    """All end with the code of the one that raised, and its reason."""
    draw, on_failure = random.Random(number), ("end", "continue")[number % 2]
    raises, dies = draw.sample(range(4), 2)
    phase, other = draw.choice(PHASES[:6]), draw.choice(PHASES[:6])
    name = f"raises-{number}"
    done, end = train(place, name, f"{phase}:{raises}:20:exception,{other}:{dies}:20:kill", f"run.on_failure={on_failure}", *DOUBLE)
    found = json.loads((place / "runs" / name / "status.json").read_text())
    assert end - time_of_fault(done) < 5 and gone(place) and found["state"] == "failed" and done.code == found["exit"] == 1, done.text
    happened = f":{raises}:20:exception at" in done.text
    if happened:
        assert found["reason"] == "RuntimeError: a fault on purpose" and done.text.count("Traceback") == 1, done.text
    else:           # the other one had died before
        assert on_failure == "end" and f"rank {dies} (node" in found["reason"], done.text


@needs_ulfm
@pytest.mark.parametrize("number", full(20, usual=3))
def test_a_rank_stands_still_while_another_dies(place, fault_tolerant, number):
    """It is named, and all are gone within the time-out and 5 s. Where the others wait for it they may not have heard of the death."""
    draw, on_failure = random.Random(number), ("end", "continue")[number % 2]
    still, dies = draw.sample(range(4), 2)
    action = ("stop", "gil", "loop", "stop", "sleep=3600")[number % 5]
    name = f"still-{number}"
    done, end = train(place, name, f"forward:{still}:20:{action},{draw.choice(PHASES[1:4])}:{dies}:20:kill", f"run.on_failure={on_failure}", *DOUBLE, "run.hang_timeout=2")
    found = json.loads((place / "runs" / name / "status.json").read_text())
    assert (found["state"], found["exit"]) == ("failed", 77) and found["rank"] in (still, dies), done.text
    assert done.code == 77 and f"rank {still} (node " in found["reason"] and end - time_of_fault(done) < 2 + 5 and gone(place), done.text


@needs_ulfm
def test_a_second_rank_dies_while_ranks_meet(place, fault_tolerant, whole):
    done, _ = train(place, "meeting", "forward:1:23:kill,meet:3:*:kill", "run.on_failure=continue", "mesh.zero=0", *DOUBLE)
    assert finished(place, "meeting", whole, done)[0]["ranks"] == 2 and "ranks 1, 3 (node " in done.text


@needs_ulfm
@pytest.mark.parametrize("fault, code, reason", [("meet:0:*:exception", 1, "RuntimeError: a fault on purpose"), ("meet:3:*:stop", 77, "rank 3 (node ")], ids=str)
def test_a_rank_fails_while_ranks_meet(place, fault_tolerant, fault, code, reason):
    name = f"meeting-{code}"
    done, end = train(place, name, f"forward:1:20:kill,{fault}", "run.on_failure=continue", *DOUBLE, "run.hang_timeout=2")
    found = json.loads((place / "runs" / name / "status.json").read_text())
    assert (done.code, found["state"], found["exit"], found["rank"]) == (code, "failed", code, int(fault[5])) and reason in found["reason"], done.text
    assert end - time_of_fault(done) < 2 + 5 and gone(place)


@needs_ulfm
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.long), 4])
def test_a_failure_that_ranks_share_is_said_once(place, fault_tolerant, count):
    name = f"shared-{count}"
    done, end = train(place, name, ",".join(f"between:{rank}:20:exception" for rank in range(4 - count, 4)), *DOUBLE)
    assert done.code == 1 and end - time_of_fault(done) < 5 and gone(place) and done.text.count("Traceback") == 1, done.text


@needs_ulfm
@pytest.mark.parametrize("wrong", [[0], [1, 2], [0, 2], [0, 1, 2, 3], [3]], ids=str)
def test_a_mistake_that_some_ranks_see_ends_all_once(tmp_path, fault_tolerant, wrong):
    """Before there is a run or a monitor: the others wait in a collective, or come to it."""
    done, seconds = end_by(tmp_path, f"""
    if group.rank in {wrong}:
        raise UserError(f"x: rank {{group.rank}} found 1")
    group.barrier()
""")
    assert done.returncode == 2 and seconds < 5, done.stderr
    assert re.findall("mpillm: error: x: rank (.) found 1", done.stderr) == [str(wrong[0])], done.stderr


@needs_ulfm
@pytest.mark.parametrize("late", [0, 3])
def test_ranks_do_not_wait_for_ever_for_one_that_computes(tmp_path, fault_tolerant, late):
    """Nor does that one for those that went: without a monitor each ends by itself."""
    done, seconds = end_by(tmp_path, f"""
    ulfm.PATIENCE = 1.0
    if group.rank == 1:
        raise UserError("x: found 1")
    if group.rank == {late}:
        time.sleep(4)
    group.barrier()
""")
    assert done.returncode != 0 and seconds < 9 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("mpillm: error: x: found 1") == 1, done.stderr


@needs_ulfm
def test_a_dead_rank_is_named_where_there_is_no_run(tmp_path, fault_tolerant):
    done, seconds = end_by(tmp_path, """
    if group.rank == 2:
        import os
        os.kill(os.getpid(), 9)
    group.barrier()
""")
    assert done.returncode == 1 and seconds < 5 and re.findall("mpillm: .*", done.stderr) == ["mpillm: rank 2 died"], done.stderr


# What no fault point reaches: (patch of the program, arguments, fault, exit code, words). `rank` is that of the start.
PATCHES = {
    "the last of those that take over fails": ("""
from mpillm.layout import comm, ulfm
from mpillm.run import life, recovery
life.connect = lambda group, *more: (comm.Group(group.handle.Dup(), group.name), "")     # as for GPUs
check, take_over = ulfm.check_all, recovery.take_over
def fail(group):
    raise RuntimeError("too late") if rank == 3 else check(group)
def take_over_and_fail(*arguments):
    ulfm.check_all = lambda group: (setattr(ulfm, "check_all", check), fail(group))
    take_over(*arguments)
recovery.take_over = take_over_and_fail
""", ("mesh.zero=0",), "forward:1:23:kill", 1, "RuntimeError: too late"),
    "an error of MPI long after a death": ("""
from mpi4py import MPI
from mpillm.run.training import Training
one_step = Training._one_step
def fail(self):
    if self.step == 45 and rank == 3:
        raise MPI.Exception(MPI.ERR_TRUNCATE)
    return one_step(self)
Training._one_step = fail
""", ("mesh.tp=2", "mesh.zero=0"), "forward:0:23:kill", 1, "MPI_ERR_TRUNCATE"),
    "a file cannot be closed": ("""
from mpillm.run.progress import Progress
close = Progress.close
def fail(self):
    close(self)
    if rank == 0:
        raise OSError(28, "No space left on device")
Progress.close = fail
""", (), "", 1, "No space left on device"),
    "the lock cannot be taken over": ("""
from mpillm.run import lock
def fail(*_):
    raise OSError(28, "No space left on device")
lock.adopt = fail
""", ("mesh.zero=0",), "forward:0:23:kill", 1, "No space left on device"),
    "a rank dies in a return for a spike": ("""
from mpillm.run import spikes, training
gather, is_one, found = training.gather_loaded, spikes.Spikes.is_one, []
def find(self, loss):
    return len(self.losses) == 25 and not found and (found.append(loss) or True) or is_one(self, loss)
def die(*arguments, **more):
    if len(found) == 1:
        found.append(None)
        if rank == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    gather(*arguments, **more)
spikes.Spikes.is_one, training.gather_loaded = find, die
""", ("mesh.zero=0",), "", 0, "from checkpoint of step 20"),
}


@needs_ulfm
@pytest.mark.long
@pytest.mark.parametrize("case", PATCHES)
def test_deaths_and_failures_at_unlucky_moments(place, fault_tolerant, monkeypatch, case):
    patch, overrides, fault, code, words = PATCHES[case]
    (place / "patched.py").write_text(f"import os, signal, sys\nfrom mpillm import __main__\nrank = int(os.environ['OMPI_COMM_WORLD_RANK'])\n{patch}\nsys.exit(__main__.main())\n")
    monkeypatch.setenv("MPILLM_FAULT", fault)
    name = case.replace(" ", "-")
    done = run("train", "job.toml", f"run.name={name}", "run.on_failure=continue", *overrides, *DOUBLE, cwd=place, ranks=4, program=("patched.py",))
    found = json.loads((place / "runs" / name / "status.json").read_text())
    assert (done.code, found["state"], found["exit"]) == (code, "failed" if code else "finished", code) and words in (found["reason"] if code else done.text), done.text
    assert done.seconds < 20 and gone(place)


def end_by(folder, body):
    """Four ranks of a command with that body, under ULFM; what it left, and the seconds that it took."""
    (folder / "command.py").write_text(f"""
import sys, time
from mpillm import __main__
from mpillm.config import UserError
from mpillm.layout import ulfm
def start(argv):
    group = __main__.all_ranks(){body}
__main__.start = start
sys.exit(__main__.main([]))
""")
    began = time.monotonic()
    done = subprocess.run([launcher(), "--with-ft", "ulfm", "-n", "4", sys.executable, "command.py"], cwd=folder, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    return done, time.monotonic() - began


@pytest.mark.skipif(launcher() is None, reason="no mpirun")
def test_it_is_refused_where_mpi_cannot(place):
    done = run("train", "job.toml", "run.name=refused", "run.on_failure=continue", cwd=place, ranks=2)
    assert done.code == 2 and "start with `mpirun --with-ft ulfm`" in done.ours[0] and not (place / "runs" / "refused").exists()


# ---- memory ---------------------------------------------------------------------------------------------------------

class Died(Exception):
    """In place of MPI's."""


class FakeLife:
    """Whose training dies once; a second death comes before or after the memory of the first was taken over."""

    def __init__(self, second):
        self.job = types.SimpleNamespace(run=types.SimpleNamespace(on_failure="continue", hang_timeout=None))
        self.directory = self.stop = types.SimpleNamespace(inherit=lambda group: None)
        self.watchdog, self.unwatch = True, lambda: None
        self.second, self.training, self.seen = second, None, []

    def begin(self, step):
        self.training = types.SimpleNamespace(ready=True, step=step, model=types.SimpleNamespace(buckets=[], weights=Weights()), account=types.SimpleNamespace(hosts=None))
        return weakref.ref(self.training.model.weights)

    def first(self, group, sizes):
        self.old = self.begin(3)
        raise Died

    def go_on(self, recovered, began):
        self.seen.append(recovered.state.step)
        if self.second == "before" and len(self.seen) == 1:
            raise Died
        held, recovered.state = self.begin(5), None
        gc.collect()
        assert held() is not None and self.old() is None
        if self.second == "after" and len(self.seen) == 1:
            self.old = held
            raise Died
        return 0


class Weights:
    """Of a model."""


@pytest.mark.parametrize("second, seen", [("never", [3]), ("before", [3, 3]), ("after", [3, 5])])
def test_the_memory_of_before_is_given_back_when_it_was_taken_over(monkeypatch, second, seen):
    group = types.SimpleNamespace(size=2, rank=0, bears_deaths=True)
    monkeypatch.setattr(recovery.comm, "set_world", lambda group: None)
    monkeypatch.setattr(recovery.comm, "world", lambda: group)
    monkeypatch.setattr(recovery, "recover", lambda life, group, state, error: recovery.Recovered(group, SIZES, state, state.step, ""))
    life = FakeLife(second)
    assert recovery.run(life, SIZES, group) == 0 and life.seen == seen


# ---- what is agreed upon --------------------------------------------------------------------------------------------

SIZES = {"pp": 2, "dp": 3, "cp": 1, "tp": 2, "ep": 1}


def state():
    return State(None, 0, SIZES)


def test_complete_replicas_are_kept():
    everyone = list(range(12))      # rank = (pp x 3 + dp) x 2 + tp
    assert complete_replicas(state(), everyone) == everyone
    assert complete_replicas(state(), [rank for rank in everyone if rank != 9]) == [0, 1, 4, 5, 6, 7, 10, 11]
    assert complete_replicas(state(), [0, 1, 2, 6, 8, 11]) == []


def test_the_newest_step_that_every_place_has_is_taken():
    def told(steps, whole=True):
        return [{"rank": rank, "step": step, "whole": whole} for rank, step in steps.items()]
    two, one = SIZES | {"dp": 2}, SIZES | {"dp": 1}
    assert common_step(state(), told({0: 5, 1: 5, 6: 5, 7: 5, 2: 6, 3: 6, 8: 6, 9: 6}), two) == 6
    assert common_step(state(), told({0: 6, 1: 5, 6: 5, 7: 5, 2: 5, 3: 6, 8: 6, 9: 6}), two) == 6
    assert common_step(state(), told({0: 6, 1: 5, 6: 6, 7: 5}), one) is None          # one moved on, the other did not
    assert common_step(state(), told({0: 5, 1: 5, 6: 5, 7: 5}, whole=False), one) is None


def test_experts_are_taken_from_ranks_that_keep_theirs():
    sizes = {"pp": 1, "dp": 4, "cp": 1, "tp": 1, "ep": 2}
    def step(steps):
        return common_step(State(None, 0, sizes), [{"rank": rank, "step": step, "whole": True} for rank, step in steps.items()], sizes | {"dp": 2})
    assert step({0: 5, 1: 5}) == step({2: 5, 3: 5}) == step({0: 5, 3: 5}) == 5
    assert step({1: 5, 3: 5}) is step({1: 5, 2: 5}) is None
    assert step({0: 5, 1: 6}) is None           # each has experts of its own


@pytest.mark.parametrize("said, heard", [
    ([(False, None)] * 3, (False, None)), ([(False, None), (True, None)], (True, None)), ([(False, 76), (False, None)], (False, 76)),
    ([(False, 3), (True, None), (False, 3)], (True, 3)), ([(False, 3), (False, 130)], (False, 1)), ([(False, 255), (False, 0)], (False, 1)), ([(False, 0)], (False, 1))], ids=str)
def test_what_ranks_agree_on_bit_by_bit(said, heard):
    assert ulfm._read(functools.reduce(operator.and_, [ulfm._flags(*each) for each in said])) == heard


def test_half_a_checkpoint_is_no_memory(monkeypatch):
    """A rank that dies while all go back to a checkpoint leaves the others with weights of no step."""
    run = types.SimpleNamespace(ready=True, directory=types.SimpleNamespace(checkpoints=None), group=None, ops=types.SimpleNamespace(host=None),
                                progress=types.SimpleNamespace(note=None), _entries_for=None, _take=lambda checkpoint: seen.append(run.ready))
    seen = []
    monkeypatch.setattr(training, "load_newest", lambda *_: seen.append(run.ready) or types.SimpleNamespace(step=3))
    assert training.Training.go_back(run) == 3 and seen == [False, False] and run.ready
