"""Fixtures of the tests of communication."""

import pytest

from mpillm.layout import comm
from mpillm.layout.comm import Solo


@pytest.fixture(params=["world", "solo"])
def ranks(request, group):
    """All ranks, and one rank by itself."""
    return group if request.param == "world" else Solo()


@pytest.fixture(params=[2**30, 3], ids=["one call", "chunks"])
def max_count(request, monkeypatch):
    monkeypatch.setattr(comm, "MAX_COUNT", request.param)
    return request.param
