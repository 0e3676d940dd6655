"""Numbers that go wrong: replicas that differ, steps that are skipped, spikes; in one process, under ranks and in real runs."""

import json
import os
import random

import numpy as np
import pytest
from command_runs import launcher, run, write_job

from mpillm.backend.cpu import Cpu
from mpillm.backend.half import HalfCpu
from mpillm.config import job_from_dict
from mpillm.layout.mesh import Mesh, sizes_of
from mpillm.run.health import samples_text, tensors_text
from mpillm.run.metrics import read_metrics
from mpillm.run.replicas import Replicas, array_hash, judge, replicated
from mpillm.run.session import build

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


def test_words_for_tensors_and_samples():
    found = [(f"blocks.{n}.mlp", [0, 1]) for n in range(6)]
    assert tensors_text(found[:1]) == "blocks.0.mlp (ranks 0-1)" and tensors_text(found).endswith("and 2 more tensors") and tensors_text([]) == "no gradient"
    assert samples_text([1.0, np.nan, np.inf, 2.0], 96) == "samples 97-98 have a loss that is not finite"
    assert samples_text([1.0, 2.0], 96) == "each sample of the step (96 to 97) has a finite loss"
    assert "the weights are to blame" in samples_text([np.nan, np.nan], 0)


# ---- replicas -------------------------------------------------------------------------------------------------------

def placed(group, zero, compute="float32", **mesh):
    job = job_from_dict({"model": {"family": "llama", "layers": 2, "width": 16, "heads": 4, "context": 8, "vocabulary": 33}, "data": {"train": "random"},
                         "mesh": {"zero": zero, **mesh}, "train": {"steps": 1, "batch": 4}, "precision": {"compute": compute}, "run": {"name": "x"}}, "test")
    mesh = Mesh(group, sizes_of(job.mesh, group.size))
    model = build(job, mesh, 33).model
    model.initialize()
    return mesh, model


LAYOUTS = [{}, {"tp": 2}, {"pp": 2}, {"cp": 2}]


@pytest.mark.ranks
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("zero, compute", [(0, "float32"), (1, "float32"), (2, "bfloat16"), (0, "bfloat16"), (3, "float32"), (1, "float64")])
def test_a_flipped_bit_is_named(group, zero, compute, layout):
    """Every rank, tensor and bit by chance, 20 of 20 found; ranks that are wrong are among those named, alone where that can be known."""
    if group.size < 2 or any(group.size % size for size in layout.values()):
        pytest.skip("needs more ranks")
    mesh, model = placed(group, zero, compute, **layout)
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
        assert found[0].sure == (size > 2) and len(found[0].ranks) == (1 if size > 2 else 2)
        if group.rank == rank:
            data[place] ^= 1 << choice[2]
        assert replicas.check() == []
    # Under ZeRO 3 only what two stages share is whole on several ranks; with one replica nothing is.
    shared = group.all_reduce(np.array([float(any(bucket.group.size > 1 and replicated(bucket) for bucket in model.buckets))]))[0]
    assert tried > 0 or not shared


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
    assert "11 steps were skipped" in found["reason"] and "step 22: skipped: loss " in done.text and "step 31: skipped" not in done.text


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
    assert len(manifest["changes"]) == len(back) and "was a spike" in manifest["changes"][0]
    assert "are left out" in done.text


def test_too_many_spikes_end_the_run_and_none_goes_back_without_a_checkpoint(place):
    done, path = train(place, "many", "train.spike=0.2", "train.steps=300", ranks=None)
    assert done.code == 76 and "is a spike" in status(path)["reason"] and "after 3 returns" in status(path)["reason"] and len(events(path, "rolled back")) == 3
    done, path = train(place, "none", "train.spike=0.2", "checkpoint.every=0", ranks=None)
    assert done.code == 0 and "no checkpoint to go back to" in done.text
