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

from mpillm.run.ending import STOPPED
from mpillm.run.metrics import read_metrics

MEAN = 5.0          # seconds between kills, exponentially distributed
EVERY = 40          # steps between checkpoints
# With one rate from the first step to the last, a run of any number of steps begins like this one: the storm lasts until all kills are done.
SHAPE = ("model.width=48", "model.layers=3", "model.heads=4", "model.context=64", "model.vocabulary=256", "data.train=random", f"checkpoint.every={EVERY}",
         "optimizer.final_rate_share=1", "run.hang_timeout=20")


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
    """SIGKILL to a random rank at a time of time.monotonic(), or as soon as there is one; the time.time() of it."""
    running.until(lambda: time.monotonic() >= at and running.ranks())
    try:
        os.kill(draw.choice(running.ranks()), signal.SIGKILL)
    except (IndexError, ProcessLookupError):    # it ended meanwhile
        return kill_one(running, draw, at)
    return time.time()


def storm(place, kills, draw):
    """Trains, killed `kills` times and started again each time, then told to stop; the times of the kills."""
    path, moments, at = place / "runs" / "stormy", [], time.monotonic()
    for gap in gaps(kills, draw):
        at = max(at + gap, time.monotonic())
        with Running("train", "job.toml", "run.name=stormy", "train.steps=1000000", *SHAPE, cwd=place, ranks=2) as running:
            moments.append(kill_one(running, draw, at))
            done = running.wait()
        assert done.code not in (0, 2), done.text
    with Running("train", "job.toml", "run.name=stormy", "train.steps=1000000", *SHAPE, cwd=place, ranks=2) as running:
        running.until(lambda: any(start["time"] > moments[-1] for start in events(path, "started")))
        (path / "STOP").touch()
        done = running.wait()
    assert done.code == STOPPED, done.text
    return moments


@pytest.mark.skipif(launcher() is None, reason="no mpirun")
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.long)])
def test_a_storm_of_kills(tmp_path, kills):
    write_job(tmp_path / "job.toml", train="seed = 3", run='name = "unnamed"')
    path, seed, begun = tmp_path / "runs" / "stormy", time.time_ns(), time.monotonic()
    moments = storm(tmp_path, kills, random.Random(seed))
    wall = time.monotonic() - begun
    lines, starts = read_metrics(path / "metrics.jsonl")[0], events(path, "started")
    done = run("train", "job.toml", "run.name=whole", f"train.steps={len(lines)}", *SHAPE, cwd=tmp_path, ranks=2, seconds=3000)
    assert done.code == 0, done.text
    assert_same(path, tmp_path / "runs" / "whole")
    first = {start["step"] for start in starts}     # steps right after a start are slow: that is part of starting
    step = statistics.mean(line["seconds"] for line in lines if line["step"] not in first)
    restart = statistics.mean(start["time"] - max(kill for kill in moments if kill < start["time"]) for start in starts if start["time"] > moments[0])
    saving = statistics.mean(event["seconds"] for event in events(path, "checkpoint"))
    work = len(lines) * step
    expected = daly(work, EVERY * step, saving, restart, wall / kills)
    print(f"seed {seed}: {kills} kills, {len(lines)} steps, work {work:.1f} s, wall {wall:.1f} s, restart {restart:.2f} s, saving {saving:.3f} s; "
          f"effective {work / wall:.3f}, of the model's {work / expected:.3f}: {expected / wall:.3f}")
    assert expected / wall > (0.95 if kills >= 50 else 0.7)     # the mean of a few gaps is no mean of all
