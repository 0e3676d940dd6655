"""Every layer by itself: backward against finite differences of forward, in float64."""

import numpy as np
import pytest

from gradient_check import OPS, batch_of, check_layer, check_slopes, parameters, small_shape, values
from mpillm.backend.reference import Reference
from mpillm.layout.comm import Solo
from mpillm.layout.mesh import Mesh
from mpillm.layout.parameter import Stack
from mpillm.model.attention import Attention, Heads
from mpillm.model.block import Block, Recompute, Setting
from mpillm.model.context import Local
from mpillm.model.embedding import Embedding
from mpillm.model.linear import Linear, RowLinear
from mpillm.model.loss import OutputLoss
from mpillm.model.mlp import GeluMLP, SwiGLU
from mpillm.model.norm import LayerNorm, RMSNorm
from mpillm.model.region import Region
from mpillm.model.rope import Rope, angles
from mpillm.model.shape import Layout

REGION = Region(Solo(), False)       # of one rank
KEPT = pytest.mark.parametrize("light", [False, True], ids=["kept", "light"])


# -- products and norms -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("rows", [1, 11])
def test_linear(biased, rows):
    made = parameters(w=(5, 7), **({"b": (5,)} if biased else {}))
    layer, x = Linear(OPS, *made), values(rows, 7)
    np.testing.assert_allclose(layer.forward(x)[0], x @ made[0].value.T + (made[1].value if biased else 0), rtol=1e-13, atol=1e-13)
    check_layer(made, x, lambda: layer.forward(x), layer.backward)


def test_linear_of_stacked_parameters():
    made = parameters(q=(4, 6), k=(2, 6), v=(3, 6), bq=(4,), bk=(2,), bv=(3,))
    layer, x = Linear(OPS, Stack(*made[:3]), Stack(*made[3:])), values(8, 6)
    separate = np.concatenate([x @ w.value.T + b.value for w, b in zip(made[:3], made[3:])], axis=1)
    np.testing.assert_allclose(layer.forward(x)[0], separate, rtol=1e-13, atol=1e-13)
    check_layer(made, x, lambda: layer.forward(x), layer.backward)


def test_linear_with_a_gelu_gives_what_is_before_it_too():
    made = parameters(w=(5, 7), b=(5,))
    x = values(3, 7)
    hidden, y, saved = Linear(OPS, *made).forward_gelu(x)
    np.testing.assert_allclose(hidden, Linear(OPS, *made).forward(x)[0], rtol=1e-14)
    np.testing.assert_allclose(y, OPS.gelu(hidden.copy()), rtol=1e-14)
    assert saved.x is x


@pytest.mark.parametrize("width", [1, 2, 7, 16])
def test_rms_norm(width):
    made = parameters(w=(width,))
    layer, x = RMSNorm(OPS, made[0], 1e-5), values(9, width)
    expected = made[0].value * x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer.forward(x)[0], expected, rtol=1e-12)
    if width > 1:
        check_layer(made, x, lambda: layer.forward(x), layer.backward)


@pytest.mark.parametrize("width", [3, 7, 16])
def test_layer_norm(width):
    made = parameters(w=(width,), b=(width,))
    layer, x = LayerNorm(OPS, *made, 1e-5), values(9, width)
    centred = x - x.mean(1, keepdims=True)
    expected = made[0].value * centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) + made[1].value
    np.testing.assert_allclose(layer.forward(x)[0], expected, rtol=1e-11)
    check_layer(made, x, lambda: layer.forward(x), layer.backward)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_row_linear_on_one_rank_is_a_linear(biased):
    made = parameters(w=(5, 7), **({"b": (5,)} if biased else {}))
    weight, bias = made[0], made[1] if biased else None
    layer, x = RowLinear(OPS, weight, bias, REGION), values(11, 7)
    np.testing.assert_array_equal(layer.forward(x)[0], Linear(OPS, weight, bias).forward(x)[0])
    check_layer(made, x, lambda: layer.forward(x), layer.backward)


def test_a_linear_writes_where_it_is_told():
    made, x, out = parameters(w=(5, 7), b=(5,)), values(3, 7), np.full((3, 9), np.nan)
    y, _ = Linear(OPS, *made).forward(x, out=out[:, 2:7])
    assert np.shares_memory(y, out) and np.isnan(out[:, :2]).all() and np.isnan(out[:, 7:]).all()
    np.testing.assert_array_equal(out[:, 2:7], Linear(OPS, *made).forward(x)[0])


@KEPT
def test_gelu_mlp(light):
    made = parameters(u=(11, 6), bu=(11,), d=(6, 11), bd=(6,))
    layer = GeluMLP(OPS, Linear(OPS, *made[:2]), RowLinear(OPS, *made[2:], REGION), REGION, light)
    x, batch = values(9, 6), batch_of(3, 3)
    check_layer(made, x, lambda: layer.forward(x, batch), lambda dy, saved: layer.backward(dy, saved, batch))


@KEPT
def test_swiglu(light):
    made = parameters(g=(11, 6), u=(11, 6), d=(6, 11))
    layer = SwiGLU(OPS, Linear(OPS, Stack(*made[:2])), RowLinear(OPS, made[2], None, REGION), REGION, light)
    x, batch = values(9, 6), batch_of(3, 3)
    gate, up = x @ made[0].value.T, x @ made[1].value.T
    np.testing.assert_allclose(layer.forward(x, batch)[0], (gate / (1 + np.exp(-gate)) * up) @ made[2].value.T, rtol=1e-12)
    check_layer(made, x, lambda: layer.forward(x, batch), lambda dy, saved: layer.backward(dy, saved, batch))


# -- embedding ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("positions", [False, True], ids=["tokens", "positions"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("first", [0, 3])
def test_embedding(positions, dropout, first):
    made = parameters(tokens=(7, 6), **({"positions": (9, 6)} if positions else {}))
    layer = Embedding(OPS, made[0], made[1] if positions else None, REGION, 77)
    batch = batch_of(3, 5, dropout=dropout, first=first)        # 15 tokens of 7: some twice
    check_layer(made, None, lambda: layer.forward(batch), lambda dy, saved: layer.backward(dy, saved, batch))
    if not dropout:
        rows = made[0].value[batch.tokens] + (made[1].value[first:first + 5] if positions else 0)
        np.testing.assert_array_equal(layer.forward(batch)[0], rows.reshape(15, 6))


def test_embedding_of_part_of_a_sequence_drops_as_the_whole():
    made = parameters(tokens=(7, 6), positions=(9, 6))
    layer, whole = Embedding(OPS, *made, REGION, 77), batch_of(3, 9, dropout=0.4)
    part = whole._replace(tokens=whole.tokens[1:, 4:8], positions=whole.positions[4:8], samples=whole.samples[1:])
    np.testing.assert_array_equal(layer.forward(part)[0].reshape(2, 4, 6), layer.forward(whole)[0].reshape(3, 9, 6)[1:, 4:8])


# -- attention ----------------------------------------------------------------------------------------------------

def attention(heads, kv_heads, d, width, rope, biased=False, light=False, apart=False):
    """`apart`: queries in a Linear of their own, as where key/value heads are held by several ranks."""
    shapes = {"q": (heads * d, width), "k": (kv_heads * d, width), "v": (kv_heads * d, width)}
    biases = {"bq": (heads * d,), "bk": (kv_heads * d,), "bv": (kv_heads * d,)} if biased else {}
    made = parameters(**shapes, **biases, o=(width, heads * d))
    stacks = [slice(0, 1), slice(1, 3)] if apart else [slice(0, 3)]
    projections = [Linear(OPS, Stack(*made[:3][part]), Stack(*made[3:6][part]) if biased else None) for part in stacks]
    turn = Rope(OPS, d, 100.0, np.float64) if rope else None
    output, core = RowLinear(OPS, made[-1], None, REGION), Local(OPS, d ** -0.5)
    return made, Attention(OPS, projections, output, Heads(heads, kv_heads, d, 0), turn, core, REGION, 99, light)


@pytest.mark.parametrize("heads, kv_heads, d, rope, dropout, biased", [
    (2, 2, 3, False, 0.0, False), (2, 2, 3, False, 0.0, True), (4, 2, 4, True, 0.0, False), (5, 1, 2, True, 0.0, False),
    (5, 5, 4, True, 0.3, False), (6, 3, 2, True, 0.3, True), (1, 1, 5, False, 0.5, True),
])
@KEPT
@pytest.mark.parametrize("apart", [False, True], ids=["one projection", "queries apart"])
def test_attention(heads, kv_heads, d, rope, dropout, biased, apart, light):
    made, layer = attention(heads, kv_heads, d, 7, rope, biased, light, apart)
    batch, x = batch_of(2, 6, dropout=dropout), 0.5 * values(12, 7)
    check_layer(made, x, lambda: layer.forward(x, batch), lambda dy, saved: layer.backward(dy, saved, batch))


def test_attention_of_one_token():
    made, layer = attention(2, 1, 4, 7, True)
    batch, x = batch_of(3, 1), values(3, 7)
    y, saved = layer.forward(x, batch)
    value = x @ made[2].value.T                                 # the only key has all the weight
    np.testing.assert_allclose(y, np.concatenate([value, value], 1) @ made[3].value.T, rtol=1e-12)
    layer.backward(np.ones_like(y), saved, batch)
    assert np.abs(made[0].grad).max() < 1e-14 and np.abs(made[1].grad).max() < 1e-14 and made[2].grad.any()


def test_attention_does_not_look_ahead():
    _, layer = attention(4, 2, 4, 7, True)
    batch, x = batch_of(2, 6), values(2, 6, 7)
    before = layer.forward(x.reshape(12, 7), batch)[0].reshape(2, 6, 7)
    x[:, 4:] += 1.0
    after = layer.forward(x.reshape(12, 7), batch)[0].reshape(2, 6, 7)
    np.testing.assert_allclose(after[:, :4], before[:, :4], rtol=1e-13, atol=1e-15)
    assert (np.abs(after[:, 4:] - before[:, 4:]).max(axis=2) > 1e-6).all()


def test_rope_turns_by_position_and_grows():
    cos, sin = angles(np.arange(4), 6, 100.0)
    np.testing.assert_allclose(np.arctan2(sin, cos)[1], 100.0 ** -np.array([0, 1 / 3, 2 / 3]), rtol=1e-14)
    rope = Rope(OPS, 6, 100.0, np.float64)
    for first, last in ((0, 3), (5, 9), (1, 4)):
        for part, whole in zip(rope.at(np.arange(first, last)), angles(np.arange(first, last), 6, 100.0)):
            np.testing.assert_array_equal(part, whole)


@pytest.mark.parametrize("positions", [[0, 1, 6, 7], [2, 3, 4, 5], [7], [0], []], ids=str)
def test_rope_at_the_positions_of_a_context_parallel_rank(positions):
    positions = np.array(positions, np.int64)
    for part, whole in zip(Rope(OPS, 6, 100.0, np.float64).at(positions), angles(positions, 6, 100.0)):
        np.testing.assert_array_equal(part, whole)


# -- output and loss ----------------------------------------------------------------------------------------------

def plain_loss(x, table, batch):
    """The definition: sum of scale * (log sum exp(logits) - logit of the target)."""
    logits = x @ table.T
    nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(x)), batch.targets.reshape(-1)]
    return float(nll @ batch.scale.reshape(-1))


@pytest.mark.parametrize("chunk_elements", [4 * 2**20, 1], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("b, t", [(2, 5), (10, 15), (2, 64)])
def test_output_loss(monkeypatch, chunk_elements, b, t):
    monkeypatch.setattr(Reference, "logit_elements", chunk_elements)
    table, = parameters(table=(31, 6))
    layer, batch, x = OutputLoss(OPS, table, REGION), batch_of(b, t, vocabulary=31), values(b * t, 6)
    num_chunks = 1 if chunk_elements > 1 else -(-b * t // 64)      # 10, 150 and 128 tokens: 1, 3 and 2 chunks
    assert -(-b * t // layer.chunk(b * t)) == num_chunks and layer.chunk(b * t) * num_chunks - b * t < num_chunks
    loss, saved = layer.forward(x, batch)
    assert abs(loss / plain_loss(x, table.value, batch) - 1) < 1e-13
    once, dx = table.grad.copy(), layer.backward(saved)
    check_slopes(lambda: layer.forward(x, batch, training=False)[0], [("table", table.value, once), ("x", x, dx)])
    layer.forward(x, batch)
    np.testing.assert_allclose(table.grad, 2 * once, rtol=1e-11, atol=1e-13)


def test_chunks_change_no_number_beyond_rounding(monkeypatch):
    results = []
    for elements in (4 * 2**20, 1):
        monkeypatch.setattr(Reference, "logit_elements", elements)
        table, = parameters(table=(31, 6))
        layer = OutputLoss(OPS, table, REGION)
        loss, saved = layer.forward(values(150, 6), batch_of(10, 15, vocabulary=31))
        results.append((loss, saved.dx, table.grad))
    for whole, chunked in zip(*results):
        np.testing.assert_allclose(chunked, whole, rtol=1e-12, atol=1e-14)


def test_targets_of_weight_0_count_for_nothing():
    table, = parameters(table=(31, 6))
    layer, batch, x = OutputLoss(OPS, table, REGION), batch_of(4, 5, vocabulary=31), values(20, 6)
    masked = batch.scale == 0
    assert 0 < masked.sum() < 20
    loss, saved = layer.forward(x, batch)
    once = table.grad.copy()
    assert (saved.dx[masked.reshape(-1)] == 0).all() and (np.abs(saved.dx[~masked.reshape(-1)]).max(1) > 0).all()
    table.bucket.clear()
    other = batch._replace(targets=np.where(masked, (batch.targets + 1) % 31, batch.targets))
    assert layer.forward(x, other)[0] == loss
    np.testing.assert_array_equal(table.grad, once)
    empty = batch._replace(scale=np.zeros_like(batch.scale))
    table.bucket.clear()
    loss, saved = layer.forward(x, empty)
    assert loss == 0.0 and not saved.dx.any() and not table.grad.any()


def test_the_loss_of_large_logits_is_finite():
    table, = parameters(table=(5, 2))
    table.value[...] *= 1e4
    loss, saved = OutputLoss(OPS, table, REGION).forward(values(6, 2), batch_of(2, 3, vocabulary=5))
    assert np.isfinite(loss) and np.isfinite(saved.dx).all()


def test_no_gradient_when_not_training():
    table, = parameters(table=(31, 6))
    _, saved = OutputLoss(OPS, table, REGION).forward(values(20, 6), batch_of(4, 5, vocabulary=31), training=False)
    assert saved is None and table.fresh


# -- blocks -------------------------------------------------------------------------------------------------------

def block_of(family, light=False, **shape):
    shape = small_shape(family, **shape)
    rope = Rope(OPS, shape.head_width, 100.0, np.float64) if family == "llama" else None
    mesh = Mesh.plan({}, 0)
    block = Block(0, Setting(OPS, shape, mesh, Layout(), rope, 1, light))
    for bucket in block.buckets:
        bucket.place(mesh, 0, OPS, np.float64)
    for number, parameter in enumerate(block.parameters):
        parameter.value[...] = 0.5 * values(*parameter.shape, seed=number)
    return block


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("family, kv_heads", [("gpt", 5), ("llama", 5), ("llama", 1)])
def test_block(family, kv_heads, dropout, recompute):
    block = block_of(family, recompute == "selective", kv_heads=kv_heads)
    layer = Recompute(block) if recompute == "block" else block
    batch, x = batch_of(2, 6, dropout=dropout), values(12, 20)
    check_layer(block.parameters, x, lambda: layer.forward(x, batch), lambda dy, saved: layer.backward(dy, saved, batch))


def test_a_recomputed_block_keeps_only_its_input():
    x, batch = values(12, 20), batch_of(2, 6)
    assert Recompute(block_of("llama")).forward(x, batch)[1] is x


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_selective_recompute_keeps_neither_activations_nor_attention(family):
    x, batch = values(12, 20), batch_of(2, 6)
    kept, light = [block_of(family, light).forward(x, batch)[1] for light in (False, True)]
    assert kept.attention.out is not None and kept.attention.lse is not None and kept.mlp.down_input is not None
    assert light.attention.out is light.attention.lse is light.mlp.down_input is None


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_names_of_a_block(family):
    names = [parameter.name.removeprefix("blocks.0.") for parameter in block_of(family).parameters]
    linear = ["attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down"]
    norms = ["attention_norm", "mlp_norm"]
    if family == "gpt":
        expected = [f"{name}.{kind}" for name in linear + norms for kind in ("weight", "bias")]
    else:
        expected = [f"{name}.weight" for name in linear + norms + ["mlp.gate"]]
    assert sorted(names) == sorted(expected)
