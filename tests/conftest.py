"""Fixtures and manners of the tests, without a launcher and under mpirun.

A test marked `ranks` (or a file with `pytestmark = pytest.mark.ranks`) runs on 1, 2, 3 and 4 ranks: every rank runs every such
test, in the same order. On one rank, like all other tests, it runs without a launcher. `long` marks counted proofs that take
minutes (tests/run.sh --long). tests/run.sh starts both kinds.

Under several ranks a failing test would leave the others waiting in MPI: its rank prints the report and ends the whole job.
"""

import os
import shutil
import sys
import time
from pathlib import Path

import hypothesis
import pytest

from mpillm.layout.comm import world

RESULTS = os.environ.get("MPILLM_TEST_RESULTS")  # a file that the first rank to finish or fail writes: "passed failed skipped"
OTHERS_WAIT = 1.5  # seconds that the other ranks give rank 0 to tell first

counts = {"passed": 0, "failed": 0, "skipped": 0}

# All ranks must draw the same examples.
hypothesis.settings.register_profile("mpillm", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("mpillm")


@pytest.fixture(scope="session")
def group():
    """All ranks of this launch; a `Solo` where there is one."""
    return world()


@pytest.fixture
def shared_tmp(group, tmp_path_factory):
    """An empty directory, the same on all ranks; removed when all ranks are done with it."""
    path = Path(group.share(str(tmp_path_factory.mktemp("shared")) if group.rank == 0 else None))
    yield path
    group.barrier()
    if group.rank == 0:
        shutil.rmtree(path, ignore_errors=True)


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Rank 0 speaks for all; another rank is heard when a test fails on it."""
    if world().rank:
        config.pluginmanager.unregister(name="terminalreporter")


def pytest_runtest_logreport(report):
    if report.failed:
        counts["failed"] += 1
        name_failed(f"{report.nodeid} ({report.when})")
        if world().size > 1:
            end_all_ranks(report)
    elif report.skipped:
        counts["skipped"] += 1
    elif report.when == "call":
        counts["passed"] += 1


def pytest_collectreport(report):
    counts["skipped"] += report.skipped
    if report.failed:
        name_failed(f"{report.nodeid} (collection)")


def name_failed(text):
    """For the end of what tests/run.sh prints."""
    if RESULTS and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(f"{RESULTS}.failed", "a") as file:
            file.write(f"{text}\n")


def end_all_ranks(report):
    """Prints the report of a failed test with its rank and ends the job; rank 0 goes first."""
    group = world()
    if group.rank:
        time.sleep(OTHERS_WAIT)
    write_results()
    sections = "".join(f"\n--- {title} ---\n{text}" for title, text in report.sections)
    print(f"\n=== rank {group.rank} of {group.size}: {report.nodeid} failed in {report.when}\n{report.longreprtext}{sections}",
          file=sys.stderr, flush=True)
    sys.stdout.flush()
    time.sleep(0.3)  # the launcher forwards what was printed
    group.abort(1)


def pytest_sessionfinish(session, exitstatus):
    """Counts for tests/run.sh; under ranks having nothing to run is no error, and rank 0 leaves first when something is."""
    write_results()
    if world().size > 1:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK
        elif exitstatus and world().rank:
            time.sleep(OTHERS_WAIT)


def write_results():
    """Writes the counts of this rank, unless another rank did; of pytest-xdist's processes the one that has them all."""
    if RESULTS and "PYTEST_XDIST_WORKER" not in os.environ and (world().rank == 0 or counts["failed"]):
        try:
            with open(RESULTS, "x") as file:
                file.write(f"{counts['passed']} {counts['failed']} {counts['skipped']}\n")
        except FileExistsError:
            pass
