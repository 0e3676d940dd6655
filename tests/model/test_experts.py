"""The mixture-of-experts MLP: against a dense loop over tokens and experts, on every layout, and on arrays without data."""

import numpy as np
import pytest

from gradient_check import OPS, check_slopes, values
from mpillm.backend.shapes import Shapes
from mpillm.layout.comm import Solo
from mpillm.layout.journal import Journal
from mpillm.layout.mesh import Mesh
from mpillm.layout.parameter import Constant, Parameter, Stack, buckets_of
from mpillm.layout.slab import cut, token_ranges
from mpillm.model.batch import Batch
from mpillm.model.experts import Experts
from mpillm.model.linear import Linear, RowLinear
from mpillm.model.mlp import SwiGLU
from mpillm.model.region import Region

pytestmark = pytest.mark.ranks

C, F, G = 6, 7, 5               # width, channels of an expert, of the shared expert: uneven under tp
BALANCE, Z = 0.3, 0.2
ONE = Mesh.plan({}, 0)


def layer_on(mesh, num_experts, k, shared=False, push=(0, 0.0), sequence=False, ops=OPS, **options):
    """A layer on its rank of `mesh` and {name: Parameter}; `push` is added to the first column of one expert's router row."""
    made = {"router": Parameter("router", (num_experts, C), Constant(0.0), partial=True)}
    shapes = {"gate": (num_experts, F, C), "up": (num_experts, F, C), "down": (num_experts, C, F)}
    if shared:
        shapes |= {"shared_gate": (G, C), "shared_up": (G, C), "shared_down": (C, G)}
    for name, shape in shapes.items():
        axes = (None, "tp") if name.endswith("down") else ("tp", None)
        made[name] = Parameter(name, shape, Constant(0.0), ("ep",) * (len(shape) - 2) + axes)
    for bucket in buckets_of("layer", made.values(), mesh):
        bucket.place(mesh, 0, ops, np.float64)
        ops.fill(bucket.grads, np.nan)          # that nobody reads before it is written
    for number, parameter in enumerate(made.values()):
        whole = values(*parameter.shape, seed=number)
        if parameter.name == "router":
            whole[push[0], 0] += push[1]
        ops.copy(parameter.value, np.ascontiguousarray(whole[parameter.held.slices()]))
    always = None
    if shared:
        both, down = Stack(made["shared_gate"], made["shared_up"]), made["shared_down"]
        region = Region(Solo(), False)
        always = SwiGLU(ops, Linear(ops, both), RowLinear(ops, down, None, region), region)
    matrices = [made[name] for name in ("router", "gate", "up", "down")]
    losses = {"balance": BALANCE, "z": Z} | options
    return Experts(ops, *matrices, always, mesh, Region(mesh["tp"], sequence), k, **losses), made


def batch_of(b, t, length=0, share=None):
    return Batch(np.zeros((b, t), np.int64), None, None, np.arange(t), np.arange(b), 0, 0.0, length, share, np.zeros(2))


def even(b):
    """(b,): the share of each of b sequences."""
    return np.full(b, 1.0 / max(1, b))


def inputs(b, t, push=(0, 0.0)):
    """x, dy (b, t, C); where the router is pushed, x is 1 in the first channel."""
    x = values(b, t, C, seed=60)
    if push[1]:
        x[..., 0] = 1.0
    return x, values(b, t, C, seed=61)


def run(layer, made, x, dy, batch):
    """y, dx and the gradients of the parameters, from one pass."""
    y, saved = layer.forward(x, batch)
    dx = layer.backward(dy, saved, batch)
    return y, dx, {name: parameter.grad for name, parameter in made.items()}


def close(found, expected, tolerance=1e-12):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max(initial=0.0)))


# -- against a dense loop -----------------------------------------------------------------------------------------

def swiglu(x, gate, up, down):
    g = gate @ x
    return down @ (g / (1.0 + np.exp(-g)) * (up @ x))


def dense(x, weights, k, b, t, share):
    """y (N, C) and the two losses, a token and an expert at a time."""
    num_experts = len(weights["router"])
    y, counts, means = np.zeros_like(x), np.zeros((b, num_experts)), np.zeros((b, num_experts))
    z = 0.0
    for n, token in enumerate(x):
        logits = weights["router"] @ token
        chosen = sorted(range(num_experts), key=lambda expert: (-logits[expert], expert))[:k]
        total = sum(np.exp(logits[expert]) for expert in chosen)
        for expert in chosen:
            matrices = [weights[name][expert] for name in ("gate", "up", "down")]
            y[n] += np.exp(logits[expert]) / total * swiglu(token, *matrices)
            counts[n // t, expert] += 1
        if "shared_gate" in weights:
            y[n] += swiglu(token, weights["shared_gate"], weights["shared_up"], weights["shared_down"])
        means[n // t] += np.exp(logits) / np.exp(logits).sum() / t
        z += share[n // t] / t * np.log(np.exp(logits).sum()) ** 2
    balance = sum(share[i] * num_experts * (counts[i] / (k * t)) @ means[i] for i in range(b))
    return y, BALANCE * balance, Z * z


@pytest.mark.parametrize("num_experts, k, shared", [(1, 1, False), (3, 1, True), (3, 3, False), (5, 2, True), (8, 3, False)])
@pytest.mark.parametrize("push", [(0, 0.0), (0, -30.0), (0, 30.0)], ids=["spread", "one starves", "one gets all"])
def test_against_a_dense_loop(num_experts, k, shared, push):
    b, t, share = 3, 4, np.array([0.5, 0.0, 0.5])               # one filler
    layer, made = layer_on(ONE, num_experts, k, shared, push)
    x, dy = [array.reshape(b * t, C) for array in inputs(b, t, push)]
    batch, before, dy_before = batch_of(b, t, t, share), x.copy(), dy.copy()
    y, dx, grads = run(layer, made, x, dy, batch)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(dy, dy_before)
    weights = {name: parameter.value for name, parameter in made.items()}
    expected, balance, z = dense(x, weights, k, b, t, share)
    close(y, expected, 1e-13)
    np.testing.assert_allclose(batch.auxiliary, [balance, z], rtol=1e-12)

    def total():
        y, balance, z = dense(x, weights, k, b, t, share)
        return np.vdot(y, dy) + balance + z
    check_slopes(total, [("x", x, dx)] + [(name, weights[name], grads[name]) for name in weights])


@pytest.mark.parametrize("options, batch", [({}, batch_of(2, 5)), ({"balance": 0.0, "z": 0.0}, batch_of(2, 5, 5, even(2)))],
                         ids=["no share", "no coefficients"])
def test_without_auxiliary_losses(options, batch):
    layer, made = layer_on(ONE, 5, 2, **options)
    x, dy = [array.reshape(10, C) for array in inputs(2, 5)]
    _, dx, grads = run(layer, made, x, dy, batch)
    weights = {name: parameter.value for name, parameter in made.items()}
    check_slopes(lambda: np.vdot(dense(x, weights, 2, 2, 5, [0, 0])[0], dy),
                 [("x", x, dx)] + [(name, weights[name], grads[name]) for name in weights])
    assert not batch.auxiliary.any()


def test_losses_that_nobody_asks_for_still_have_gradients():
    share, results = even(2), []
    x, dy = [array.reshape(10, C) for array in inputs(2, 5)]
    for batch in (batch_of(2, 5, 5, share), batch_of(2, 5, 5, share)._replace(auxiliary=None)):
        results.append(run(*layer_on(ONE, 5, 2), x, dy, batch))
    np.testing.assert_array_equal(results[0][1], results[1][1])


# -- gradients ----------------------------------------------------------------------------------------------------

def test_light_changes_nothing():
    x, dy = [array.reshape(12, C) for array in inputs(3, 4)]
    results = [run(*layer_on(ONE, 5, 2, light=light), x, dy, batch_of(3, 4, 4, even(3))) for light in (False, True)]
    for full, light in zip(*[(y, dx, *grads.values()) for y, dx, grads in results]):
        np.testing.assert_array_equal(full, light)


@pytest.mark.parametrize("deferred", [False, True], ids=["now", "later"])
def test_gradients_are_added_up_over_micro_batches(deferred):
    """The expert that starves in the first micro-batch gets rows in the second, and the other way round."""
    passes = [(push, inputs(3, 4, push)) for push in ((2, -30.0), (2, 30.0))]
    layer, made = layer_on(ONE, 5, 1)
    buckets = {id(parameter.bucket): parameter.bucket for parameter in made.values()}.values()
    expected = {name: 0.0 for name in made}
    for bucket in buckets if deferred else ():
        bucket.defer()
    for push, (x, dy) in passes:
        x[..., 0] = np.sign(push[1])        # the router below has a large number there
        single = layer_on(ONE, 5, 1, push=(2, 30.0))
        layer.router.value[...] = single[0].router.value
        for target, made_by in ((layer, made), single):
            grads = run(target, made_by, x.reshape(12, C), dy.reshape(12, C), batch_of(3, 4, 4, even(3)))[2]
        expected = {name: expected[name] + grads[name] for name in made}
    for bucket in buckets if deferred else ():
        assert np.isnan(bucket.grads).all()
        for work in bucket.deferred_work():
            work()
    for name, parameter in made.items():
        close(parameter.grad, expected[name], 1e-14)
        assert np.abs(parameter.grad[2]).max() > 0


# -- every layout against one rank --------------------------------------------------------------------------------

def half(n):
    """A factor of n that is not n, where there is one."""
    return 2 if n == 4 else 1


LAYOUTS = {     # of n ranks
    "dp": lambda n: {"dp": n}, "dp=ep": lambda n: {"dp": n, "ep": n}, "dp ep": lambda n: {"dp": n, "ep": half(n)},
    "cp=ep": lambda n: {"cp": n, "ep": n}, "dp cp=ep": lambda n: {"dp": half(n), "cp": n // half(n), "ep": n},
    "tp": lambda n: {"tp": n}, "tp sequence": lambda n: {"tp": n},
    "ep tp": lambda n: {"dp": n // half(n), "ep": n // half(n), "tp": half(n)},
    "ep tp sequence": lambda n: {"cp": n // half(n), "ep": n // half(n), "tp": half(n)},
}
meshes = {}


def mesh_of(group, layout):
    """The mesh of a layout over all ranks, made once."""
    sizes = tuple(LAYOUTS[layout](group.size).items())
    if sizes not in meshes:
        meshes[sizes] = Mesh(group, dict(sizes))
    return meshes[sizes]


def check_layout(group, layout, b, t, num_experts, k, share, shared=False, push=(0, 0.0)):
    """Results on this rank, and gradients summed over all ranks, against those of one rank that holds everything."""
    mesh, sequence = mesh_of(group, layout), layout.endswith("sequence")
    x, dy = inputs(b, t, push)
    batch = batch_of(b, t, t, share)
    expected = run(*layer_on(ONE, num_experts, k, shared, push), x.reshape(-1, C), dy.reshape(-1, C), batch)

    start, size = cut(b, mesh.size("dp"), mesh.coord("dp"))
    positions = np.concatenate([np.arange(first, first + extent) for first, extent in token_ranges(t, mesh.size("cp"), mesh.coord("cp"))])
    own_batch = batch_of(size, len(positions), t, share[start:start + size])
    layer, made = layer_on(mesh, num_experts, k, shared, push, sequence)
    first, rows = layer.region.rows(own_batch.num_rows)

    def own(array):
        mine = array.reshape(b, t, C)[start:start + size, positions].reshape(-1, C)
        return np.ascontiguousarray(mine[first:first + rows])
    y, dx, grads = run(layer, made, own(x), own(dy), own_batch)
    close(y, own(expected[0]))
    close(dx, own(expected[1]))
    close(group.all_reduce(own_batch.auxiliary), batch.auxiliary)
    for name, parameter in made.items():
        total = np.zeros(parameter.shape)
        total[parameter.held.slices()] = grads[name]
        close(group.all_reduce(total), expected[2][name])


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("num_experts", [3, 5, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(group, layout, num_experts, k):
    share = np.array([0.25, 0.25, 0.0, 0.25, 0.25])
    check_layout(group, layout, 5, 9, num_experts, k, share, shared=(num_experts + k) % 2 == 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("push", [(1, -30.0), (0, 30.0), (3, 30.0)], ids=["one starves", "the first gets all", "the last gets all"])
@pytest.mark.parametrize("k", [1, 2])
def test_uneven_to_the_extreme(group, layout, push, k):
    check_layout(group, layout, 4, 6, 4, k, even(4), push=push)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("b, t, num_experts", [(0, 3, 2), (1, 1, 5), (2, 1, 2), (1, 2, 5), (4, 1, 2)])
def test_few_tokens(group, layout, b, t, num_experts):
    check_layout(group, layout, b, t, num_experts, 2, even(b), shared=True)


def test_one_rank_of_experts_sends_nothing(group, monkeypatch):
    sent = []
    monkeypatch.setattr(Solo, "all_to_all", lambda self, x, send, receive, out: (sent.append(x.dtype), out.__setitem__(..., x)))
    x, dy = [array.reshape(12, C) for array in inputs(3, 4)]
    run(*layer_on(ONE, 5, 2), x, dy, batch_of(3, 4))
    assert sent == [np.int64]               # the counts


# -- without data -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("light", [False, True], ids=["full", "light"])
@pytest.mark.parametrize("sequence", [False, True], ids=["same", "split"])
def test_without_data(light, sequence):
    b, t, num_experts, k, flops = 2, 6, 8, 2, 0
    for rank in range(8):
        ops, journal = Shapes(), Journal()
        mesh = Mesh.plan({"dp": 4, "tp": 2, "ep": 4}, rank, journal=journal, empty=ops.empty)
        layer, made = layer_on(mesh, num_experts, k, shared=True, sequence=sequence, ops=ops, light=light)
        kept = ops.live
        rows = layer.region.rows(b * t)[1]
        x, batch = ops.empty((rows, C), np.float64), batch_of(b, t, t, even(8)[:b])
        y, saved = layer.forward(x, batch)
        assert y.shape == x.shape and layer.backward(y, saved, batch).shape == x.shape
        assert journal.traffic["ep", "all_to_all"][0] == 5      # counts, rows there and back, gradients there and back
        flops += ops.flops
        del x, y, saved
        assert ops.live == kept
    expert_products, router_products = 9 * 2 * C * F * k * b * t * 4, 3 * 2 * C * num_experts * b * t * 8
    assert flops == expert_products + router_products + 9 * 2 * C * G * b * t * 4
