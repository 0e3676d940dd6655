"""The cores of attention under context parallelism: every rank of this launch is a cp rank, Local on the whole sequence is the oracle."""

import numpy as np
import pytest

from mpillm.backend.cpu import Cpu
from mpillm.backend.reference import Reference
from mpillm.backend.shapes import Shapes
from mpillm.layout.comm import Solo, world
from mpillm.layout.mesh import Mesh
from mpillm.layout.slab import token_ranges
from mpillm.model.batch import Batch
from mpillm.model.context import Local, Ring, Ulysses, core_of

pytestmark = pytest.mark.ranks

FORMS = {"ring": Ring, "ulysses": Ulysses}
H, D, SCALE = 12, 8, 0.3
TOLERANCE = {np.float64: 1e-12, np.float32: 1e-5}
DROPOUT_KEY, FIRST_HEAD = 0x1234567890ABCDEF, 3


def kv_heads_of(form, size):
    """Numbers of kv heads, K < cp among them: all that Ulysses can do, or all."""
    return [k for k in (1, 2, 3, 4, 12) if form == "ring" or k % size == 0 or size % k == 0]


def rows_of(length, size, rank, form):
    """Positions of the tokens of a rank."""
    return np.concatenate([np.arange(start, start + count) for start, count in token_ranges(length, size, rank, form)])


def batch_of(positions, length, num_samples, dropout):
    tokens = np.zeros((num_samples, len(positions)), np.int64)
    return Batch(tokens, None, None, positions, np.arange(num_samples) * 5 + 2, step=3, dropout=dropout, length=length)


def views(x, k):
    """Queries, keys and values of (B, t, H + 2K, D)."""
    return x[:, :, :H], x[:, :, H:H + k], x[:, :, H + k:]


def run(core, qkv, dout, batch, k):
    """out (B, t, H, D) and the gradient of qkv (B, t, H + 2K, D)."""
    mask = batch.probability_mask(DROPOUT_KEY, FIRST_HEAD)
    dqkv = np.full_like(qkv, np.nan)
    out, lse = core.forward(*views(qkv, k), batch, mask)
    core.backward(dout, *views(qkv, k), out, lse, *views(dqkv, k), batch, mask)
    assert out.flags.c_contiguous
    return out, dqkv


def check(ops, group, form, length, num_samples, k, dropout=0.0, dtype=np.float64):
    rng = np.random.default_rng([length, num_samples, k])           # the same on all ranks
    qkv = rng.standard_normal((num_samples, length, H + 2 * k, D)).astype(dtype)
    dout = rng.standard_normal((num_samples, length, H, D)).astype(dtype)
    whole = run(Local(ops, SCALE), qkv, dout, batch_of(np.arange(length), length, num_samples, dropout), k)
    rows = rows_of(length, group.size, group.rank, form)
    core = FORMS[form](ops, group, SCALE)
    own = run(core, qkv[:, rows], dout[:, rows], batch_of(rows, length, num_samples, dropout), k)
    for name, found, expected in (("out", own[0], whole[0]),) + tuple(
            zip(("dq", "dk", "dv"), views(own[1], k), views(whole[1], k))):
        difference = np.abs(found - expected[:, rows]).max(initial=0.0) / np.abs(expected).max()
        assert difference < TOLERANCE[dtype], (name, difference)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("length", [65, 7, 2 * world().size, 3])
@pytest.mark.parametrize("form", FORMS)
def test_a_core_equals_attention_of_the_whole_sequence(group, form, length, num_samples, dropout):
    for k in kv_heads_of(form, group.size):
        check(Cpu(), group, form, length, num_samples, k, dropout)


@pytest.mark.parametrize("form", FORMS)
def test_a_core_in_single_precision(group, form):
    check(Cpu(), group, form, 65, 2, 12, 0.4, np.float32)


@pytest.mark.parametrize("form", FORMS)
def test_a_core_on_the_reference_backend(group, form):
    check(Reference(), group, form, 17, 2, 12, 0.4)


@pytest.mark.parametrize("form", FORMS)
def test_a_core_of_one_rank_needs_no_other(form):
    check(Cpu(), Solo(), form, 17, 2, 3, 0.4)


def test_core_of_chooses(group):
    assert isinstance(core_of("ring", Cpu(), Solo(), SCALE), Local)
    for form, kind in FORMS.items():
        assert isinstance(core_of(form, Cpu(), group, SCALE), kind if group.size > 1 else Local)


def test_local_attends_to_a_cache():
    rng = np.random.default_rng(1)
    qkv = rng.standard_normal((2, 9, H + 6, D))
    q, k, v = views(qkv, 3)
    core, batch = Local(Cpu(), SCALE), batch_of(np.arange(9), 9, 2, 0.0)
    whole, _ = core.forward(q, k, v, batch, None)
    last, _ = core.forward(q[:, 7:], k, v, batch_of(np.arange(7, 9), 9, 2, 0.0), None)
    np.testing.assert_allclose(last, whole[:, 7:], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("length", [65, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_core_runs_without_data_on_any_planned_rank(size, form, length, dropout):
    for rank in range(size):
        ops = Shapes()
        core = core_of(form, ops, Mesh.plan({"cp": size}, rank, empty=ops.empty)["cp"], SCALE)
        rows = rows_of(length, size, rank, form)
        batch = batch_of(rows, length, 2, dropout)
        mask = batch.probability_mask(DROPOUT_KEY, FIRST_HEAD)
        for k in kv_heads_of(form, size):
            shape = 2, len(rows), H + 2 * k, D
            qkv, dqkv, dout = ops.empty(shape, np.float32), ops.empty(shape, np.float32), ops.empty((2, len(rows), H, D), np.float32)
            live, flops = ops.live, ops.flops
            out, lse = core.forward(*views(qkv, k), batch, mask)
            assert out.shape == dout.shape and ops.live >= live + out.nbytes
            core.backward(dout, *views(qkv, k), out, lse, *views(dqkv, k), batch, mask)
            assert ops.flops > flops or not len(rows)
            del out, lse
            assert ops.live == live
