"""Two checkpoints compared, and one looked into, with the rows of each tensor dealt to any number of ranks."""

import math

import numpy as np
import pytest
from store_states import SHAPES, entries_of, raised, values
from test_checkpoint import data_offset, flip, on_rank_0

from mpillm.backend.reference import Reference
from mpillm.store import checkpoint as checkpoints
from mpillm.store import hyperslab
from mpillm.store.compare import difference, values_of
from mpillm.store.errors import DamagedCheckpoint

pytestmark = pytest.mark.ranks

BACKEND, NAME = Reference(), "masters/blocks.0.mlp.up.weight"     # (10, 7)


def saved(directory, group, dtype="float32", **changes):
    """A checkpoint in which the first elements of the first tensor whose name ends so are other ones."""
    entries = entries_of(group, "columns", dtype=dtype)
    for name, new in changes.items():
        entry = next(entry for entry in entries if entry.name.endswith(name))
        whole = values(entry.name, entry.shape, dtype)
        whole.reshape(-1)[:len(new)] = new
        entry.array[...] = whole[entry.slab.slices()]
    return checkpoints.open_checkpoint(checkpoints.save(directory, 1, entries, {}, {}, group, BACKEND), group)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Two rows of NAME at a time."""
    monkeypatch.setattr(hyperslab, "PIECE", 2 * 7 * 8)


def test_equal_tensors_differ_in_nothing(group, shared_tmp):
    a, b = saved(shared_tmp / "a", group), saved(shared_tmp / "b", group)
    assert all(difference(a, b, name, group, BACKEND) == (0, 0.0, 0.0) for name in SHAPES)


def test_what_differs_is_counted_and_measured(group, shared_tmp):
    a, b = saved(shared_tmp / "a", group, weight=[1.0, 2.0, 0.0, 9.0]), saved(shared_tmp / "b", group, weight=[1.0, 2.5, -0.0, 8.0])
    assert difference(a, b, "masters/embedding.tokens.weight", group, BACKEND) == (2, 1.0, 1 / 9)
    assert difference(a, b, NAME, group, BACKEND) == (0, 0.0, 0.0)


def test_numbers_that_are_not_finite(group, shared_tmp):
    a, b = (saved(shared_tmp / name, group, weight=new) for name, new in (("a", [np.nan, np.inf, np.nan, np.inf]), ("b", [np.nan, np.inf, 1.0, -np.inf])))
    assert difference(a, b, "masters/embedding.tokens.weight", group, BACKEND)[:2] == (2, math.inf)


def test_the_same_numbers_in_another_type_are_equal(group, shared_tmp):
    a, b = saved(shared_tmp / "a", group), saved(shared_tmp / "b", group, "float64")
    narrow = values(NAME, SHAPES[NAME]).astype(np.float64)
    found = difference(a, b, NAME, group, BACKEND)
    assert found.differing == (narrow != values(NAME, SHAPES[NAME], "float64")).sum() > 0 and 0 < found.relative < 1e-7


def test_norm_and_range(group, shared_tmp):
    checkpoint = saved(shared_tmp, group, weight=[np.nan, -50.0, np.inf, 40.0])
    for name in (NAME, "masters/embedding.tokens.weight", "moment1/norm.weight"):
        whole = values(name, SHAPES[name])
        if name.endswith("tokens.weight"):
            whole.reshape(-1)[:4] = [np.nan, -50.0, np.inf, 40.0]
        finite = whole[np.isfinite(whole)].astype(np.float64)
        found = values_of(checkpoint, name, group, BACKEND)
        assert found[1:] == (finite.min(), finite.max(), whole.size - finite.size) and abs(found.norm / np.linalg.norm(finite) - 1) < 1e-14


def test_a_tensor_without_a_finite_number(group, shared_tmp):
    found = values_of(saved(shared_tmp, group, **{"moment1/norm.weight": [np.nan]}), "moment1/norm.weight", group, BACKEND)
    assert (found.norm, found.not_finite) == (0.0, 1) and math.isnan(found.low) and math.isnan(found.high)


def test_damaged_data_is_not_compared(group, shared_tmp):
    a, b = saved(shared_tmp / "a", group), saved(shared_tmp / "b", group)
    state = b.directory / "state.h5"
    on_rank_0(group, lambda: flip(state, data_offset(state, NAME) + 2, 6))
    assert NAME in raised(group, DamagedCheckpoint, lambda: difference(a, b, NAME, group, BACKEND))
