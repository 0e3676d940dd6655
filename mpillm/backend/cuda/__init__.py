"""The CUDA backend: the operations of `Reference` on one GPU, by kernels of our own and by cuBLASLt.

Arrays are CuPy's. Nothing waits for the GPU but `to_host`, `synchronize` and what gives a Python number.
"""

import functools

import numpy as np

from mpillm.backend.cuda.attention import AttentionOps
from mpillm.backend.cuda.gemm import GemmOps
from mpillm.backend.cuda.norms import NormOps
from mpillm.backend.cuda.optimizer import OptimizerOps
from mpillm.backend.cuda.pointwise import PointwiseOps
from mpillm.backend.cuda.routing import RoutingOps
from mpillm.backend.cuda.rows import RowOps
from mpillm.backend.cuda.vocabulary import VocabularyOps

ROW_BYTES = 128     # rows of `padded` are a multiple of this long: tensor cores want 16, caches like a line


class Cuda(AttentionOps, GemmOps, NormOps, OptimizerOps, PointwiseOps, RoutingOps, RowOps, VocabularyOps):
    """
    Parameters
    ----------
    device : Device
    """

    name = "cuda"
    # A chunk of 1 GB in bfloat16: large products, and the float32 gradient of the table is read and written few times.
    logit_elements = 2**29

    def __init__(self, device):
        self.device, self.note = device, ""
        self.empty, self.zeros, self.from_host, self.constant = device.empty, device.zeros, device.from_host, device.constant
        self.synchronize, self.range, self.passing = device.synchronize, device.range, device.empty
        self.send_ahead = device.send_ahead
        self.activations, self.capture = device.activations, device.capture

    @functools.cached_property
    def host(self):
        """The backend of the host memory that belongs to this device."""
        from mpillm.backend.cpu import Cpu

        return Cpu()

    def set_threads(self, num_threads):
        """Threads of BLAS in this process: little is left for them here."""
        self.host.set_threads(num_threads)

    @staticmethod
    def padding(columns, dtype):
        """Columns to add to so many of a matrix: tensor cores take whole packs of 16 bytes (at 50,257 they ran at a tenth of the speed)."""
        return -columns % (16 // np.dtype(dtype).itemsize)

    @staticmethod
    def row_of(columns, dtype):
        """Elements from row to row of `padded`."""
        line = ROW_BYTES // np.dtype(dtype).itemsize
        return -(-columns // line) * line

    def padded(self, shape, dtype):
        rows, columns = shape
        return self.device.empty((rows, self.row_of(columns, dtype)), dtype)[:, :columns]

    def to_host(self, array):
        """A copy as a NumPy array, when it is there."""
        if not array.flags.c_contiguous:
            strided, array = array, self.device.empty(array.shape, array.dtype)
            self.copy(array, strided)
        return self.device.to_host(array)

    def fetch_start(self, array):
        """Starts copying a contiguous array to page-locked host memory; calling the result gives it, when it is there."""
        memory = self.device.pinned(max(1, array.nbytes))
        if array.nbytes:
            self.device.copy_to_host_start(memory, array)
        copied = self.device.record()

        def fetched():
            copied.synchronize()
            return memory[:array.nbytes].view(array.dtype).reshape(array.shape)
        return fetched

    def put(self, array, host):
        """The array becomes a copy of a NumPy array of its shape, in its type."""
        target = array if array.flags.c_contiguous else self.device.empty(array.shape, array.dtype)
        self.device.upload(target, host.astype(array.dtype, copy=False))
        if target is not array:
            self.copy(array, target)
