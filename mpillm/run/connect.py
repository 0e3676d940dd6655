"""How the arrays of this job's devices go between ranks: chosen once, the same on all ranks, said at the start."""

from ..config import UserError
from ..layout.device_group import DeviceGroup, NcclGroup
from ..layout.node import gather_on_node
from ..layout.probe import is_cuda_aware
from ..layout.transport import Direct, Staged

WORDS = {"cuda_aware": "device memory straight to MPI", "staged": "pinned host memory to MPI", "nccl": "NCCL"}


def connect(group, ops, transport):
    """
    Parameters
    ----------
    group : Group
        All ranks.
    ops : backend
        Of this rank.
    transport : str
        communication.transport of the job.

    Returns
    -------
    group : Group
        All ranks, for arrays of `ops`.
    line : str
        For the user; "" where there is nothing to choose.
    """
    on_gpu = ops.host is not ops
    with_gpu = sum(group.collect(on_gpu))
    if group.size == 1 or not with_gpu:
        return group, ""
    mixed, asked = with_gpu < group.size, transport
    if mixed and transport == "nccl":
        raise UserError('communication.transport = "nccl": some ranks have no GPU; set it to "auto", or run.device = "gpu"')
    if transport == "auto":
        transport = "cuda_aware" if _all_aware(group, on_gpu) else "staged"
    handle = group.handle.Dup()     # its messages are not to meet those of `group`
    line = f"communication of GPU arrays: {transport} ({WORDS[transport]}){', as MPI was found to be able to' * (asked == 'auto' and transport == 'cuda_aware')}"
    if transport == "nccl":
        return NcclGroup(handle, group.name, ops), line
    kind = Direct if transport == "cuda_aware" else Staged
    return DeviceGroup(handle, group.name, ops, kind(ops), mixed), line


def _all_aware(group, on_gpu):
    """Whether MPI takes device memory on every node with GPUs; one rank of each asks."""
    of_node, rank = gather_on_node(group, on_gpu)
    first = on_gpu and not any(of_node[:rank])
    answers = group.collect(is_cuda_aware() if first else None)
    return False not in answers and True in answers
