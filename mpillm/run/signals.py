"""Requests to stop: signals, a file `stop` in the run directory, the time limit of the job.

| signal | does |
|---|---|
| SIGUSR1 | save and stop |
| SIGTERM | the same, except under Open MPI's mpirun, which kills within a second of it (and of Ctrl-C): signal it USR1 |
| SIGINT (Ctrl-C) | the first one stops after this step, with a checkpoint; the second at once |
| SIGUSR2 | writes the stacks of all threads to standard error and goes on |

A handler only sets a flag: Python runs it when the rank comes back from MPI, and all ranks have to stop after the
same step. So once a step they agree: `agree()`, or `local()` added to a sum over the ranks that is under way anyway.
"""

import faulthandler
import signal
import sys
import threading
import time

from . import launch

CODES = ("", "SIGUSR1", "SIGTERM", "Ctrl-C", "the time limit", "a file named stop", "the program")
LOOK = 2.0              # seconds between looks for the file `stop`
MARGIN = 5.0            # seconds kept back before the time limit, beside two steps and two saves


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
    time_limit : float or None
        Seconds from the start of the process (`run.time_limit`).
    stop_requested : callable or None
        Asked on rank 0 every two seconds, such as `RunDirectory.stop_requested`.
    clock : callable
        Seconds since the start of the process.
    """

    def __init__(self, group, time_limit=None, stop_requested=None, clock=lambda: time.monotonic() - launch.STARTED):
        self.group, self.time_limit, self.stop_requested, self.clock = group, time_limit, stop_requested, clock
        self.code = 0                               # index of CODES: why this rank wants to stop
        self.step_seconds = self.save_seconds = 0.0  # longest of late; a limit leaves time for two of each
        self.last_call, self.last_look = None, -LOOK
        self.old = {}

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
        self.save_seconds = max(self.save_seconds, seconds)

    # ---- once a step --------------------------------------------------------------------------------------------

    def local(self):
        """1.0 where this rank wants to stop, else 0.0: to be summed over the ranks. Called once a step."""
        now = self.clock()
        if self.last_call is not None:
            self.step_seconds = max(0.9 * self.step_seconds, now - self.last_call)
        self.last_call = now
        if self.group.rank == 0 and not self.code:
            self._look(now)
        return float(self.code > 0)

    def _look(self, now):
        margin = MARGIN + 2 * self.step_seconds + 2 * self.save_seconds
        if self.time_limit is not None and now + min(margin, self.time_limit / 2) >= self.time_limit:
            self.request("the time limit")
        elif self.stop_requested is not None and now - self.last_look >= LOOK:
            self.last_look = now
            if self.stop_requested():
                self.request("a file named stop")

    def agree(self):
        """Whether any rank wants to stop: the same answer on all ranks. Collective, one number."""
        self.local()
        return bool(self.explain())

    def explain(self):
        """The reason over all ranks, in words; "" when none wants to stop. Collective."""
        import numpy as np
        self.code = int(self.group.all_reduce(np.array([self.code], np.int64), "max")[0])
        return CODES[self.code]

    # ---- signals ------------------------------------------------------------------------------------------------

    def install(self):
        """Installs the handlers; only the main thread of a process can."""
        if threading.current_thread() is not threading.main_thread():
            return
        for reason in early:
            self.request(reason)
        self._handle(signal.SIGUSR1, lambda *_: self.request("SIGUSR1"))
        if not launch.ends_on_terminate():
            self._handle(signal.SIGTERM, lambda *_: self.request("SIGTERM"))
        self._handle(signal.SIGINT, self._interrupt)
        try:
            faulthandler.register(signal.SIGUSR2, file=sys.__stderr__, all_threads=True, chain=False)
        except (AttributeError, OSError, ValueError):  # standard error is closed
            pass

    def _handle(self, number, handler):
        self.old[number] = signal.signal(number, handler)

    def _interrupt(self, number, frame):
        if self.code == CODES.index("Ctrl-C"):
            raise KeyboardInterrupt
        self.code = CODES.index("Ctrl-C")

    def uninstall(self):
        """Puts the old handlers back; SIGUSR2 gets its default only if `install` took it."""
        if self.old:
            faulthandler.unregister(signal.SIGUSR2)
        for number, handler in self.old.items():
            signal.signal(number, handler)
        self.old = {}

    def __enter__(self):
        self.install()
        return self

    def __exit__(self, *error):
        self.uninstall()
