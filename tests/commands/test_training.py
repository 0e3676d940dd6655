"""Real training runs that are killed, stopped, damaged and moved to other numbers of ranks: they end with the same numbers."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time

import h5py
import numpy as np
import pytest
from command_runs import Running, changed, flip, launcher, run, tree, write_job, write_texts

from mpillm.run.metrics import read_metrics
from mpillm.text.batches import Batches
from mpillm.text.order import Order

STEPS, EVERY = 250, 50
needs_mpi = pytest.mark.skipif(launcher() is None, reason="no mpirun")
PIPELINE = ("mesh.pp=2", "mesh.schedule=zero_bubble", "train.micro_batch=2")
LAYOUTS = [pytest.param(None, 0, (), id="1-rank-zero-0"), pytest.param(None, 2, (), id="1-rank-zero-2"),
           *(pytest.param(2, zero, (), id=f"2-ranks-zero-{zero}", marks=needs_mpi) for zero in (0, 1, 2, 3)),
           pytest.param(2, 1, ("mesh.tp=2",), id="2-ranks-tp", marks=needs_mpi), pytest.param(2, 2, PIPELINE, id="2-ranks-pp", marks=needs_mpi)]


# ---- what a run left ------------------------------------------------------------------------------------------------

def newest(run_directory):
    """The newest checkpoint directory; None where there is none."""
    return max((run_directory / "checkpoints").glob("step-" + "[0-9]" * 8), default=None)


def tensors(run_directory, tables=("masters", "moment1", "moment2")):
    """Every tensor of the newest checkpoint, by its name."""
    found = {}
    with h5py.File(newest(run_directory) / "state.h5", "r") as file:
        for table in tables:
            file[table].visititems(lambda name, item: found.update({f"{item.parent.name}/{name}": item[...]}) if hasattr(item, "shape") else None)
    return found


def numbers(run_directory):
    """(step, loss, gradient norm) of every step, to the last digit."""
    return [(line["step"], repr(line["loss"]), repr(line["grad_norm"])) for line in read_metrics(run_directory / "metrics.jsonl")[0]]


def losses(run_directory):
    return np.array([line["loss"] for line in read_metrics(run_directory / "metrics.jsonl")[0]])


def events(run_directory, name):
    return [event for event in read_metrics(run_directory / "metrics.jsonl")[1] if event["event"] == name]


def manifest(run_directory):
    return json.loads((newest(run_directory) / "manifest.json").read_text())


def status(run_directory):
    return json.loads((run_directory / "status.json").read_text())


def step_of(run_directory):
    """The last step in metrics.jsonl; 0 before there is one."""
    try:
        with open(run_directory / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4000))
            found = re.findall(rb'\n\{"step": (\d+)', b"\n" + file.read())
    except FileNotFoundError:
        return 0
    return int(found[-1]) if found else 0


def assert_same(run_directory, other):
    """Bit for bit: masters, moments, and what was told of every step."""
    mine, theirs = tensors(run_directory), tensors(other)
    assert mine.keys() == theirs.keys() and len(mine) > 20
    assert [name for name in mine if mine[name].tobytes() != theirs[name].tobytes()] == []
    assert numbers(run_directory) == numbers(other)


def assert_close(run_directory, other, relative):
    """Losses of all steps and final weights of two float64 runs on other numbers of ranks."""
    np.testing.assert_allclose(losses(run_directory), losses(other), rtol=relative, atol=0)
    mine, theirs = tensors(run_directory, ["masters"]), tensors(other, ["masters"])
    worst = max(np.abs(mine[name] - theirs[name]).max() / np.abs(theirs[name]).max() for name in mine)
    assert worst < relative, worst


# ---- the workplace --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with token files and a job; every test has runs of its own names in it."""
    place = tmp_path_factory.mktemp("training")
    write_texts(place / "texts", documents=20, words=120)
    write_job(place / "job.toml", train="seed = 3", optimizer="warmup = 5\nrate = 3e-3", checkpoint=f"every = {EVERY}", run='name = "unnamed"')
    done = run("prepare", "texts", "train.h5", "--validation", "val.h5", "--share", "0.2", cwd=place)
    assert done.code == 0, done.text
    return place


def arguments(name, *overrides, zero=1):
    return ["train", "job.toml", f"run.name={name}", f"train.steps={STEPS}", f"mesh.zero={zero}", "model.dropout=0.1", *overrides]


@pytest.fixture(scope="module")
def reference(place):
    """The uninterrupted run of a layout, made when it is first asked for; gives its directory."""
    def get(ranks=None, zero=1, steps=STEPS, layout=()):
        name = "-".join(["reference", str(ranks), str(zero), str(steps), *layout])
        if not (place / "runs" / name).exists():
            finish(place, name, f"train.steps={steps}", *layout, ranks=ranks, zero=zero)
        return place / "runs" / name
    return get


def copied(reference, name):
    """A run directory as that of a finished reference."""
    return shutil.copytree(reference, reference.parent / name)


def finish(place, name, *more, ranks=None, zero=1):
    """Starts a run again and lets it come to its end."""
    done = run(*arguments(name, *more, zero=zero), cwd=place, ranks=ranks)
    assert done.code == 0, done.text
    assert status(place / "runs" / name)["state"] == "finished"
    return done


# ---- killed ---------------------------------------------------------------------------------------------------------

def kill(running, one):
    """SIGKILL to one rank, or to all at once."""
    ranks = running.ranks()
    for process in random.sample(ranks, 1) if one else ranks:
        os.kill(process, signal.SIGKILL)
    done = running.wait()
    assert done.code != 0 and done.seconds < 40
    return done


@pytest.mark.parametrize("ranks, zero, layout", [LAYOUTS[0], LAYOUTS[2], LAYOUTS[5]])         # the others: `test_twenty_kills`
def test_a_killed_run_goes_on_as_if_nothing_had_been(place, reference, ranks, zero, layout):
    name, draw = "-".join(["killed", str(ranks), str(zero), *layout]), random.Random(f"{ranks} {zero}")
    path, target = place / "runs" / name, draw.randrange(EVERY + 1, STEPS - 2 * EVERY)
    with Running(*arguments(name, *layout, zero=zero), cwd=place, ranks=ranks) as running:
        running.until(lambda: step_of(path) >= target)
        began = time.monotonic()
        kill(running, one=draw.random() < 0.5)
        assert time.monotonic() - began < 10
    left = newest(path)
    assert left is not None and (path / "lock").exists() and status(path)["state"] == "running"
    done = finish(place, name, *layout, ranks=ranks, zero=zero)
    assert f"resumed from {left.name}" in done.text
    assert_same(path, reference(ranks, zero, layout=layout))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks, zero, layout", LAYOUTS)
def test_twenty_kills(place, reference, ranks, zero, layout):
    """Killed at any moment of start, step or checkpoint; with a checkpoint every few steps."""
    seed, steps = time.time_ns(), 3000
    draw, name = random.Random(seed), "-".join(["often-killed", str(ranks), str(zero), *layout])
    overrides = ["checkpoint.every=7", f"train.steps={steps}", *layout]
    path, kills = place / "runs" / name, 0
    while kills < 20 and step_of(path) < steps - 200:
        with Running(*arguments(name, *overrides, zero=zero), cwd=place, ranks=ranks) as running:
            time.sleep(draw.uniform(0.05, 1.3 if ranks is None else 1.8))
            kill(running, one=draw.random() < 0.5)
            kills += 1
    print(f"seed {seed}: {kills} kills, {len(events(path, 'resumed'))} resumes, at step {step_of(path)}")
    finish(place, name, *overrides, ranks=ranks, zero=zero)
    assert_same(path, reference(ranks, zero, steps, layout))
    assert kills > 10 and not [item for item in path.rglob("*") if ".tmp-" in item.name or item.name.startswith(".")], seed


# ---- stopped --------------------------------------------------------------------------------------------------------

FLOAT64 = ["precision.compute=float64", "checkpoint.every=0", "optimizer.rate=1e-3"]


def stop_at(place, name, step, number=signal.SIGUSR1, ranks=None, more=()):
    """Starts or continues a run and signals its launcher when it has done `step`."""
    path = place / "runs" / name
    with Running(*arguments(name, *more), cwd=place, ranks=ranks) as running:
        running.until(lambda: step_of(path) >= step)
        running.process.send_signal(number)
        done = running.wait()
    assert done.code == 75, done.text
    found = status(path)
    assert found["state"] == "stopped" and found["exit"] == 75 and newest(path).name == f"step-{found['step']:08d}"
    assert not (path / "lock").exists()
    return found


@needs_mpi
def test_stopped_and_resumed_on_other_ranks(place):
    """2 ranks, then 1, 3 and 2: every sample once and in the same order, over the edge of an epoch."""
    finish(place, "whole", *FLOAT64)
    whole, path = place / "runs" / "whole", place / "runs" / "parts"
    cursors, step = [], 0
    for ranks, count in ((2, 20), (None, 20), (3, 10)):
        found = stop_at(place, "parts", step + count, ranks=ranks, more=FLOAT64)
        assert "SIGUSR1" in found["reason"] and step + count <= found["step"] < STEPS
        step = found["step"]
        cursors.append(manifest(path)["cursor"])
    finish(place, "parts", *FLOAT64, ranks=2)
    assert [event["ranks"] for event in events(path, "resumed")] == [1, 3, 2]
    assert_close(path, whole, 1e-12)
    assert manifest(path)["cursor"] == manifest(whole)["cursor"] and manifest(path)["cursor"]["corpora"][0]["epoch"] >= 1
    order = Batches([place / "train.h5"], [1.0], 8, seed=3)
    for cursor in cursors:      # what was read after each resume, sample by sample
        rest = Batches([place / "train.h5"], [1.0], 8, seed=3, cursor=cursor)
        left = STEPS * 6 - cursor["samples"]
        for mine, theirs in zip(rest.samples(0, left), order.samples(cursor["samples"], left)):
            assert np.array_equal(mine, theirs)


def test_three_resumes_in_an_epoch_and_one_over_its_edge(place):
    """Stopped where it is wanted, by `train.steps`: the rates do not depend on it here."""
    fixed = ["optimizer.rate_schedule=constant_then_decay", "optimizer.decay_share=0.0", "checkpoint.every=0"]
    per_epoch = Batches([place / "train.h5"], [1.0], 8, seed=3)._orders[0].num_grains[0]       # samples
    edge = per_epoch // 6 + 1       # the step with samples of both epochs
    assert per_epoch % 6
    finish(place, "at-once", *fixed, f"train.steps={edge + 9}")
    for steps in (20, 21, 60, edge - 1, edge, edge + 9):
        done = finish(place, "by-and-by", *fixed, f"train.steps={steps}")
    assert f"train.steps changes from {edge} to {edge + 9}" in done.text
    path = place / "runs" / "by-and-by"
    assert_same(path, place / "runs" / "at-once")
    assert [event["step"] for event in events(path, "resumed")] == [20, 21, 60, edge - 1, edge]
    assert len(manifest(path)["changes"]) == 5


def test_what_changes_at_a_resume_is_said_and_kept(place):
    """The data goes on where it was, whatever a sample and a step are from then on."""
    path = place / "runs" / "changing"
    finish(place, "changing", "train.steps=20")
    done = finish(place, "changing", "train.steps=30", "train.batch=9", "model.context=16", "precision.compute=float64")
    said = ["model.context changes from 8 to 16", "train.steps changes from 20 to 30", "train.batch changes from 6 to 9",
            "precision.compute changes from float32 to float64"]
    assert all(f"{line}\n" in done.err for line in said) and manifest(path)["changes"] == [f"step 20: {line}" for line in said]
    found = manifest(path)
    assert found["tokens"] == 20 * 6 * 8 + 10 * 9 * 16
    assert found["samples"] == 20 * 6 + 10 * 9 and found["cursor"]["corpora"][0]["tokens"] == 20 * 6 * 8 + 10 * 9 * 16
    assert tensors(path)["/masters/norm.weight"].dtype == np.float64


@pytest.mark.parametrize("number, reason", [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_other_signals_stop_a_run_without_a_launcher(place, number, reason):
    assert reason in stop_at(place, f"by-{reason}", 5, number, more=["train.steps=100000"])["reason"]


def test_a_time_limit(place):
    done = run(*arguments("limited", "train.steps=1000000", "checkpoint.every=0", "run.time_limit=3"), cwd=place)
    path = place / "runs" / "limited"
    assert done.code == 75 and done.seconds < 10 and "stopped by the time limit" in done.text
    assert status(path)["reason"].startswith("stopped by the time limit") and newest(path).name == f"step-{status(path)['step']:08d}"


@needs_mpi
def test_a_file_named_stop(place):
    path = place / "runs" / "told"
    with Running(*arguments("told", "train.steps=1000000", "checkpoint.every=0"), cwd=place, ranks=2) as running:
        running.until(lambda: step_of(path) > 0)
        (path / "SAVE").touch()         # first a checkpoint in between
        running.until(lambda: not (path / "SAVE").exists())
        saved = newest(path)
        running.until(lambda: f'"step": {int(saved.name[5:]) + 5},' in (path / "metrics.jsonl").read_text())
        (path / "STOP").touch()
        done = running.wait()
    assert saved.exists() and newest(path).name > saved.name
    assert done.code == 75 and "a file named STOP" in status(path)["reason"], done.text
    assert run(*arguments("told"), cwd=place).code == 2     # until it is deleted
    (path / "STOP").unlink()
    finish(place, "told", f"train.steps={step_of(path) + 1}")


# ---- damaged --------------------------------------------------------------------------------------------------------

def spoil(path, kind):
    """Damages a checkpoint directory."""
    if kind == "data":
        with h5py.File(path / "state.h5", "r") as file:
            offset = file["moment2/blocks.0.mlp.up.weight"].id.get_offset() + 41
        flip(path / "state.h5", offset)
    elif kind == "manifest":
        flip(path / "manifest.json", 100)
    elif kind == "cut":
        os.truncate(path / "state.h5", 3000)
    else:
        (path / "manifest.json").unlink()


@pytest.mark.parametrize("kind, ranks", [("data", None), ("manifest", None), ("cut", None), ("no manifest", None),
                                         pytest.param("data", 2, marks=needs_mpi)])
def test_a_damaged_checkpoint_is_passed_over(place, reference, kind, ranks):
    """The newest of two is damaged: the run goes on from the older one and ends as it did."""
    whole, name = reference(ranks), f"damaged-{kind.replace(' ', '-')}-{ranks}"
    path = copied(whole, name)
    spoil(newest(path), kind)
    done = finish(place, name, ranks=ranks)
    said = [line for line in done.text.splitlines() if "passed over" in line]
    assert len(said) == 1 and f"step-{STEPS:08d}" in said[0], done.text
    assert f"resumed from step-{STEPS - EVERY:08d}" in done.text
    assert_same(path, whole)
    names = sorted(item.name for item in (path / "checkpoints").iterdir())
    assert [name for name in names if ".damaged-" not in name] == ["latest", f"step-{STEPS - EVERY:08d}", f"step-{STEPS:08d}"]
    assert len(names) == 4      # the damaged one is set aside, for people to look at


def test_what_a_killed_run_left_is_cleared_away(place, reference):
    path, process = copied(reference(), "littered"), subprocess.Popen(["true"])
    process.wait()
    unfinished = path / "checkpoints" / f"step-00000300.tmp-{socket.gethostname()}-{process.pid}-0123abcd"
    unfinished.mkdir()
    for left in (path / ".status.json.0123456789ab", path / ".job.toml.0123456789ab", path / "checkpoints" / "latest.tmp-0123abcd", unfinished / "state.h5"):
        left.write_text("half")
    (path / "notes.txt").write_text("of the user")
    finish(place, "littered", f"train.steps={STEPS + 1}")
    assert sorted(item.name for item in path.iterdir()) == ["checkpoints", "job.toml", "log.txt", "metrics.jsonl", "notes.txt", "status.json"]
    assert sorted(item.name for item in (path / "checkpoints").iterdir()) == ["latest", f"step-{STEPS:08d}", f"step-{STEPS + 1:08d}"]


# ---- forms of a run -------------------------------------------------------------------------------------------------

@needs_mpi
def test_a_launcher_with_one_rank_makes_no_difference(place, reference):
    finish(place, "one-rank", ranks=1)
    assert_same(place / "runs" / "one-rank", reference())


OFFSETS = """
import sys
from mpillm.store import hyperslab
hyperslab.default_form = lambda group: "offsets"      # as where h5py has no MPI
from mpillm.__main__ import main
sys.exit(main())
"""


@needs_mpi
def test_checkpoints_written_by_offsets(place, reference, tmp_path):
    """The form of a serial h5py: the same file, and either form goes on from the other."""
    (tmp_path / "offsets.py").write_text(OFFSETS)
    program, path = [tmp_path / "offsets.py"], place / "runs" / "offsets"
    done = run(*arguments("offsets"), cwd=place, ranks=2, program=program)
    assert done.code == 0, done.text
    assert_same(path, reference(2))
    assert (newest(path) / "state.h5").read_bytes() == (newest(reference(2)) / "state.h5").read_bytes()
    for name, how in (("parallel-after-offsets", {}), ("offsets-after-parallel", {"program": program})):
        again = copied(path if how == {} else reference(2), name)
        shutil.rmtree(newest(again))
        done = run(*arguments(name), cwd=place, ranks=2, **how)
        assert done.code == 0 and "resumed" in done.text, done.text
        assert_same(again, reference(2))


def test_the_written_job_file_starts_the_run_again(place, reference):
    path = copied(reference(), "from-its-job")
    shutil.rmtree(newest(path))
    done = run("train", path / "job.toml", "run.name=from-its-job", cwd=place)
    assert done.code == 0 and " changes from " not in done.text and f"resumed from step-{STEPS - EVERY:08d}" in done.text, done.text
    assert_same(path, reference())


def test_a_dry_run_prints_and_writes_nothing(place, reference):
    before = tree(place)
    done = run(*arguments("dry", "--dry-run", "--ranks", "64", "train.batch=128"), cwd=place)
    assert done.code == 0 and done.err == "" and changed(before, tree(place)) == []
    elements = sum(array.size for array in tensors(reference(), ["masters"]).values())
    assert f"{elements:,} parameters" in done.out and "64 ranks" in done.out and "1,024 tokens in 1 micro-batch" in done.out
    names = ["model", "layout", "a rank holds", "a rank needs", "a rank sends", "a step", "the run"]
    lines = done.out.splitlines()
    assert [line.split("  ")[0] for line in lines if not line.startswith(" ")] == names
    ledger = [line.split() for line in lines if line.startswith(" ")]
    assert ledger[0] == ["axis", "operation", "calls/step", "MB", "sent/step"] and {tuple(row[:2]) for row in ledger[1:]} == {
        ("dp", "all_gather"), ("dp", "all_reduce"), ("dp", "reduce_scatter"), ("world", "all_reduce")}


def test_a_dry_run_of_any_layout_tells_the_same_model(place):
    """The stage that needs the most memory and the one that sends the most are named; experts and shared experts are counted once."""
    overrides = ["model.layers=3", "model.experts=4", "model.shared_experts=1", "train.batch=64"]
    outputs = []
    for more in ([], ["--ranks", "16", "mesh.pp=2", "mesh.tp=2", "mesh.cp=2", "mesh.ep=4", "mesh.zero=3", "train.micro_batch=4"]):
        done = run(*arguments("dry", "--dry-run", *overrides, *more), cwd=place)
        assert done.code == 0 and done.err == "", done.text
        outputs.append(done.out)
    one, many = [[line for line in out.splitlines() if line.startswith(("model", "the run"))] for out in outputs]
    assert one == many and len(one) == 2
    assert "16 ranks: pp=2 x dp=2 x cp=2 x tp=2, ep=4, zero=3" in outputs[1] and "(stage 0" in outputs[1]
    assert {line.split()[0] for line in outputs[1].splitlines() if line.startswith("     ")} >= {"axis", "pp", "cp", "ep", "tp", "world"}


# ---- failures -------------------------------------------------------------------------------------------------------

@needs_mpi
def test_a_token_that_one_rank_cannot_use_ends_all(place):
    """The file is damaged while the run goes on, where rank 1 alone will read."""
    shutil.copy(place / "train.h5", place / "spoilt.h5")
    path, overrides = place / "runs" / "spoilt", ["data.train=spoilt.h5", "checkpoint.every=0", "train.steps=100000"]
    with h5py.File(place / "spoilt.h5", "r") as file:
        offset, count = file["tokens"].id.get_offset(), len(file["tokens"])
    starts, _ = Order(count, 8, 8, seed=3).ranges(6 * 149 + 4, 1)       # a sample of step 150, in the half of rank 1
    token = int(starts[0]) + 3
    with Running(*arguments("spoilt", *overrides), cwd=place, ranks=2) as running:
        running.until(lambda: step_of(path) >= 3)
        with open(place / "spoilt.h5", "r+b") as file:
            file.seek(offset + 2 * token)
            file.write((999).to_bytes(2, "little"))
        running.until(lambda: step_of(path) >= 149)
        began = time.monotonic()
        done = running.wait()
        assert time.monotonic() - began < 10
    assert done.ours == [f"mpillm: error: spoilt.h5: token {token} has id 999, its vocabulary ends at 256: the file is damaged; "
                         "make it with `mpillm prepare` again"], done.text
    assert done.code == 2 and step_of(path) == 149
    assert status(path)["state"] == "failed" and status(path)["rank"] == 1 and "id 999" in status(path)["reason"] and not (path / "lock").exists()


@needs_mpi
def test_numbers_that_are_not_finite(place):
    """Steps are skipped on all ranks alike, then the run ends and says why; the older checkpoint stays."""
    path = place / "runs" / "wild"
    done = run(*arguments("wild", "optimizer.rate=1e30", "checkpoint.every=1"), cwd=place, ranks=2)
    assert done.code == 76, done.text
    steps, _ = read_metrics(path / "metrics.jsonl")
    assert [line["skipped"] for line in steps[-10:]] == [True] * 10 and not steps[0]["skipped"] and steps[-1]["grad_norm"] is None
    found = status(path)
    assert found["state"] == "failed" and found["exit"] == 76 and "not finite in 10 steps in a row" in found["reason"], found
    assert f"the last checkpoint is of step {int(newest(path).name[5:])}" in found["reason"]
    assert len(done.ours) == 0 and "Traceback" not in done.text


# ---- what is done with a run ----------------------------------------------------------------------------------------

@needs_mpi
def test_evaluation_does_not_depend_on_ranks(place, reference):
    found = []
    for ranks in (None, 2, 3):
        done = run("evaluate", reference(), "--data", "val.h5", "--data", "train.h5", "--precision", "float64", "--json", cwd=place, ranks=ranks)
        assert done.code == 0, done.text
        found.append(json.loads(done.out)["results"])
    for results in found[1:]:
        for one, first in zip(results, found[0], strict=True):
            assert one["tokens"] == first["tokens"] and abs(one["unigram"] - first["unigram"]) < 1e-12
            assert abs(one["loss"] - first["loss"]) < 1e-12 * first["loss"]
    assert found[0][0]["loss"] < np.log(257) - 1      # and it has learnt something


@needs_mpi
def test_generated_text_does_not_depend_on_ranks(place, reference):
    prompts = ["alpha beta", "the", "g", "delta of the", ""]
    (place / "prompts.txt").write_text("\n".join(prompts) + "\n")
    shown = run("generate", reference(), *(part for prompt in prompts for part in ("--prompt", prompt)), "--tokens", "20", cwd=place)
    assert shown.code == 0 and shown.err == "" and len(shown.out.split("\n\n")) == 6, shown.text
    for sampling in (["--temperature", "0"], ["--temperature", "0.8", "--top-k", "50", "--top-p", "0.95", "--seed", "4"]):
        texts = []
        for ranks in (None, 3):
            out = place / f"text-{sampling[1]}-{ranks}.jsonl"
            done = run("generate", reference(), "--prompts", "prompts.txt", "--tokens", "20", *sampling, "--output", out, cwd=place, ranks=ranks)
            assert done.code == 0, done.text
            texts.append([json.loads(line) for line in out.read_text().splitlines()])
        assert texts[0] == texts[1] and [record["prompt"] for record in texts[0]] == prompts
        assert all(record["text"] for record in texts[0])
        if sampling[1] == "0":
            assert shown.out == "".join(record["prompt"] + record["text"] + "\n\n" for record in texts[0])


def test_inspect_of_what_a_run_made(place, reference):
    done = run("inspect", "train.h5", cwd=place)
    assert done.code == 0 and "tokens " in done.out and "vocabulary      257" in done.out
    done = run("inspect", reference(), "--tensors", cwd=place)
    assert done.code == 0 and f"step            {STEPS}" in done.out and "masters/blocks.0.attention.query.weight" in done.out
    holds = json.loads(run("inspect", reference(), "--json", cwd=place).out)
    assert holds["step"] == STEPS and holds["samples"] == 6 * STEPS and holds["job"]["train"]["seed"] == 3
    assert {name: list(array.shape) for name, array in tensors(reference()).items()} == {f"/{name}": tensor["shape"] for name, tensor in holds["tensors"].items()}


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 3])
def test_token_files_do_not_depend_on_ranks(place, ranks):
    done = run("prepare", "texts", f"train-{ranks}.h5", "--validation", f"val-{ranks}.h5", "--share", "0.2", cwd=place, ranks=ranks)
    assert done.code == 0, done.text
    for kind in ("train", "val"):
        with h5py.File(place / f"{kind}-{ranks}.h5", "r") as mine, h5py.File(place / f"{kind}.h5", "r") as first:
            for name in ("tokens", "documents", "tokenizer"):
                assert np.array_equal(mine[name][...], first[name][...])
            assert dict(mine.attrs) == dict(first.attrs)
