"""Proves that the ranks of a layout fit together, from what each communicates (play.py); `mpillm verify --order`.

1. Collectives: all members of a group make the same calls in the same order: operation, type, shape, root, counts.
   (The counts of the all-to-all that carries rows to experts are sent by the call before it, and not known here.)
2. Messages: each is received as the shape and type that it is sent as, and none is left over.
3. No deadlock. The ranks of a stage make the same calls, one after the other, in groups of the same axes. So two of them
   never order common groups differently, and a stage can go on as one: what holds up one rank holds up all, and only what
   concerns several stages is left: messages and the groups that span stages. These are run, one rank a stage. That a run
   came to its end proves that every run does: no rank's calls depend on which of the others is faster.
"""

import collections
import itertools
import time
from typing import NamedTuple

from ..layout.comm import Solo
from ..layout.mesh import AXES, coordinates, num_ranks_of
from .data import TrainingData
from .play import MESSAGES, WAIT, WrongOrder, play, rank_name


class Proof(NamedTuple):
    """What was found to be right."""
    groups: int
    calls: int      # collectives that the ranks start, messages that they send
    messages: int


def prove(job, sizes, vocabulary):
    """The Proof that the ranks of a layout fit together.

    Raises
    ------
    WrongOrder
        They do not: rank, action and partner.
    """
    known = {}
    plays = [play(job, sizes, rank, vocabulary, known) for rank in range(num_ranks_of(sizes))]
    return match(plays, sizes)


def match(plays, sizes):
    """The Proof for the Plays of all ranks, in their order. Raises WrongOrder."""
    ranks = Ranks(plays, sizes)
    calls = sum(map(ranks.check_group, ranks.keys_of(ranks.calls)))
    messages = sum(map(ranks.check_messages, ranks.keys_of(ranks.messages)))
    ranks.check_stages()
    Simulation(ranks).run()
    return Proof(len(ranks.keys_of(ranks.calls + ranks.messages)), calls + messages, messages)


class Ranks:
    """The Plays of all ranks.

    Attributes
    ----------
    groups : dict
        key -> (name, ranks of the members)
    calls : list
        Of each rank: {key: {segment: list of Call}} of collectives
    messages : the same of messages
    """

    def __init__(self, plays, sizes):
        self.plays, self.sizes, self.groups, self.calls, self.messages = plays, sizes, {}, [], []
        for each in plays:
            self.groups.update(each.groups)
            calls, messages = {}, {}
            for segment, made in each.segments.items():
                for call in made:
                    if call.agreed is not WAIT:
                        found = messages if call.agreed[0] in MESSAGES else calls
                        found.setdefault(call.group, {}).setdefault(segment, []).append(call)
            self.calls.append(calls)
            self.messages.append(messages)

    def name(self, rank):
        return rank_name(self.sizes, rank)

    def _made(self, found, rank, key):
        """(Step, number of the call within it, Call) of a rank in a group, in their order."""
        of_segment = found[rank].get(key, {})
        for step in self.plays[rank].order:
            for number, call in enumerate(of_segment.get(step.segment, ()), 1):
                yield step, number, call

    @staticmethod
    def keys_of(found):
        """The groups in which calls were made, those of lower ranks first."""
        return dict.fromkeys(key for made in found for key in made)

    # ---- collectives ----------------------------------------------------------------------------------------------

    def check_group(self, key):
        """Whether all members make the same calls; how many, of all together."""
        members, different = self.groups[key][1], []     # [sequence, ranks that have it]
        for rank in members:
            of_segment = {segment: [call.agreed for call in calls] for segment, calls in self.calls[rank].get(key, {}).items()}
            sequence = list(itertools.chain.from_iterable(of_segment.get(step.segment, ()) for step in self.plays[rank].order))
            for each in different:
                if each[0] == sequence:
                    each[1].append(rank)
                    break
            else:
                different.append((sequence, [rank]))
        most = max(different, key=lambda each: len(each[1]))
        for each in different:
            if each is not most:
                raise WrongOrder(self._difference(key, each[1][0], most[1][0]))
        if any(agreed[0] == "shift" for agreed in set(most[0])):
            self._check_shifts(key)
        return len(members) * len(most[0])

    def _difference(self, key, rank, other):
        for mine, its in itertools.zip_longest(self._made(self.calls, rank, key), self._made(self.calls, other, key)):
            if mine is None or its is None or mine[2].agreed != its[2].agreed:
                break
        step, number, _ = mine or its
        place = f"call {number} of {step.name} over {self.groups[key][0]}"
        first = f"{self.name(rank)} does {said(mine[2])} as {place}" if mine else f"{self.name(rank)} makes no {place}"
        second = f"{self.name(other)} does {said(its[2])}" if its else f"{self.name(other)} makes none"
        return f"{first}, {second}" + (f" in {its[0].name}" if its and its[0].name != step.name else "")

    def _check_shifts(self, key):
        """Whether each member expects as much as the one before it sends."""
        members = self.groups[key][1]
        made = [[each for each in self._made(self.calls, rank, key) if each[2].agreed[0] == "shift"] for rank in members]
        for index, rank in enumerate(members):
            for (step, number, call), (_, _, before) in zip(made[index], made[index - 1]):
                expected, sent = call.own[1], before.own[0]
                if sent != expected:
                    raise WrongOrder(f"{self.name(rank)} expects {expected} elements in the shift that is call {number} of {step.name} "
                                     f"over {self.groups[key][0]}, {self.name(members[index - 1])} sends {sent}")

    # ---- messages -------------------------------------------------------------------------------------------------

    def check_messages(self, key):
        """Whether what the members of a group send each other is what they receive; how many messages."""
        members, sent, received = self.groups[key][1], {}, {}      # (source, target, tag) -> list of (action, type, shape)
        for index, rank in enumerate(members):
            for step, _, (_, (operation, dtype, tag), (peer, shape)) in self._made(self.messages, rank, key):
                sends = operation == "send"
                channel = (index, peer, tag + step.tags[0]) if sends else (peer, index, tag + step.tags[1])
                (sent if sends else received).setdefault(channel, []).append((step.name, dtype, shape))
        for channel in {**received, **sent}:
            source, target = [self.name(members[index]) for index in channel[:2]]
            for mine, its in itertools.zip_longest(sent.get(channel, ()), received.get(channel, ())):
                if its is None:
                    raise WrongOrder(f"{source} sends a message in {mine[0]} to {target}, which never receives it")
                if mine is None:
                    raise WrongOrder(f"{target} waits in {its[0]} for a message from {source}, which never sends it")
                if mine[1:] != its[1:]:
                    raise WrongOrder(f"{target} receives {its[1]} {its[2]} in {its[0]} from {source}, "
                                     f"which sends {mine[1]} {mine[2]} in {mine[0]}")
        return sum(map(len, sent.values()))

    # ---- stages ---------------------------------------------------------------------------------------------------

    def check_stages(self):
        """Whether all ranks of a stage make the same calls, in groups of the same axes."""
        first = {}      # stage -> its first rank
        for each in self.plays:
            model = self.plays[first.setdefault(coordinates(self.sizes, each.rank)["pp"], each.rank)]
            if each.order != model.order:
                mine, its = next(pair for pair in itertools.zip_longest(each.order, model.order) if pair[0] != pair[1])
                raise WrongOrder(f"{self.name(each.rank)} does {mine.name if mine else 'nothing'} where "
                                 f"{self.name(model.rank)} of the same stage does {its.name if its else 'nothing'}")
            for step in {step.segment: step for step in reversed(each.order)}.values():
                self._check_segment(step, each, model)

    def _check_segment(self, step, each, model):
        pairs = itertools.zip_longest(each.segments[step.segment], model.segments[step.segment])
        for number, (mine, its) in enumerate(pairs, 1):
            if mine is None or its is None or alike(mine) != alike(its):
                texts = [f"{said(call)} over {self.groups[call.group][0]}" if call else "nothing more" for call in (mine, its)]
                raise WrongOrder(f"{self.name(each.rank)} does {texts[0]} as call {number} of {step.name}, {self.name(model.rank)} of the "
                                 f"same stage {texts[1]}: ranks that order their groups differently can wait for each other")


def alike(call):
    """What is the same in a call of all ranks of a stage: axes of the group, operation, partner of a message."""
    operation = call.agreed[0]
    return call.group and call.group[0], operation, call.own[0] if operation in MESSAGES else None


def said(call):
    operation, dtype, detail = call.agreed
    return operation if dtype is None else f"{operation} of {dtype} {detail}"


class Simulation:
    """Messages, and calls of groups that span stages, of the first rank of each stage.

    A message is sent without blocking, and is done when it is received (as MPI's synchronous sends); a call of a group is
    done when all members have made it.
    """

    def __init__(self, ranks):
        self.ranks, self.name = ranks, ranks.name
        stages = ranks.sizes["pp"]
        actors = range(0, len(ranks.plays), len(ranks.plays) // stages)
        self.spanning = {key: [rank for rank in members if rank in actors] for key, (_, members) in ranks.groups.items()
                         if members[0] // actors.step != members[-1] // actors.step}
        self.programs = {rank: [(step, call) for step in ranks.plays[rank].order for call in ranks.plays[rank].segments[step.segment]
                                if call.group is None or call.group in self.spanning] for rank in actors}
        self.made = collections.Counter()                       # (group, rank) -> calls
        self.sent, self.received = collections.Counter(), collections.Counter()     # (group, source, target, tag) -> messages

    def run(self):
        """Raises WrongOrder where ranks wait for ever."""
        position, moved = dict.fromkeys(self.programs, 0), True
        while moved:
            moved = False
            for rank, program in self.programs.items():
                while position[rank] < len(program) and self._passes(rank, *program[position[rank]]):
                    position[rank] += 1
                    moved = True
        waiting = {rank: program[position[rank]] for rank, program in self.programs.items() if position[rank] < len(program)}
        if waiting:
            raise WrongOrder(self._circle(waiting))

    def _channel(self, rank, step, call):
        (operation, _, tag), peer = call.agreed, self.ranks.groups[call.group][1][call.own[0]]
        return (call.group, rank, peer, tag + step.tags[0]) if operation == "send" else (call.group, peer, rank, tag + step.tags[1])

    def _passes(self, rank, step, call):
        """Makes the call of a rank unless it has to wait."""
        if self._awaited(rank, step, call):
            return False
        operation = call.agreed[0]
        if operation in MESSAGES:
            (self.sent if operation == "send" else self.received)[self._channel(rank, step, call)] += 1
        elif call.agreed is not WAIT:
            self.made[call.group, rank] += 1
        return True

    def _awaited(self, rank, step, call):
        """The rank that has to do something first, and what; None where none has."""
        if call.agreed[0] == "receive":
            channel = self._channel(rank, step, call)
            return None if self.sent[channel] > self.received[channel] else (channel[1], "a message from")
        if call.agreed is not WAIT:
            return None
        for key in self.spanning if call.group is None else [call.group]:
            for member in self.spanning[key]:
                if self.made[key, member] < self.made[key, rank]:
                    return member, f"a call over {self.ranks.groups[key][0]} by"
        for channel, count in self.sent.items():
            if channel[1] == rank and call.group in (None, channel[0]) and self.received[channel] < count:
                return channel[2], "its message to be received by"
        return None

    def _circle(self, waiting):
        """The ranks that wait for each other, in words."""
        rank, path, texts = min(waiting), [], []
        while rank in waiting and rank not in path:
            path.append(rank)
            step, call = waiting[rank]
            rank, what = self._awaited(rank, step, call)
            texts.append(f"waits in {step.name} for {what} {self.name(rank)}")
        start = path.index(rank) if rank in path else 0
        end = "" if rank in path else ", which has come to its end"
        return f"{self.name(path[start])} " + ", which ".join(texts[start:]) + end


def order_report(job, sizes):
    """Proves the order of a layout, or finds what is wrong with it; prints the line. Returns the exit code: 0 proven, 1 wrong.

    Parameters
    ----------
    job : Job
    sizes : dict
        Axis sizes, as of `mesh.sizes_of`, that the job may have (`check_layout`).
    """
    started = time.perf_counter()
    vocabulary = job.model.vocabulary or TrainingData(job, Solo()).vocabulary
    count = num_ranks_of(sizes)
    layout = f"order of {count:,} rank{'s' * (count > 1)} ({' x '.join(f'{axis}={sizes[axis]}' for axis in AXES)})"
    try:
        proof = prove(job, sizes, vocabulary)
    except WrongOrder as wrong:
        print(f"{layout}: WRONG: {wrong}")
        return 1
    print(f"{layout}: proven: {proof.groups:,} groups, {proof.calls:,} calls of a step, {proof.messages:,} of them messages; "
          f"all match, none can deadlock; {time.perf_counter() - started:.1f} s")
    return 0
