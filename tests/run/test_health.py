"""Numbers that go wrong: replicas that differ, steps that are skipped, spikes; in one process, under ranks and in real runs."""

import json
import os
import random
import signal
import types

import numpy as np
import pytest
from command_runs import launcher, run, write_job

from mpillm.backend.cpu import Cpu
from mpillm.backend.half import HalfCpu
from mpillm.config import job_from_dict
from mpillm.layout.comm import Solo
from mpillm.layout.mesh import Mesh, sizes_of
from mpillm.run.health import Health, WrongNumbers, first_text, samples_text, tensors_text
from mpillm.run.metrics import read_metrics
from mpillm.run.replicas import Replicas, array_hash, flip_bit, judge, judge_parts, replicated
from mpillm.run.session import build
from mpillm.train.scaling import LossScale
from mpillm.train.step import StepResult

needs_mpi = pytest.mark.skipif(launcher() is None, reason="no mpirun")


# ---- hashes and verdicts --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_any_bit_changes_the_hash(dtype, size):
    import ml_dtypes  # noqa: F401
    ops = Cpu() if dtype in ("float32", "float64") else HalfCpu()
    x = np.random.default_rng(0).normal(size=size).astype(np.dtype(dtype))
    before = array_hash(ops, x)
    assert array_hash(ops, x.copy()) == before
    for place in {0, size // 2, size - 1}:
        for bit in range(8 * x.itemsize):
            words = x.view(np.uint8)
            words[place * x.itemsize + bit // 8] ^= 1 << bit % 8
            assert array_hash(ops, x) != before, (place, bit)
            words[place * x.itemsize + bit // 8] ^= 1 << bit % 8
    assert array_hash(ops, x[:0]) == 0


def test_the_most_are_right_and_of_two_nobody_is():
    assert judge([1, 1, 1]) == ([], True) and judge([1]) == ([], True)
    assert judge([1, 9, 1]) == ([1], True) and judge([7, 1, 8, 1, 1]) == ([0, 2], True)
    assert judge([1, 2]) == ([0, 1], False) and judge([1, 2, 1, 2]) == ([0, 1, 2, 3], False)


def test_a_copy_is_right_where_it_is_what_the_master_rounds_to():
    owners = [[(5, 5), (6, None)], [(5, None), (7, 7)]]         # ZeRO 1: of each of two replicas, the part of each owner
    assert judge_parts(owners) == ([0], True)
    owners[0][0] = (4, 5)                                       # the owner's own copy
    assert judge_parts(owners) == ([0], True)
    assert judge_parts([[(4, 4)], [(5, 5)]]) == ([0, 1], False)         # ZeRO 0: the masters differ too
    assert judge_parts([[(4, 4)], [(5, 4)]]) == ([1], True)
    assert judge_parts([[(4, 9)], [(5, 9)]]) == ([0, 1], False)         # no copy is what the master says


def test_words_for_tensors_and_samples():
    assert first_text([1, 2, 3]) == "1-3" and first_text(list(range(0, 100, 2))) == "0, 2, 4, 6, 8, 10, 12, 14 and 42 more"
    found = [(f"blocks.{n}.mlp", [0, 1]) for n in range(6)]
    assert tensors_text(found[:1]) == "blocks.0.mlp (ranks 0-1)" and tensors_text(found).endswith("and 2 more tensors") and tensors_text([]) == "no gradient"
    assert samples_text([1.0, np.nan, np.inf, 2.0], 96) == "samples 97-98 have a loss that is not finite"
    assert samples_text([1.0, 2.0], 96) == "each sample of the step (96 to 97) has a finite loss"
    assert "the weights are to blame" in samples_text([np.nan, np.nan], 0)


# ---- replicas -------------------------------------------------------------------------------------------------------

def placed(group, zero, compute="float32", spike=0.0, **mesh):
    job = job_from_dict({"model": {"family": "llama", "layers": 2, "width": 16, "heads": 4, "context": 8, "vocabulary": 33}, "data": {"train": "random"},
                         "mesh": {"zero": zero, **mesh}, "train": {"steps": 1, "batch": 4, "spike": spike}, "precision": {"compute": compute}, "run": {"name": "x"}}, "test")
    mesh = Mesh(group, sizes_of(job.mesh, group.size))
    model = build(job, mesh, 33).model
    model.initialize()
    return job, mesh, model


LAYOUTS = [{}, {"tp": 2}, {"pp": 2}, {"cp": 2}]


@pytest.mark.ranks
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("zero, compute", [(0, "float32"), (1, "float32"), (1, "bfloat16"), (2, "bfloat16"), (0, "bfloat16"), (3, "float32"), (1, "float64"), (2, "float64")])
def test_a_flipped_bit_is_named(group, zero, compute, layout):
    """Every rank, tensor and bit by chance, 20 of 20 found; ranks that are wrong are among those named, alone where that can be known."""
    if group.size < 2 or any(group.size % size for size in layout.values()):
        pytest.skip("needs more ranks")
    _, mesh, model = placed(group, zero, compute, **layout)
    replicas = Replicas(mesh, model)
    assert replicas.check() == []
    draw, tried = random.Random(7), 0
    for _ in range(20):
        rank = draw.randrange(group.size)
        own = [(bucket, table, ops, array) for bucket in model.buckets if bucket.group.size > 1 for table, ops, array in replicated(bucket) if array.size]
        where = None
        choice = draw.random(), draw.random(), draw.randrange(8)
        if group.rank == rank and own:
            bucket, table, ops, array = own[int(choice[0] * len(own))]
            data = array.view(np.uint8)
            place = int(choice[1] * data.size)
            data[place] ^= 1 << choice[2]
            element = place // array.itemsize
            parameter = next(p for p in bucket.parameters if p.offset <= element < p.offset + p.held.size) if len(array) == bucket.size else None
            where = [table + (parameter.name if parameter else ""), bucket.group.size]
        where = group.share(where, rank)
        found = replicas.check()
        if where is None:
            assert zero == 3 or found == []
            continue
        tried += 1
        name, size = where
        assert len(found) == 1 and found[0].tensor == name and rank in found[0].ranks, (where, rank, found)
        sure = size > 2 or compute == "bfloat16" and " of " not in name     # the master tells
        assert found[0].sure == sure and len(found[0].ranks) == (1 if sure else 2)
        if group.rank == rank:
            data[place] ^= 1 << choice[2]
        assert replicas.check() == []
    # Under ZeRO 3 only what two stages share is whole on several ranks; with one replica nothing is.
    shared = group.all_reduce(np.array([float(any(bucket.group.size > 1 and replicated(bucket) for bucket in model.buckets))]))[0]
    assert tried > 0 or not shared


@pytest.mark.ranks
@pytest.mark.parametrize("result", [{"skipped": True, "loss": np.nan}, {"skipped": False, "loss": 99.0}], ids=str)
def test_a_flipped_bit_behind_a_skip_or_a_spike_is_named_at_once(group, result):
    """Long before the next comparison is due, and before a return to a checkpoint would hide it."""
    if group.size < 2:
        pytest.skip("needs more ranks")
    job, mesh, model = placed(group, 1, spike=6.0)
    events = []
    run = types.SimpleNamespace(job=job, mesh=mesh, model=model, ops=model.ops, group=group, step=7, trainer=types.SimpleNamespace(loss_scale=LossScale()),
                                account=types.SimpleNamespace(hosts=["n"] * group.size), metrics=types.SimpleNamespace(event=lambda name, **values: events.append(name)))
    health = Health(run)
    health.spikes.resume([1.0] * 30)
    if group.rank == 1:
        flip_bit(model)
    with pytest.raises(WrongNumbers, match=r"weights differ .*rank 1 \(node n\)"):
        health.after_step(StepResult(grad_norm=1.0, rate=1.0, balance_loss=0.0, router_z_loss=0.0, flags=[], **result))
    assert events == ["replicas differ"]


# ---- real runs ------------------------------------------------------------------------------------------------------

SHAPE = ("data.train=random", "model.vocabulary=64", "model.width=16", "checkpoint.every=10")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("health")
    write_job(place / "job.toml", train="seed = 3", run='name = "unnamed"')
    return place


def train(place, name, *overrides, fault="", ranks=2):
    os.environ["MPILLM_FAULT"] = fault
    try:
        done = run("train", "job.toml", f"run.name={name}", "train.steps=60", *SHAPE, *overrides, cwd=place, ranks=ranks)
    finally:
        del os.environ["MPILLM_FAULT"]
    return done, place / "runs" / name


def status(path):
    return json.loads((path / "status.json").read_text())


def events(path, name):
    return [event for event in read_metrics(path / "metrics.jsonl")[1] if event["event"] == name]


@needs_mpi
@pytest.mark.parametrize("ranks, zero, step", [(3, 0, 22), (3, 1, 30)])
def test_a_run_whose_replicas_differ_ends_before_it_saves(place, ranks, zero, step):
    """With ZeRO 1 a copy lives one step: what differs is found at the step of a comparison."""
    name = f"differs-{zero}"
    done, path = train(place, name, "run.check_replicas=10", f"mesh.zero={zero}", fault=f"between:1:{step}:flip", ranks=ranks)
    found = status(path)
    assert (found["state"], found["exit"], found["step"]) == ("failed", 76, 30) and done.code != 0
    assert "weights differ" in found["reason"] and " on rank 1 (node " in found["reason"] and "they were equal at step 20" in found["reason"]
    assert max(each.name for each in (path / "checkpoints").glob("step-????????")) == "step-00000020"
    assert events(path, "replicas differ")[0]["tensors"][0]["ranks"] == [1]
    done, path = train(place, name, "run.check_replicas=10", f"mesh.zero={zero}", ranks=ranks)
    assert done.code == 0 and "resumed from step-00000020" in done.text


@needs_mpi
def test_a_step_with_a_nan_is_skipped_on_all_ranks_and_many_in_a_row_end_the_run(place):
    done, path = train(place, "skips", fault=",".join(f"forward:{step % 2}:{step}:nan" for step in [22, *range(30, 40)]))
    assert path.is_dir(), done.text
    found, steps = status(path), read_metrics(path / "metrics.jsonl")[0]
    assert (found["exit"], found["step"]) == (76, 39) and done.code != 0
    assert [line["step"] for line in steps if line["skipped"]] == [22, *range(30, 40)] and steps[21]["grad_norm"] is None
    assert found["reason"].startswith("loss or gradients were not finite in 10 steps in a row: embedding.tokens.weight (rank 1); "
                                      "each sample of the step (228 to 233) has a finite loss; the last checkpoint is of step 20"), found["reason"]
    assert found["reason"].endswith("not finite: 11") and "step 22: skipped: loss " in done.text and "step 31: skipped" not in done.text


def test_weights_that_are_not_finite_are_named(place):
    """On one rank, with the samples: here all of them, since the weights are to blame."""
    done, path = train(place, "weights", "optimizer.rate=1e38", "optimizer.clip=0.0", "optimizer.warmup=0", ranks=None)
    found = status(path)
    assert done.code == 76 and "every sample of the step" in found["reason"] and "more tensors" in found["reason"], found["reason"]


@pytest.mark.parametrize("ranks, layout", [(None, ()), pytest.param(2, ("mesh.tp=2",), marks=needs_mpi)])
def test_a_spike_goes_back_and_leaves_its_samples_out(place, ranks, layout):
    name = f"spike-{ranks}"
    done, path = train(place, name, "train.spike=1.5", *layout, ranks=ranks)
    assert done.code == 0, done.text
    back = events(path, "rolled back")
    assert back and all(event["step"] < event["spike"] and event["step"] % 10 == 0 and event["loss"] > event["threshold"] for event in back)
    manifest = json.loads(max((path / "checkpoints").glob("step-????????")).joinpath("manifest.json").read_text())
    assert manifest["samples"] == 6 * (60 + sum(event["spike"] - event["step"] for event in back)) == manifest["cursor"]["samples"]
    assert manifest["counts"] == [0, 0, len(back)] and len(manifest["changes"]) == len(back) and "was a spike" in manifest["changes"][0]
    assert "are left out" in done.text


def test_a_run_killed_after_it_went_back_goes_on_without_the_samples_left_out(place):
    """As the uninterrupted one of the same spikes, though no checkpoint was due in between."""
    whole, path = train(place, "back", "train.spike=1.5", ranks=None)
    first = events(path, "rolled back")[0]
    assert whole.code == 0 and first["spike"] % 10
    done, cut = train(place, "back-cut", "train.spike=1.5", fault=f"forward:0:{first['spike'] + 1}:kill", ranks=None)
    assert done.code == -signal.SIGKILL and len(events(cut, "rolled back")) == 1
    done, cut = train(place, "back-cut", "train.spike=1.5", ranks=None)
    assert done.code == 0 and f"resumed from step-{first['step']:08}" in done.text, done.text
    losses = [{line["step"]: line["loss"] for line in read_metrics(each / "metrics.jsonl")[0]} for each in (path, cut)]
    assert losses[0] == losses[1] and len(losses[0]) == 60


def test_too_many_spikes_end_the_run_and_none_goes_back_without_a_checkpoint(place):
    done, path = train(place, "many", "train.spike=0.2", "train.steps=300", ranks=None)
    assert done.code == 76 and "is a spike" in status(path)["reason"] and "after 3 returns" in status(path)["reason"] and len(events(path, "rolled back")) == 3
    done, path = train(place, "many", "train.spike=0.2", "train.steps=300", ranks=None)     # a new start alone gives no new returns
    assert done.code == 76 and len(events(path, "rolled back")) == 3
    done, path = train(place, "many", "train.spike=0.2", "train.steps=300", "train.spike=0.19", ranks=None)
    assert len(events(path, "rolled back")) > 3
    done, path = train(place, "none", "train.spike=0.2", "checkpoint.every=0", ranks=None)
    assert done.code == 0 and "no checkpoint to go back to" in done.text


def test_after_a_return_whose_save_failed_the_end_saves():
    """What lies there would read the samples that were left out."""
    job, mesh, model = placed(Solo(), 0, spike=1.5)
    notes = []
    training = types.SimpleNamespace(job=job, mesh=mesh, model=model, step=30, saved_step=None, samples=180, changes=notes, go_back=lambda: 20, try_save=lambda: None,
                               progress=types.SimpleNamespace(note=notes.append), metrics=types.SimpleNamespace(event=lambda name, **values: None))
    health = Health(training)
    health.compared = 30
    health.spikes.losses.extend([1.0, 1.1] * 12)
    training.saved_step = 20
    assert health._go_back(9.0) and training.saved_step is None and health.rollbacks == 1


def test_a_curve_that_stays_up_is_soon_usual():
    """Where there is no checkpoint to go back to."""
    job, mesh, model = placed(Solo(), 0, spike=6.0)
    notes = []
    health = Health(types.SimpleNamespace(job=job, mesh=mesh, model=model, step=7, go_back=lambda: None, progress=types.SimpleNamespace(note=notes.append)))
    health.spikes.resume([1.0, 1.01] * 30)
    for _ in range(20):
        assert not health.after_step(StepResult(2.0, 1.0, 1.0, False, 0.0, 0.0, []))
    assert 1 <= len(notes) <= 3
