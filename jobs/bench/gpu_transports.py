"""All-reduce of 256 MB between ranks with GPUs: seconds and GB/s of each transport. Started by mpirun, on two ranks or more.

    mpirun -n 2 python jobs/bench/gpu_transports.py [--megabytes 256] [--out FILE.json]

GB/s are the bytes of the array over the time, and what a rank sends and receives, 2 (p - 1) / p of it each way.
"""

import argparse
import statistics
import time

import numpy as np

from gpu_record import about, save, table
from mpillm.config import UserError
from mpillm.layout.comm import world
from mpillm.layout.probe import is_cuda_aware
from mpillm.run.connect import connect
from mpillm.run.session import open_device

ROUNDS = 7


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    group = world()
    ops = open_device("gpu", "float32", group)
    aware = group.share(is_cuda_aware() if group.rank == 0 else None)
    rows, raw = [], {}
    for transport in ("cuda_aware", "staged", "nccl"):
        row = {"transport": transport, "milliseconds": "", "GB/s": "", "note": ""}
        rows.append(row)
        if transport == "cuda_aware" and not aware:
            row["note"] = "the probe says no"
            continue
        try:
            ranks, _ = connect(group, ops, transport)
        except UserError as error:
            row["note"] = str(error)[:160]
            continue
        x = ops.from_host(np.full(arguments.megabytes << 18, group.rank + 1, np.float32))
        seconds = []
        for _ in range(ROUNDS + 1):
            ops.fill(x, 1.0)
            ops.synchronize()
            group.barrier()
            started = time.perf_counter()
            ranks.all_reduce(x)
            ops.synchronize()
            seconds.append(time.perf_counter() - started)
        right = bool((ops.to_host(x[:1000]) == group.size).all() and (ops.to_host(x[-1000:]) == group.size).all())
        middle = statistics.median(seconds[1:])
        row |= {"milliseconds": middle * 1e3, "GB/s": x.nbytes / middle / 1e9, "note": "" if right else "WRONG SUM"}
        raw[transport] = seconds[1:]
    if group.rank == 0:
        print(f"{group.size} ranks, {arguments.megabytes} MB, probe: MPI {'takes' if aware else 'does not take'} device memory; {ops.note}")
        print(table(rows))
        save(arguments.out, about(ops) | {"ranks": group.size, "megabytes": arguments.megabytes, "probe": aware, "rows": rows, "seconds": raw})


if __name__ == "__main__":
    main()
