"""metrics.jsonl: one JSON object a line, only ever appended to, readable while the run goes on.

A line of a step has the keys `step, loss, grad_norm, rate, tokens, seconds, tokens_per_second, flop_share,
memory_bytes, skipped` (and `validation_loss` where the step was validated in the same line); any other line has the
key `event`. SI units. JSON has no NaN and no infinity: such a number is written as null.
"""

import json
import math
import os
import sys

KEYS = ("step", "loss", "validation_loss", "grad_norm", "rate", "tokens", "seconds", "tokens_per_second", "flop_share",
        "memory_bytes", "skipped")


def resident_bytes():
    """Bytes of memory that this process occupies now; its peak where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plain(value):
    """`value` as JSON has it: NumPy scalars as numbers, non-finite numbers as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Metrics:
    """Appends to metrics.jsonl on rank 0; the other ranks keep the last line of a step, for the day on which rank 0 dies.

    The file is opened with the first line, so a run that is refused before that has not touched it. A last line that
    a killed run left unfinished is closed by a line break, and readers skip it.

    Parameters
    ----------
    path : path-like
    group : Group or Solo
    """

    def __init__(self, path, group):
        self.path, self.active, self.descriptor, self.silent, self.last = path, group.rank == 0, None, False, None

    def _open(self):
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        size = os.fstat(self.descriptor).st_size
        if size and os.pread(self.descriptor, 1, size - 1) != b"\n":
            os.write(self.descriptor, b"\n")

    def step(self, line, write=True):
        """A step's line, keys as at the top of this file; `memory_bytes` of this rank is added to `line` where missing.

        With `write=False` only that is done.
        """
        line.setdefault("memory_bytes", resident_bytes())
        if write:
            self.last = {key: line[key] for key in KEYS if key in line} | line
            self._append(self.last)

    def catch_up(self, last):
        """Appends the `last` line that another rank kept, where the rank that was to write it died before."""
        if self.active and last is not None and (_newest(self.path, '{"step": ') or {}).get("step") != last["step"]:
            self._append(last)

    def event(self, name, **values):
        """A line that is no step: `resumed`, `validation`, `checkpoint`, `stopped`, ..."""
        self._append({"event": name, **values})

    def _append(self, values):
        if self.active:
            if self.descriptor is None:
                self._open()
            data = json.dumps(plain(values), allow_nan=False).encode() + b"\n"
            try:
                while data:  # one write, unless the disk takes only a part
                    data = data[os.write(self.descriptor, data):]
            except OSError as error:  # a full disk is no reason to end the run: the next checkpoint will tell
                if not self.silent:
                    print(f"mpillm: {self.path}: a line was lost: {error.strerror}", file=sys.stderr)
                self.silent = True

    def sync(self):
        """Makes what was written survive a crash of the machine."""
        if self.descriptor is not None:
            os.fsync(self.descriptor)

    def close(self):
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def last_event(path, name):
    """The last event of that name in the last MB of a metrics.jsonl; None where there is none."""
    return _newest(path, f'"event": "{name}"')


def _newest(path, text, tail=1 << 20):
    """The last whole line with `text` in the last `tail` bytes of a metrics.jsonl; None where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - tail))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines):
        if text.encode() in line:
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None


def read_metrics(path):
    """What a metrics.jsonl tells.

    Returns
    -------
    steps : list of dict
        By step; of several lines of a step (after a resume) the last one.
    events : list of dict
        In the order written.
    Lines that are not JSON objects (torn by a kill) are left out.
    """
    steps, events = {}, []
    with open(path, "rb") as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if not isinstance(line, dict):
                continue
            if "event" in line:
                events.append(line)
            elif type(line.get("step")) is int:
                steps[line["step"]] = line
    return [steps[step] for step in sorted(steps)], events
