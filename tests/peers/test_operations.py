"""The backend's operations against PyTorch's functions and their gradients, float64."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the peer tests need PyTorch: pip install torch")

import torch.nn.functional as F  # noqa: E402

from mpillm.backend import Update, open_backend  # noqa: E402
from mpillm.backend.reference import Reference  # noqa: E402
from mpillm.model.rope import angles  # noqa: E402

torch.set_num_threads(1)
FORMS = [open_backend("cpu"), Reference()]
N, C = 37, 45
TOLERANCE = 1e-12       # of the largest element


@pytest.fixture(params=FORMS, ids=["kernels", "numpy"])
def ops(request):
    return request.param


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def tensors(*arrays):
    """Copies that want a gradient."""
    return [torch.tensor(array, requires_grad=True) for array in arrays]


def same(*pairs):
    """Pairs of (ours, PyTorch's)."""
    for ours, theirs in pairs:
        theirs = theirs.detach().numpy()
        assert np.abs(ours - theirs).max() <= TOLERANCE * max(1.0, np.abs(theirs).max())


def test_layer_norm(ops):
    x, weight, bias, dy = random(0, N, C), random(1, C), random(2, C), random(3, N, C)
    tx, tw, tb = tensors(x, weight, bias)
    expected = F.layer_norm(tx, (C,), tw, tb, 1e-5)
    expected.backward(torch.tensor(dy))
    dweight, dbias = np.zeros(C), np.zeros(C)
    y, mean, rstd = ops.layer_norm(x, weight, bias, 1e-5)
    dx = ops.layer_norm_backward(dy, x, weight, mean, rstd, dweight, dbias)
    same((y, expected), (dx, tx.grad), (dweight, tw.grad), (dbias, tb.grad))


def test_rms_norm(ops):
    x, weight, dy = random(0, N, C), random(1, C), random(2, N, C)
    tx, tw = tensors(x, weight)
    expected = F.rms_norm(tx, (C,), tw, 1e-6)
    expected.backward(torch.tensor(dy))
    dweight = np.zeros(C)
    y, rstd = ops.rms_norm(x, weight, 1e-6)
    dx = ops.rms_norm_backward(dy, x, weight, rstd, dweight)
    same((y, expected), (dx, tx.grad), (dweight, tw.grad))


def test_gelu(ops):
    x, bias, dy = random(0, N, C) * 3, random(1, C), random(2, N, C)
    tx, = tensors(x + bias)
    expected = F.gelu(tx, approximate="tanh")
    expected.backward(torch.tensor(dy))
    y = ops.gelu(x, bias)
    same((y, expected), (ops.gelu_backward(dy, x), tx.grad))


def test_swiglu(ops):
    both, dy = random(0, N, 2 * C) * 3, random(1, N, C)
    tboth, = tensors(both)
    expected = F.silu(tboth[:, :C]) * tboth[:, C:]
    expected.backward(torch.tensor(dy))
    dboth = np.empty_like(both)
    y = ops.swiglu(both[:, :C], both[:, C:])
    ops.swiglu_backward(dy, both[:, :C], both[:, C:], dboth[:, :C], dboth[:, C:])
    same((y, expected), (dboth, tboth.grad))


def test_rope_turns_pairs_as_complex_numbers(ops):
    x, (cos, sin) = random(0, 2, 9, 3, 10), angles(np.arange(9), 10, 10000.0)
    frequencies = 10000.0 ** (-torch.arange(5, dtype=torch.float64) / 5)
    turns = torch.arange(9, dtype=torch.float64)[:, None] * frequencies                 # (T, D/2)
    turns = torch.polar(torch.ones_like(turns), turns)[:, None]                         # (T, 1, D/2)
    pairs = torch.complex(torch.tensor(x[..., :5]), torch.tensor(x[..., 5:])) * turns   # (B, T, H, D/2)
    turned = x.copy()
    ops.rope(turned, cos, sin)
    same((turned, torch.cat((pairs.real, pairs.imag), dim=-1)))
    ops.rope(turned, cos, sin, inverse=True)
    same((turned, torch.tensor(x)))


@pytest.mark.parametrize("heads", [(6, 2), (4, 1), (5, 5)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_attention(ops, heads, causal):
    (h, k), b, t, d = heads, 2, 70, 10
    qkv, dout = random(0, b, t, h + 2 * k, d), random(1, b, t, h, d)
    tq, tk, tv = tensors(qkv[:, :, :h], qkv[:, :, h:h + k], qkv[:, :, h + k:])
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (tq, tk, tv)), is_causal=causal, scale=0.3, enable_gqa=True).transpose(1, 2)
    expected.backward(torch.tensor(dout))
    parts = slice(0, h), slice(h, h + k), slice(h + k, None)
    dqkv = np.empty_like(qkv)
    q_k_v, dq_dk_dv = [[x[:, :, part] for part in parts] for x in (qkv, dqkv)]
    out, lse = ops.attention(*q_k_v, 0.3, causal)
    ops.attention_backward(dout, *q_k_v, out, lse, *dq_dk_dv, 0.3, causal)
    same((out, expected), *zip(dq_dk_dv, (tq.grad, tk.grad, tv.grad), strict=True))


def test_cross_entropy(ops):
    logits_again = lambda: random(0, N, 131) * 5
    logits, targets, scale = logits_again(), np.random.default_rng(1).integers(0, 131, N), np.random.default_rng(2).random(N)
    tlogits, = tensors(logits)
    expected = (F.cross_entropy(tlogits, torch.tensor(targets), reduction="none") * torch.tensor(scale)).sum()
    expected.backward()
    stats = ops.cross_entropy_stats(logits, targets, 0)
    loss, whole, total = np.zeros(1), logits_again(), np.zeros(1)
    ops.loss_sum(*stats, scale, loss)
    ops.cross_entropy_gradient(logits, targets, 1 / stats[1], scale, 0)
    ops.cross_entropy(whole, targets, scale, total)
    same((loss[0], expected), (logits, tlogits.grad), (total[0], expected), (whole, tlogits.grad))


def test_embedding(ops):
    ids, table, dy = np.random.default_rng(0).integers(0, 11, N), random(1, 11, C), random(2, N, C)
    ttable, = tensors(table)
    expected = F.embedding(torch.tensor(ids), ttable)
    expected.backward(torch.tensor(dy))
    dtable = np.zeros_like(table)
    ops.embedding_backward(ids, dy, dtable)
    same((ops.embedding(ids, table), expected), (dtable, ttable.grad))


def test_adamw(ops):
    weight, moment1, moment2 = random(0, 1001), np.zeros(1001), np.zeros(1001)
    tweight, = tensors(weight)
    optimizer = torch.optim.AdamW([tweight], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        grad = random(step, 1001) * 10.0 ** -step
        tweight.grad = torch.tensor(grad * 0.5)
        optimizer.step()
        ops.adamw([Update(weight, grad, moment1, moment2, None, 0.1)], 0.01, 0.9, 0.95, 1e-8, step, 0.5)
    state = optimizer.state[tweight]
    same((weight, tweight), (moment1, state["exp_avg"]), (moment2, state["exp_avg_sq"]))
