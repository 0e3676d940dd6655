"""Watches the ranks of a node from a process of its own: `python -m mpillm.run.monitor`, started by run/watchdog.py.

It reads the flight recorder of each rank in shared memory. A rank that makes no progress for longer than it allows itself
is an alarm: the monitors of all nodes write where their ranks stand into the run directory, that of rank 0 says who waits for
whom, and each ends its ranks with exit code 77 and kills what is left. A thread of the rank could not: it stands still with a
rank that is stopped, or that holds the interpreter. Where all ranks of a node are stopped, the job is suspended, which is no alarm.

Standard library only, no MPI: monitors meet in the run directory, and touch it only after half of the time that is allowed.
"""

import contextlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path

from ..layout.record import Record
from . import ending, hang, lock
from .directory import failure_since, write_atomic

POLL = 0.2              # seconds between looks
ALIVE = 1.0             # seconds between looks for processes that ended
STACKS = 0.4            # seconds that a rank has to write its stacks
TOGETHER = 3.0          # seconds that the lead waits for the other nodes
VERDICT = 6.0           # seconds that the others wait for the lead
GENTLE = 0.7            # seconds that a rank has to end by itself
ENDED = "ended"         # a file: the lead has reported
LAST_CALLS = 16         # of each rank in the report
CLOSED = -1.0           # the limit of a rank that is watched no longer

DUMP, END = signal.SIGRTMIN + 1, signal.SIGRTMIN + 2      # to a rank: write your stacks; end with code 77


class Watched:
    """A rank of this node.

    Parameters
    ----------
    config : dict
        rank, pid, start, record, stacks (paths; removed here once they are open).
    """

    def __init__(self, config):
        self.rank, self.pid, self.start = config["rank"], config["pid"], config["start"]
        self.record, self.stacks = Record(config["record"]), open(config["stacks"], "rb")
        self.record.unlink()
        os.unlink(config["stacks"])
        self.state, self.quiet, self.process = self.record.state(), 0.0, "R"

    def look(self, seconds):
        """`seconds` have passed since the last look."""
        state = self.record.state()
        self.quiet = self.quiet + seconds if state.count == self.state.count else 0.0
        self.state = state

    def look_at_process(self):
        """The state letter of the process as /proc shows it; "" where it is no more."""
        try:
            with open(f"/proc/{self.pid}/stat") as file:
                text = file.read()
            fields = text[text.rindex(")") + 2:].split()
            self.process = fields[0] if int(fields[19]) == self.start and fields[0] not in "ZX" else ""
        except (OSError, ValueError):
            self.process = ""
        return self.process

    @property
    def overdue(self):
        return 0 < self.state.limit < self.quiet

    def signal(self, number):
        if self.look_at_process():
            with contextlib.suppress(OSError):
                os.kill(self.pid, number)

    def standing(self, host):
        """Where the rank stands, as hang.py takes it, and more for the file."""
        process, state = self.look_at_process(), self.record.state()
        waits = self.record.entry(state.waits)
        self.stacks.seek(0)
        stacks = self.stacks.read().decode("utf-8", "replace")
        return {"rank": self.rank, "host": host, "pid": self.pid, "stopped": process in ("T", "t"), "gone": not process,
                "quiet": self.quiet, "phase": state.phase, "step": state.step, "site": state.site, "place": innermost(stacks),
                "call": waits._asdict() if waits else None, "calls": [entry._asdict() for entry in self.record.entries()[-LAST_CALLS:]],
                "stacks": stacks}


def innermost(stacks):
    """file:line of the innermost line of mpillm in the main thread's stack, of what faulthandler wrote last."""
    thread = stacks.rpartition("most recent call first")[2]     # the main thread comes last
    for line in thread.splitlines():
        if "/mpillm/" in line and '", line ' in line:
            name, _, rest = line.partition('", line ')
            return f"{name.rpartition('/')[2]}:{rest.split()[0]}"
    return ""


class Monitor:
    """
    Parameters
    ----------
    config : dict
        ranks (as of Watched), host, node (number of this monitor), nodes (of all), num_ranks, directory, stamp, token (of the lock),
        status (what status.json held before the run).
    """

    def __init__(self, config):
        self.config, self.host, self.node = config, config["host"], config["node"]
        self.ranks = [Watched(each) for each in config["ranks"]]
        self.directory = Path(config["directory"])
        self.folder = self.directory / f"hang-{config['stamp']}"
        self.lead = any(each.rank == 0 for each in self.ranks)

    # ---- watching -------------------------------------------------------------------------------------------------

    def watch(self):
        """Returns when the ranks have ended, or have been ended."""
        before, asked_alive, parent = time.monotonic(), 0.0, True
        while True:
            ready = select.select([sys.stdin] if parent else [], [], [], POLL)[0]
            if ready:
                if os.read(0, 64):      # "end": the run is over
                    return
                parent = False          # the rank that started this process is no more
            now = time.monotonic()
            if not parent or now - asked_alive > ALIVE:
                asked_alive = now
                living = [each for each in self.ranks if each.look_at_process()]
                if all(each.record.state().limit == CLOSED for each in living):
                    return
            for each in self.ranks:
                each.look(min(now - before, 4 * POLL))      # not the time in which this process was suspended itself
            before = now
            if self._alarm() and self._judge():
                return

    def _alarm(self):
        """Whether a rank of this node is overdue, or one of another node is and ours wait too; one that is no more is missed by the others."""
        late = [each for each in self.ranks if each.overdue and each.look_at_process()]
        if late:
            states = [each.look_at_process() for each in self.ranks]
            return not all(state in ("T", "t") for state in states) or self.folder.is_dir()
        half = any(0 < each.state.limit / 2 < each.quiet for each in self.ranks)
        return half and self.config["nodes"] > 1 and self.folder.is_dir()

    # ---- an alarm -------------------------------------------------------------------------------------------------

    def _judge(self):
        """Says who waits for whom and ends the ranks; False if they went on meanwhile."""
        quiet = max(each.quiet for each in self.ranks)
        counts = [each.record.state().count for each in self.ranks]
        for each in self.ranks:
            each.signal(DUMP)
        time.sleep(STACKS)
        standing = [each.standing(self.host) for each in self.ranks]
        with contextlib.suppress(OSError):      # the disk may be what hangs: the ranks are to end all the same
            self.folder.mkdir(exist_ok=True)
            write_atomic(self.folder / f"node-{self.node}.json", json.dumps(standing).encode())
        everybody = self._hear(standing) if self.lead else standing
        if all(each.record.state().count != count for each, count in zip(self.ranks, counts)):
            return self._over(quiet)
        if self.lead:
            self._report(everybody, quiet)
        else:
            self._wait_for_verdict()
        self._end()
        return True

    def _hear(self, own):
        """Where the ranks of all nodes stand, as far as their monitors have written it in time."""
        found, deadline = {self.node: own}, time.monotonic() + TOGETHER
        while len(found) < self.config["nodes"] and time.monotonic() < deadline:
            for node in set(range(self.config["nodes"])) - set(found):
                with contextlib.suppress(OSError, ValueError):
                    found[node] = json.loads((self.folder / f"node-{node}.json").read_text())
            time.sleep(POLL / 4)
        return [each for node in sorted(found) for each in found[node]]

    def _wait_for_verdict(self):
        deadline = time.monotonic() + VERDICT
        while time.monotonic() < deadline and not (self.folder / ENDED).exists() and self.folder.is_dir():
            time.sleep(POLL / 4)

    def _over(self, quiet):
        """All ranks went on: no alarm."""
        if self.lead:
            line = f"no progress for {quiet:.0f} s, then the ranks went on"
            ending.say(f"mpillm: {line}\n")
            with contextlib.suppress(OSError):
                os.rename(self.folder, f"{self.folder}-over-{time.monotonic_ns()}")
                self._log([line])
        for each in self.ranks:
            each.quiet = 0.0
        return False

    def _report(self, ranks, quiet):
        lines = hang.report(ranks, self.config["num_ranks"], quiet, self.folder)
        guilty = hang.culprits(ranks)
        ending.say(f"mpillm: {lines[0]}\nmpillm: {lines[-1]}\n")     # a line a rank is for the file
        stacks = "".join(f"==== rank {each['rank']} (node {each['host']})\n{each['stacks'] or 'no stack: the process did not write one'}\n" for each in ranks)
        status = {"state": "failed", "exit": ending.HANG, "reason": lines[0][:2000], "rank": guilty[0] if guilty else None,
                  "step": max(each["step"] for each in ranks), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        for work in (lambda: self._write_status(status),
                     lambda: write_atomic(self.folder / "report.txt", ("\n".join(lines) + "\n").encode()),
                     lambda: write_atomic(self.folder / "stacks.txt", stacks.encode()),
                     lambda: self._log(lines), lambda: write_atomic(self.folder / ENDED, b"")):
            with contextlib.suppress(OSError):
                work()

    def _write_status(self, status):
        """Unless a rank has failed, which is then why the others wait. Without the guard of `RunDirectory.status`: a rank that stands still may hold it."""
        if failure_since(self.directory, self.config["status"]) is None:
            write_atomic(self.directory / "status.json", json.dumps(status).encode() + b"\n")

    def _log(self, lines):
        stamp = time.strftime("%Y-%m-%d %H:%M:%S ")
        with open(self.directory / "log.txt", "a") as file:
            file.writelines(f"{stamp}{line}\n" for line in lines if line)

    def _end(self):
        """Ends the ranks of this node: the living by themselves, with the exit code; what is left then is killed."""
        for each in self.ranks:
            each.signal(END)
        deadline = time.monotonic() + GENTLE
        while time.monotonic() < deadline and any([each.look_at_process() for each in self.ranks]):
            time.sleep(POLL / 4)
        for each in self.ranks:
            each.signal(signal.SIGKILL)
        with contextlib.suppress(OSError):
            lock.remove(self.directory / lock.NAME, self.config["token"])


def main():
    data = b""
    while b"\n" not in data:
        piece = os.read(0, 65536)
        if not piece:
            return
        data += piece
    config, _, over = data.partition(b"\n")     # what follows on standard input tells that the run is over
    if over:
        return
    try:
        monitor = Monitor(json.loads(config))
    except FileNotFoundError:       # a rank has closed its record: its run is over, or goes on with another monitor
        return
    monitor.watch()


if __name__ == "__main__":
    main()
