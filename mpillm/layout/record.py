"""The flight recorder in shared memory: where a rank stands and its last calls, readable by another process.

The rank writes with a few `pack_into`, without a system call; a monitor on the same node (run/monitor.py) reads, even when
the rank is stopped or holds the interpreter. Standard library only.
"""

import mmap
import os
import struct
import tempfile
from typing import NamedTuple

AGREE = "agree"             # the call in which ranks meet after a failure (ulfm.py)
ENTRIES = 256               # calls that are kept
CALL = struct.Struct("<QQqddq48s32s32s16s48s")      # one call; order of the fields of Entry
HEAD = struct.Struct("<QddqQd16s48s")               # where the rank stands; order of the fields of State
STARTED = struct.Struct("<Qd")
WAITS = struct.Struct("<Qd")
SIZE = 4096 + ENTRIES * CALL.size
SECONDS_AT = struct.calcsize("<QQqd")                       # of the field `seconds` in a call
COUNT_AT, LIMIT_AT, STEP_AT, WAITS_AT = 0, 16, 24, 32       # of fields in the head


class State(NamedTuple):
    """Where a rank stands."""
    count: int          # of marks: it grows while the rank makes progress
    marked: float       # time.monotonic() of the last mark; the same clock in all processes of a node
    limit: float        # seconds without a mark that are allowed now; 0: any
    step: int           # under way
    waits: int          # number of the call that the rank waits for, 0: it waits for none
    since: float        # time.monotonic() when that began
    phase: str          # part of the step, or of the run
    site: str           # file:line where the phase was entered


class Entry(NamedTuple):
    """A call."""
    number: int         # of all calls of this rank
    turn: int           # of the calls of this rank along this group: all members count alike
    bytes: int          # sent
    started: float      # time.monotonic()
    seconds: float      # it took; -1: not finished
    step: int
    operation: str      # with the partner of a message: "send to 3"
    group: str          # the axis, as messages show it
    subject: str        # what it was about: the bucket of parameters
    phase: str
    site: str           # file:line of the caller


def _text(data):
    return data.rstrip(b"\0").decode("utf-8", "replace")


class Record:
    """
    Parameters
    ----------
    path : str or None
        An existing record, to be read; None makes one, to be written.
    """

    def __init__(self, path=None):
        if path is None:
            folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
            descriptor, self.path = tempfile.mkstemp(prefix="mpillm-", dir=folder)
            os.ftruncate(descriptor, SIZE)
        else:
            descriptor, self.path = os.open(path, os.O_RDONLY | os.O_NOFOLLOW), path
        try:
            self.memory = mmap.mmap(descriptor, SIZE, access=mmap.ACCESS_WRITE if path is None else mmap.ACCESS_READ)
        finally:
            os.close(descriptor)

    def unlink(self):
        """Takes away the name; who has opened the record goes on to see it."""
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass

    # ---- the rank that is recorded --------------------------------------------------------------------------------

    def mark(self, count, now):
        STARTED.pack_into(self.memory, COUNT_AT, count, now)

    def waiting(self, number, now):
        WAITS.pack_into(self.memory, WAITS_AT, number, now)

    def limit(self, seconds):
        struct.pack_into("<d", self.memory, LIMIT_AT, seconds)

    def phase(self, count, now, step, phase, site):
        """A new phase; nothing is waited for and any time is allowed until `limit`."""
        HEAD.pack_into(self.memory, 0, count, now, 0.0, step, 0, 0.0, phase.encode(), site)

    def call(self, number, turn, sent, now, step, operation, group, subject, phase, site):
        place = 4096 + number % ENTRIES * CALL.size
        CALL.pack_into(self.memory, place, number, turn, sent, now, -1.0, step, operation.encode(), group.encode(), subject.encode(), phase.encode(), site)

    def done(self, number, seconds):
        struct.pack_into("<d", self.memory, 4096 + number % ENTRIES * CALL.size + SECONDS_AT, seconds)

    # ---- who looks ------------------------------------------------------------------------------------------------

    def state(self):
        *numbers, phase, site = HEAD.unpack_from(self.memory, 0)
        return State(*numbers, _text(phase), _text(site))

    def entry(self, number):
        """Call `number`; None where it is no longer kept."""
        *numbers, operation, group, subject, phase, site = CALL.unpack_from(self.memory, 4096 + number % ENTRIES * CALL.size)
        return Entry(*numbers, *map(_text, (operation, group, subject, phase, site))) if number and numbers[0] == number else None

    def entries(self):
        """All calls that are kept, oldest first."""
        numbers = [CALL.unpack_from(self.memory, 4096 + place * CALL.size)[0] for place in range(ENTRIES)]
        return [entry for entry in map(self.entry, sorted(filter(None, numbers))) if entry]
