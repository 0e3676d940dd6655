"""What the watch of a run costs: steps with the flight recorder, the monitor process and the comparison of ranks, by turns with bare ones.

    mpirun -n 2 python jobs/bench/watching.py [--shape 14M] [--pairs N] [--out FILE.json]

Prints the watch's share of a step (median over pairs of turns, its spread) and what a comparison of all replicas takes, which a run
makes every `run.check_replicas` steps and before each save.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import workers  # noqa: F401  (finds mpillm)

from mpillm.backend.threads import prepare_environment

prepare_environment(1)      # before NumPy, as the product does

import record  # noqa: E402
from ours import Steps, versions  # noqa: E402

from mpillm.layout.journal import JOURNAL  # noqa: E402
from mpillm.run.replicas import Replicas  # noqa: E402
from mpillm.run.signals import StopFlag  # noqa: E402
from mpillm.run.stragglers import ComputeTime  # noqa: E402
from mpillm.run.watchdog import Watchdog  # noqa: E402

TURN = 3        # steps


def turn(steps, compute_time=None):
    """Seconds of a step."""
    started = time.perf_counter()
    for _ in range(TURN):
        begun = time.perf_counter()
        if compute_time:
            compute_time.begin()
        steps.step()
        if compute_time:
            compute_time.end(steps.done, time.perf_counter() - begun)
    return (time.perf_counter() - started) / TURN


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="14M")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--out", metavar="FILE.json")
    arguments = parser.parse_args()
    about = record.begin(vars(arguments))
    steps = Steps({"shape": arguments.shape})
    group, mesh, pairs = steps.group, steps.trainer.mesh, []
    steps.step()
    with tempfile.TemporaryDirectory() as folder, StopFlag(group) as stop:
        directory = SimpleNamespace(path=Path(folder), token="", before=None)
        compute_time = ComputeTime(mesh, JOURNAL)
        for number in range(arguments.pairs):
            found = {}
            for watched in ((True, False) if number % 2 else (False, True)):
                if watched:
                    with Watchdog(group, directory, stop):
                        time.sleep(0.5)     # the monitor has started
                        found[watched] = turn(steps, compute_time)
                else:
                    found[watched] = turn(steps)
            pairs.append([found[False], found[True]])
    shares = sorted(watched / bare - 1 for bare, watched in pairs)
    replicas, checks = Replicas(mesh, steps.model), []
    for _ in range(arguments.pairs):
        group.barrier()
        started = time.perf_counter()
        replicas.check()
        checks.append(time.perf_counter() - started)
    if group.rank == 0:
        step = statistics.median(bare for bare, _ in pairs)
        print(f"{arguments.shape}, {group.size} ranks: step {1e3 * step:.1f} ms, the watch takes {100 * statistics.median(shares):.2f} % of it "
              f"({100 * shares[0]:.2f} to {100 * shares[-1]:.2f}, {len(pairs)} pairs of {TURN} steps); a comparison of replicas {1e3 * statistics.median(checks):.2f} ms")
        if arguments.out:
            about["versions"] = versions(steps.ops)
            record.write(about | {"ranks": group.size, "steps_per_turn": TURN, "seconds_bare_and_watched": pairs, "seconds_of_a_comparison": checks}, arguments.out)


if __name__ == "__main__":
    main()
