"""What is kept of a benchmark: the date, the machine without its name, versions, every raw number."""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path

import workers  # noqa: F401  (finds mpillm)

from mpillm.backend.threads import first_cpu

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def machine():
    """CPU model, cores, memory, system; no host name."""
    cpu = first_cpu()
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count()
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    return {"cpu": cpu.get("model name", platform.machine()), "cpu_family": cpu.get("cpu family"), "cpu_model": cpu.get("model"),
            "vectors": [name for name in ("avx2", "avx512f", "amx_tile", "asimd", "sve") if name in flags], "cores": cores,
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "load_before": os.getloadavg()[0],
            "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}"}


def commit():
    """The commit of this checkout, with "+" when files differ from it; None without git."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, timeout=20)
    try:
        found = git("rev-parse", "HEAD")
        return found.stdout.strip() + ("+" if git("status", "--porcelain").stdout else "") if found.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):
        return None


def begin(arguments):
    """A record of what is about to run."""
    return {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "machine": machine(), "commit": commit(),
            "arguments": arguments, "versions": {}}


def write(record, out):
    """Writes the record; a plain file name lies in jobs/bench/results."""
    path = Path(out) if os.sep in out else RESULTS / out
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
