"""What a rank does: its phase, its last calls (flight recorder), and calls and bytes per axis (ledger).

`comm` enters every call here before it starts. What is noted goes to shared memory too (record.py) where a run is watched.
A group that is only planned has a journal of its own, so one process can play many ranks and keep what each would have done.
"""

import collections
import sys
import time
from typing import NamedTuple

RECORD_LENGTH = 256         # calls that the flight recorder remembers
OWN_FILES = ("journal.py", "comm.py", "device_group.py", "planned.py")     # of them no line is a call site


class Traffic(NamedTuple):
    """What a rank did along one axis by one operation."""
    calls: int
    bytes: int      # that this rank sends: of the whole array (p-1)/p in a gather or scatter, 2 (p-1)/p in an all-reduce


class Call:
    """One call in the flight recorder: waited for from the start, unless it is `begun`, and until it is `done`."""
    __slots__ = ("journal", "number", "group", "operation", "shape", "dtype", "started", "seconds", "turn")

    def __init__(self, journal, number, group, operation, array, turn):
        self.journal, self.number, self.group, self.operation, self.turn = journal, number, group, operation, turn
        self.shape, self.dtype = getattr(array, "shape", ()), getattr(array, "dtype", "")
        self.started, self.seconds = time.monotonic(), None

    def begun(self):
        """It goes on by itself: the rank does other work."""
        self.journal.wait_for(None)

    def waits(self):
        """From now on the rank does nothing but wait for it."""
        self.journal.wait_for(self)

    def done(self):
        self.seconds = time.monotonic() - self.started
        self.journal.finished(self)

    def __str__(self):
        state = "not finished" if self.seconds is None else f"{self.seconds:.6f} s"
        return f"#{self.number} {self.operation} over {self.group} {list(self.shape)} {self.dtype}: {state}"


class Journal:
    """
    Attributes
    ----------
    calls : deque of Call, newest last
    traffic : dict
        (group name, operation) -> [calls, bytes sent], since the process began.
    record : Record or None
        In shared memory, where a run is watched.
    listeners : list of callables
        Called with (phase, step, time.monotonic()) when a phase begins.
    subject : str
        What the next call is about, such as the name of a bucket.
    part, step
        The phase and the step under way.
    waited : float
        Seconds that this rank waited for calls, since the process began.
    """

    def __init__(self):
        self.calls, self.count, self.traffic, self.turns = collections.deque(maxlen=RECORD_LENGTH), 0, {}, {}
        self.record, self.listeners, self.subject = None, [], ""
        self.part, self.step, self.marks = "set-up", 0, 0
        self.waiting, self.wait_start, self.waited = None, 0.0, 0.0
        self._sites = {}

    # ---- where the rank stands ------------------------------------------------------------------------------------

    def phase(self, name, step=None):
        """A part of a step, or of the run, begins: "data", "forward", "backward", "reduce", "optimizer", "evaluate", "save", ..."""
        now = time.monotonic()
        self.part, self.step = name, self.step if step is None else step
        self.marks += 1
        if self.waiting:
            self.wait_for(None)
        if self.record:
            self.record.phase(self.marks, now, self.step, name, self._site())
        for listener in self.listeners:
            listener(name, self.step, now)

    def progress(self):
        """Something was done that takes long in all: a piece of a checkpoint written, say."""
        self.marks += 1
        if self.record:
            self.record.mark(self.marks, time.monotonic())

    def wait_for(self, call):
        """The rank waits for `call`; None: for nothing."""
        if call is self.waiting:
            return
        now = time.monotonic()
        if self.waiting:
            self.waited += now - self.wait_start
        self.waiting, self.wait_start = call, now
        if self.record:
            self.record.waiting(call.number if call else 0, now)

    def finished(self, call):
        """Of `Call.done`."""
        self.marks += 1
        if call is self.waiting:
            self.wait_for(None)
        if self.record:
            self.record.done(call.number, call.seconds)
            self.record.mark(self.marks, call.started + call.seconds)

    def _site(self):
        """file:line of the nearest caller outside this layer, as bytes."""
        frame = sys._getframe(2)
        while frame.f_back and frame.f_code.co_filename.endswith(OWN_FILES):
            frame = frame.f_back
        key = frame.f_code, frame.f_lineno
        if key not in self._sites:
            self._sites[key] = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}".encode()
        return self._sites[key]

    # ---- calls ----------------------------------------------------------------------------------------------------

    def enter(self, group, operation, array, sent, detail=None, peer="", expected=None):
        """Notes a call before it starts.

        Parameters
        ----------
        group : Group
        array : array or None
        sent : int
            Bytes that this rank sends.
        detail : hashable
            What else all members must agree on (the counts of a gather, say; of a message: its tag).
        peer : str
            Of a message: "to 3", "from 0".
        expected : int or None
            Of a shift: elements that this rank expects of the one before it.
        """
        self.count += 1
        turn = self.turns[group.name] = self.turns.get(group.name, 0) + (not peer)
        call = Call(self, self.count, group.name, f"{operation} {peer}".rstrip(), array, turn)
        self.calls.append(call)
        entry = self.traffic.setdefault((group.name, operation), [0, 0])
        entry[0] += 1
        entry[1] += sent
        self.marks += 1
        if self.record:
            self.record.call(call.number, turn, sent, call.started, self.step, call.operation, group.name, self.subject, self.part, self._site())
            self.record.mark(self.marks, call.started)
        self.wait_for(call)
        self.subject = ""
        return call

    def last_calls(self, count=8):
        """The newest `count` calls as lines of text, newest last."""
        return [str(call) for call in list(self.calls)[-count:]]

    def snapshot(self):
        """The ledger so far, to be handed to `since`."""
        return {key: tuple(entry) for key, entry in self.traffic.items()}

    def since(self, before):
        """{(group name, operation): Traffic} of the calls after the snapshot `before`."""
        found = {}
        for key, (calls, sent) in self.traffic.items():
            old_calls, old_sent = before.get(key, (0, 0))
            if calls > old_calls:
                found[key] = Traffic(calls - old_calls, sent - old_sent)
        return found


def ledger_table(traffic, steps=1):
    """Lines of a table: axis, operation, calls and bytes of a step; `traffic` as of `Journal.since`, over `steps` steps."""
    rows = [("axis", "operation", "calls/step", "MB sent/step")]
    for (name, operation), entry in sorted(traffic.items()):
        rows.append((name, operation, f"{entry.calls / steps:.4g}", f"{entry.bytes / steps / 1e6:.4g}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}" for row in rows]


JOURNAL = Journal()     # of this process
