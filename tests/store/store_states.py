"""A small state with every kind of tensor, and ways to cut it over the ranks of a group."""

import zlib

import numpy as np

from mpillm.layout.slab import Slab
from mpillm.store.hyperslab import Entry

SHAPES = {
    "masters/embedding.tokens.weight": (37, 12),
    "masters/blocks.0.mlp.up.weight": (10, 7),
    "masters/norm.weight": (5,),
    "moment1/norm.weight": (1,),
    "moment2/blocks.0.mlp.up.weight": (1, 9),
    "communication/residual/blocks.0.mlp.up.weight": (3, 10, 7),
}


def values(name, shape, dtype="float32"):
    """The whole tensor: a function of its name."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(dtype)


def by_rows(shape, rank, size):
    return Slab.whole(shape).cut(0, size, rank)


def by_columns(shape, rank, size):
    return Slab.whole(shape).cut(len(shape) - 1, size, rank)


def by_both(shape, rank, size):
    """Two column parts where there are at least two ranks, rows within them; on three ranks one part is uneven."""
    if size == 1 or len(shape) == 1:
        return by_rows(shape, rank, size)
    left = size // 2
    part, index, parts = (0, rank, left) if rank < left else (1, rank - left, size - left)
    return Slab.whole(shape).cut(len(shape) - 1, 2, part).cut(len(shape) - 2, parts, index)


def on_last(shape, rank, size):
    return Slab.whole(shape) if rank == size - 1 else Slab((0,) * len(shape), (0,) * len(shape))


CUTS = {"rows": by_rows, "columns": by_columns, "both": by_both, "last": on_last}


def entries_of(group, how="rows", shapes=SHAPES, dtype="float32", fill=True, change=0.0):
    """The entries of this rank: filled with their values (plus `change`), or with NaN to be read into."""
    entries = []
    for name, shape in shapes.items():
        slab = CUTS[how](shape, group.rank, group.size)
        array = np.full(slab.shape, np.nan, dtype)
        if fill:
            array[...] = values(name, shape, dtype)[slab.slices()] + np.asarray(change, dtype)
        entries.append(Entry(name, shape, slab, array))
    return entries


def assert_loaded(entries, change=0.0, dtype="float32"):
    for entry in entries:
        expected = values(entry.name, entry.shape, dtype)[entry.slab.slices()] + np.asarray(change, dtype)
        np.testing.assert_array_equal(entry.array, expected)


def forms(group):
    """Both forms where this h5py and group can write both."""
    from mpillm.store.hyperslab import default_form
    return sorted({"offsets", default_form(group)})


def raised(group, kinds, work):
    """The message of the exception that `work()` must raise; the same on all ranks."""
    try:
        work()
    except kinds as error:
        messages = group.collect([type(error).__name__, str(error)])
        assert all(message == messages[0] for message in messages), messages
        return str(error)
    raise AssertionError("nothing was raised")
