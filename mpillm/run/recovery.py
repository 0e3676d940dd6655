"""A run that goes on when a rank dies (`run.on_failure = "continue"`): the data-parallel replica of the dead rank is dropped.

The ranks that are left of complete replicas make a new, smaller mesh; samples of a step are dealt anew, so the batch and the order of
the data stay. Under ZeRO 0 every replica has the whole state in memory: of those that have done the same step it is taken. Else parts of
it died with the rank, and the newest checkpoint is loaded. What is left of an incomplete replica waits until the others are done.
"""

import os
import socket
import threading
import time

from ..config import UserError
from ..layout import ulfm
from ..layout.compose import check_layout
from ..layout.journal import JOURNAL
from ..layout.mesh import AXES, coordinates, num_ranks_of
from . import ending
from .hang import ranks_text

DEADLINE = 30.0         # seconds that going on may take


def check(job, group):
    """Refuses a job that is to go on where that cannot be."""
    if job.run.on_failure != "continue" or group.size == 1:
        return
    if not ulfm.enabled():
        raise UserError(f'run.on_failure = "continue": this MPI was not started with fault tolerance; start with `{ulfm.COMMAND}` of Open MPI 5, or set it to "end"')
    if job.communication.transport == "nccl":
        raise UserError('run.on_failure = "continue" with communication.transport = "nccl": NCCL cannot go on without a rank; use "staged" or "cuda_aware"')


class State:
    """Where a run stood on this rank when another died: what memory has of it."""

    def __init__(self, training, rank, sizes):
        self.training, self.rank, self.sizes = training, rank, sizes
        ready = training is not None and training.ready
        self.step = training.step if ready else None
        self.whole = ready and all(bucket.zero == 0 for bucket in training.model.buckets)

    def described(self):
        """JSON-able: what the other ranks must know."""
        return {"rank": self.rank, "step": self.step, "whole": self.whole, "host": socket.gethostname()}

    def replica(self, rank):
        """What the ranks of a replica share, and the place of a rank in it."""
        coords = coordinates(self.sizes, rank)
        return coords["dp"], tuple(coords[axis] for axis in AXES if axis != "dp")


def complete_replicas(state, alive):
    """Old ranks of the replicas of which no rank died, ascending."""
    size = num_ranks_of(state.sizes) // state.sizes["dp"]
    counts = {}
    for rank in alive:
        counts.setdefault(state.replica(rank)[0], []).append(rank)
    return sorted(rank for ranks in counts.values() if len(ranks) == size for rank in ranks)


def common_step(state, described):
    """The newest step of which every place in a replica has a copy in memory; None where there is none."""
    if not all(each["whole"] for each in described):
        return None
    steps = {}
    for each in described:
        steps.setdefault(state.replica(each["rank"])[1], set()).add(each["step"])
    return max(set.intersection(*steps.values()), default=None)


class Recovered:
    """How the run goes on.

    Attributes
    ----------
    group : Group, Solo or None
        None: this rank leaves.
    sizes : dict
        Of the new mesh.
    state : State or None
        To be taken from memory.
    step : int or None
        Of it.
    line : str
        For people.
    """

    def __init__(self, group, sizes, state, step, line):
        self.group, self.sizes, self.state, self.step, self.line = group, sizes, state, step, line


def recover(job, world, state):
    """Meets the ranks that are left and agrees with them how to go on; raises UserError where no layout is left. Collective over those."""
    timer = threading.Timer(DEADLINE, _too_long)
    timer.daemon = True
    timer.start()
    try:
        while True:
            try:
                return _recover(job, world, state)
            except Exception as error:
                if not ulfm.is_failure(error):      # another rank died meanwhile: all over again
                    raise
    finally:
        timer.cancel()


def _too_long():
    ending.say(f"mpillm: going on without the dead rank took over {DEADLINE:.0f} s: the run ends\n")
    os._exit(ending.FAILED)


def _recover(job, world, state):
    alive = ulfm.survivors(world)
    JOURNAL.turns.clear()
    described = alive.collect(state.described())
    old_ranks = [each["rank"] for each in described]
    dead = sorted(set(range(num_ranks_of(state.sizes))) - set(old_ranks))
    kept = complete_replicas(state, old_ranks)
    sizes = state.sizes | {"dp": len(kept) * state.sizes["dp"] // num_ranks_of(state.sizes)}
    if not kept:
        raise RuntimeError(f"{ranks_text(dead)} died and no complete replica is left; start again to go on from the last checkpoint")
    check_layout(job, sizes)
    if sizes["dp"] * sizes["cp"] % sizes["ep"]:
        raise RuntimeError(f"{ranks_text(dead)} died and mesh.ep={sizes['ep']} does not divide the {sizes['dp'] * sizes['cp']} replicas that are left; start again to go on")
    step = common_step(state, [each for each in described if each["rank"] in kept])
    group = ulfm.regroup(alive, [place for place, rank in enumerate(old_ranks) if rank in kept])
    line = f"{ranks_text(dead)} died" + (f" in step {max(each['step'] or 0 for each in described) + 1}" if state.step is not None else "")
    return Recovered(group, sizes, state if step is not None else None, step, line)


def run(life, sizes, group):
    """Lets a Life train until it comes to an end, without the ranks that die meanwhile; the exit code. Collective."""
    recovered, began = None, 0.0
    while True:
        life.training = None
        try:
            return life.first(group, sizes) if recovered is None else life.go_on(recovered, began)
        except Exception as error:
            if life.job.run.on_failure != "continue" or group.size == 1 or not ulfm.is_failure(error):
                raise
        began = time.monotonic()
        recovered = recover(life.job, group, State(life.training, group.rank, sizes))
        life.directory.inherit(recovered.group)
        if recovered.group is None:
            return ending.FINISHED
        group, sizes = recovered.group, recovered.sizes
        life.stop.inherit(group)


def take_over(training, recovered, began):
    """The state in memory, or the newest checkpoint, for a Training of the new mesh. Collective."""
    old = recovered.state and recovered.state.training
    if old is None:
        training.prepare()
        source = f"checkpoint of step {training.step}" if training.step else "the start: there is no checkpoint"
    else:
        mine = old.step == recovered.step
        root = training.group.collect(mine).index(True)
        facts = training.group.share(old.facts() if training.group.rank == root else None, root)
        training.adopt(facts)
        for new, before in zip(training.model.buckets, old.model.buckets):
            good = new.group.collect(mine)
            for array, kept in zip(new.whole_state(), before.whole_state()):
                if mine:
                    new.ops.copy(array, kept)
                if not all(good):
                    new.group.broadcast(array, good.index(True))
        recovered.state = None      # gives the memory of what was before back
        source = f"memory, step {training.step}"
    nodes = training.group.size
    training.progress.note(f"{recovered.line}; went on with {nodes} rank{'s' * (nodes > 1)} from {source} after {time.monotonic() - began:.2f} s")
    training.metrics.event("went on", step=training.step, ranks=nodes, source="memory" if old else "checkpoint", seconds=time.monotonic() - began, reason=recovered.line)
