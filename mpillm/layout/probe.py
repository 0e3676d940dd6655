"""Whether MPI can read and write device memory. Asked in a child process: an MPI that cannot may crash in trying.

    python -m mpillm.layout.probe        exit code 0: it can
"""

import os
import subprocess
import sys

SECONDS = 30            # that the child may take
SIZE = 1 << 20          # bytes of the message
# Variables of a launcher, which would make the child a rank of this job; with these names mpirun of Open MPI 4 sets parameters
# of its own beside those of the user.
LAUNCHERS = ("OMPI_", "PMI", "PRTE_", "SLURM_", "MPI_LOCAL", "PALS_", "HYDRA_", "MPIR_", "MV2_", "FLUX_")
OF_USER = ("OMPI_MCA_", "OMPI_ALLOW_RUN_AS_ROOT")
OF_LAUNCHER = ("OMPI_MCA_ess", "OMPI_MCA_orte_", "OMPI_MCA_pmix", "OMPI_MCA_shmem_RUNTIME", "OMPI_MCA_initial_wdir")


def environment_of_child():
    """What is left of the environment for a process that is no rank of this job."""
    return {name: value for name, value in os.environ.items()
            if not name.startswith(LAUNCHERS) or name.startswith(OF_USER) and not name.startswith(OF_LAUNCHER)}


def is_cuda_aware(limit=SECONDS):
    """Whether a child, which is a job of one rank, sent a device array to itself and got the same."""
    try:
        done = subprocess.run([sys.executable, "-m", "mpillm.layout.probe"], env=environment_of_child(), timeout=limit,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=os.getcwd())
    except (subprocess.TimeoutExpired, OSError):
        return False
    return done.returncode == 0


def main():
    import numpy as np
    from mpi4py import MPI

    from ..backend import open_backend

    ops = open_backend("gpu")
    host = np.arange(SIZE, dtype=np.uint8).view(np.float32)
    x, y = ops.from_host(host), ops.zeros(host.shape, host.dtype)
    ops.synchronize()
    buffers = [[MPI.memory.fromaddress(array.data.ptr, array.nbytes), MPI.BYTE] for array in (x, y)]
    received = MPI.COMM_SELF.Irecv(buffers[1], 0, 1)
    sent = MPI.COMM_SELF.Isend(buffers[0], 0, 1)
    MPI.Request.Waitall([received, sent])
    sys.exit(0 if ops.to_host(y).tobytes() == host.tobytes() else 1)


if __name__ == "__main__":
    main()
