"""The proof of the order of calls: layouts of every kind pass, planted errors are named, and what is played is what ranks really do."""

import time

import numpy as np
import pytest

from mpillm.backend import open_backend
from mpillm.backend.shapes import Shapes
from mpillm.config import job_from_dict
from mpillm.layout.compose import check_layout
from mpillm.layout.journal import JOURNAL
from mpillm.layout.mesh import Mesh, sizes_of
from mpillm.model.context import Ring
from mpillm.model.region import Region
from mpillm.run import play as playing
from mpillm.run.order import order_report, prove
from mpillm.run.play import MESSAGES, WAIT, Blank, PlayedMesh, Recorder, WrongOrder, play
from mpillm.run.session import build
from mpillm.train import step
from mpillm.train.gradients import Gradients
from mpillm.train.optimizer import AdamW
from mpillm.train.pipeline import Pipeline
from mpillm.train.schedule import Action
from mpillm.train.step import Trainer

MOE = {"experts": 5, "shared_experts": 1}
LAYOUTS = {     # ranks, [mesh], [model], [train]
    "one rank": (1, {}, {}, {}),
    "dp, ZeRO 0": (8, {"zero": 0}, {}, {}),
    "dp, ZeRO 1, fewer samples than ranks": (8, {"zero": 1}, {}, {"batch": 5}),
    "dp, ZeRO 2": (8, {"zero": 2}, {}, {"batch": 27, "micro_batch": 2}),
    "dp, ZeRO 3, recompute": (8, {"zero": 3}, {}, {"recompute": "block"}),
    "tp": (4, {"tp": 4}, {}, {"recompute": "selective"}),
    "tp, tokens not split": (8, {"tp": 4, "sequence": False}, {"family": "gpt", "kv_heads": None}, {}),
    "pp, gpipe, tied": (8, {"pp": 4, "schedule": "gpipe", "zero": 0}, {}, {}),
    "pp, tied, uneven layers, ZeRO 2": (12, {"pp": 3, "tp": 2, "zero": 2, "stages": [1, 3, 1]}, {}, {}),
    "zero bubble, ZeRO 3": (16, {"pp": 4, "tp": 2, "schedule": "zero_bubble", "zero": 3}, {"tied": False}, {}),
    "interleaved, tied": (8, {"pp": 4, "schedule": "interleaved", "chunks": 2}, {"layers": 9}, {"batch": 23}),
    "interleaved, ZeRO 3, a part without blocks":
        (8, {"pp": 2, "schedule": "interleaved", "chunks": 2, "zero": 3, "stages": [2, 2, 1, 0]}, {}, {}),
    "cp ring": (8, {"cp": 4, "zero": 2}, {}, {}),
    "cp ulysses": (8, {"cp": 2, "cp_form": "ulysses", "tp": 2}, {}, {"recompute": "block"}),
    "experts": (8, {"ep": 4, "tp": 2}, MOE, {}),
    "experts over dp x cp, pipeline, ZeRO 3": (16, {"pp": 2, "cp": 2, "ep": 4, "tp": 2, "zero": 3, "schedule": "zero_bubble"}, MOE, {}),
    "everything": (16, {"pp": 2, "cp": 2, "ep": 2, "tp": 2, "zero": 2, "schedule": "interleaved", "chunks": 2}, MOE | {"dropout": 0.1}, {}),
}


def job_of(mesh=None, model=None, train=None):
    """5 layers, 4 heads, 2 key/value heads, uneven vocabulary and context; 11 samples, one in a micro-batch."""
    model = {"family": "llama", "layers": 5, "width": 16, "heads": 4, "kv_heads": 2, "context": 9, "mlp_width": 13,
             "vocabulary": 31} | (model or {})
    train = {"steps": 5, "batch": 11, "micro_batch": 1} | (train or {})
    return job_from_dict({"model": {key: value for key, value in model.items() if value is not None}, "data": {"train": "random"},
                          "mesh": mesh or {}, "train": train, "run": {"name": "test"}}, "test")


def layout(name):
    """(job, sizes) of LAYOUTS."""
    ranks, *sections = LAYOUTS[name]
    job = job_of(*sections)
    sizes = sizes_of(job.mesh, ranks)
    check_layout(job, sizes)
    return job, sizes


def trainer_on(ops, mesh, job):
    model = build(job, mesh, job.model.vocabulary, ops).model
    return Trainer(ops, model, Gradients(ops, model.buckets), AdamW(ops, model.buckets, job.optimizer), mesh, job)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_proven(name, capsys):
    job, sizes = layout(name)
    assert order_report(job, sizes) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"order of {LAYOUTS[name][0]} rank") and ": proven: " in printed and printed.count("\n") == 1


@pytest.mark.parametrize("name", ["dp, ZeRO 2", "tp", "cp ulysses", "zero bubble, ZeRO 3", "interleaved, tied", "everything"])
def test_what_is_put_together_is_the_whole_step_call_for_call(name):
    job, sizes = layout(name)
    for rank in range(LAYOUTS[name][0]):
        ops, recorder = Shapes(), Recorder({}, LAYOUTS[name][0])
        mesh = PlayedMesh.plan(sizes, rank, journal=recorder, empty=ops.empty)
        trainer_on(ops, mesh, job).train_step(1, Blank(job.model.context), 0)
        whole = [call for segment in recorder.segments.values() for call in segment]
        assert whole == put_together(play(job, sizes, rank, job.model.vocabulary, {}))


def put_together(played):
    """All calls of a rank, with the tags of their messages."""
    calls = []
    for part in played.order:
        for group, agreed, own in played.segments[part.segment]:
            if agreed[0] in MESSAGES:
                agreed = (*agreed[:2], agreed[2] + part.tags[agreed[0] == "receive"])
            if group is not None:       # else it is the waiting at the end, no call
                calls.append((group, agreed, own))
    return calls


@pytest.mark.ranks
@pytest.mark.parametrize("multiple, mesh", [
    (1, {"zero": 2}), (1, {"zero": 3}), (1, {"tp": "rest", "dp": 1}), (1, {"pp": "rest", "dp": 1, "schedule": "zero_bubble"}),
    (1, {"cp": "rest", "dp": 1, "zero": 3}), (2, {"pp": 2, "schedule": "interleaved", "chunks": 2}), (2, {"tp": 2, "zero": 3}),
    (2, {"cp": 2, "cp_form": "ulysses"}), (2, {"ep": 2})], ids=str)
def test_ranks_really_do_what_is_played(group, multiple, mesh, monkeypatch):
    if group.size % multiple:
        pytest.skip(f"{group.size} ranks do not fit this layout")
    job = job_of(mesh, {"heads": 12, "kv_heads": 12, "width": 24, "context": 12} | (MOE if "ep" in mesh else {}))
    sizes, calls, enter = sizes_of(job.mesh, group.size), [], JOURNAL.enter
    check_layout(job, sizes)
    trainer = trainer_on(open_backend("cpu"), Mesh(group, sizes), job)

    def noting(group, operation, array, sent, detail=None, peer="", expected=None):
        calls.append((group.name, operation, peer))
        return enter(group, operation, array, sent, detail, peer, expected)
    monkeypatch.setattr(JOURNAL, "enter", noting)
    trainer.train_step(1, Blank(job.model.context), 0)
    monkeypatch.undo()
    played, expected = play(job, sizes, group.rank, job.model.vocabulary, {}), []
    for name, agreed, own in put_together(played):
        if agreed != WAIT and agreed[0] != "split":
            peer = {"send": "to ", "receive": "from "}.get(agreed[0])
            expected.append((played.groups[name][0], agreed[0], f"{peer}{own[0]}" if peer else ""))
    same = [call for call in calls if call[0] != "one rank" and call[1] != "split"] == expected      # some groups were made before the step
    assert all(group.collect(same))


# -- planted errors -----------------------------------------------------------------------------------------------

def plant(monkeypatch, owner, name, wrong, only=None):
    """Replaces a method, on the rank `only` or on all; `wrong(right, self, ...)`."""
    right, here, make = getattr(owner, name), {}, playing.build

    def noting(job, mesh, *rest):
        here["rank"] = mesh.rank
        return make(job, mesh, *rest)

    def method(self, *arguments):
        return wrong(right, self, *arguments) if only in (None, here["rank"]) else right(self, *arguments)
    monkeypatch.setattr(playing, "build", noting)
    monkeypatch.setattr(owner, name, method)


def wrong_line(mesh, ranks, model=None, train=None):
    job = job_of(mesh, model, train)
    sizes = sizes_of(job.mesh, ranks)
    with pytest.raises(WrongOrder) as error:
        prove(job, sizes, job.model.vocabulary)
    return str(error.value)


def test_a_rank_that_skips_a_collective(monkeypatch):
    plant(monkeypatch, Region, "leave", lambda right, self, y: y, only=5)
    assert wrong_line({"tp": 4, "sequence": False}, 8) == (
        "rank 5 (pp=0 dp=1 cp=0 tp=1) does all_reduce max of float32 (9,) as call 1 of F0 over tp, "
        "rank 4 (pp=0 dp=1 cp=0 tp=0) does all_reduce of float32 (9, 16)")


def test_a_rank_that_stops_early(monkeypatch):
    plant(monkeypatch, AdamW, "step", lambda right, self, *rest: None, only=1)
    assert wrong_line({"pp": 2, "zero": 1}, 6) == (
        "rank 1 (pp=0 dp=1 cp=0 tp=0) makes no call 1 of the end of the step over dp, "
        f"rank 0 (pp=0 dp=0 cp=0 tp=0) does {the_gather()}")


def the_gather():
    """The first gather of new values of rank 0."""
    job = job_of({"pp": 2, "zero": 1})
    played = play(job, sizes_of(job.mesh, 6), 0, 31, {})
    operation, dtype, detail = next(call.agreed for call in played.segments["the end of the step"]
                                    if call.agreed[0] == "all_gather" and played.groups[call.group][0] == "dp")
    return f"{operation} of {dtype} {detail}"


def test_a_rank_with_another_shape(monkeypatch):
    plant(monkeypatch, Region, "leave", lambda right, self, y: right(self, y.reshape(-1)).reshape(y.shape), only=6)
    assert wrong_line({"tp": 4, "sequence": False}, 8) == (
        "rank 6 (pp=0 dp=1 cp=0 tp=2) does all_reduce of float32 (144,) as call 1 of F0 over tp, "
        "rank 4 (pp=0 dp=1 cp=0 tp=0) does all_reduce of float32 (9, 16)")


def test_a_rank_that_shifts_too_much(monkeypatch):
    def block(right, self, k, batch, step):
        whole = right(self, k, batch, step)
        return self.ops.empty((2, whole.shape[1], whole.shape[2] + 1) + whole.shape[3:], k.dtype) if step == 1 else whole
    plant(monkeypatch, Ring, "_block", block, only=2)
    line = wrong_line({"cp": 4, "dp": 1}, 4)
    assert line == ("rank 2 (pp=0 dp=0 cp=2 tp=0) expects 48 elements in the shift that is call 1 of F0 over cp, "
                    "rank 1 (pp=0 dp=0 cp=1 tp=0) sends 32")


def swapped(monkeypatch, stage, first, second):
    """Exchanges two actions of a stage's list."""
    right = step.make_schedule

    def wrong(*arguments):
        schedule = right(*arguments)
        actions = schedule.actions[stage]
        one, other = actions.index(first), actions.index(second)
        actions[one], actions[other] = actions[other], actions[one]
        return schedule
    monkeypatch.setattr(step, "make_schedule", wrong)


def test_swapped_actions_that_deadlock(monkeypatch):
    swapped(monkeypatch, 2, Action("B", 0), Action("F", 2))     # F0 F2 F1 B0 ...
    swapped(monkeypatch, 2, Action("F", 1), Action("F", 2))     # F0 F1 F2 B0 ...
    assert wrong_line({"pp": 3}, 6) == (
        "rank 2 (pp=1 dp=0 cp=0 tp=0) waits in B0 for a message from rank 4 (pp=2 dp=0 cp=0 tp=0), "
        "which waits in F2 for a message from rank 2 (pp=1 dp=0 cp=0 tp=0)")


def test_swapped_actions_that_no_stage_can_do(monkeypatch):
    swapped(monkeypatch, 1, Action("F", 1), Action("B", 1))
    assert wrong_line({"pp": 2}, 4) == (
        "rank 2 (pp=1 dp=0 cp=0 tp=0) fails in the start of the step: ValueError: stage 1 does B1 before its own F1")


def test_a_missing_message(monkeypatch):
    plant(monkeypatch, Pipeline, "_send", lambda right, self, x, action: right(self, x, action) if action.kind == "B" else None, only=1)
    assert wrong_line({"pp": 2}, 4) == (
        "rank 3 (pp=1 dp=1 cp=0 tp=0) waits in F0 for a message from rank 1 (pp=0 dp=1 cp=0 tp=0), which never sends it")


def test_a_message_that_nobody_receives(monkeypatch):
    plant(monkeypatch, Pipeline, "_receive", lambda right, self, action: self.ops.empty((9, 16), self.model.dtype), only=2)
    assert wrong_line({"pp": 2}, 4) == (
        "rank 0 (pp=0 dp=0 cp=0 tp=0) sends a message in F0 to rank 2 (pp=1 dp=0 cp=0 tp=0), which never receives it")


def test_a_message_of_another_type(monkeypatch):
    def receive(right, self, action):
        if action.kind == "F":
            self.group.receive(self.ops.empty((9, 16), np.float64), 0, self._tag(self.schedule.receives(1, action)))
        return self.ops.empty((9, 16), self.model.dtype)
    plant(monkeypatch, Pipeline, "_receive", receive, only=3)
    assert wrong_line({"pp": 2}, 4) == (
        "rank 3 (pp=1 dp=1 cp=0 tp=0) receives float64 (9, 16) in F0 from rank 1 (pp=0 dp=1 cp=0 tp=0), which sends float32 (9, 16) in F0")


def test_a_wrong_tag(monkeypatch):
    plant(monkeypatch, Pipeline, "_tag", lambda right, self, message: right(self, message) + (self.stage == 1 and message.microbatch == 5))
    assert wrong_line({"pp": 2}, 2, train={"batch": 8}) == (
        "rank 0 (pp=0 dp=0 cp=0 tp=0) waits in B5 for a message from rank 1 (pp=1 dp=0 cp=0 tp=0), which never sends it")


def test_sends_that_block_where_two_stages_send_to_each_other(monkeypatch):
    def send(right, self, x, action):
        right(self, x, action)
        if self.sending:
            self.sending.pop().wait()
    plant(monkeypatch, Pipeline, "_send", send)
    assert wrong_line({"pp": 2}, 4) == (
        "rank 0 (pp=0 dp=0 cp=0 tp=0) waits in F1 for its message to be received by rank 2 (pp=1 dp=0 cp=0 tp=0), "
        "which waits in B0 for its message to be received by rank 0 (pp=0 dp=0 cp=0 tp=0)")


def test_two_ranks_of_a_stage_that_order_two_groups_differently(monkeypatch):
    def begin(right, self):
        mesh = self.buckets[0].mesh
        for axis in ("dp", "tp") if mesh.rank != 3 else ("tp", "dp"):
            mesh[axis].all_reduce(np.zeros(1))
        right(self)
    plant(monkeypatch, Gradients, "begin", begin)
    assert wrong_line({"tp": 2}, 4) == (
        "rank 3 (pp=0 dp=1 cp=0 tp=1) does all_reduce of float64 (1,) over tp as call 3 of the start of the step, "
        "rank 0 (pp=0 dp=0 cp=0 tp=0) of the same stage all_reduce of float64 (1,) over dp: "
        "ranks that order their groups differently can wait for each other")


def test_a_stage_that_waits_at_once_for_what_another_stage_does_later(monkeypatch):
    def start(right, self, bucket, last):
        right(self, bucket, last)
        if bucket.parameters[0].tied and self.pending:
            self.pending[-1].message.wait()
    plant(monkeypatch, Gradients, "start", start)
    assert wrong_line({"pp": 2, "schedule": "gpipe"}, 4, train={"batch": 6}) == (
        "rank 0 (pp=0 dp=0 cp=0 tp=0) waits in B2 for a message from rank 2 (pp=1 dp=0 cp=0 tp=0), "
        "which waits in B2 for a call over ppxdp by rank 0 (pp=0 dp=0 cp=0 tp=0)")


def test_a_rank_that_fails_by_itself(monkeypatch):
    plant(monkeypatch, Region, "enter", lambda right, self, x, num_rows: right(self, x[1:], num_rows), only=2)
    assert wrong_line({"tp": 4, "dp": 1}, 4) == (
        "rank 2 (pp=0 dp=0 cp=0 tp=2) fails in F0: ValueError: (1, 16) over tp: expected 2 along dim 0")


def test_a_rank_with_other_micro_batches(monkeypatch):
    plant(monkeypatch, Trainer, "micro_batch", lambda right, self: 2, only=0)
    assert wrong_line({"dp": 2}, 2).startswith("rank 1 (pp=0 dp=1 cp=0 tp=0) does ")


def test_the_report_of_what_is_wrong(monkeypatch, capsys):
    plant(monkeypatch, Region, "leave", lambda right, self, y: y, only=1)
    job = job_of({"tp": 2, "sequence": False})
    assert order_report(job, sizes_of(job.mesh, 4)) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("order of 4 ranks (pp=1 x dp=2 x cp=1 x tp=2): WRONG: rank 1 (pp=0 dp=0 cp=0 tp=1) does ")
    assert printed.count("\n") == 1


# -- many ranks ---------------------------------------------------------------------------------------------------

def large(mesh, batch):
    return job_of(mesh, {"layers": 48, "width": 4096, "heads": 64, "kv_heads": 8, "context": 4096, "mlp_width": 14336, "vocabulary": 128256,
                         "tied": False}, {"batch": batch})


def test_64_ranks_of_48_layers():
    job = large({"pp": 4, "tp": 4, "zero": 3, "schedule": "interleaved", "chunks": 2}, 64)
    proof = prove(job, sizes_of(job.mesh, 64), job.model.vocabulary)
    assert proof.messages == 2 * (4 * 2 - 1) * 16 * 16      # both ways, between 8 parts, 16 columns, 16 micro-batches
    assert proof.groups == 1 + 16 + 16 + 16 + 4         # the world; along pp, dp and tp; stages


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("zero", [1, 3])
def test_1024_ranks_of_48_layers_in_a_minute(zero):
    job = large({"pp": 8, "dp": 16, "tp": 8, "zero": zero, "schedule": "interleaved", "chunks": 2}, 16 * 32)
    began = time.process_time()
    proof = prove(job, sizes_of(job.mesh, 1024), job.model.vocabulary)
    assert proof.messages == 2 * (8 * 2 - 1) * 128 * 32
    assert time.process_time() - began < 60
