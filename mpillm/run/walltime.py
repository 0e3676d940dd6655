"""How long this job may still run: `run.time_limit`, and the limit of Slurm, which administrators may move while the job runs."""

import math
import os
import re
import subprocess
import threading
import time

from . import launch

ASK_AGAIN = 600.0       # seconds between questions to Slurm
NO_ANSWER = 60.0        # seconds after one that got no answer
SQUEUE_TIMEOUT = 20     # seconds


def seconds_of(text):
    """Slurm's ways to write a duration, from "90" (minutes) and "3:04" to "1-02:03:04" or "UNLIMITED", in seconds; None for other words (NOT_SET, ...)."""
    text = text.strip()
    if text == "UNLIMITED":
        return math.inf
    days, dash, clock = text.rpartition("-")
    parts = [days] * len(dash) + clock.split(":")
    if len(parts) > 3 + len(dash) or not all(part.isascii() and part.isdigit() for part in parts):
        return None
    units = (86400, 3600, 60, 1) if dash else (3600, 60, 1) if len(parts) == 3 else (60, 1)
    numbers = list(zip(map(int, parts), units))
    if any(number >= {3600: 24}.get(unit, 60) for number, unit in numbers[1:]):
        return None
    return sum(number * unit for number, unit in numbers)


def ask_slurm(job):
    """Seconds that Slurm leaves the job; None where it gives no answer."""
    try:
        answer = subprocess.run(["squeue", "--noheader", "--job", job, "--format", "%L"], capture_output=True, text=True, timeout=SQUEUE_TIMEOUT, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return seconds_of(answer.stdout) if answer.returncode == 0 else None


class WallTime:
    """The limits of a run, in seconds since its process began.

    Parameters
    ----------
    own : float or None
        `run.time_limit`.
    environ : mapping
        Of a Slurm job: SLURM_JOB_ID, SLURM_JOB_END_TIME (seconds since 1970).
    ask : callable
        As `ask_slurm`.
    """

    def __init__(self, own=None, environ=os.environ, ask=ask_slurm):
        self.own, self.slurm, self.job, self.ask = own, None, environ.get("SLURM_JOB_ID"), ask
        end = environ.get("SLURM_JOB_END_TIME", "")
        if self.job and end.isdigit():
            self.slurm = clock() + int(end) - time.time()
        self.over, self.asking = threading.Event(), False

    def start(self):
        """Asks Slurm now and again, in a thread: squeue may take long. Rank 0 does it."""
        if self.job and not self.asking:
            self.asking = True
            threading.Thread(target=self._keep_asking, daemon=True, name="wall time").start()

    def _keep_asking(self):
        while True:
            left = self.ask(self.job)
            if left is not None:
                self.slurm = clock() + left
            if self.over.wait(NO_ANSWER if left is None else ASK_AGAIN):
                return

    def stop(self):
        self.over.set()

    def limit(self):
        """(seconds, name) of the limit that comes first; (None, "") where there is none."""
        both = (self.own, "the time limit"), (self.slurm, "Slurm's time limit")
        limits = [(seconds, name) for seconds, name in both if seconds is not None and seconds < math.inf]
        return min(limits, default=(None, ""))


def clock():
    """Seconds since the process began."""
    return time.monotonic() - launch.STARTED
