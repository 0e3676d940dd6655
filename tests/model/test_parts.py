"""The parts that a pipeline cuts the model into: how blocks are dealt, and that the stages together are the model."""

import itertools

import numpy as np
import pytest

from gradient_check import OPS, batch_of, gradients_of, run, small_model, small_shape, values
from mpillm.layout.mesh import Mesh
from mpillm.model.shape import Layout, layers_of_parts
from mpillm.model.transformer import Transformer

SHAPE = small_shape(width=20, heads=5, kv_heads=5, mlp_width=40, context=160)
BLOCK = 4 * 20 * 20 + 3 * 20 * 40 + 20 * 160        # cost of a block of this shape, in multiply-adds of a token


def with_table(cost, layers):
    """The shape with an output table of `cost` blocks."""
    return SHAPE._replace(layers=layers, vocabulary=int(BLOCK * cost) // SHAPE.width)


@pytest.mark.parametrize("table, num_parts, layers, expected", [
    (1, 1, 3, (3,)), (1, 2, 8, (5, 3)), (1, 2, 7, (4, 3)), (1, 4, 11, (3, 3, 3, 2)), (2, 2, 8, (5, 3)), (3, 3, 9, (4, 4, 1)),
    (0, 3, 7, (3, 2, 2)), (1, 3, 2, (1, 1, 0)), (1, 5, 2, (1, 1, 0, 0, 0)), (9, 2, 3, (3, 0)),
])
def test_blocks_are_dealt_by_cost(table, num_parts, layers, expected):
    assert layers_of_parts(with_table(table, layers), num_parts) == expected


@pytest.mark.parametrize("table", [0.5, 1.25, 2.0, 3.5])
def test_no_other_deal_has_a_smaller_largest_cost(table):
    for num_parts, layers in itertools.product((1, 2, 3, 4), range(7)):
        largest = {deal: max(deal[-1] + table, *deal[:-1], 0) for deal in itertools.product(range(layers + 1), repeat=num_parts)
                   if sum(deal) == layers}
        found = layers_of_parts(with_table(table, layers), num_parts)
        assert largest[found] == min(largest.values()), (num_parts, layers, found)


def test_blocks_are_dealt_by_hand():
    assert layers_of_parts(small_shape(layers=5), 3, [0, 4, 1]) == (0, 4, 1)
    model = Transformer(OPS, small_shape(layers=5), np.float64, mesh=Mesh.plan({"pp": 2}, 1), layout=Layout(chunks=2, layers=(0, 1, 2, 2)))
    assert list(model.blocks) == [0, 3, 4] and [len(part.units) for part in model.parts] == [1, 3]      # the last part has the loss too


def stages_of(stages, chunks, **shape):
    """The model of each stage."""
    meshes, layout = [Mesh.plan({"pp": stages}, rank) for rank in range(stages)], Layout(chunks=chunks)
    return [Transformer(OPS, small_shape(**shape), np.float64, mesh=mesh, layout=layout) for mesh in meshes]


LAYOUTS = [(1, 1, 2), (2, 1, 5), (3, 1, 2), (4, 1, 1), (2, 2, 5), (4, 3, 7), (4, 2, 3)]     # stages, chunks, layers


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("stages, chunks, layers", LAYOUTS)
def test_the_parts_of_all_stages_are_the_model(stages, chunks, layers, tied):
    models, units = stages_of(stages, chunks, layers=layers, tied=tied), []
    assert all(len(model.parts) == chunks for model in models)
    for number in range(stages * chunks):
        part = models[number % stages].parts[number // stages]
        assert (part.first, part.last) == (number == 0, number == stages * chunks - 1)
        units += [getattr(unit, "name", type(unit).__name__) for unit in part.units]
    assert units == ["First"] + [f"blocks.{index}" for index in range(layers)] + ["Last"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("stages, chunks, layers", LAYOUTS)
def test_every_parameter_is_on_one_stage_and_a_tied_table_on_both_ends(stages, chunks, layers, tied):
    models, expected = stages_of(stages, chunks, layers=layers, tied=tied), small_model(layers=layers, tied=tied).parameters()
    names = [parameter.name for parameter in expected]
    for model in models:
        assert [(p.name, p.shape, p.decay) for p in model.every_parameter()] == [(p.name, p.shape, p.decay) for p in expected]
        assert all(p in model.every_parameter() for p in model.parameters())
    found = [parameter.name for model in models for parameter in model.parameters()]
    twice = ["embedding.tokens.weight"] if tied and stages > 1 else []
    assert sorted(found) == sorted(names + twice)
    for name in twice:
        assert name in [p.name for p in models[0].first.parameters] and name in [p.name for p in models[-1].last.parameters]


@pytest.mark.parametrize("family", ["gpt", "llama"])
@pytest.mark.parametrize("stages, chunks, layers", [(2, 1, 3), (3, 1, 1), (2, 2, 3)])
def test_parts_one_after_the_other_compute_what_the_whole_model_does(family, stages, chunks, layers):
    """What the executor does, without messages: forward through all parts, backward the other way."""
    whole, batch = small_model(family=family, layers=layers, tied=False), batch_of(3, 8, vocabulary=31, dropout=0.1)
    loss, expected = run(whole, batch), gradients_of(whole)
    models = stages_of(stages, chunks, family=family, layers=layers, tied=False)
    for model in models:
        model.place()
        for parameter in model.parameters():
            parameter.value[...] = next(p.value for p in whole.parameters() if p.name == parameter.name)
    x, kept, done = None, [], []
    parts = [models[number % stages].parts[number // stages] for number in range(stages * chunks)]
    for part in parts:
        x, saved = part.forward(x, batch)
        kept.append(saved)
    assert x == loss
    dx = None
    for part in reversed(parts):
        dx = part.backward(dx, kept.pop(), batch, done.append)
    assert dx is None and [bucket.name for bucket in done] == [bucket.name for part in reversed(parts) for bucket in reversed(part.buckets)]
    for model in models:
        for name, gradient in gradients_of(model).items():
            np.testing.assert_array_equal(gradient, expected[name], err_msg=name)


def test_a_part_without_units_hands_on_what_it_gets():
    model, = [each for each in stages_of(3, 1, layers=1) if not each.parts[0].units]
    x = values(6, 20)
    y, saved = model.parts[0].forward(x, batch_of(2, 3))
    assert y is x and saved == [] and model.parts[0].backward(x, saved, batch_of(2, 3)) is x
    assert model.parameters() == [] and model.buckets == [] and not model.parts[0].first and not model.parts[0].last
