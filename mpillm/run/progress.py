"""How a run tells people where it stands: one live line on a terminal, a plain line now and then in a batch log.

Rank 0 only; the plain lines go into log.txt as well. A terminal or a log that goes away does not end the run.
"""

import os
import sys
import time

from . import launch

FIRST_STEPS = 3             # steps that each get a line at the beginning
SHORTEST, LONGEST = 10.0, 30.0  # seconds between lines of a batch log, growing by half
LIVE = 0.1                  # seconds between redrawings of the live line
SMOOTHING = 0.9             # weight of the past in the mean time of a step


def duration(seconds):
    """Seconds for people: 42s, 3m05s, 2h07m, 5d03h."""
    seconds = max(0, round(seconds))
    for big, small, unit, unit_below in ((86400, 3600, "d", "h"), (3600, 60, "h", "m"), (60, 1, "m", "s")):
        if seconds >= big:
            return f"{seconds // big}{unit}{seconds % big // small:02d}{unit_below}"
    return f"{seconds}s"


def scaled(number):
    """A number with at most four digits and an SI prefix: 950, 12.3k, 4.56M."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 999.5:
            break
        number /= 1000
    return f"{number:.0f}" if not prefix else f"{number:.3g}{prefix}"


def bytes_text(number):
    """Bytes for people: 512 B, 1.50 GB (powers of 1000)."""
    text = scaled(number)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def on_terminal(stream):
    """Whether people watch this stream live.

    Under a launcher the streams of a rank tell nothing: Open MPI gives it a pseudo-terminal even when its own output
    goes to a file, MPICH a pipe even on a terminal. There the launcher's own standard error is asked, where it runs
    on this node.
    """
    if not launch.launched():
        return stream.isatty()
    for process, name in launch.ancestors():
        if name in ("prterun", "orterun", "mpirun", "mpiexec", "mpiexec.hydra"):
            try:
                return os.readlink(f"/proc/{process}/fd/2").startswith(("/dev/pts/", "/dev/tty"))
            except OSError:
                return False
    return False


class Progress:
    """
    Parameters
    ----------
    group : Group or Solo
    log : path-like or None
        log.txt, appended to from `start()` on, with the notes made before: a run that is refused leaves it alone.
    stream : file, optional
        Standard error when left out.
    live : bool, optional
        Whether one line is redrawn; asked from the stream when left out.
    """

    def __init__(self, group, log=None, stream=None, live=None):
        self.active = group.rank == 0
        self.stream = sys.stderr if stream is None else stream
        self.path, self.log, self.early, self.drawn = log, None, [], ""
        self.live = self.active and (on_terminal(self.stream) if live is None else live)
        self._count_from(0, 0)

    def start(self, step, steps):
        """The run goes from `step` (done so far) to `steps`."""
        self._count_from(step, steps)
        if self.active and self.path is not None and self.log is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self.log = os.fdopen(os.open(self.path, flags, 0o644), "a")
            self._keep(self.early)
            self.early = []

    def _count_from(self, step, steps):
        self.first, self.last_step, self.steps = step, step, steps
        self.step_seconds = None            # mean, recent steps weigh more
        self.interval, self.due, self.redraw = SHORTEST, 0.0, 0.0
        self.before = time.monotonic()

    def step(self, line):
        """Tells of a step; `line` as for `Metrics.step`. What is missing in it is left out."""
        if not self.active:
            return
        now = time.monotonic()
        self._measure(line["step"], now)
        if self.live and (now >= self.redraw or line["step"] >= self.steps):
            self.redraw = now + LIVE
            self._draw(self.text(line))
        if line["step"] <= self.first + FIRST_STEPS or line["step"] >= self.steps or now >= self.due:
            self._plain(self.text(line), self.live)
            self.due = now + self.interval
            self.interval = min(LONGEST, self.interval * 1.5)

    def _measure(self, step, now):
        """The mean wall time of a step, with evaluations and checkpoints between steps included."""
        done = max(1, step - self.last_step)
        seconds = (now - self.before) / done
        if self.step_seconds is None or step <= self.first + FIRST_STEPS:
            self.step_seconds = seconds  # the first steps are slow: only the newest counts
        else:
            self.step_seconds = SMOOTHING * self.step_seconds + (1 - SMOOTHING) * seconds
        self.last_step, self.before = step, now

    def text(self, line):
        """One line of text on a step."""
        width = len(str(self.steps))
        parts = [f"step {line['step']:>{width}}/{self.steps}"]
        if line.get("loss") is not None:
            parts.append(f"loss {line['loss']:.4f}")
        if line.get("tokens_per_second"):
            parts.append(f"{scaled(line['tokens_per_second'])} tokens/s")
        if line.get("flop_share"):
            parts.append(f"{100 * line['flop_share']:.0f}% of peak")
        if line.get("memory_bytes"):
            parts.append(bytes_text(line["memory_bytes"]))
        if line.get("skipped"):
            parts.append("skipped")
        if self.step_seconds is not None:
            parts.append(f"{duration(self.step_seconds * (self.steps - line['step']))} left")
        return "  ".join(parts)

    def note(self, text):
        """A line that stays: a checkpoint, an evaluation, a change."""
        if self.active:
            self._plain(text, False)

    def _plain(self, text, log_only):
        self._keep([time.strftime("%Y-%m-%d %H:%M:%S ") + text + "\n"])
        if not log_only:
            self._write(("\r\x1b[K" if self.drawn else "") + text + "\n" + self.drawn)

    def _keep(self, lines):
        """Lines for log.txt."""
        if self.log is None:
            self.early += lines if self.path is not None else []
            return
        try:
            self.log.writelines(lines)
            self.log.flush()
        except OSError:  # a full disk: the next checkpoint will say so
            pass

    def _draw(self, text):
        width = terminal_width(self.stream)
        self.drawn = text[:width - 1]
        self._write("\r" + self.drawn + "\x1b[K")

    def _write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            pass

    def close(self):
        """Ends the live line, so that the next output begins on a line of its own."""
        if self.drawn:
            self._write("\n")
            self.drawn = ""
        if self.log is not None:
            self.log.close()
            self.log = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def terminal_width(stream):
    """Columns of the terminal behind a stream; 100 where it cannot be asked."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 100
    except (OSError, ValueError, AttributeError):
        return 100
