"""The watchdog of a run: starts a monitor on each node, and tells it how long this rank may go without progress.

How long is learned from the run itself: in a step `FACTOR` times the longest step so far, and at least `LEAST` seconds. A save, a
validation, a loading vary with the load of file systems: `PATIENCE` times as much at least. The first steps, which compile, and what
has not happened yet may take `UNKNOWN`. `run.hang_timeout` sets the time of a step instead, and with it the others. Ranks that meet
after a failure wait for one that may still be where this one was: as long as for that.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..layout.journal import JOURNAL
from ..layout.node import gather_on_node
from ..layout.record import Record
from . import ending, lock
from .monitor import CLOSED, DUMP, END

FACTOR = 5              # of the longest so far, as NVIDIA's resiliency extension has it (RELIABILITY: NVRx safety_factor)
LEAST = 60.0            # seconds
PATIENCE = 10           # times what a step may take, for what is no step
UNKNOWN = 1800.0        # seconds; with run.hang_timeout PATIENCE times that
FIRST_STEPS = 2         # that compile, record graphs and fill caches
IN_STEP = ("data", "forward", "backward", "reduce", "optimizer", "between", "meet")
CLOSING = 2.0           # seconds that the monitor has to end
NOT_FOR_IT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Limits:
    """How long a rank may be without progress, by phase; listens to the journal.

    Parameters
    ----------
    hang_timeout : float or None
        Seconds (`run.hang_timeout`).
    """

    def __init__(self, hang_timeout):
        self.least = hang_timeout or LEAST
        self.unknown = hang_timeout * PATIENCE if hang_timeout else UNKNOWN
        self.set = hang_timeout is not None
        self.longest = {}           # seconds by phase; "step": of a whole step
        self.phase, self.began, self.step_began, self.steps = "set-up", time.monotonic(), None, 0

    def enter(self, phase, now):
        """A phase begins; returns the seconds that it may be without progress."""
        before, self.phase = self.phase, phase
        if phase == "meet":         # what was cut short tells nothing of how long it takes
            return max(self.of(before), self.of(phase))
        if before not in IN_STEP:
            self._took(before, now - self.began)
        self.began = now
        if phase == "data":
            self.step_began = now
        elif phase == "between" and self.step_began is not None:
            self.steps += 1
            if self.steps > FIRST_STEPS:
                self._took("step", now - self.step_began)
        return self.of(phase)

    def _took(self, phase, seconds):
        self.longest[phase] = max(self.longest.get(phase, 0.0), seconds)

    def of(self, phase):
        key = "step" if phase in IN_STEP else phase
        if key not in self.longest:
            return self.unknown
        if key == "step":
            return self.least if self.set else max(self.least, FACTOR * self.longest[key])
        return max(PATIENCE * self.least, FACTOR * self.longest[key])


class Watchdog:
    """A context manager around the work of a run. Collective.

    Where MPI bears the death of a rank (ULFM) it stays after a failure, for the ranks have to meet: `close` is the caller's then.

    Parameters
    ----------
    group : Group or Solo
        All ranks.
    directory : RunDirectory
    stop : StopFlag
        Its thread hears the monitor's signal to end, also while this rank waits in MPI.
    hang_timeout : float or None
        Seconds.
    """

    def __init__(self, group, directory, stop, hang_timeout=None):
        self.group, self.directory, self.stop = group, directory, stop
        self.limits, self.monitor, self.record, self.stacks = Limits(hang_timeout), None, None, None

    def __enter__(self):
        try:
            self._open()
        except BaseException:       # a rank died meanwhile
            self.close()
            raise
        return self

    def _open(self):
        self.record = JOURNAL.record = Record()
        descriptor, path = tempfile.mkstemp(prefix="mpillm-stacks-", dir=os.path.dirname(self.record.path))
        self.stacks, self.stacks_path = os.fdopen(descriptor, "w"), path
        faulthandler.register(DUMP, file=self.stacks, all_threads=True, chain=False)
        self.stop.on_signal(END, lambda: os._exit(ending.HANG))
        JOURNAL.listeners.append(self._listen)
        process = {"rank": self.group.rank, "pid": os.getpid(), "start": lock.process_start(os.getpid()), "record": self.record.path,
                   "stacks": path, "namespace": lock.namespace()}
        of_node, place = gather_on_node(self.group, process)
        # Process ids mean something in their own namespace only: ranks in containers apart have monitors apart.
        ours = [each for each in of_node if each["namespace"] == process["namespace"]]
        leads = self.group.collect(ours[0]["rank"] == self.group.rank)
        stamp = self.group.share(time.strftime("%Y%m%d-%H%M%S"))
        if leads[self.group.rank]:
            self._start({"ranks": ours, "host": socket.gethostname(), "node": sum(leads[:self.group.rank]), "nodes": sum(leads), "stamp": stamp,
                         "num_ranks": self.group.size, "directory": str(self.directory.path.resolve()), "token": self.directory.token,
                         "status": self.directory.before})
        JOURNAL.phase("load")

    def _start(self, config):
        path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        # What a terminal, a launcher or Slurm sends to all is not for the monitor: it has a session of its own and inherits the mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_IT)
        try:
            self.monitor = subprocess.Popen([sys.executable, "-m", "mpillm.run.monitor"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                            env=environment, start_new_session=True)
            self.monitor.stdin.write(json.dumps(config).encode() + b"\n")
            self.monitor.stdin.flush()
        except OSError as error:
            ending.say(f"mpillm: node {config['host']}: no watchdog: {error}\n")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _listen(self, phase, step, now):
        self.record.limit(self.limits.enter(phase, now))

    def __exit__(self, kind, error, trace):
        if kind is None or not self.group.bears_deaths:
            self.close()

    def close(self):
        """Ends the watch, once."""
        if self.record is None:
            return
        JOURNAL.record = None
        if self._listen in JOURNAL.listeners:
            JOURNAL.listeners.remove(self._listen)
        self.record.limit(CLOSED)   # a monitor that outlives this, since its parent died, is to leave the rank alone
        faulthandler.unregister(DUMP)
        if self.monitor:
            with contextlib.suppress(OSError):
                self.monitor.stdin.write(b"end")
                self.monitor.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.monitor.wait(CLOSING)
        for path in (self.record.path, self.stacks_path):       # of a monitor that did not start
            with contextlib.suppress(OSError):
                os.unlink(path)
        self.stacks.close()
        self.record = None
