"""Judges what `mpillm doctor` measured: outliers, findings, a table a node, a verdict. Pure."""

import statistics

from .hang import ranks_text
from .progress import bytes_text, scaled

LEAST = {"gemm_flops": 0.8, "bandwidth_within": 0.5, "bandwidth_across": 0.5}      # shares of the median below which a rank is an outlier
MOST = {"latency_within": 5.0, "latency_across": 5.0, "start_seconds": 3.0}        # times the median
WORDS = {"gemm_flops": "matrix product", "bandwidth_within": "bandwidth on the node", "bandwidth_across": "bandwidth across nodes",
         "latency_within": "latency on the node", "latency_across": "latency across nodes", "start_seconds": "start of Python"}
HARDWARE = ("gemm_flops", "bandwidth_within", "bandwidth_across")      # a reason to leave a node out
SKEW = 1.0              # seconds between clocks
SLOW_START = 10.0       # seconds; a shorter start is no finding
LEAST_FREE = 1 << 30    # bytes


def outliers(ranks):
    """{key: ranks far from the median of all}."""
    found = {}
    for key in (*LEAST, *MOST):
        values = {each["rank"]: each[key] for each in ranks if each[key] is not None}
        if len(values) < 3:
            continue
        middle = statistics.median(values.values())
        far = [rank for rank, value in values.items() if key in LEAST and value < LEAST[key] * middle or key in MOST and value > MOST[key] * middle]
        if key == "start_seconds":
            far = [rank for rank in far if values[rank] > SLOW_START]
        if far:
            found[key] = sorted(far)
    return found


def findings(known):
    """(problems, warnings), lines for people."""
    ranks, problems, warnings = known["ranks"], [], []
    system = known["file_system"]
    if system.get("error"):
        problems.append(f"the run directory cannot be written to: {system['error']}")
    elif system["free_bytes"] < LEAST_FREE:
        problems.append(f"only {bytes_text(system['free_bytes'])} are free in the run directory")
    for each in known["all_reduce"]:
        if not each["right"]:
            problems.append(f"MPI's sum of {bytes_text(each['bytes'])} over all ranks is wrong")
    clocks = [each["clock"] for each in ranks]
    if max(clocks) - min(clocks) > SKEW:
        warnings.append(f"the clocks of the nodes differ by {max(clocks) - min(clocks):.1f} s")
    if known["mpi"] and not system.get("parallel_hdf5"):
        warnings.append("h5py has no MPI: checkpoints are written by offsets, which works; for parallel HDF5 load its module and run jobs/setup.sh again")
    for key, far in outliers(ranks).items():
        hosts = sorted({each["host"] for each in ranks if each["rank"] in far})
        warnings.append(f"{WORDS[key]} of {ranks_text(far)} (node{'s' * (len(hosts) > 1)} {', '.join(hosts)}) is far from the median")
    return problems, warnings + binding(ranks)


def binding(ranks):
    """Findings about the cores that ranks may use, once a kind."""
    shared, crowded = set(), set()
    for host in {each["host"] for each in ranks}:
        own = [each for each in ranks if each["host"] == host]
        cores = set().union(*(each["cpus"] for each in own))
        wanted = sum(each["threads"] for each in own)
        if wanted > len(cores):
            crowded.add(host)
        elif any(set(a["cpus"]) & set(b["cpus"]) and len(a["cpus"]) < len(cores) for place, a in enumerate(own) for b in own[:place]):
            shared.add(host)
    lines = [f"more threads than cores on {', '.join(sorted(crowded))}: start fewer ranks or set OMP_NUM_THREADS"] if crowded else []
    return lines + ([f"ranks are bound to cores of other ranks on {', '.join(sorted(shared))}: check --cpu-bind or mpirun --bind-to"] if shared else [])


def excluded(known):
    """Nodes with slow hardware, for `sbatch --exclude`; none where there is one node only, or most are slow."""
    far = {rank for key, found in outliers(known["ranks"]).items() if key in HARDWARE for rank in found}
    hosts = sorted({each["host"] for each in known["ranks"]})
    slow = sorted({each["host"] for each in known["ranks"] if each["rank"] in far})
    return slow if 2 * len(slow) < len(hosts) else []


def judge(known):
    """`known` with problems, warnings, exclude and verdict."""
    problems, warnings = findings(known)
    verdict = "not fit" if problems else "fit, with warnings" if warnings else "fit"
    return known | {"problems": problems, "warnings": warnings, "exclude": excluded(known), "verdict": verdict}


def table(judged):
    """Lines: what runs here, a row a node, messages and files, findings, verdict."""
    mpi, system = judged["mpi"], judged["file_system"]
    lines = [f"MPI           {mpi['library']}, thread level {mpi['thread_level']}, started by {judged['launcher'] or 'another launcher'}" if mpi else "MPI           one rank, not used",
             f"Python        {judged['python']}, from start to first check {_span(judged['ranks'], 'start_seconds')} s"]
    rows = [("node", "ranks", "cores", "threads", "GEMM GF/s a rank", "latency us", "GB/s on node", "GB/s across", "GPUs", "GPU-aware", "memory")]
    far = {rank for found in outliers(judged["ranks"]).values() for rank in found}
    for host in dict.fromkeys(each["host"] for each in judged["ranks"]):
        own = [each for each in judged["ranks"] if each["host"] == host]
        mark = " *" if any(each["rank"] in far for each in own) else ""
        aware = own[0]["gpu_aware_mpi"]
        rows.append((host + mark, str(len(own)), str(len(set().union(*(each["cpus"] for each in own)))), str(own[0]["threads"]), _span(own, "gemm_flops", 1e-9),
                     _span(own, "latency_within", 1e6), _span(own, "bandwidth_within", 1e-9), _span(own, "bandwidth_across", 1e-9),
                     str(len({each["gpu"] for each in own} - {None})), {True: "yes", False: "no", None: "-"}[aware], bytes_text(own[0]["memory_bytes"] or 0)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    if judged["all_reduce"]:
        lines.append("all-reduce    " + ", ".join(f"{bytes_text(each['bytes'])} in {1e3 * each['seconds']:.3g} ms" for each in judged["all_reduce"]))
    if not system.get("error"):
        stripes = f", {system['stripe_count']} stripes" if system["stripe_count"] else ""
        lines.append(f"run directory {system['type']}{stripes}, {bytes_text(system['free_bytes'])} free; {'parallel HDF5' if system['form'] == 'parallel' else 'written by offsets'}: "
                     f"wrote {bytes_text(system['bytes'])} at {scaled(system['write_rate'])}B/s, read back at {scaled(system['read_rate'])}B/s")
    lines += [f"problem: {line}" for line in judged["problems"]] + [f"warning: {line}" for line in judged["warnings"]]
    if judged["exclude"]:
        lines.append(f"leave out: sbatch --exclude={','.join(judged['exclude'])}")
    return [*lines, f"verdict: {judged['verdict']} ({judged['seconds']:.0f} s)"]


def _span(ranks, key, scale=1.0):
    """The least and the most of a value, for people."""
    values = [each[key] * scale for each in ranks if each[key] is not None]
    if not values:
        return "-"
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low}-{high}"
