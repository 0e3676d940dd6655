"""The pipeline's executor with layers that only take time: its idle share and live activations against the formulas of the papers.

4 stages, 8 micro-batches; F, I and W of a part take as long as each other, in sleep, so that ranks need no cores of their own.
"""

import time
from typing import NamedTuple

import pytest

from layouts import free
from mpillm.layout.mesh import Mesh
from mpillm.layout.parameter import Bucket
from mpillm.model.region import Region
from mpillm.train.pipeline import Pipeline
from mpillm.train.schedule import make_schedule
from small_jobs import OPS

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]

S, M = 4, 8
SECONDS = 0.03      # of F, I and W of a part
REPEATS = 3         # the fastest counts: others on the machine can only make it slower
CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 1}
# Idle time by the work of a stage: Narayanan et al. 2021, arXiv:2104.04473, section 2.2; Qi et al. 2023, arXiv:2401.10241, section 2.1
BUBBLES = {"gpipe": (S - 1) / M, "1f1b": (S - 1) / M, "interleaved": (S - 1) / (2 * M), "zero_bubble": (S - 1) / (3 * M)}
# Most activations of micro-batches that are live on the first stage, in activations of a whole stage; section 2.2 of both, and
# Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.3, for interleaved
PEAKS = {"gpipe": M, "1f1b": S, "interleaved": S * (1 + (S - 1) / (S * 2)), "zero_bubble": S}


class StandIn:
    """A part of a model that sleeps; W is put off by a real Bucket, as the gradients of weights are."""

    def __init__(self, first, last, model):
        self.first, self.last, self.model, self.buckets = first, last, model, [Bucket("stand-in", [])]

    def work(self):
        started = time.perf_counter()
        time.sleep(SECONDS)
        self.model.busy += time.perf_counter() - started

    def forward(self, x, batch, training=True):
        self.work()
        return OPS.zeros((1,) if self.last else self.model.message, float), "saved"

    def backward(self, dy, saved, batch, done):
        self.work()
        self.buckets[0].later(self.work)
        done(self.buckets[0])
        return None if self.first else OPS.zeros(self.model.message, float)


class Model:
    """What the executor asks of a model."""

    class Shape(NamedTuple):
        width: int

    class Setting(NamedTuple):
        region: Region

    def __init__(self, mesh, chunks):
        self.mesh, self.shape, self.dtype, self.busy = mesh, self.Shape(3), float, 0.0
        self.setting, self.message = self.Setting(Region(mesh["tp"], False)), (Rows.num_rows, 3)
        numbers = [chunk * S + mesh.coord("pp") for chunk in range(chunks)]
        self.parts = [StandIn(number == 0, number == chunks * S - 1, self) for number in numbers]


class Rows:
    """What the executor asks of a batch."""
    num_rows = 2


class Reductions:
    """What the executor asks of the gradients."""

    def start(self, bucket, last):
        pass


class Found(NamedTuple):
    total: float    # seconds of the step
    idle: float     # share of the total without work, mean of the stages
    peaks: list     # live micro-batches of parts, by stage

    @property
    def bubble(self):
        """Idle time by the work of a stage."""
        return self.idle / (1 - self.idle)


def step_of(group, name):
    """One step of the schedule through the real executor."""
    model = Model(Mesh(group, {"pp": S}), CHUNKS[name])
    pipeline, live = Pipeline(OPS, model), []       # live: after each action

    def counted(do):
        def counting(action):
            do(action)
            live.append(len(pipeline.saved) + len(pipeline.deferred))
        return counting
    pipeline.do = {kind: counted(do) for kind, do in pipeline.do.items()}
    group.barrier()
    started = time.perf_counter()
    pipeline.run(make_schedule(name, S, M, CHUNKS[name]), [Rows] * M, Reductions())
    stages = group.collect([time.perf_counter() - started, model.busy, max(live)])
    free(model.mesh)
    total = max(seconds for seconds, _, _ in stages)
    return Found(total, 1 - sum(busy for _, busy, _ in stages) / (S * total), [peak for _, _, peak in stages])


@pytest.fixture(scope="module")
def found(group):
    """The fastest of a few steps of every schedule."""
    if group.size != S:
        pytest.skip(f"on {S} ranks")
    return {name: min(step_of(group, name) for _ in range(REPEATS)) for name in CHUNKS}


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved"])
def test_the_idle_share_is_that_of_the_formula(found, name):
    expected = BUBBLES[name] / (1 + BUBBLES[name])      # of the whole time
    assert found[name].idle == pytest.approx(expected, rel=0.15)


def test_zero_bubble_idles_less_than_1f1b_by_the_predicted_share(found):
    assert found["1f1b"].bubble - found["zero_bubble"].bubble == pytest.approx(BUBBLES["1f1b"] - BUBBLES["zero_bubble"], rel=0.25)


@pytest.mark.parametrize("name", CHUNKS)
def test_the_peak_of_live_activations_is_that_of_the_formula(found, name):
    assert found[name].peaks[0] / CHUNKS[name] == PEAKS[name]
    assert max(found[name].peaks) == found[name].peaks[0]
    if name == "1f1b":
        assert found[name].peaks == [min(S - stage, M) for stage in range(S)]


def test_every_schedule_takes_as_long_as_its_formula(found):
    """Against the time of the work alone, so that work that is done twice or left out is seen too."""
    for name, chunks in CHUNKS.items():
        work = 3 * M * chunks * SECONDS
        assert found[name].total == pytest.approx(work * (1 + BUBBLES[name]), rel=0.15), name
