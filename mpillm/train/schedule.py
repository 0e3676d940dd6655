"""Pipeline schedules as data: what each stage does and in which order; checked, timed and drawn without MPI.

A stage holds `chunks` chunks of the model; chunk c of stage s is virtual stage c x stages + s, and micro-batches flow
through the virtual stages in order. The executor (pipeline.py) walks its stage's list: it receives what an action
takes (blocking), computes, and sends what the action makes (non-blocking, buffer kept).

In every schedule a chunk sees the micro-batches in ascending order, forward and backward, so the order in which weight
gradients are added up, and with it every bit of the sum, does not depend on the schedule.
"""

from typing import NamedTuple

DOWNSTREAM = {"F": 1, "B": -1, "I": -1}     # virtual stages from an action to the one that takes what it makes; W makes nothing


class Action(NamedTuple):
    """One unit of work of a stage; prints as F3, B0, and F3.1 in chunk 1."""
    kind: str           # F forward, B backward, or B in two parts: I gradient of the input, W gradients of the weights
    microbatch: int
    chunk: int = 0

    def __str__(self):
        return f"{self.kind}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


class Message(NamedTuple):
    """One array on its way; equal for sender and receiver, and different from every other message of the step."""
    kind: str           # F activations, B their gradient
    microbatch: int
    chunk: int          # of the receiver
    source: int         # stage
    target: int         # stage; the source itself when there is one stage with several chunks


class Schedule(NamedTuple):
    name: str
    stages: int
    microbatches: int
    chunks: int         # of a stage
    actions: list       # per stage: list of Action, in order
    trains: bool = True     # False: forward only

    def virtual_stage(self, stage, chunk):
        return chunk * self.stages + stage

    def receives(self, stage, action):
        """The message `action` of `stage` waits for; None in W, in F of the first and in B and I of the last virtual stage."""
        here = self.virtual_stage(stage, action.chunk)
        return self._message(action, here - DOWNSTREAM[action.kind], here) if action.kind in DOWNSTREAM else None

    def sends(self, stage, action):
        """The message `action` of `stage` makes; None in W, in F of the last and in B and I of the first virtual stage."""
        here = self.virtual_stage(stage, action.chunk)
        return self._message(action, here, here + DOWNSTREAM[action.kind]) if action.kind in DOWNSTREAM else None

    def _message(self, action, source, target):
        if min(source, target) < 0 or max(source, target) >= self.stages * self.chunks:
            return None
        kind = "F" if action.kind == "F" else "B"
        return Message(kind, action.microbatch, target // self.stages, source % self.stages, target % self.stages)


def gpipe(stages, microbatches):
    """All forwards, then all backwards; M micro-batches live (Huang et al. 2019, arXiv:1811.06965, section 2.2)."""
    return _schedule("gpipe", stages, microbatches, 1, lambda stage: _actions("F", microbatches) + _actions("B", microbatches))


def one_f_one_b(stages, microbatches):
    """After a warm-up one forward, one backward; min(S - s, M) live (Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1)."""
    forwards, backwards = _actions("F", microbatches), [[action] for action in _actions("B", microbatches)]
    return _schedule("1f1b", stages, microbatches, 1, lambda stage: _alternate(forwards, backwards, stages - stage - 1))


def interleaved(stages, microbatches, chunks):
    """1F1B over `chunks` >= 2 chunks a stage, S micro-batches of a chunk at a time (Narayanan et al. 2021, section 2.2.2).

    Live micro-batch-chunks, where S divides M: min(2 (S - s - 1) + (chunks - 1) S + 1, M chunks); never more elsewhere.
    Where S does not divide M, the last S micro-batches are filled up and the actions of the filling left out: what is left
    of an order that can run can run. (A last group of fewer than S cannot: 4 stages, 5 micro-batches, 3 chunks deadlock.)
    """
    if chunks < 2:
        raise ValueError(f"schedule interleaved needs 2 or more chunks a stage, not {chunks}; use schedule 1f1b for 1")

    def actions_of(stage):
        forwards = _chunk_order(stages, -(-microbatches // stages) * stages, chunks)
        backwards = [[Action("B", action.microbatch, chunks - 1 - action.chunk)] for action in forwards]
        filled = _alternate(forwards, backwards, 2 * (stages - stage - 1) + (chunks - 1) * stages)
        return [action for action in filled if action.microbatch < microbatches]
    return _schedule("interleaved", stages, microbatches, chunks, actions_of)


def zero_bubble(stages, microbatches):
    """ZB-H1: 1F1B with the backward in two parts, W of stage s following s micro-batches behind I.

    I goes to the stage before at once, and W fills slots in which 1F1B waits (Qi et al. 2023, arXiv:2401.10241, section 2.1).
    From F to the end of W min(S, M) are live on every stage, the peak of 1F1B's first stage; from F to the end of I
    min(S - s, M), as in 1F1B. With M >= S the bubble is (S - 1) max(F, I, F + I - W), in the time the actions take: at equal
    times a third of that of 1F1B, (S - 1) (F + I + W).
    """
    def actions_of(stage):
        inputs, weights = _actions("I", microbatches), _actions("W", microbatches)
        backwards = [[action] for action in inputs[:stage]] + [list(pair) for pair in zip(inputs[stage:], weights)]
        left = weights[max(0, microbatches - stage):]
        return _alternate(_actions("F", microbatches), backwards, stages - stage - 1) + left
    return _schedule("zero_bubble", stages, microbatches, 1, actions_of)


def forward_only(stages, microbatches, chunks=1):
    """For validation: forwards alone, S micro-batches of a chunk at a time."""
    def actions_of(stage):
        return _chunk_order(stages, microbatches, chunks)
    return _schedule("forward_only", stages, microbatches, chunks, actions_of, trains=False)


SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b, "interleaved": interleaved, "zero_bubble": zero_bubble}


def make_schedule(name, stages, microbatches, chunks=1):
    """The schedule `name` of `SCHEDULES`. ValueError: an unknown name, a size below 1, chunks the schedule does not have."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name} is unknown; use one of {', '.join(SCHEDULES)}")
    if name == "interleaved":
        return interleaved(stages, microbatches, chunks)
    if chunks != 1:
        raise ValueError(f"schedule {name} has 1 chunk a stage, not {chunks}; use chunks = 1 or schedule interleaved")
    return SCHEDULES[name](stages, microbatches)


def _schedule(name, stages, microbatches, chunks, actions_of, trains=True):
    for what, size in (("stages", stages), ("microbatches", microbatches), ("chunks", chunks)):
        if size < 1:
            raise ValueError(f"schedule {name}: {what} {size} is below 1")
    return Schedule(name, stages, microbatches, chunks, [actions_of(stage) for stage in range(stages)], trains)


def _actions(kind, microbatches):
    return [Action(kind, microbatch) for microbatch in range(microbatches)]


def _chunk_order(stages, microbatches, chunks):
    """Forwards: up to S micro-batches through chunk 0, the same through chunk 1 and so on, then the next S micro-batches."""
    return [Action("F", microbatch, chunk) for first in range(0, microbatches, stages) for chunk in range(chunks)
            for microbatch in range(first, min(first + stages, microbatches))]


def _alternate(forwards, backwards, warm_up):
    """The first `warm_up` forwards, then a forward and a backward (a list of actions) in turn, then the other backwards."""
    actions = forwards[:warm_up]
    for position, backward in enumerate(backwards, warm_up):
        actions += forwards[position:position + 1] + backward
    return actions


class Report(NamedTuple):
    """What `check` found."""
    peak: tuple                 # per stage: most micro-batch-chunks live, from F to the end of B or W; 0 when nothing goes backward
    peak_before_input: tuple    # the same from F to the end of B or I; between I and W only what W needs is live
    num_messages: int           # of a step, all stages
    overtaking: tuple           # (source, target) stages whose messages are not received in the order they are sent in


def check(schedule):
    """Proves that a schedule is whole and runs to its end with non-blocking sends and blocking receives.

    Every micro-batch passes every chunk once forward and once backward (B, or I and later W), backward after forward;
    every message sent is received and the other way round; no stage waits for ever. So non-blocking synchronous sends
    (MPI_Issend) that are waited for at the end of the step complete as well: a send never holds up its stage, and at the
    end all have been received. Where messages between two stages overtake each other, tags must tell them apart; in the
    schedules of this file none does.

    Raises
    ------
    ValueError
        Names stage, action and partner: "stage 2 waits in F3 for stage 1, which waits in B0 for stage 2".
    """
    if len(schedule.actions) != schedule.stages:
        raise ValueError(f"schedule {schedule.name} has {schedule.stages} stages and lists for {len(schedule.actions)}")
    for stage, actions in enumerate(schedule.actions):
        check_stage(schedule, stage, actions)
    sent, received = {}, {}     # (source, target) -> messages in order
    for _, _, incoming, outgoing in execution_order(schedule):
        for messages, message in ((received, incoming), (sent, outgoing)):
            if message:
                messages.setdefault((message.source, message.target), []).append(message)
    peak, peak_before_input = (tuple(_peak(actions, ends) if schedule.trains else 0 for actions in schedule.actions)
                               for ends in ("BW", "BI"))
    overtaking = tuple(channel for channel in sorted(sent) if sent[channel] != received[channel])
    return Report(peak, peak_before_input, sum(map(len, sent.values())), overtaking)


def check_stage(schedule, stage, actions):
    """Whether a stage does all its work once, each part after what it needs from the stage itself."""
    position = {}
    for index, action in enumerate(actions):
        if action in position:
            raise ValueError(f"stage {stage} does {action} twice")
        position[action] = index
    for microbatch in range(schedule.microbatches):
        for chunk in range(schedule.chunks):
            split = Action("I", microbatch, chunk) in position or Action("W", microbatch, chunk) in position
            chain = [Action(kind, microbatch, chunk) for kind in ("F" + ("IW" if split else "B") * schedule.trains)]
            for action in chain:
                if action not in position:
                    message = schedule.sends(stage, action)
                    partner = f", for which stage {message.target} waits" if message else ""
                    raise ValueError(f"stage {stage} never does {action}{partner}")
            for before, after in zip(chain, chain[1:]):
                if position[before] > position[after]:
                    raise ValueError(f"stage {stage} does {after} before its own {before}")
            for action in chain:
                del position[action]
    if position:
        raise ValueError(f"stage {stage} does {min(position, key=position.get)}, which is no part of the step")


def _peak(actions, ends):
    live = peak = 0
    for action in actions:
        live += (action.kind == "F") - (action.kind in ends)
        peak = max(peak, live)
    return peak


def execution_order(schedule):
    """Yields (stage, action, message received, message sent) in an order in which one process could run all stages.

    ValueError: stages that wait for each other, or for what is never sent.
    """
    arrived, position, moved = {None}, [0] * schedule.stages, True
    while moved:
        moved = False
        for stage, actions in enumerate(schedule.actions):
            while position[stage] < len(actions):
                action = actions[position[stage]]
                incoming = schedule.receives(stage, action)
                if incoming not in arrived:
                    break
                outgoing = schedule.sends(stage, action)
                arrived.add(outgoing)
                position[stage] += 1
                moved = True
                yield stage, action, incoming, outgoing
    waiting = {stage: actions[position[stage]] for stage, actions in enumerate(schedule.actions) if position[stage] < len(actions)}
    if waiting:
        raise ValueError(_circle(schedule, waiting))


def _circle(schedule, waiting):
    """The stages that wait for each other, in words; `waiting`: stage -> the action it cannot start."""
    stage, path = min(waiting), []
    while stage not in path:
        path.append(stage)
        message = schedule.receives(stage, waiting[stage])
        if message.source not in waiting:
            return f"stage {stage} waits in {waiting[stage]} for stage {message.source}, which never sends it"
        stage = message.source
    circle = path[path.index(stage):] + [stage]
    steps = [f"waits in {waiting[here]} for stage {there}" for here, there in zip(circle, circle[1:])]
    return f"stage {circle[0]} " + ", which ".join(steps)


class Timeline(NamedTuple):
    """When every action runs, in the unit of the durations given."""
    times: list         # per stage: list of (Action, start, end)
    total: float        # end of the last action
    idle: tuple         # per stage: share of the total without work


def simulate(schedule, forward, backward_input, backward_weight, transfer=0):
    """The timeline of a step.

    Parameters
    ----------
    forward, backward_input, backward_weight : number
        Seconds that F, I and W of one chunk take; B takes I and W together.
    transfer : number
        Seconds from the end of an action to the arrival of its message at another stage; the sender works on meanwhile.
    """
    seconds = {"F": forward, "I": backward_input, "W": backward_weight, "B": backward_input + backward_weight}
    arrival, free, times = {None: 0}, [0] * schedule.stages, [[] for _ in range(schedule.stages)]
    for stage, action, incoming, outgoing in execution_order(schedule):
        start = max(free[stage], arrival[incoming])
        end = free[stage] = start + seconds[action.kind]
        times[stage].append((action, start, end))
        if outgoing:
            arrival[outgoing] = end + (transfer if outgoing.target != stage else 0)
    total = max(free)
    return Timeline(times, total, tuple(1 - sum(end - start for _, start, end in row) / total for row in times))


def table(schedule, width=120):
    """A row a stage, a column a slot of time (F, I, W take one, B two), dots where a stage waits; folded at `width` characters."""
    timeline = simulate(schedule, 1, 1, 1)
    cell = 1 + max(len(str(action)) for actions in schedule.actions for action in actions)
    label = len(f"stage {schedule.stages - 1} ")
    columns = max(1, (width - label) // cell)
    rows = []
    for row in timeline.times:
        slots = ["."] * timeline.total
        for action, start, end in row:
            slots[start:end] = [str(action)] + ["-" * len(str(action))] * (end - start - 1)
        rows.append(slots)
    blocks = ["\n".join(f"stage {stage}".ljust(label) + "".join(slot.rjust(cell) for slot in slots[first:first + columns])
                        for stage, slots in enumerate(rows))
              for first in range(0, timeline.total, columns)]
    return "\n\n".join(blocks)
