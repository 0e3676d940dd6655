"""Layouts whose ranks compute on (fake) GPUs, all of them or every second one: the steps of one rank on a CPU."""

import sys
from pathlib import Path

import numpy as np
import pytest

from mpillm.backend import open_backend
from mpillm.layout.transport import Direct, Staged
from small_jobs import job_of, steps_of, trainer_of, worst_gradient, worst_of_all

sys.path.append(str(Path(__file__).resolve().parents[1] / "layout"))
pytestmark = [pytest.mark.ranks, pytest.mark.timeout(200)]

RESERVED = 1 << 25      # bytes, of which places are used again: a graph that knows a dead array's address is found out
MODEL = {"heads": 4, "width": 16, "kv_heads": 2}
LAYOUTS = {
    2: [{"dp": 2}, {"dp": 2, "zero": 1}, {"dp": 2, "zero": 3}, {"tp": 2}, {"pp": 2, "zero": 1}, {"cp": 2}, {"cp": 2, "cp_form": "ulysses"}],
    3: [{"dp": 3, "zero": 2}],
    4: [{"dp": 2, "tp": 2, "zero": 1}, {"pp": 2, "dp": 2, "zero": 3}],
}


def run(group, layout, kind, mixed, compute, model=MODEL, **train):
    """(gradients and losses of two steps, the trainer) of this rank."""
    from mpillm.layout.device_group import DeviceGroup
    from test_transport import fake_ops
    ops = open_backend("cpu") if mixed and group.rank % 2 else fake_ops(reserve=RESERVED)
    handle = group.handle.Dup()
    ranks = DeviceGroup(handle, "world", ops, kind(ops), mixed)
    job = job_of("gpt" if "kv_heads" not in model else "llama", model=model, mesh={"dp": 1, "zero": 0} | layout, precision={"compute": compute},
                 train={"batch": 7, "micro_batch": 2} | train)
    trainer = trainer_of(job, ranks, ops)
    return steps_of(trainer, 2), trainer


@pytest.mark.parametrize("kind, mixed", [(Direct, False), (Staged, False), (Staged, True)], ids=["cuda_aware", "staged", "mixed"])
def test_every_layout_gives_the_gradients_of_one_rank(group, kind, mixed):
    if group.size == 1:
        pytest.skip("one rank has no layout")
    expected = steps_of(trainer_of(job_of(model=MODEL, train={"batch": 7, "micro_batch": 2})), 2)
    for layout in LAYOUTS[group.size]:
        found, _ = run(group, layout, kind, mixed, "float64")
        for step in range(2):
            worst = worst_of_all(group, worst_gradient(found.gradients[step], expected.gradients[step]))
            assert worst[0] < 1e-10, (layout, step, worst)
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-11)


def test_graphs_beside_reductions(group):
    """Data parallel: passes are recorded in pieces, between which gradients are reduced; the bits are those without."""
    if group.size == 1:
        pytest.skip("one rank reduces nothing")
    results = []
    for graphs in (True, False):
        from mpillm.train.recorded import Recorded
        takes = Recorded.takes
        if not graphs:
            Recorded.takes = lambda self, batch: False
        try:
            found, trainer = run(group, {"dp": group.size, "zero": 1}, Staged, False, "float32", batch=5 * group.size, micro_batch=2)
        finally:
            Recorded.takes = takes
        results.append(found)
        assert any(recorded is not None for recorded in trainer.pipeline.recorded.passes.values()) == graphs
    one, two = results
    assert one.losses == two.losses
    for name, (_, array) in one.weights.items():
        np.testing.assert_array_equal(array, two.weights[name][1], name)


def test_optimizer_state_on_the_host_gives_the_same(group):
    layout = {"dp": group.size, "zero": 1}
    if group.size == 1:
        pytest.skip("tests/backend/cuda has one rank")
    (one, _), (two, trainer) = [run(group, layout, Staged, False, "float32", offload=offload) for offload in ("none", "optimizer")]
    assert isinstance(trainer.model.parameters()[0].master, np.ndarray)
    np.testing.assert_allclose(one.losses, two.losses, rtol=1e-6)
    for name, (_, array) in one.weights.items():
        np.testing.assert_allclose(array, two.weights[name][1], rtol=1e-5, atol=1e-7, err_msg=name)


def test_ranks_of_both_kinds_are_connected(group, monkeypatch):
    """Every second rank computes on the CPU; one rank of the node asks MPI, and all learn the answer."""
    if group.size == 1:
        pytest.skip("one rank is not mixed")
    from mpillm.config import UserError
    from mpillm.run import connect
    from test_transport import fake_ops
    ops = open_backend("cpu") if group.rank % 2 == 0 else fake_ops()
    for aware in (True, False):
        monkeypatch.setattr(connect, "is_cuda_aware", lambda: aware)
        ranks, line = connect.connect(group, ops, "auto")
        assert ranks.mixed and isinstance(ranks.transport, Direct if aware else Staged) and ("cuda_aware" if aware else "staged") in line
        assert ops.to_host(ranks.all_reduce(ops.from_host(np.ones(5, np.float32)))).tolist() == [group.size] * 5
    with pytest.raises(UserError, match="some ranks have no GPU"):
        connect.connect(group, ops, "nccl")


def test_verify(group, monkeypatch):
    """What `mpillm verify JOB run.device=gpu` does: device ranks against one of them."""
    if group.size == 1:
        pytest.skip("one rank has no layout")
    from mpillm.run import verify
    from test_transport import fake_ops
    monkeypatch.setattr(verify, "open_device", lambda *arguments: fake_ops(reserve=RESERVED))
    for layout in LAYOUTS[group.size]:
        job = job_of("llama", model=MODEL | {"mlp_width": 15, "vocabulary": 37}, mesh={"dp": 1, "zero": 0} | layout, train={"batch": 7, "micro_batch": 2},
                     communication={"transport": "staged"})
        report = verify.compare(verify.in_float64(job), group)
        assert not report.wrong, (layout, report.wrong)
        assert len(report.rows) > 10
