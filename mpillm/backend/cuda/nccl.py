"""NCCL through CuPy: the ranks of one communicator, on a stream of their own beside the computing."""

import numpy as np

from mpillm.config import UserError

TYPES = {"uint8": 1, "int64": 4, "float16": 6, "float32": 7, "float64": 8, "bfloat16": 9}     # ncclDataType_t
OPERATIONS = {"sum": 0, "max": 2, "min": 3}                                             # ncclRedOp_t


def new_id():
    """What all ranks of a communicator must be given, (128,) uint8."""
    return np.frombuffer(bytes(_nccl().get_unique_id()), np.uint8).copy()


def _nccl():
    try:
        from cupy.cuda import nccl
    except ImportError:
        nccl = None
    if nccl is None or not getattr(nccl, "available", True):
        raise UserError('communication.transport = "nccl": CuPy finds no NCCL; install nvidia-nccl-cu12 or -cu13, or set it to "auto"')
    return nccl


class Nccl:
    """
    Parameters
    ----------
    device : Device
    size, rank : int
    unique_id : (128,) uint8
        Of `new_id` on one rank.
    """

    def __init__(self, device, size, rank, unique_id):
        nccl = _nccl()
        self.device, self.nccl = device, nccl
        self.stream = device.cupy.cuda.Stream(non_blocking=True)
        try:
            self.communicator = nccl.NcclCommunicator(size, unique_id.tobytes(), rank)
        except nccl.NcclError as error:
            raise UserError(f'communication.transport = "nccl": {error}; it needs a GPU for each rank; set it to "auto"') from None

    def run(self, calls):
        """Starts NCCL calls, `calls(communicator, stream address)`, behind the work of the device; what its later work is to wait for."""
        self.stream.wait_event(self.device.record())
        self.nccl.groupStart()
        calls(self.communicator, self.stream.ptr)
        self.nccl.groupEnd()
        return self.device.record(self.stream)

    def all_reduce(self, x, op="sum"):
        kind = TYPES[x.dtype.name]
        return self.run(lambda comm, stream: comm.allReduce(x.data.ptr, x.data.ptr, x.size, kind, OPERATIONS[op], stream))

    def exchange(self, sent, received):
        """`sent`, `received`: (array, rank) of each message."""
        def calls(comm, stream):
            for x, rank in received:
                comm.recv(x.data.ptr, x.nbytes, TYPES["uint8"], rank, stream)
            for x, rank in sent:
                comm.send(x.data.ptr, x.nbytes, TYPES["uint8"], rank, stream)
        return self.run(calls)
