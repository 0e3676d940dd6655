"""A run that is killed again and again, started again by a loop: its weights, and how much of its time was of use.

5 kills here, 50 with `tests/run.sh --long`.
"""

import math
import os
import random
import signal
import statistics
import time

import pytest
from command_runs import Running, launcher, run, write_job
from test_training import assert_same, events

from mpillm.run.metrics import read_metrics

MEAN = 5.0          # seconds between kills, exponentially distributed
EVERY = 40          # steps between checkpoints
SHAPE = ("model.width=48", "model.layers=3", "model.heads=4", "model.context=64", "model.vocabulary=256", "data.train=random", f"checkpoint.every={EVERY}",
         "run.hang_timeout=20")


def daly(work, interval, saving, restart, between):
    """Expected wall time of `work` seconds (Daly 2006, A higher order estimate of the optimum checkpoint interval, equation for
    exponentially distributed failures): saved every `interval` seconds in `saving` s, restarted in `restart` s, `between` s from failure to failure."""
    return between * math.exp(restart / between) * (math.exp((interval + saving) / between) - 1) * work / interval


def gaps(kills, draw):
    """Seconds before each kill: exponentially distributed, a random one of each `kills`-quantile, so that few kills take no other time than many."""
    found = [-MEAN * math.log(1 - (number + draw.random()) / kills) for number in range(kills)]
    draw.shuffle(found)
    return found


def kill_one(running, draw, at):
    """SIGKILL to a random rank at a time of time.monotonic(), or as soon as there is one; False where the run came to its end before."""
    while time.monotonic() < at or not running.ranks():
        if running.process.poll() is not None:
            return False
        time.sleep(0.01)
    try:
        os.kill(draw.choice(running.ranks()), signal.SIGKILL)
    except (IndexError, ProcessLookupError):
        return running.process.poll() is None and kill_one(running, draw, at)
    return True


@pytest.mark.skipif(launcher() is None, reason="no mpirun")
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.long)])
def test_a_storm_of_kills(tmp_path, kills):
    write_job(tmp_path / "job.toml", train="seed = 3", run='name = "unnamed"')
    done = run("train", "job.toml", "run.name=trial", "train.steps=200", *SHAPE, cwd=tmp_path, ranks=2)
    assert done.code == 0, done.text
    step = statistics.median(line["seconds"] for line in read_metrics(tmp_path / "runs" / "trial" / "metrics.jsonl")[0])
    steps = int(0.7 * kills * MEAN / step)
    done = run("train", "job.toml", "run.name=whole", f"train.steps={steps}", *SHAPE, cwd=tmp_path, ranks=2, seconds=3000)
    assert done.code == 0, done.text
    path, seed = tmp_path / "runs" / "stormy", time.time_ns()
    draw, killed, moments = random.Random(seed), 0, []
    waits, started = gaps(kills, draw), time.monotonic()
    at = started + waits[0]
    while True:
        with Running("train", "job.toml", "run.name=stormy", f"train.steps={steps}", *SHAPE, cwd=tmp_path, ranks=2) as running:
            if killed < kills:
                died = kill_one(running, draw, at)
                moments += [time.time()] * died
                killed += died
                at = time.monotonic() + waits[min(killed, kills - 1)]
            done = running.wait(3000)
        if done.code == 0:
            break
        assert done.code != 2, done.text
    wall = time.monotonic() - started
    assert_same(path, tmp_path / "runs" / "whole")
    assert killed == kills, f"seed {seed}: the run ended after {killed} kills"
    work = sum(line["seconds"] for line in read_metrics(tmp_path / "runs" / "whole" / "metrics.jsonl")[0])
    begun = [event["time"] for event in events(path, "started")]
    restarts = [first - max(kill for kill in moments if kill < first) for first in begun if first > moments[0]]
    saving = statistics.mean(event["seconds"] for event in events(path, "checkpoint"))
    expected = daly(work, EVERY * work / steps, saving, statistics.mean(restarts), wall / kills)
    print(f"seed {seed}: {kills} kills, work {work:.1f} s, wall {wall:.1f} s, restart {statistics.mean(restarts):.2f} s, saving {saving:.3f} s; "
          f"effective {work / wall:.3f}, of the model's {work / expected:.3f}: {expected / wall:.3f}")
    assert expected / wall > (0.95 if kills >= 50 else 0.7)     # the mean of a few gaps is no mean of all
