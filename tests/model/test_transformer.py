"""The whole model: gradients against finite differences, recompute, dropout, initial values."""

import numpy as np
import pytest

from gradient_check import OPS, batch_of, check_slopes, clear, gradients_of, run, small_model, small_shape
from mpillm.backend import Dropout
from mpillm.backend.reference import Reference
from mpillm.config import Model
from mpillm.model.shape import Shape
from mpillm.model.transformer import Transformer

FAMILIES = [("gpt", True), ("gpt", False), ("llama", True), ("llama", False)]


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
@pytest.mark.parametrize("dropout", [0.0, 0.15])
@pytest.mark.parametrize("family, tied", FAMILIES)
def test_gradients_of_the_whole_model(family, tied, dropout, recompute):
    model = small_model(family=family, tied=tied, recompute=recompute)
    batch = batch_of(3, 8, vocabulary=31, dropout=dropout)
    run(model, batch)
    pairs = [(p.name, p.value, g) for p, g in zip(model.parameters(), gradients_of(model).values())]
    check_slopes(lambda: model.forward(batch, training=False)[0], pairs)


@pytest.mark.parametrize("dropout", [0.0, 0.15])
@pytest.mark.parametrize("recompute", ["selective", "block"])
@pytest.mark.parametrize("family, tied", FAMILIES)
def test_recompute_changes_no_bit(family, tied, recompute, dropout):
    batch = batch_of(3, 8, vocabulary=31, dropout=dropout)
    kept, again = [small_model(family=family, tied=tied, recompute=form, dtype=np.float32) for form in ("none", recompute)]
    batch = batch._replace(scale=batch.scale.astype(np.float32))
    assert run(kept, batch) == run(again, batch)
    for name, gradient in gradients_of(kept).items():
        np.testing.assert_array_equal(gradients_of(again)[name], gradient, err_msg=name)


@pytest.mark.parametrize("family, tied", FAMILIES)
def test_micro_batches_in_flight_do_not_disturb_each_other(family, tied, monkeypatch):
    """Two forwards, then two backwards in the other order: nothing is kept on the layers."""
    monkeypatch.setattr(Reference, "logit_elements", 1)
    model, batches = small_model(family=family, tied=tied), [batch_of(2, 8, 31, 0.1, seed=seed) for seed in (1, 2)]
    for batch in batches:
        run(model, batch)
    expected = gradients_of(model)
    clear(model)
    saved = [model.forward(batch)[1] for batch in batches]
    for batch, kept in reversed(list(zip(batches, saved))):
        model.backward(kept, batch)
    for name, gradient in gradients_of(model).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-11, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("family, tied", FAMILIES)
def test_the_first_step_of_a_fresh_model_keeps_every_micro_batch(family, tied):
    """Gradients made on first use must not be taken for unwritten at the second micro-batch."""
    fresh, used = small_model(family=family, tied=tied), small_model(family=family, tied=tied)
    batches = [batch_of(2, 8, 31, seed=seed) for seed in (1, 2)]
    for bucket in used.buckets:
        bucket.grads.fill(np.nan)
        bucket.clear()
    for model in (fresh, used):
        for batch in batches:
            run(model, batch)
    for name, gradient in gradients_of(fresh).items():
        np.testing.assert_array_equal(gradients_of(used)[name], gradient, err_msg=name)


# -- dropout ------------------------------------------------------------------------------------------------------

def test_dropout_keeps_its_share_and_is_unbiased():
    for rate in (0.1, 0.5, 0.9):
        x = np.ones((2000, 16))
        OPS.dropout(x, Dropout(rate, 5, 1, np.arange(200).repeat(10), np.tile(np.arange(10), 200)))
        assert np.allclose(np.unique(x), [0, 1 / (1 - rate)])
        kept, error = (x > 0).mean(), (rate * (1 - rate) / x.size) ** 0.5
        assert abs(kept - (1 - rate)) < 5 * error


def test_attention_dropout_is_unbiased():
    b, t, h, k, d = 4000, 4, 2, 1, 3
    random = np.random.default_rng(1)
    q, key, v = [np.broadcast_to(random.normal(size=(1, t, n, d)), (b, t, n, d)).copy() for n in (h, k, k)]
    mask = Dropout(0.3, 9, 1, np.arange(b), np.arange(t))
    dropped, expected = OPS.attention(q, key, v, 0.5, True, mask)[0], OPS.attention(q, key, v, 0.5, True, None)[0][0]
    error = dropped.std(axis=0) / b**0.5
    assert (np.abs(dropped.mean(axis=0) - expected) < 5 * error + 1e-12).all() and (error[0] > 0).all()


@pytest.mark.parametrize("change", ["step", "seed", "sample"])
def test_dropout_depends_on_step_seed_and_sample(change):
    batch = batch_of(3, 8, 31, dropout=0.2)
    other = batch._replace(step=4) if change == "step" else batch
    other = batch._replace(samples=batch.samples + 1) if change == "sample" else other
    first, second = small_model(), small_model(seed=2 if change == "seed" else 1)
    for mine, theirs in zip(first.buckets, second.buckets):
        theirs.values[:] = mine.values
    assert first.forward(batch)[0] == first.forward(batch)[0]
    assert first.forward(batch)[0] != second.forward(other)[0]


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_dropout_is_independent_of_the_micro_batch_and_of_the_order(family):
    model, whole = small_model(family=family), batch_of(5, 8, 31, dropout=0.2)
    loss, together = run(model, whole), gradients_of(model)
    logits = model.logits(whole)
    clear(model)
    parts, total = [np.array([3]), np.array([4, 0]), np.array([2, 1])], 0.0
    for rows in parts:
        part = whole._replace(tokens=whole.tokens[rows], targets=whole.targets[rows], scale=whole.scale[rows], samples=whole.samples[rows])
        np.testing.assert_allclose(model.logits(part), logits[rows], rtol=1e-12, atol=1e-12)
        total += run(model, part)
    assert abs(total / loss - 1) < 1e-13
    for name, gradient in gradients_of(model).items():
        np.testing.assert_allclose(gradient, together[name], rtol=1e-10, atol=1e-12, err_msg=name)


# -- the model as a whole -----------------------------------------------------------------------------------------

def test_buckets_come_in_the_order_of_the_backward():
    for tied in (True, False):
        model = small_model(tied=tied)
        batch = batch_of(2, 8, 31)
        _, saved = model.forward(batch)
        order = []
        model.backward(saved, batch, lambda bucket: order.append(bucket.name))
        assert order == ["head", "blocks.1", "blocks.0", "embedding"] and [bucket.name for bucket in model.buckets] == order[::-1]
        names = [parameter.name for parameter in model.parameters()]
        assert ("head.weight" in names) != tied and len(set(names)) == len(names)


def test_initial_values_have_the_published_spread():
    model = Transformer(OPS, small_shape("gpt", width=100, layers=8, mlp_width=400, vocabulary=500), np.float64, 1)
    model.place()
    model.initialize()
    for parameter in model.parameters():
        residual = parameter.name.endswith(("attention.output.weight", "mlp.down.weight"))
        if len(parameter.shape) == 2:
            std = 0.02 / 4 if residual else 0.02
            assert abs(parameter.value.std() / std - 1) < 6 / (2 * parameter.value.size) ** 0.5, parameter.name
        else:
            assert (parameter.value == (1.0 if parameter.name.endswith("norm.weight") else 0.0)).all()


def test_the_loss_of_a_fresh_model_is_that_of_guessing():
    model = small_model(spread=0.0)
    batch = batch_of(8, 9, 31)
    assert abs(model.forward(batch)[0] / batch.scale.sum() - np.log(31)) < 0.06


def test_logits_agree_with_the_loss_and_with_next_logits():
    model, batch = small_model(), batch_of(3, 8, 31)
    logits = model.logits(batch)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch.targets[..., None], 2)[..., 0]
    assert abs((nll * batch.scale).sum() / model.forward(batch)[0] - 1) < 1e-12
    np.testing.assert_allclose(model.next_logits(batch), logits[:, -1], rtol=1e-12)


def test_shapes_left_out_are_filled_in():
    gpt = Shape.of(Model("gpt", 2, 24, 6, 16), 50)
    assert (gpt.kv_heads, gpt.head_width, gpt.mlp_width, gpt.vocabulary) == (6, 4, 96, 50)
    llama = Shape.of(Model("llama", 2, 96, 6, 16, kv_heads=2, vocabulary=64), 50)
    assert (llama.kv_heads, llama.mlp_width, llama.vocabulary) == (2, 256, 64)
    assert Shape.of(Model("llama", 2, 97, 1, 16), 50).mlp_width == 320


def test_flops_of_a_token():
    model = small_model(family="llama", layers=2, width=20, heads=5, context=9, vocabulary=31, mlp_width=13)
    matrices = 2 * (20 * 20 + 2 * 4 * 20 + 20 * 20 + 3 * 13 * 20) + 31 * 20
    assert model.flops_per_token() == 6 * matrices + 12 * 2 * 5 * 4 * 9


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_flops_of_a_token_count_every_matrix(family):
    shape = small_shape(family, tied=False)
    parameters = small_model(family=family, tied=False).parameters()
    matrices = sum(p.value.size for p in parameters if len(p.shape) == 2 and "embedding" not in p.name)
    assert shape.flops_per_token() == 6 * matrices + 12 * shape.layers * shape.heads * shape.head_width * shape.context


def test_flops_of_a_token_count_the_experts_that_it_is_sent_to():
    dense, sent = small_shape(), 2 + 1
    experts = dense._replace(experts=8, experts_per_token=2, shared_experts=1)
    one_expert, router = 3 * dense.mlp_width * dense.width, 8 * dense.width
    assert experts.flops_per_token() - dense.flops_per_token() == 6 * dense.layers * ((sent - 1) * one_expert + router)
