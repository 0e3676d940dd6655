"""Which device a rank takes."""

import types

import pytest

from mpillm.backend.cuda import device
from mpillm.config import UserError
from mpillm.run import session


@pytest.mark.parametrize("seen, auto, gpu", [
    ([["a", "b"]] * 3, [0, 1, None], [0, 1, 0]),                # every rank sees all
    ([["a"], ["b"], ["c"]], [0, 0, 0], [0, 0, 0]),              # a launcher bound each to its own
    ([["a"], ["a"], ["b"]], [0, None, 0], [0, 0, 0]),
    ([["a", "b"], ["b"], ["a"]], [0, 0, None], [0, 0, 0]),
    ([[], []], [None, None], [None, None]),
])
def test_gpus_of_a_node_are_dealt(seen, auto, gpu):
    ranks = range(len(seen))
    assert [session.dealt(seen, rank, sharing=False) for rank in ranks] == auto
    assert [session.dealt(seen, rank, sharing=True) for rank in ranks] == gpu


def test_auto_without_cupy_is_the_cpu(monkeypatch):
    def missing():
        raise UserError("no CuPy")
    monkeypatch.setattr(device, "import_cupy", missing)
    assert session.open_device("auto").name == "cpu"
    with pytest.raises(UserError, match="no CuPy"):
        session.open_device("gpu")


def test_no_gpu_is_said_once(monkeypatch):
    monkeypatch.setattr(device, "addresses", list)
    assert session.open_device("auto").name == "cpu"
    with pytest.raises(UserError, match='no GPU is seen on .*; check the driver and CUDA_VISIBLE_DEVICES, or use device "cpu"'):
        session.open_device("gpu")


@pytest.mark.ranks
@pytest.mark.parametrize("name, gpus, note", [("gpu", 8, ""), ("gpu", 1, "{size} ranks share one GPU"), ("auto", 1, "{others} of {size} ranks compute on CPUs"), ("auto", 8, "")])
def test_ranks_open_their_gpus(monkeypatch, group, name, gpus, note):
    """What ranks tell each other of their devices; the GPUs are names only."""
    addresses = [f"0000:0{number}:00.0" for number in range(gpus)]

    def opened(kind, index=0, dtype=None):
        where = None if kind == "cpu" else types.SimpleNamespace(address=addresses[index])
        return types.SimpleNamespace(name=kind, device=where, note="", set_threads=lambda count: None)
    monkeypatch.setattr(device, "addresses", lambda: addresses)
    monkeypatch.setattr(session, "open_backend", opened)
    ops = session.open_device(name, group=group)
    assert ops.name == ("gpu" if name == "gpu" or group.rank < gpus else "cpu")
    text = note.format(size=group.size, others=group.size - 1)
    assert text in ops.note if group.size > 1 else not ops.note
