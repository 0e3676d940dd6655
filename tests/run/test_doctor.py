"""`mpillm doctor`: what is judged as an outlier, and the command on 1 and 3 ranks."""

import json

import pytest
from command_runs import launcher, run

from mpillm.layout.measure import pairs
from mpillm.run.diagnosis import excluded, judge, outliers, table
from mpillm.run.doctor import mount_type


def a_rank(rank, host, **values):
    return {"rank": rank, "host": host, "start_seconds": 1.0, "cpus": [rank % 4], "threads": 1, "gpu": None, "memory_bytes": 2**34, "gemm_flops": 50e9,
            "gpu_aware_mpi": None, "clock": 1000.0, "latency_within": 1e-6, "bandwidth_within": 5e9, "latency_across": 2e-6, "bandwidth_across": 1e10} | values


def known(ranks, **values):
    return {"version": 1, "num_ranks": len(ranks), "mpi": {"library": "Open MPI v5", "standard": [3, 1], "thread_level": "multiple"}, "launcher": "srun", "python": "3.11.7",
            "all_reduce": [{"bytes": 8, "seconds": 1e-5, "right": True}], "ranks": ranks, "seconds": 4.0, "date": "now",
            "file_system": {"error": None, "form": "parallel", "parallel_hdf5": True, "bytes": 1 << 24, "write_rate": 1e9, "read_rate": 2e9, "type": "lustre",
                            "free_bytes": 10**12, "stripe_count": 4}} | values


def nodes(count=4, per_node=4):
    return [a_rank(rank, f"n{rank // per_node}") for rank in range(count * per_node)]


def test_an_allocation_in_order_is_fit():
    judged = judge(known(nodes()))
    assert (judged["verdict"], judged["problems"], judged["warnings"], judged["exclude"]) == ("fit", [], [], [])
    text = "\n".join(table(judged))
    assert "lustre, 4 stripes" in text and text.count("n0") == 1 and "verdict: fit (4 s)" in text and "*" not in text


def test_a_slow_node_is_named_marked_and_left_out():
    ranks = nodes()
    for rank in range(8, 12):
        ranks[rank]["gemm_flops"] = 20e9
    judged = judge(known(ranks))
    assert judged["verdict"] == "fit, with warnings" and judged["exclude"] == ["n2"] and outliers(ranks) == {"gemm_flops": [8, 9, 10, 11]}
    text = "\n".join(table(judged))
    assert "matrix product of ranks 8-11 (node n2) is far from the median" in text and "n2 *" in text and "sbatch --exclude=n2" in text


@pytest.mark.parametrize("key, value, named, left_out", [
    ("bandwidth_across", 1e9, "bandwidth across nodes of rank 5 (node n1)", ["n1"]), ("latency_within", 1e-4, "latency on the node of rank 5", []),
    ("start_seconds", 40.0, "start of Python of rank 5", []), ("start_seconds", 5.0, None, [])])
def test_other_outliers(key, value, named, left_out):
    ranks = nodes()
    ranks[5][key] = value
    judged = judge(known(ranks))
    assert judged["exclude"] == left_out and (named is None) == (judged["warnings"] == []) and (named is None or named in judged["warnings"][0])


def test_problems_make_it_unfit():
    for values, line in (({"all_reduce": [{"bytes": 8, "seconds": 1.0, "right": False}]}, "sum of 8 B over all ranks is wrong"),
                         ({"file_system": {"error": "no space", "form": "offsets", "parallel_hdf5": True, "free_bytes": 1}}, "cannot be written to: no space"),
                         ({"file_system": known([])["file_system"] | {"free_bytes": 10**6}}, "only 1 MB are free")):
        judged = judge(known(nodes(), **values))
        assert judged["verdict"] == "not fit" and line in judged["problems"][0] and "problem: " in "\n".join(table(judged))


def test_clocks_binding_and_hdf5_are_looked_at():
    ranks = nodes(1)
    ranks[0]["clock"] += 3
    ranks[1]["cpus"] = [0]
    lines = judge(known(ranks, file_system=known([])["file_system"] | {"parallel_hdf5": False}))["warnings"]
    assert any("differ by 3.0 s" in line for line in lines) and any("h5py has no MPI" in line for line in lines)
    assert any("more threads than cores on n0" in line for line in lines)
    ranks = [a_rank(0, "n0", cpus=[0, 1]), a_rank(1, "n0", cpus=[1, 2])]
    assert any("bound to cores of other ranks" in line for line in judge(known(ranks))["warnings"])


def test_where_most_are_slow_or_there_is_one_node_none_is_left_out():
    assert excluded(known([a_rank(rank, "n0", gemm_flops=1e9 if rank == 3 else 5e10) for rank in range(4)])) == []


def test_each_rank_has_a_partner_on_its_node_and_across():
    hosts = ["a", "a", "a", "b", "b", "c"]
    assert [pairs(hosts, rank)["within"] for rank in range(6)] == [1, 0, None, 4, 3, None]
    assert [pairs(hosts, rank)["across"] for rank in range(6)] == [3, 4, None, 0, 1, None]


def test_the_mount_with_the_longest_path_counts(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"a / ext4 rw 0 0\nb {tmp_path} lustre rw 0 0\nc {tmp_path}x nfs rw 0 0\n")
    assert mount_type(tmp_path / "runs", mounts) == "lustre" and mount_type("/none", mounts) == "ext4" and mount_type("/", tmp_path / "none") == "?"


@pytest.mark.parametrize("ranks", [None, pytest.param(3, marks=pytest.mark.skipif(launcher() is None, reason="no mpirun"))])
def test_the_command(tmp_path, ranks):
    done = run("doctor", "--json", "found.json", "--dir", "some/runs", cwd=tmp_path, ranks=ranks)
    assert "verdict: fit" in done.out and done.code == 0, done.text
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["num_ranks"] == (ranks or 1) and len(found["ranks"]) == found["num_ranks"] and found["seconds"] < 60
    assert all(each["gemm_flops"] > 1e8 and each["cpus"] for each in found["ranks"]) and found["file_system"]["write_rate"] > 0
    assert (found["mpi"] is None) == (ranks is None) and len(found["all_reduce"]) == (3 if ranks else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]      # what it made is gone


def test_what_cannot_be_is_refused(tmp_path):
    (tmp_path / "runs").write_text("a file")
    assert run("doctor", cwd=tmp_path).code == 2 and run("doctor", "--json", "none/x.json", cwd=tmp_path).ours == [
        "mpillm: error: --json none/x.json: its folder does not exist; make it first"]
