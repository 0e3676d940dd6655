"""Faults on purpose, to prove what a run does about them: MPILLM_FAULT="phase:rank:step:action[,...]", off by default.

A fault happens when the rank enters the phase (of `Journal.phase`) in that step; `*` stands for any phase, rank or step. A fault of
one step happens once. For tests of sites and of mpillm; nothing reads the variable but a run.

| action | does |
|---|---|
| `exception` | raises RuntimeError |
| `exit` | sys.exit(3) |
| `segv` | a segmentation fault |
| `kill` | kill -9 of itself |
| `stop` | SIGSTOP: stands still, with all threads |
| `loop` | an endless loop in Python |
| `gil` | waits for ever holding the interpreter, as C code that fails to let go does |
| `sleep=S` | sleeps for S seconds |
| `usr1`, `usr1=S` | sends itself SIGUSR1, after S seconds |
| `flip`, `nan` | flips a bit of a weight; puts a NaN into a gradient of the step |
| `slow=F` | from then on every phase takes F times as long: the rank sleeps the rest |
"""

import ctypes
import os
import re
import signal
import sys
import threading
import time
from typing import NamedTuple

from ..config import UserError
from .ending import say
from .hang import WORDS

VARIABLE = "MPILLM_FAULT"
PHASES = ("*", *WORDS, "forward", "backward")
DIGITS = re.compile(r"\d+(\.\d+)?")
NUMBER = {"sleep": True, "slow": True, "usr1": False}      # actions that take one, and whether they need it


class Fault(NamedTuple):
    phase: str
    rank: str
    step: str
    action: str


def parse(text):
    """The faults that the variable names."""
    faults = []
    for part in filter(None, text.split(",")):
        fields = part.strip().split(":")
        if len(fields) != 4 or not all(field == "*" or field.isdigit() for field in fields[1:3]):
            raise UserError(f"{VARIABLE}: {part!r}: expected phase:rank:step:action, such as forward:1:5:kill")
        if fields[0] not in PHASES:
            raise UserError(f"{VARIABLE}: phase {fields[0]!r}: expected one of {', '.join(PHASES)}")
        faults.append(Fault(*fields))
    return faults


def loop():
    while True:
        pass


def stand_still_holding_interpreter():
    mutex, library = ctypes.create_string_buffer(256), ctypes.PyDLL(None)      # PyDLL, unlike CDLL, calls without letting other threads run
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)       # no signal ends it, as one would a sleep


def fail():
    raise RuntimeError("a fault on purpose")


ACTIONS = {
    "exception": fail,
    "exit": lambda: sys.exit(3),
    "segv": lambda: ctypes.string_at(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "loop": loop,
    "gil": stand_still_holding_interpreter,
    "usr1": lambda seconds=0: threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGUSR1)).start(),
    "sleep": lambda seconds: time.sleep(float(seconds)),
}


class Faults:
    """Listens to the journal of a rank.

    Parameters
    ----------
    faults : list of Fault
    rank : int
    more : dict
        Further actions: name -> callable.
    """

    def __init__(self, faults, rank, more=None):
        self.actions = ACTIONS | {"slow": self._slow_down} | (more or {})
        for fault in faults:
            name, given, value = fault.action.partition("=")
            if name not in self.actions:
                raise UserError(f"{VARIABLE}: action {name!r}: expected one of {', '.join(self.actions)}")
            if given and not (name in NUMBER and DIGITS.fullmatch(value)) or NUMBER.get(name) and not given:
                raise UserError(f"{VARIABLE}: action {fault.action!r}: expected {name}" + ("=NUMBER" if name in NUMBER else " alone"))
        self.rank = rank
        self.faults = [fault for fault in faults if fault.rank in ("*", str(rank))]
        self.factor, self.last, self.waited = 1.0, None, 0.0

    def _slow_down(self, factor):
        self.factor = float(factor)

    def listener(self, journal):
        """For `Journal.listeners`."""
        def entered(phase, step, now):
            if self.factor > 1 and self.last is not None:
                worked = now - self.last - (journal.waited - self.waited)
                time.sleep(max(0.0, worked * (self.factor - 1)))
            for fault in list(self.faults):
                if fault.phase in ("*", phase) and fault.step in ("*", str(step)):
                    if fault.step != "*":
                        self.faults.remove(fault)
                    name, _, value = fault.action.partition("=")
                    say(f"mpillm: fault {':'.join(fault)} at {time.time():.3f} on rank {self.rank} in step {step}\n")
                    self.actions[name](*([value] if value else []))
            self.last, self.waited = time.monotonic(), journal.waited
        return entered


def install(journal, rank, more=None, environ=os.environ):
    """Installs the faults of the environment, where there are any."""
    text = environ.get(VARIABLE)
    if text:
        journal.listeners.append(Faults(parse(text), rank, more).listener(journal))
