"""Requests to save and to stop: signals, files in the run directory, the time limit of the job.

| | does |
|---|---|
| SIGUSR1 | save and stop |
| SIGTERM | the same, except under Open MPI's mpirun, which kills within a second of it (and of Ctrl-C): signal it USR1 |
| SIGINT (Ctrl-C) | the first one stops after this step, with a checkpoint; the second at once |
| SIGUSR2 | writes the stacks of all threads to standard error and goes on |
| a file STOP in the run directory | save and stop; for colleagues, who may not signal the job |
| a file SAVE there | save and go on; the file is then removed |

All ranks have to stop after the same step. So once a step they agree: `agree()`, or `wishes()` added to a sum over the ranks
that is under way anyway. A handler of Python runs only when the rank comes back from MPI; a thread hears of signals at once.
"""

import faulthandler
import os
import signal
import sys
import threading

from . import launch
from .ending import say
from .walltime import WallTime, clock

CODES = ("", "SIGUSR1", "SIGTERM", "Ctrl-C", "the time limit", "Slurm's time limit", "a file named STOP", "the program")
LOOK = 2.0              # seconds between looks for the files STOP and SAVE
MARGIN = 5.0            # seconds kept back before the time limit, beside two steps and two saves
RETRY = 60.0            # seconds after a checkpoint that failed until a file SAVE is heard again
WRITE_RATE = 2e8        # bytes/s of a save, before one was measured

early = []              # reasons to stop that came before there was a StopFlag


def listen_early():
    """From now on SIGUSR1 is kept for the StopFlag to come: by default it would end a process that is only starting."""
    signal.signal(signal.SIGUSR1, lambda *_: early.append("SIGUSR1"))


class StopFlag:
    """Whether the run is to save and stop; a context manager that installs the signal handlers and puts the old ones back.

    Parameters
    ----------
    group : Group or Solo
        All ranks of the job.
    wall : WallTime or None
        The limits of the job.
    wished : callable or None
        Asked on rank 0 every two seconds: "STOP", "SAVE" or None, such as `RunDirectory.wish`.
    clock : callable
        Seconds since the start of the process.
    """

    def __init__(self, group, wall=None, wished=None, clock=clock):
        self.group, self.wall, self.wished, self.clock = group, wall or WallTime(None, {}), wished, clock
        self.code = 0                               # index of CODES: why this rank wants to stop
        self.wants_save = False                     # a colleague wants a checkpoint
        self.step_seconds = self.save_seconds = 0.0  # longest of late; a limit leaves time for two of each
        self.guessed = True                         # no save was measured yet
        self.last_call, self.last_look, self.deaf_until = None, -LOOK, 0.0
        self.old, self.functions, self.thread = {}, {}, None

    @property
    def requested(self):
        """Whether this rank was asked to stop."""
        return self.code > 0

    @property
    def reason(self):
        """What asked this rank to stop, in words; after `agree()` or `explain()` what asked any rank."""
        return CODES[self.code]

    def request(self, reason="the program"):
        """Asks to stop; the first reason stays."""
        self.code = self.code or CODES.index(reason)

    def saved(self, seconds):
        """Notes how long a checkpoint took, so that the time limit leaves room for one."""
        self.save_seconds = seconds if self.guessed else max(self.save_seconds, seconds)
        self.guessed = self.wants_save = False

    def save_failed(self):
        """No checkpoint could be written: a colleague's wish for one is not tried again after every step."""
        self.wants_save, self.deaf_until = False, self.clock() + RETRY

    def expect_save(self, num_bytes, seconds=None):
        """Before a save was measured: what one of `num_bytes` will take, or took in an earlier part of the run."""
        if self.guessed:
            self.save_seconds = num_bytes / WRITE_RATE if seconds is None else seconds

    # ---- once a step --------------------------------------------------------------------------------------------

    def wishes(self):
        """[1.0 where this rank wants to stop, 1.0 where it wants a checkpoint], else 0.0: to be summed over the ranks. Called once a step."""
        now = self.clock()
        if self.last_call is not None:
            self.step_seconds = max(0.9 * self.step_seconds, now - self.last_call)
        self.last_call = now
        if self.group.rank == 0 and not self.code:
            self._look(now)
        return [float(self.code > 0), float(self.wants_save)]

    def _look(self, now):
        margin = MARGIN + 2 * self.step_seconds + 2 * self.save_seconds
        limit, name = self.wall.limit()
        if limit is not None and now + min(margin, limit / 2) >= limit:
            self.request(name)
        elif self.wished is not None and now - self.last_look >= LOOK:
            self.last_look = now
            wish = self.wished()
            if wish == "STOP":
                self.request("a file named STOP")
            self.wants_save = wish == "SAVE" and now >= self.deaf_until

    def agree(self):
        """Whether any rank wants to stop: the same answer on all ranks. Collective, one number."""
        self.wishes()
        return bool(self.explain())

    def explain(self):
        """The reason over all ranks, in words; "" when none wants to stop. Collective."""
        import numpy as np
        self.code = int(self.group.all_reduce(np.array([self.code], np.int64), "max")[0])
        return CODES[self.code]

    def inherit(self, group):
        """After ranks were lost: `group` goes on."""
        self.group, self.last_call = group, None
        if group.rank == 0:
            self.wall.start()

    # ---- signals ------------------------------------------------------------------------------------------------

    def install(self):
        """Installs the handlers and the thread; only the main thread of a process can."""
        if threading.current_thread() is not threading.main_thread():
            return
        for reason in early:
            self.request(reason)
        self._listen()
        self._handle(signal.SIGUSR1, lambda *_: self.request("SIGUSR1"))
        if not launch.ends_on_terminate():
            self._handle(signal.SIGTERM, lambda *_: self.request("SIGTERM"))
        self._handle(signal.SIGINT, self._interrupt)
        try:
            faulthandler.register(signal.SIGUSR2, file=sys.__stderr__, all_threads=True, chain=False)
        except (AttributeError, OSError, ValueError):  # standard error is closed
            pass
        if self.group.rank == 0:
            self.wall.start()

    def _handle(self, number, handler):
        self.old.setdefault(number, signal.signal(number, handler))

    def _interrupt(self, number, frame):
        if self.code == CODES.index("Ctrl-C"):
            raise KeyboardInterrupt
        self.code = CODES.index("Ctrl-C")

    def on_signal(self, number, function):
        """Calls `function()` as soon as the signal comes, in a thread: also while the main thread waits in MPI."""
        self.functions[number] = function
        if self.thread:
            self._handle(number, lambda *_: None)       # the interpreter tells the thread of signals that have a handler

    def _listen(self):
        self.pipe = os.pipe()
        os.set_blocking(self.pipe[1], False)
        self.old_descriptor = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._hear, daemon=True, name="signals")
        self.thread.start()

    def _hear(self):
        """In the thread: reads the number of each signal; a 0 ends it."""
        names = {signal.SIGUSR1: "SIGUSR1", signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
        said = self.group.rank > 0
        while True:
            for number in os.read(self.pipe[0], 64):
                if number == 0:
                    return
                if number in self.functions:
                    self.functions[number]()
                elif number in names and number in self.old:
                    if not said:
                        say(f"mpillm: {names[number]}: the run saves and stops after this step\n")
                        said = True
                    if number != signal.SIGINT:     # the handler counts these
                        self.request(names[number])

    def uninstall(self):
        """Puts the old handlers back; SIGUSR2 gets its default only if `install` took it."""
        if not self.thread:
            return
        faulthandler.unregister(signal.SIGUSR2)
        for number, handler in self.old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.old_descriptor)
        os.write(self.pipe[1], b"\0")
        self.thread.join(1.0)
        for descriptor in self.pipe:
            os.close(descriptor)
        self.old, self.thread = {}, None
        self.wall.stop()

    def __enter__(self):
        self.install()
        return self

    def __exit__(self, *error):
        self.uninstall()
