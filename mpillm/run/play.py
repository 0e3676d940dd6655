"""Plays one rank of a layout without data and without MPI, and keeps what it communicates in a step.

The model, the executor of the pipeline and the step are the code that trains, on the data-free backend and on groups that
are only planned, whose calls a Recorder keeps. Of micro-batches of one shape only the first is played, and the last, which
completes the gradients; the calls of the others are the same, in the order of the schedule.
"""

import functools
from typing import NamedTuple

import numpy as np

from ..backend.shapes import Shapes
from ..layout.journal import Journal
from ..layout.mesh import AXES, Mesh, coordinates, num_ranks_of
from ..layout.planned import Planned
from ..train.gradients import Gradients
from ..train.optimizer import AdamW
from ..train.pipeline import Pipeline
from ..train.schedule import check_stage
from ..train.step import Trainer
from .session import build

WAIT = ("wait", None, None)
MESSAGES = ("send", "receive")


class WrongOrder(Exception):
    """Ranks that do not fit together: one line with rank, action and partner."""


def rank_name(sizes, rank):
    """A rank as messages show it: "rank 37 (pp=1 dp=0 cp=0 tp=5)"."""
    coords = coordinates(sizes, rank)
    return f"rank {rank} ({' '.join(f'{axis}={coords[axis]}' for axis in AXES)})"


class Call(NamedTuple):
    """A call that a rank starts; or, agreed = WAIT, a place where it waits for its calls in a group to be done."""
    group: object       # key of the group; None (WAIT): all groups
    agreed: tuple       # operation, type of the array, what else all members must see alike; a message's tag is that of its Step left off
    own: object         # shift: (elements sent, elements expected); message: (number of the other in the group, shape); else None


class Step(NamedTuple):
    """A part of a rank's step in which it makes the calls of a segment."""
    name: str           # of the action, such as F3
    segment: object
    tags: tuple         # to be added to the tags of messages (sent, received)


BUILDING, START, END = [Step(name, name, (0, 0)) for name in ("the building of the model", "the start of the step", "the end of the step")]


class Play(NamedTuple):
    """What a rank communicates, from the building of the model to the end of the first step."""
    rank: int
    order: tuple        # of Step
    segments: dict      # segment -> list of Call
    groups: dict        # key -> (name, ranks of the members)


class Handle:
    """What a call gets from a Recorder: `done` where the rank knows that it is done."""
    __slots__ = ("recorder", "group")

    def __init__(self, recorder, group):
        self.recorder, self.group = recorder, group

    def begun(self):
        pass

    def waits(self):
        pass

    def done(self):
        self.recorder.calls.append(Call(self.group, WAIT, None))


class Received:
    """The same of a message received: that blocks by itself."""

    def done(self):
        pass


class Recorder(Journal):
    """Keeps calls by segments.

    Parameters
    ----------
    known : dict
        What was agreed on so far, of all ranks played: equal values are one object.
    num_ranks : int
        Of the job.
    """
    received = Received()

    def __init__(self, known, num_ranks):
        super().__init__()
        self.known, self.segments, self.groups = known, {}, {"world": ("world", range(num_ranks))}
        self.begin(*BUILDING)

    def begin(self, name, segment, tags):
        """The calls of a Step follow."""
        self.name, self.tags = name, tags
        self.calls = self.segments[segment] = []

    def enter(self, group, operation, array, sent, detail=None, peer="", expected=None):
        own = None
        if peer:
            detail -= self.tags[operation == "receive"]
            own = int(peer.split()[1]), array.shape
        elif expected is not None:
            own = array.size, expected
        agreed = operation, getattr(array, "dtype", None), detail
        self.calls.append(Call(group.key, self.known.setdefault(agreed, agreed), own))
        return self.received if operation == "receive" else Handle(self, group.key)


class PlayedMesh(Mesh):
    """A planned mesh that tells its Recorder its groups; to make one is a call of all ranks of its parent."""

    def _make(self, shared):
        recorder, parent, made = self._planned["journal"], self._parent(shared), super()._make(shared)
        if made is not self.world and isinstance(parent, Planned):
            recorder.enter(parent, "split", None, 0, shared).done()
        if isinstance(made, Planned):
            recorder.groups[made.key] = made.name, self.members(shared)
        return made


class PlayedPipeline(Pipeline):
    """Runs as many actions of a schedule as there are different ones, and keeps the calls of each as a segment."""

    def __init__(self, ops, model, recorder):
        super().__init__(ops, model)
        self.recorder, self.order, self.work = recorder, [], self.do

    def run(self, schedule, batches, gradients=None):
        check_stage(schedule, self.stage, schedule.actions[self.stage])
        self.do = dict.fromkeys(self.work, self._note)
        super().run(schedule, batches, gradients)
        first, actions = {}, list(schedule.actions)
        for step, action in zip(self.order, actions[self.stage]):
            first.setdefault(step.segment, action.microbatch)
        actions[self.stage] = [action for action in actions[self.stage] if action.microbatch in first.values()]
        self.do = {kind: functools.partial(self._play, work) for kind, work in self.work.items()}
        loss = super().run(schedule._replace(actions=actions), batches, gradients)
        self.recorder.begin(*END)
        self.recorder.calls.append(Call(None, WAIT, None))      # for its messages, at the end of run, and in Gradients.finish
        return loss

    def _step(self, action):
        segment = action.kind, action.chunk, self.batches[action.microbatch].shape[0], self.last
        messages = self.schedule.sends(self.stage, action), self.schedule.receives(self.stage, action)
        return Step(str(action), segment, tuple(self._tag(message) if message else 0 for message in messages))

    def _note(self, action):
        self.order.append(self._step(action))

    def _play(self, work, action):
        step = self._step(action)
        before = self.recorder.segments.get(step.segment)
        self.recorder.begin(*step)
        work(action)
        if before is not None and before != self.recorder.calls:
            raise ValueError("its calls are not those of the micro-batch before it")


class Blank(NamedTuple):
    """Samples without content, which take no memory."""
    context: int

    def samples(self, first, count):
        """As `Batches.samples`."""
        tokens = np.broadcast_to(np.int32(0), (count, self.context))
        return tokens, tokens, np.broadcast_to(np.float32(1), tokens.shape)


def play(job, sizes, rank, vocabulary, known):
    """The Play of a rank; `known` as of Recorder.

    Raises
    ------
    WrongOrder
        The rank fails by itself.
    """
    ops, recorder = Shapes(), Recorder(known, num_ranks_of(sizes))
    try:
        mesh = PlayedMesh.plan(sizes, rank, journal=recorder, empty=ops.empty)
        model = build(job, mesh, vocabulary, ops).model
        trainer = Trainer(ops, model, Gradients(ops, model.buckets), AdamW(ops, model.buckets, job.optimizer), mesh, job)
        trainer.pipeline = PlayedPipeline(ops, model, recorder)
        recorder.begin(*START)
        trainer.train_step(1, Blank(job.model.context), 0)
    except (ValueError, LookupError) as error:
        raise WrongOrder(f"{rank_name(sizes, rank)} fails in {recorder.name}: {type(error).__name__}: {error}") from error
    order = BUILDING, START, *trainer.pipeline.order, END
    return Play(rank, known.setdefault(order, order), recorder.segments, recorder.groups)
