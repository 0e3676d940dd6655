"""Finite differences along random directions, and small layers to try them on."""

import numpy as np

from mpillm.backend import open_backend
from mpillm.layout.mesh import Mesh
from mpillm.layout.parameter import Bucket, Constant, Parameter
from mpillm.model.batch import Batch
from mpillm.model.shape import Shape
from mpillm.model.transformer import Transformer

OPS = open_backend("cpu")
STEP = 1e-3                     # of the differences; their error is of order STEP^4
TOLERANCE = 1e-8                # relative, of a directional derivative in float64
DIRECTIONS = 3


def values(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def parameters(**shapes):
    """Placed float64 parameters with random values, in one bucket, in the order given."""
    made = [Parameter(name, shape, Constant(0.0)) for name, shape in shapes.items()]
    Bucket("layer", made).place(Mesh.plan({}, 0), 0, OPS, np.float64)
    for number, parameter in enumerate(made):
        parameter.value[...] = values(*parameter.shape, seed=100 + number)
    return made


def batch_of(b, t, vocabulary=7, dropout=0.0, first=0, seed=0):
    """Random tokens, targets and weights (a third of them 0) of samples 10, 11, ... at positions first, first + 1, ..."""
    random = np.random.default_rng(seed)
    tokens, targets = random.integers(0, vocabulary, (2, b, t))
    scale = random.random((b, t)) * (random.random((b, t)) > 1 / 3)
    return Batch(tokens, targets, scale, np.arange(first, first + t), np.arange(10, 10 + b), 3, dropout, first + t)


def slope(function, array, direction):
    """The derivative of function() along `direction` of `array`: five-point central difference."""
    start, results = array.copy(), []
    for factor in (2, 1, -1, -2):
        array[...] = start + factor * STEP * direction
        results.append(function())
    array[...] = start
    return (8 * (results[1] - results[2]) - (results[0] - results[3])) / (12 * STEP)


def check_slopes(function, pairs):
    """Compares gradients with differences of function().

    Parameters
    ----------
    function : callable -> float
    pairs : list of (name, array, gradient)

    Returns
    -------
    float
        The worst difference, relative to the slope or to the size of the gradients, whichever is larger.
    """
    largest = max(np.linalg.norm(gradient) for _, _, gradient in pairs)
    worst = 0.0
    for name, array, gradient in pairs:
        random = np.random.default_rng(len(name))
        for _ in range(DIRECTIONS):
            direction = random.normal(size=array.shape)
            direction /= np.linalg.norm(direction)
            expected, found = slope(function, array, direction), float(np.vdot(gradient, direction))
            difference = abs(expected - found) / max(abs(found), 0.1 * np.linalg.norm(gradient), 1e-3 * largest)
            assert difference < TOLERANCE, f"{name}: {found} instead of {expected}"
            worst = max(worst, difference)
    return worst


def check_layer(made, x, forward, backward):
    """A layer's backward against differences of its forward, and that gradients are added to what is there.

    Parameters
    ----------
    made : list of Parameter
    x : array or None
        The input; None for a layer without one.
    forward : callable -> (y, saved); reads `x` and the parameters
    backward : callable (dy, saved) -> dx or None
    """
    inputs = None if x is None else x.copy()
    y, saved = forward()
    if x is not None:
        np.testing.assert_array_equal(x, inputs)        # forward leaves its input alone
    dy = values(*y.shape, seed=50)
    dx = backward(dy.copy(), saved)
    pairs = [(parameter.name, parameter.value, parameter.grad.copy()) for parameter in made]
    if x is not None:
        pairs.append(("x", x, dx))
    check_slopes(lambda: float(np.vdot(forward()[0], dy)), pairs)
    backward(dy.copy(), forward()[1])
    for parameter, (_, _, once) in zip(made, pairs):
        np.testing.assert_allclose(parameter.grad, 2 * once, rtol=1e-12, atol=1e-12 * np.abs(once).max())


def small_shape(family="llama", tied=True, heads=5, kv_heads=None, layers=2, width=20, context=9, vocabulary=31, mlp_width=13):
    return Shape(family, layers, width, heads, kv_heads or (heads if family == "gpt" else 1), width // heads, mlp_width, context,
                 vocabulary, tied, 10000.0, 1e-5)


def small_model(dtype=np.float64, recompute="none", seed=1, spread=0.3, **shape):
    """A placed model on one rank, its initial values moved by random ones so that no bias is zero."""
    model = Transformer(OPS, small_shape(**shape), dtype, seed, recompute)
    model.place()
    model.initialize()
    for number, parameter in enumerate(model.parameters()):
        parameter.value[...] += (spread * values(*parameter.shape, seed=number)).astype(dtype)
    return model


def run(model, batch):
    """Loss of a batch, with the gradients added."""
    loss, saved = model.forward(batch)
    model.backward(saved, batch)
    return loss


def gradients_of(model):
    return {parameter.name: parameter.grad.copy() for parameter in model.parameters()}


def clear(model):
    for bucket in model.buckets:
        bucket.clear()
