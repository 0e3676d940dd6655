"""Real runs with a fault on purpose on a random rank in a random phase: what ends, how soon, and what the run says about it.

The counted proofs run 5 times here and in full with `tests/run.sh --long`.
"""

import json
import os
import random
import re
import time
from pathlib import Path

import pytest
from command_runs import launcher, run, write_texts

from mpillm.run import faults
from mpillm.run.metrics import read_metrics

RANKS, STEPS, HANG_TIMEOUT = 4, 60, 2.0
PHASES = ("data", "forward", "backward", "reduce", "optimizer", "between")
SAVING = ("save", "write", "verify", "publish")
pytestmark = [pytest.mark.skipif(launcher() is None, reason="no mpirun"), pytest.mark.timeout(7000)]

JOB = f"""
[model]
family = "llama"
layers = 2
width = 16
heads = 2
context = 8
vocabulary = 32
dropout = 0.1
[data]
train = "random"
[train]
steps = {STEPS}
batch = 8
seed = 7
[checkpoint]
every = 10
[run]
name = "unnamed"
hang_timeout = {HANG_TIMEOUT}
"""


def full(count, usual=5):
    """`usual` of them in the usual run, `count` in the long one."""
    return [pytest.param(number, marks=() if number < usual else pytest.mark.long) for number in range(count)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("faults")
    (place / "job.toml").write_text(JOB)
    return place


def train(place, name, fault, *overrides, ranks=RANKS, seconds=90):
    """Runs to the end; (Done, time.time() of its end)."""
    os.environ["MPILLM_FAULT"] = fault
    try:
        done = run("train", "job.toml", f"run.name={name}", *overrides, cwd=place, ranks=ranks, seconds=seconds)
    finally:
        del os.environ["MPILLM_FAULT"]
    return done, time.time()


def status(place, name):
    return json.loads((place / "runs" / name / "status.json").read_text())


def time_of_fault(done):
    return float(re.search(r"mpillm: fault \S+ at ([\d.]+)", done.text)[1])


def left_over(place):
    """Process ids that still work in the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd").startswith(str(place)):
                found.append(int(process.name))
        except OSError:
            pass
    return found


def gone(place, seconds=1.0):
    """Whether nothing of the run is left, now or within a moment."""
    deadline = time.monotonic() + seconds
    while left_over(place) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left_over(place)


def a_place_for_it(number, choose):
    """(phase, rank, step): each phase in turn; a save at the second or a later one, when the run knows how long one takes."""
    phases = PHASES + SAVING
    phase = phases[number % len(phases)]
    return phase, choose.randrange(RANKS), choose.choice([20, 30, 40]) if phase in SAVING else choose.randrange(5, 45)


# ---- a rank ends ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", full(40))
def test_a_rank_that_raises_or_dies_ends_all_within_five_seconds(place, number):
    choose = random.Random(number)
    action = ("exception", "exit", "segv", "kill")[number % 4]
    phase, rank, step = a_place_for_it(number, choose)
    name = f"ends-{number}"
    done, end = train(place, name, f"{phase}:{rank}:{step}:{action}")
    assert done.code != 0 and "finished" not in done.text
    assert end - time_of_fault(done) < 5 and gone(place)
    if action == "exception":
        assert f"rank {rank} failed: RuntimeError: a fault on purpose" in done.text
        assert status(place, name) | {"time": 0} == {"state": "failed", "exit": 1, "reason": "RuntimeError: a fault on purpose", "rank": rank,
                                                     "step": status(place, name)["step"], "time": 0}


# ---- a rank stands still --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", full(50))
def test_a_rank_that_stands_still_is_named_and_the_job_ends(place, number):
    choose = random.Random(1000 + number)
    action = ("stop", "loop", "gil", "stop", "sleep=3600")[number % 5]
    phase, rank, step = a_place_for_it(number, choose)
    name = f"hangs-{number}"
    allowed, overrides = (10, ["run.hang_timeout=1"]) if phase in SAVING else (HANG_TIMEOUT, [])
    done, end = train(place, name, f"{phase}:{rank}:{step}:{action}", *overrides)
    found = status(place, name)
    assert (found["state"], found["exit"], found["rank"]) == ("failed", 77, rank), done.text
    assert end - time_of_fault(done) < allowed + 5 and gone(place)
    assert done.code != 0 and f"rank {rank} (node " in found["reason"] and f"in step {step}" in found["reason"]
    folder, = (place / "runs" / name).glob("hang-*")
    report, stacks = (folder / "report.txt").read_text(), (folder / "stacks.txt").read_text()
    assert found["reason"] in report and all(f"==== rank {each} " in stacks for each in range(RANKS))
    assert stacks.count("most recent call first") >= RANKS - 1
    assert not (place / "runs" / name / "lock").exists()


def test_what_has_not_happened_yet_may_take_ten_times_as_long(place):
    done, end = train(place, "first", "write:2:10:stop", "run.hang_timeout=1")
    assert status(place, "first")["rank"] == 2 and "writing a checkpoint" in status(place, "first")["reason"]
    assert 10 < end - time_of_fault(done) < 15


@pytest.mark.parametrize("steps", [500, pytest.param(5000, marks=pytest.mark.long)])
def test_slow_saves_and_validations_are_no_alarm(place, steps):
    faults = [f"{phase}:{rank}:{step}:sleep={2.5 * HANG_TIMEOUT}" for phase, rank, step in
              [("save", 1, steps // 5), ("write", 0, 2 * steps // 5), ("load", 0, 0), ("evaluate", 1, 2 * steps // 5), ("forward", 1, 1)]]
    corpus = place / f"text-{steps}"
    write_texts(corpus, documents=20)
    done = run("prepare", corpus.name, f"{corpus.name}.h5", "--validation", f"{corpus.name}-val.h5", "--share", "0.3", cwd=place)
    assert done.code == 0, done.text
    done, _ = train(place, f"slow-{steps}", ",".join(faults), f"train.steps={steps}", f"checkpoint.every={steps // 5}",
                    f"train.evaluate_every={steps // 5}", f"data.train={corpus.name}.h5", f"data.validation={corpus.name}-val.h5",
                    "model.vocabulary=300", ranks=2, seconds=3000)
    assert done.code == 0 and done.text.count("mpillm: fault") == 5 and "no progress" not in done.text, done.text
    assert not list((place / "runs" / f"slow-{steps}").glob("hang-*"))


# ---- a request to stop ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", full(30))
def test_usr1_in_any_phase_leaves_a_valid_checkpoint(place, number):
    choose = random.Random(2000 + number)
    phase, rank, step = a_place_for_it(number, choose)
    name, fault = f"usr1-{number}", f"{phase}:{rank}:{step}:usr1"
    if number % 5 == 4:         # while the others, and this one too, wait in MPI for another rank
        fault = f"reduce:{rank}:{step}:usr1=0.3,forward:{(rank + 1) % RANKS}:{step}:sleep=1"
    done, _ = train(place, name, fault)
    found = status(place, name)
    assert (found["state"], found["exit"]) == ("stopped", 75) and done.code != 0, done.text
    assert step <= found["step"] <= step + 1
    done, _ = train(place, name, "", f"train.steps={found['step'] + 2}")
    assert done.code == 0 and f"resumed from step-{found['step']:08d}" in done.text


# ---- slow ranks -----------------------------------------------------------------------------------------------------

def test_a_rank_at_half_speed_is_named_within_20_steps(place):
    shape = ("model.width=128", "model.layers=4", "model.context=128", "model.heads=4")
    done, _ = train(place, "half", "data:1:10:slow=2", *shape, ranks=2)
    assert done.code == 0, done.text
    steps, events = read_metrics(place / "runs" / "half" / "metrics.jsonl")
    named = [event for event in events if event["event"] == "slow rank"]
    assert named and {event["rank"] for event in named} == {1} and 10 < named[0]["step"] <= 30
    shown = [line["compute_seconds"] for line in steps if "compute_seconds" in line and line["step"] > 15]
    assert shown and all(each["rank"] == 1 and each["most"] > each["median"] for each in shown)
    assert "rank 1 (node " in done.text and "is slow" in done.text


# ---- the variable ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, line", [
    ("forward:1:5", "expected phase:rank:step:action"), ("forward:a:5:kill", "expected phase:rank:step:action"), ("forwards:1:5:kill", "phase 'forwards': expected one of"),
    ("forward:1:5:kills", "action 'kills': expected one of"), ("forward:1:5:sleep", "expected sleep=NUMBER"), ("forward:1:5:sleep=x", "expected sleep=NUMBER"),
    ("forward:1:5:kill=3", "expected kill alone"), ("forward:1:5:usr1=", "expected usr1=NUMBER")])
def test_a_fault_that_cannot_be_is_refused(place, monkeypatch, text, line):
    """Also where it is another rank's."""
    monkeypatch.setenv("MPILLM_FAULT", text)
    done = run("train", "job.toml", "run.name=unheard", cwd=place)
    assert done.code == 2 and len(done.ours) == 1 and line in done.ours[0] and not (place / "runs" / "unheard").exists(), done.text


def test_every_phase_has_its_name():
    """Of those that the code enters."""
    source = "".join(path.read_text() for path in Path(faults.__file__).parents[1].rglob("*.py"))
    entered = set(re.findall(r'phase\("([a-z-]+)"\)', source))
    assert len(entered) > 10 and entered <= set(faults.PHASES)
