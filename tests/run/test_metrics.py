"""metrics.jsonl: valid JSON whatever happens, and what a reader makes of it."""

import json
import math

import numpy as np

from mpillm.layout.comm import Solo
from mpillm.run.metrics import Metrics, read_metrics


def test_steps_and_events(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Metrics(path, Solo()) as metrics:
        assert not path.exists()        # opened with the first line
        line = {"loss": np.float32(2.5), "step": np.int64(1), "grad_norm": math.inf, "skipped": np.bool_(True), "rate": float("nan")}
        metrics.step(line)
        assert line["memory_bytes"] > 1e6
        assert path.read_text().count("\n") == 1    # flushed
        metrics.event("checkpoint", step=1, seconds=0.5)
        metrics.step({"step": 2, "loss": 2.0}, write=False)
    steps, events = read_metrics(path)
    assert [step["step"] for step in steps] == [1]
    assert steps[0]["loss"] == 2.5 and steps[0]["grad_norm"] is None and steps[0]["rate"] is None and steps[0]["skipped"] is True
    assert events == [{"event": "checkpoint", "step": 1, "seconds": 0.5}]
    assert "NaN" not in path.read_text() and next(iter(json.loads(path.read_text().splitlines()[0]))) == "step"


def test_a_torn_line_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    with Metrics(path, Solo()) as metrics:
        metrics.step({"step": 2, "loss": 2.5})
    assert path.read_bytes().startswith(b'{"step": 1, "loss": 3.0}\n{"step": 2, "lo\n{"step": 2')
    assert [(step["step"], step["loss"]) for step in read_metrics(path)[0]] == [(1, 3.0), (2, 2.5)]


def test_after_a_resume_the_last_line_of_a_step_wins(tmp_path):
    with Metrics(tmp_path / "m", Solo()) as metrics:
        for step, loss in ((1, 3.0), (2, 2.0), (3, 1.0)):
            metrics.step({"step": step, "loss": loss})
        metrics.event("resumed", step=1)
        metrics.step({"step": 2, "loss": 2.25})
    assert [step["loss"] for step in read_metrics(tmp_path / "m")[0]] == [3.0, 2.25, 1.0]


def test_lines_that_are_no_metrics_are_left_out(tmp_path):
    (tmp_path / "m").write_bytes(b'[1]\n\xff\xfe\n\n{"step": "x"}\n{"step": 4}\n' + b"[" * 100000 + b"\n")
    assert read_metrics(tmp_path / "m") == ([{"step": 4}], [])


def test_the_line_of_a_rank_that_died_is_caught_up_with(tmp_path):
    """Not where it was written; but where an earlier pass over the same step, before a return or a resume, left one."""
    with Metrics(tmp_path / "m", Solo()) as metrics:
        for step, loss in ((1, 3.0), (2, 2.0), (3, 1.0), (2, 2.25)):
            metrics.step({"step": step, "loss": loss})
        metrics.event("checkpoint", step=2, seconds=0.1)
        metrics.catch_up({"step": 2, "loss": 2.25})
        assert (tmp_path / "m").read_text().count("\n") == 5
        metrics.catch_up({"step": 3, "loss": 1.25})
        metrics.catch_up(None)
    assert [step["loss"] for step in read_metrics(tmp_path / "m")[0]] == [3.0, 2.25, 1.25]


def test_other_ranks_write_nothing(tmp_path):
    class Other(Solo):
        rank = 1
    with Metrics(tmp_path / "m", Other()) as metrics:
        metrics.step({"step": 1})
        metrics.event("checkpoint")
    assert not (tmp_path / "m").exists()
