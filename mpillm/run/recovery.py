"""A run that goes on when a rank dies (`run.on_failure = "continue"`): the data-parallel replica of the dead rank is dropped.

The ranks that are left of complete replicas make a new, smaller mesh; samples of a step are dealt anew, so the batch and the order of
the data stay. Under ZeRO 0 every replica has the whole state in memory: of those that have done the same step it is taken. Else parts of
it died with the rank, and the newest checkpoint is loaded. What is left of an incomplete replica ends.
A death while that goes on starts it anew, from the same memory.

Without that (`"end"`), or where a rank fails by itself, all ranks that live end together, with the same code. The watchdog's monitor
watches over these meetings: it names the rank that does not come.
"""

import contextlib
import time

from ..config import UserError
from ..layout import comm, ulfm
from ..layout.compose import check_layout
from ..layout.journal import JOURNAL
from ..layout.mesh import AXES, coordinates, num_ranks_of
from . import ending
from .ending import RanksDied
from .hang import ranks_text

UNWATCHED = 600.0       # seconds that agreeing on how to go on may take where no monitor is there yet
NAMED = 4               # nodes of a message


def check(job, group):
    """Refuses a job that is to go on where that cannot be."""
    if job.run.on_failure != "continue" or group.size == 1:
        return
    if not group.bears_deaths:
        raise UserError(f'run.on_failure = "continue": this MPI was not started with fault tolerance; start with `{ulfm.COMMAND}` of Open MPI 5, or set it to "end"')
    if job.communication.transport == "nccl":
        raise UserError('run.on_failure = "continue" with communication.transport = "nccl": NCCL cannot go on without a rank; use "staged" or "cuda_aware"')


class State:
    """Where a run stood on this rank when another died: what memory has of it, and where it lies in the mesh of that time."""

    def __init__(self, training, rank, sizes):
        self.training, self.rank, self.sizes = training, rank, sizes
        ready = training is not None and training.ready
        self.step = training.step if ready else None
        self.whole = ready and all(bucket.zero == 0 for bucket in training.model.buckets)
        self.hosts = training.account.hosts if training is not None else None

    def described(self):
        """JSON-able: what the other ranks must know."""
        return {"rank": self.rank, "step": self.step, "whole": self.whole}

    def named(self, ranks):
        """Ranks with the nodes that they were on, as far as these are known."""
        nodes = sorted({self.hosts[rank] for rank in ranks}) if self.hosts else []
        return ranks_text(ranks) + (f" (node{'s' * (len(nodes) > 1)} {', '.join(nodes[:NAMED])}{', ...' * (len(nodes) > NAMED)})" if nodes else "")

    def replica(self, rank):
        """What the ranks of a replica share, and what else tells which part of the model a rank has: its place in it, and its experts."""
        coords = coordinates(self.sizes, rank)
        return coords["dp"], tuple(coords[axis] for axis in (*AXES, "ep") if axis != "dp")


def complete_replicas(state, alive):
    """Old ranks of the replicas of which no rank died, ascending."""
    size = num_ranks_of(state.sizes) // state.sizes["dp"]
    counts = {}
    for rank in alive:
        counts.setdefault(state.replica(rank)[0], []).append(rank)
    return sorted(rank for ranks in counts.values() if len(ranks) == size for rank in ranks)


def common_step(state, described, sizes):
    """The newest step of which memory has a copy of every part of the model on a rank that keeps it in a mesh of `sizes`; None where there is none."""
    ranks = sorted(each["rank"] for each in described)
    moved = any(coordinates(state.sizes, rank)["ep"] != coordinates(sizes, place)["ep"] for place, rank in enumerate(ranks))    # to other experts
    if moved or not all(each["whole"] for each in described):
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


def recover(life, world, state, error):
    """Meets the ranks that live and agrees with them how to go on after `error` on this one. Collective over those.

    Returns
    -------
    A Recovered, or the exit code with which all end.

    Raises
    ------
    The exception that ends the job, on the rank that is to say it.
    """
    verdict = ending.settle(error, world)
    while verdict.code is None:
        JOURNAL.turns.clear()
        try:
            recovered = _agreed(life, verdict.alive, state)
            ulfm.check_all(verdict.alive)
            return recovered
        except Exception as trouble:        # another one died meanwhile, or no way is left
            error = trouble
        verdict = ending.settle(error, verdict.alive)
    if verdict.speaks:
        raise error
    return verdict.code


def _agreed(life, alive, state):
    """How the ranks that live go on; raises RanksDied where they end, which all of them find alike. Collective over those."""
    code = alive.share(life.directory.failure() if alive.rank == 0 else None)      # the monitor may be ending the ranks, this one later than others
    if code is not None:
        raise SystemExit(code)
    described = alive.collect(state.described())
    old_ranks = [each["rank"] for each in described]
    missing = sorted(set(range(num_ranks_of(state.sizes))) - set(old_ranks))
    if not missing:
        raise RuntimeError("MPI tells of a rank that died, but all are there")
    dead = state.named(missing)
    if life.job.run.on_failure != "continue":
        raise RanksDied(f"{dead} died; start again to go on from the last checkpoint")
    kept, sizes = what_is_left(life.job, state, old_ranks, dead)
    step = common_step(state, [each for each in described if each["rank"] in kept], sizes)
    group = ulfm.regroup(alive, [place for place, rank in enumerate(old_ranks) if rank in kept])
    line = f"{dead} died" + (f" after step {max(each['step'] or 0 for each in described)}" if state.step is not None else "")
    return Recovered(group, sizes, state if step is not None else None, step, line)


def what_is_left(job, state, alive, dead):
    """(old ranks of complete replicas, sizes of their mesh); RanksDied, which names the `dead`, where they make none."""
    kept = complete_replicas(state, alive)
    if not kept:
        raise RanksDied(f"{dead} died and no complete replica is left; start again to go on from the last checkpoint")
    sizes = state.sizes | {"dp": len(kept) * state.sizes["dp"] // num_ranks_of(state.sizes)}
    try:
        check_layout(job, sizes)
    except UserError as error:
        raise RanksDied(f"{dead} died and what is left makes no mesh: {error}; start again to go on from the last checkpoint") from error
    return kept, sizes


def _newest_state(life, recovered, group, sizes):
    """The State to go on from: that of before, where the one that followed it was not ready yet. Nobody else keeps it: it holds a whole model."""
    return recovered and recovered.state or State(life.training, group.rank, sizes)


def run(life, sizes, group):
    """Lets a Life train until it comes to an end, without the ranks that die meanwhile; the exit code. Collective."""
    if not group.bears_deaths:
        return life.first(group, sizes)
    recovered = None
    while True:
        try:
            return life.first(group, sizes) if recovered is None else life.go_on(recovered, began)
        except BaseException as trouble:
            error = trouble
        began = time.monotonic()
        if group.size == 1:
            raise error
        JOURNAL.phase("meet")
        with contextlib.nullcontext() if life.watchdog else ulfm.limited(group.rank, UNWATCHED):
            recovered = recover(life, comm.world(), _newest_state(life, recovered, group, sizes), error)
        if isinstance(recovered, int):
            return recovered
        comm.set_world(recovered.group)     # now: who fails from here on has to meet those that go on
        life.directory.inherit(recovered.group)
        if recovered.group is None:
            ulfm.kill_self()
        life.unwatch()
        group, sizes, life.training, error = recovered.group, recovered.sizes, None, None
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
        training.metrics.catch_up(training.group.share(old.metrics.last if training.group.rank == root else None, root))
        for new, before in zip(training.model.buckets, old.model.buckets):
            good = new.group.collect(mine)
            for array, kept in zip(new.whole_state(), before.whole_state()):
                if mine:
                    new.ops.copy(array, kept)
                if not all(good):
                    new.group.broadcast(array, good.index(True))
        ulfm.check_all(comm.world())        # on all or on none, for the ranks of the old state have other numbers
        recovered.state = None              # gives the memory of what was before back
        source = f"memory, step {training.step}"
    nodes = training.group.size
    training.progress.note(f"{recovered.line}; went on with {nodes} rank{'s, numbered anew,' * (nodes > 1)} from {source} after {time.monotonic() - began:.2f} s")
    training.metrics.event("went on", step=training.step, ranks=nodes, source="memory" if old else "checkpoint", seconds=time.monotonic() - began, reason=recovered.line)
