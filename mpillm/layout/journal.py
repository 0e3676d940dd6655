"""What was communicated: the last calls of this process (flight recorder), and calls and bytes per axis (ledger).

`comm` enters every call here before it starts. A group that is only planned has a journal of its own, so one process
can play many ranks and keep what each would have done.
"""

import collections
import time
from typing import NamedTuple

RECORD_LENGTH = 256         # calls that the flight recorder remembers


class Traffic(NamedTuple):
    """What a rank did along one axis by one operation."""
    calls: int
    bytes: int      # that this rank sends: of the whole array (p-1)/p in a gather or scatter, 2 (p-1)/p in an all-reduce


class Call:
    """One call in the flight recorder."""
    __slots__ = ("number", "group", "operation", "shape", "dtype", "started", "seconds")

    def __init__(self, number, group, operation, array):
        self.number, self.group, self.operation = number, group, operation
        self.shape, self.dtype = getattr(array, "shape", ()), str(getattr(array, "dtype", ""))
        self.started, self.seconds = time.monotonic(), None

    def done(self):
        self.seconds = time.monotonic() - self.started

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
    """

    def __init__(self):
        self.calls, self.count, self.traffic = collections.deque(maxlen=RECORD_LENGTH), 0, {}

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
        call = Call(self.count, group.name, f"{operation} {peer}".rstrip(), array)
        self.calls.append(call)
        entry = self.traffic.setdefault((group.name, operation), [0, 0])
        entry[0] += 1
        entry[1] += sent
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
