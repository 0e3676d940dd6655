"""The progress line: what it says, and when."""

import io
import os

from mpillm.layout.comm import Solo
from mpillm.run import progress as progress_module
from mpillm.run.progress import Progress, bytes_text, duration, on_terminal, scaled


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(progress_module.time, "monotonic", lambda: self.now)


def line(step, **more):
    return {"step": step, "loss": 2.345678, "tokens_per_second": 12345.6, "flop_share": 0.873, "memory_bytes": 1.5e9} | more


def test_numbers_for_people():
    assert [duration(seconds) for seconds in (0, 42, 185, 7620, 270000)] == ["0s", "42s", "3m05s", "2h07m", "3d03h"]
    assert [scaled(number) for number in (0, 950, 999.7, 12345.6, 4.56e6)] == ["0", "950", "1k", "12.3k", "4.56M"]
    assert [bytes_text(number) for number in (512, 1.5e9)] == ["512 B", "1.5 GB"]


def test_a_batch_log_gets_the_first_steps_then_a_line_now_and_then(monkeypatch, tmp_path):
    clock, stream = Clock(monkeypatch), io.StringIO()
    with Progress(Solo(), tmp_path / "log.txt", stream, live=False) as progress:
        progress.note("before")
        assert not (tmp_path / "log.txt").exists()      # a run that is refused now leaves it alone
        progress.start(0, 1000)
        for step in range(1, 1001):
            clock.now += 0.1
            progress.step(line(step))
        progress.note("step 1000: checkpoint")
    text = stream.getvalue()
    assert "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    assert 6 <= len(lines) <= 12
    assert lines[1] == "step    1/1000  loss 2.3457  12.3k tokens/s  87% of peak  1.5 GB  1m40s left"
    assert lines[-2].startswith("step 1000/1000") and lines[-2].endswith("0s left")
    assert [text[20:] for text in (tmp_path / "log.txt").read_text().splitlines()] == lines


def test_a_terminal_has_one_live_line(monkeypatch, tmp_path):
    clock, stream = Clock(monkeypatch), io.StringIO()
    with Progress(Solo(), tmp_path / "log.txt", stream, live=True) as progress:
        progress.start(0, 50)
        for step in range(1, 51):
            clock.now += 0.2
            progress.step(line(step))
            if step == 20:
                progress.note("saved")
    text = stream.getvalue()
    assert text.count("\r") == 51 and text.count("\n") == 2 and "\r\x1b[Ksaved\nstep 20/50" in text
    assert (tmp_path / "log.txt").read_text().count("\n") < 10


def test_what_is_not_known_is_left_out():
    progress = Progress(Solo(), None, io.StringIO(), live=False)
    progress.start(0, 9)
    assert progress.text({"step": 3, "loss": None, "skipped": True}) == "step 3/9  skipped"


def test_a_lost_terminal_does_not_end_the_run(tmp_path):
    read, write = os.pipe()
    os.close(read)
    progress = Progress(Solo(), tmp_path / "log.txt", os.fdopen(write, "w"), live=False)
    progress.start(0, 2)
    progress.step(line(1))
    progress.step(line(2))
    progress.close()
    assert (tmp_path / "log.txt").read_text().count("\n") == 2
    try:
        progress.stream.close()
    except BrokenPipeError:
        pass


def test_other_ranks_say_nothing(tmp_path):
    class Other(Solo):
        rank = 1
    stream = io.StringIO()
    progress = Progress(Other(), tmp_path / "log.txt", stream)
    progress.start(0, 2)
    progress.step(line(1))
    progress.note("x")
    assert stream.getvalue() == "" and not (tmp_path / "log.txt").exists()


def test_a_launcher_without_a_terminal_is_no_terminal(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setattr(progress_module.launch, "ancestors", lambda: [])

    class Terminal(io.StringIO):
        def isatty(self):
            return True
    assert not on_terminal(Terminal())
