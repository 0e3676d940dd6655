"""`mpillm doctor`: what is judged as an outlier, what ends a check that hangs, and the command on 1 and 3 ranks."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from command_runs import environment, launcher, run

from mpillm.layout.comm import Solo
from mpillm.layout.measure import ROUNDS, all_reduce_times, neighbour, partners
from mpillm.run import doctor
from mpillm.run.diagnosis import amount, excluded, judge, outliers, table
from mpillm.run.doctor import mount_type

WITH_MPIRUN = pytest.mark.skipif(launcher() is None, reason="no mpirun")


def a_rank(rank, host, **values):
    return {"rank": rank, "host": host, "start_seconds": 0.1, "import_seconds": 0.4, "mpi_seconds": 0.7, "cpus": [rank % 4], "threads": 1, "blas": "openblas",
            "gpu": None, "gpu_name": None, "gpu_free_bytes": None, "memory_bytes": 2**34, "gemm_float32": 50e9, "gemm_float64": 25e9, "gemm_bfloat16": None,
            "to_gpu": None, "from_gpu": None, "gpu_aware_mpi": None, "clock": 1000.0, "latency_within": 1e-6, "bandwidth_within": 5e9, "latency_across": 2e-6,
            "bandwidth_across": 1e10} | values


FILES = {"directory": "runs", "error": None, "form": "parallel", "parallel_hdf5": True, "bytes": 1 << 24, "write_rate": 1e9, "read_rate": 2e9, "type": "lustre",
         "free_bytes": 10**12, "stripe_count": 4}


def known(ranks, files=FILES, **values):
    return {"version": 1, "num_ranks": len(ranks), "mpi": {"library": "Open MPI v5", "standard": [3, 1], "thread_level": "multiple"}, "launcher": "srun", "python": "3.11.7",
            "notes": [], "all_reduce": [{"bytes": 8, "seconds": 1e-5, "wrong": []}], "ranks": ranks, "seconds": 4.0, "date": "now", "file_system": files} | values


def nodes(count=4, per_node=4):
    return [a_rank(rank, f"n{rank // per_node}") for rank in range(count * per_node)]


# ---- what is judged -------------------------------------------------------------------------------------------------

def test_an_allocation_in_order_is_fit():
    judged = judge(known(nodes()))
    assert (judged["verdict"], judged["problems"], judged["warnings"], judged["exclude"]) == ("fit", [], [], [])
    text = "\n".join(table(judged))
    assert "lustre, 4 stripes" in text and text.count("n0") == 1 and "verdict: fit (4 s)" in text and "*" not in text and "GPU" not in text


def test_a_slow_node_is_named_marked_and_left_out():
    ranks = nodes()
    for rank in range(8, 12):
        ranks[rank]["gemm_float32"] = 20e9
    judged = judge(known(ranks))
    assert judged["verdict"] == "fit, with warnings" and judged["exclude"] == ["n2"]
    assert judged["outliers"] == {"gemm_float32": {"ranks": [8, 9, 10, 11], "median": 50e9, "worst": 20e9}}
    text = "\n".join(table(judged))
    assert "float32 matrix product of ranks 8-11 (node n2) is slow: 20 GFLOP/s, where the median is 50 GFLOP/s" in text
    assert text.count("20 *") == 1 and "sbatch --exclude=n2" in text


@pytest.mark.parametrize("key, value, named, left_out", [
    ("bandwidth_across", 1e9, "bandwidth across nodes of rank 5 (node n1) is slow: 1 GB/s", ["n1"]), ("latency_within", 1e-4, "latency on the node of rank 5", []),
    ("latency_within", 1e-5, None, []), ("import_seconds", 40.0, "import of Python modules of rank 5", []), ("import_seconds", 4.0, None, [])])
def test_other_outliers(key, value, named, left_out):
    ranks = nodes()
    ranks[5][key] = value
    judged = judge(known(ranks))
    assert judged["exclude"] == left_out and (named is None) == (judged["warnings"] == []) and (named is None or named in judged["warnings"][0])


def test_problems_make_it_unfit():
    for values, line in (({"all_reduce": [{"bytes": 8, "seconds": 1.0, "wrong": [2, 3]}]}, "sum of 8 B over all ranks is wrong on ranks 2-3"),
                         ({"files": FILES | {"error": "no space", "free_bytes": 1}}, "checkpoints cannot be written: no space"),
                         ({"files": FILES | {"free_bytes": 10**6}}, "only 1 MB are free in runs")):
        judged = judge(known(nodes(), **values))
        assert judged["verdict"] == "not fit" and line in judged["problems"][0] and len(judged["problems"]) == 1 and "problem: " in "\n".join(table(judged))


def test_clocks_binding_and_hdf5_are_looked_at():
    ranks = nodes(1)
    ranks[0]["clock"] += 3
    ranks[1]["cpus"] = [0]
    lines = judge(known(ranks, FILES | {"parallel_hdf5": False}, notes=["a note"]))["warnings"]
    assert lines[0] == "a note" and any("differ by 3.0 s" in line for line in lines) and any("h5py has no MPI" in line for line in lines)
    assert any("more threads than cores on n0" in line for line in lines)


@pytest.mark.parametrize("masks, threads, wrong", [
    ([[0, 1], [1, 2]], 1, True), ([[0], [0], [1, 2]], 1, True), ([[0, 1], [2, 3]], 2, False), ([[0, 1], [0, 1], [2, 3], [2, 3]], 1, False),
    ([[0, 1, 2, 3]] * 4, 1, False)])
def test_ranks_that_are_bound_to_the_cores_of_others_are_found(masks, threads, wrong):
    ranks = [a_rank(rank, "n0", cpus=mask, threads=threads) for rank, mask in enumerate(masks)]
    assert any("bound to cores of other ranks on n0" in line for line in judge(known(ranks))["warnings"]) == wrong


def test_ranks_that_share_cores_are_not_compared_and_gpus_only_with_gpus():
    assert outliers([a_rank(rank, "n0", cpus=[0, 1], gemm_float32=(5e10, 1e9)[rank == 2]) for rank in range(4)]) == {}
    ranks = nodes() + [a_rank(rank, f"g{rank}", gpu="0", gpu_name="G", gemm_float32=5e13, gemm_bfloat16=5e14, to_gpu=5e10, from_gpu=5e10) for rank in range(16, 20)]
    assert outliers(ranks) == {}
    ranks[17]["to_gpu"] = 1e9
    judged = judge(known(ranks))
    assert list(judged["outliers"]) == ["to_gpu"] and judged["exclude"] == ["g17"] and "bfloat16 GF/s" in "\n".join(table(judged))


def test_where_half_the_nodes_are_slow_or_there_is_one_node_none_is_left_out():
    assert excluded(known([a_rank(rank, "n0", gemm_float32=1e9 if rank == 3 else 5e10) for rank in range(4)])) == []
    ranks = nodes()
    for rank in (0, 4):
        ranks[rank]["gemm_float32"] = 1e9
    assert excluded(known(ranks)) == []


def test_the_plan_gets_medians_of_what_is_there():
    machine = judge(known(nodes()))["machine"]
    assert machine["nodes"] == 4 and machine["ranks_per_node"] == machine["cores_per_node"] == 4 and machine["gpus_per_node"] == 0
    assert machine["gemm_flops"] == {"float32": 50e9, "float64": 25e9, "bfloat16": None} and machine["latency_across"] == 2e-6 and machine["write_rate"] == 1e9
    json.dumps(machine)


def test_amounts_are_for_people():
    assert [amount(value, unit) for value, unit in ((1.5e9, "B/s"), (12, "B/s"), (2e-5, "s"))] == ["1.5 GB/s", "12 B/s", "2e-05 s"]


# ---- who measures with whom -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", range(1, 9))
def test_each_place_of_a_ring_meets_both_neighbours(count):
    met = {place: set() for place in range(count)}
    for turn in range(ROUNDS):
        for place in range(count):
            other = neighbour(place, count, turn)
            if other is not None:
                assert neighbour(other, count, turn) == place
                met[place].add(other)
    assert all(met[place] == ({(place - 1) % count, (place + 1) % count} if count > 1 else set()) for place in met)


def test_each_rank_has_partners_on_its_node_and_across():
    hosts = ["a", "a", "a", "b", "b", "c"]
    rounds = [[partners(hosts, rank, turn) for rank in range(6)] for turn in range(ROUNDS)]
    assert [each["within"] for each in rounds[0]] == [1, 0, None, 4, 3, None] and [each["across"] for each in rounds[0]] == [3, 4, None, 0, 1, None]
    assert [each["across"] for each in rounds[1]] == [None, None, None, 5, None, 3] and [each["across"] for each in rounds[2]] == [5, None, None, None, None, 0]
    for each in rounds:
        for rank, of_rank in enumerate(each):
            assert all(other is None or each[other][kind] == rank for kind, other in of_rank.items())


@pytest.mark.parametrize("error, wrong", [(0, []), (1, [0])])
def test_a_wrong_sum_is_found(error, wrong):
    class Third(Solo):
        rank, size = 2, 6
        handle = SimpleNamespace(Barrier=lambda: None, Allreduce=lambda x, total: total.__setitem__(slice(None), (x - 2) * 6 + sum(range(6)) + error))
    found = all_reduce_times(Third())
    assert [each["wrong"] for each in found] == [wrong] * 3 and all(each["seconds"] > 0 for each in found)


def test_a_gpu_is_timed_by_copies_there_and_back():
    calls = []
    gpu = SimpleNamespace(host=None, from_host=lambda x: calls.append("there") or x, to_host=lambda x: calls.append("back"), synchronize=lambda: calls.append("wait"))
    assert all(rate > 0 for rate in doctor.copies(gpu).values()) and calls[:3] == ["there", "wait", "back"]


# ---- the file system ------------------------------------------------------------------------------------------------

def test_the_mount_with_the_longest_path_counts(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"a / ext4 rw 0 0\nb {tmp_path} lustre rw 0 0\nc {tmp_path}x nfs rw 0 0\n")
    assert mount_type(tmp_path / "runs", mounts) == "lustre" and mount_type("/none", mounts) == "ext4" and mount_type("/", tmp_path / "none") == "?"


def test_a_run_that_begins_meanwhile_keeps_its_directory(tmp_path, monkeypatch):
    def a_run_begins(*arguments):
        (tmp_path / "new/runs/mine").mkdir()
        return {}
    monkeypatch.setattr(doctor, "write_test", a_run_begins)
    found = doctor.file_system(Solo(), tmp_path / "new/runs")
    assert found["error"] is None and [path.name for path in (tmp_path / "new/runs").iterdir()] == ["mine"]


def test_what_fails_in_writing_is_told_and_nothing_stays(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device", "state.h5")
    monkeypatch.setattr("mpillm.store.hyperslab._data", full)
    found = doctor.file_system(Solo(), tmp_path / "new/runs")
    assert "No space left" in found["error"] and found["free_bytes"] > 0 and list(tmp_path.iterdir()) == []


# ---- a check that hangs -----------------------------------------------------------------------------------------------

HANGS = """
import time
from mpillm.layout.comm import world
from mpillm.run.doctor import Deadline
group, deadline = world(), Deadline(world().rank, 1.0)
deadline.enter("a quick one")
group.barrier()
deadline.enter("a hanging one")
time.sleep(60) if group.rank == 1 else group.barrier()
"""


@WITH_MPIRUN
def test_a_check_that_hangs_ends_the_job_and_is_named(tmp_path):
    done = run(cwd=tmp_path, ranks=2, program=("-c", HANGS), seconds=20)
    assert done.code and sorted(line.partition(" (")[0] for line in done.ours) == ["mpillm: rank 0", "mpillm: rank 1"], done.text
    assert all("came to no end of check 2, a hanging one, in 1 s" in line for line in done.ours)


def test_a_library_that_never_returns_to_python_ends_too():
    code = ("import ctypes, mpillm.run.doctor as doctor\ndoctor.LAST_RESORT = 0.2\n"
            "doctor.Deadline(0, 0.3).enter('the check')\nctypes.PyDLL(None).sleep(60)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, env=environment(), check=False)
    assert done.returncode == 1 and "Timeout" in done.stderr


# ---- the command ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ranks", [None, pytest.param(3, marks=WITH_MPIRUN)])
def test_the_command(tmp_path, ranks):
    done = run("doctor", "--json", "found.json", "--dir", "some/runs", cwd=tmp_path, ranks=ranks)
    assert "verdict: fit" in done.out and done.code == 0, done.text
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["num_ranks"] == (ranks or 1) and len(found["ranks"]) == found["num_ranks"] and found["seconds"] < 60
    assert all(each["gemm_float32"] > 1e8 and each["gemm_float64"] > 1e8 and each["cpus"] and each["threads"] == 1 for each in found["ranks"])
    assert all((each["bandwidth_within"] or 0) > 0 for each in found["ranks"]) == bool(ranks)
    assert found["file_system"]["write_rate"] > 0 and found["machine"]["gemm_flops"]["float32"] > 1e8
    assert (found["launcher"] is None) == (ranks is None) and [each["wrong"] for each in found["all_reduce"]] == ([[], [], []] if ranks else [])
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]      # what it made is gone


PLANTED = """
import sys
from mpillm.__main__ import main
from mpillm.layout.comm import world
from mpillm.run import doctor
rank, products, resources, messages = world().rank, doctor.products, doctor.resources, doctor.messages
doctor.resources = lambda ops: resources(ops) | {"cpus": [rank]}
doctor.products = lambda group, ops: {**products(group, ops), "gemm_float32": 1e9 if rank == 1 else 5e10, "gemm_float64": 2e10}
doctor.node_name = lambda: f"n{rank}"
def planted_messages(group, hosts):
    found = messages(group, hosts)
    assert found["latency_within"] is found["bandwidth_within"] is None and found["latency_across"] < 1 and found["bandwidth_across"] > 1e6
    return found | {"bandwidth_across": 1e10}
doctor.messages = planted_messages
sys.exit(main(["doctor", "--dir", "/proc/none"]))
"""


@WITH_MPIRUN
def test_a_slow_rank_and_a_directory_that_cannot_be_made(tmp_path):
    done = run(cwd=tmp_path, ranks=3, program=("-c", PLANTED))
    assert done.code == 1 and "verdict: not fit" in done.out and "problem: checkpoints cannot be written: /proc/none" in done.out, done.text
    assert "float32 matrix product of rank 1 (node n1) is slow: 1 GFLOP/s, where the median is 50 GFLOP/s" in done.out and "us across" in done.out
    assert "leave out: sbatch --exclude=n1\n" in done.out


def test_what_cannot_be_is_refused(tmp_path):
    (tmp_path / "runs").write_text("a file")
    for arguments, line in ((["--json", "none/x.json"], "--json none/x.json: its folder does not exist; make it first"),
                            (["--json", "."], "--json .: is a folder; name a file"),
                            ([], f"--dir runs: {tmp_path}/runs is not a folder; name one, or one that can be made")):
        done = run("doctor", *arguments, cwd=tmp_path)
        assert done.code == 2 and done.ours == [f"mpillm: error: {line}"], done.text
