"""What is read from launchers' variables: pure functions of an environment."""

from mpillm.run import launch

MANY = set(range(16))


def cores(cpus):
    return max(1, len(cpus))


def threads(environ, own, node=MANY):
    return launch.num_threads(environ, own, node, cores)


def test_ranks_of_every_launcher():
    assert launch.rank({}) == 0 and not launch.launched({})
    assert launch.rank({"OMPI_COMM_WORLD_RANK": "3", "SLURM_PROCID": "1"}) == 3
    assert launch.rank({"PMI_RANK": "2"}) == 2 and launch.launched({"PMI_RANK": "2", "PMI_SIZE": "4"})
    assert not launch.launched({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"})


def test_a_batch_script_is_no_launched_rank():
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert not launch.launched(batch)
    assert launch.launched(batch | {"SLURM_STEP_NUM_TASKS": "8"})
    assert launch.rank({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}) == 5


def test_local_size():
    assert launch.local_size({}) == 1
    assert launch.local_size({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}) == 4
    assert launch.local_size({"MPI_LOCALNRANKS": "3"}) == 3
    step = {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}
    assert launch.local_size(step | {"SLURM_NODEID": "2"}) == 2
    assert launch.local_size(step | {"SLURM_NODEID": "3"}) == 1
    assert launch.tasks_of_nodes("2(x3),1") == [2, 2, 2, 1] and launch.tasks_of_nodes("x") == []


def test_threads_divide_the_node_once():
    four = {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "4"}
    assert threads({}, MANY) == 16                          # alone
    assert threads(four, MANY) == 4                         # unbound: all ranks share the node
    assert threads(four, {0, 1, 2, 3}) == 4                 # bound to its own cores: divided already
    assert threads(four, {0}) == 1                          # bound to one core
    assert threads(four, set(range(8))) == 4                # bound to a socket that two ranks share
    assert threads(four, {0, 1}, {0, 1}) == 1               # more ranks than cores


def test_threads_in_a_part_of_a_node():
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_CPUS_ON_NODE": "8"}
    assert threads(slurm, MANY) == 4                        # the job has half of the node, unbound
    assert threads(slurm, {0, 1, 2}) == 3


def test_hardware_threads_of_a_core_count_once(tmp_path):
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(siblings + "\n")
    assert launch.physical_cores({0, 1, 2, 3}, tmp_path) == 2
    assert launch.physical_cores({0, 2}, tmp_path) == 1
    assert launch.physical_cores({0, 1}, tmp_path / "missing") == 2


def test_terminate_saves_except_under_open_mpi():
    assert launch.ends_on_terminate({"OMPI_COMM_WORLD_SIZE": "2"})
    assert not launch.ends_on_terminate({"PMI_RANK": "0"}) and not launch.ends_on_terminate({})
