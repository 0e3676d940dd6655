"""Run on the ranks by the set-up: shows that MPI moves data, or that a file is written in parallel. Prints JSON on rank 0.

python proof.py mpi | hdf5 FILE | library
"""

import json
import re
import sys

COUNT = 2**20  # float64 elements: 8 MiB, above every eager limit


def libraries():
    """The MPI libraries in this process; two of them would be two worlds that do not know each other."""
    with open("/proc/self/maps") as maps:
        return sorted(set(re.findall(r"/\S*/libmpi(?:ch|_\w+)?\.so\S*", maps.read())))


def library():
    """Which MPI mpi4py finds; MPI is not initialised (some login nodes abort in MPI_Init)."""
    import mpi4py
    mpi4py.rc.initialize = False
    from mpi4py import MPI
    return MPI.Get_library_version(), MPI


def prove_mpi():
    import numpy as np
    from mpi4py import MPI
    comm = MPI.COMM_WORLD
    sent, received = np.full(COUNT, float(comm.rank)), np.empty(COUNT)
    comm.Sendrecv(sent, (comm.rank + 1) % comm.size, recvbuf=received, source=(comm.rank - 1) % comm.size)
    assert (received == (comm.rank - 1) % comm.size).all(), "a message arrived damaged"
    comm.Allreduce(MPI.IN_PLACE, sent)
    assert (sent == comm.size * (comm.size - 1) / 2).all(), "a sum came out wrong"
    return {"ranks": comm.size, "rank": comm.rank}


def prove_hdf5(path):
    import h5py  # before mpi4py: the order must not matter
    from mpi4py import MPI
    import numpy as np
    comm, part = MPI.COMM_WORLD, 1000
    assert len(libraries()) == 1, f"two MPI libraries in one process: {libraries()}"
    with h5py.File(path, "w", driver="mpio", comm=comm) as file:
        dataset = file.create_dataset("numbers", (comm.size * part,), "f8")
        with dataset.collective:
            dataset[comm.rank * part:(comm.rank + 1) * part] = np.arange(part) + comm.rank * part
    comm.Barrier()
    with h5py.File(path) as file:
        assert (file["numbers"][:] == np.arange(comm.size * part)).all(), "the file holds other numbers than were written"
    return {"ranks": comm.size, "rank": comm.rank, "hdf5": h5py.version.hdf5_version}


def main(what, *arguments):
    if what == "library":
        print(json.dumps({"library": library()[0].strip("\0 ").splitlines()[0], "files": libraries()}))
        return
    result = prove_mpi() if what == "mpi" else prove_hdf5(*arguments)
    if result["rank"] == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
