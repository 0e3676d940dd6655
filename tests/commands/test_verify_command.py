"""`mpillm verify` as users start it: what it prints, how it ends, and a planted error that it finds."""

import json

import pytest
from command_runs import launcher, run, write_job

pytestmark = pytest.mark.skipif(launcher() is None, reason="no mpirun")

# A program whose tensor-parallel ranks do not sum the gradients that go back from their parts of an MLP or an attention.
BROKEN = """
import sys
from mpillm.__main__ import main
from mpillm.model.region import Region
Region.enter_backward = lambda self, dx: dx
sys.exit(main())
"""


@pytest.fixture
def job(tmp_path):
    write_job(tmp_path / "job.toml", mesh="tp = 2\nsequence = false", run='name = "test"')
    return tmp_path


def test_a_layout_is_verified(job):
    done = run("verify", "job.toml", cwd=job, ranks=2)
    assert done.code == 0, done.text
    lines = done.out.splitlines()
    assert lines[0].startswith("a small version: llama, 1 layer, width 8, 2 heads, ")
    assert lines[1] == "2 ranks (tp=2, zero=1, recompute none) against one rank"
    assert any(line.startswith("blocks.*.attention.output.weight  columns over tp") and "rank" in line for line in lines)
    assert lines[-2].startswith("loss of step 1 ")
    assert lines[-1].startswith("verified: 2 ranks (tp=2, zero=1, recompute none) equal one rank: worst ")
    assert list(job.iterdir()) == [job / "job.toml"]     # it leaves nothing


def test_one_process_checks_what_it_can(job):
    done = run("verify", "job.toml", "mesh.tp=1", "train.recompute=block", "--all", cwd=job)
    assert done.code == 0 and "\nblocks.0.mlp.up.weight " in done.out
    assert done.out.splitlines()[-1].startswith("verified: 1 rank (zero=1, recompute block) equals one rank: worst ")


def test_an_error_is_named_and_ends_with_1(job):
    done = run("verify", "job.toml", cwd=job, ranks=2, program=("-c", BROKEN))
    assert done.code == 1, done.text
    about, verdict = done.out.splitlines()[-2:]
    assert about.startswith("gradient of step 1: ")
    assert "; its loss is equal: look in the backward of norm.weight, the first to differ there" in about
    assert verdict.startswith("differs: ") and " on rank " in verdict and "(tp=" in verdict and ": gradient of step 1 by " in verdict


def test_json(job):
    right = run("verify", "job.toml", "--json", cwd=job, ranks=2)
    values = json.loads(right.out)
    assert right.code == 0 and values["verified"] and values["wrong"] == [] and values["mesh"]["tp"] == 2
    assert {"loss of step 1", "gradient norm of step 2"} <= set(values["numbers"])
    assert [tensor["split"] for tensor in values["tensors"] if tensor["tensor"] == "blocks.0.mlp.down.weight"] == ["columns over tp"]
    wrong = run("verify", "job.toml", "--json", cwd=job, ranks=2, program=("-c", BROKEN))
    values = json.loads(wrong.out)
    assert wrong.code == 1 and not values["verified"]
    assert {found["what"] for found in values["wrong"]} == {"gradient of step 1"}
    assert all(found["rank"] in (0, 1) for found in values["wrong"])


def test_the_full_model(job):
    done = run("verify", "job.toml", "--full", "model.vocabulary=50", cwd=job, ranks=2)
    assert done.code == 0, done.text
    assert "the whole model: llama, 1 layer, width 8, 2 heads, context 8, vocabulary 50; 2 steps of 6 random samples" in done.out
    assert "rank 0 also runs the job alone: about " in done.out and "\nverified: " in done.out


def test_the_order_of_a_layout_needs_no_ranks(job):
    assert run("verify", "job.toml", "--order", "--ranks", "8", "model.vocabulary=50", cwd=job).code == 0


@pytest.mark.parametrize("arguments, line", [
    (["--full"], "verify --full needs a vocabulary: train.h5: cannot read the token file: No such file or directory; make it with "
                 "`mpillm prepare`; or set model.vocabulary, or leave --full out"),
    (["mesh.tp=1", "mesh.ep=2"], "mesh: ep=2 with model.experts=0: there are no experts to split; use ep = 1, or set model.experts"),
    (["--ranks", "4"], "--ranks 4: expected 1 or more, together with --order; else verify has those it was started with")])
def test_mistakes_give_one_line(job, arguments, line):
    done = run("verify", "job.toml", *arguments, cwd=job, ranks=2)
    assert done.code == 2 and done.ours == [f"mpillm: error: {line}"]
