"""Where a rank stands among those of its node."""


def place_on_node(group):
    """(rank, size) of this process among the ranks of `group` on its node."""
    if group.handle is None:
        return 0, 1
    from mpi4py import MPI

    node = group.handle.Split_type(MPI.COMM_TYPE_SHARED)
    try:
        return node.Get_rank(), node.Get_size()
    finally:
        node.Free()
