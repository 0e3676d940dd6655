"""`Cuda` can be called as `Cpu` is."""

import inspect

import pytest

from mpillm.backend.cpu import Cpu


def parameters(function):
    """Name, kind and default of each."""
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", [name for name in dir(Cpu) if not name.startswith("_")])
def test_same_names_and_parameters(cuda, name):
    assert hasattr(cuda, name)
    mine = getattr(Cpu(), name)
    if callable(mine):
        assert parameters(getattr(cuda, name)) == parameters(mine)
