"""Judges what `mpillm doctor` measured: outliers, findings, a table a node, a verdict. Pure."""

import collections
import statistics

from .hang import ranks_text
from .progress import bytes_text, scaled

# What is compared between ranks: key of a rank -> (its name, unit, share or multiple of the median beyond which a rank is an outlier)
RATES = {"gemm_float32": ("float32 matrix product", "FLOP/s", 0.8), "gemm_float64": ("float64 matrix product", "FLOP/s", 0.8),
         "gemm_bfloat16": ("bfloat16 matrix product", "FLOP/s", 0.8), "bandwidth_within": ("bandwidth on the node", "B/s", 0.5),
         "bandwidth_across": ("bandwidth across nodes", "B/s", 0.5), "to_gpu": ("copy to the GPU", "B/s", 0.5), "from_gpu": ("copy from the GPU", "B/s", 0.5)}
TIMES = {"latency_within": ("latency on the node", "s", 5.0), "latency_across": ("latency across nodes", "s", 5.0),
         "start_seconds": ("start of Python", "s", 3.0), "import_seconds": ("import of Python modules", "s", 3.0)}
SLOW = {"start_seconds": 5.0, "import_seconds": 5.0, "latency_within": 2e-5, "latency_across": 1e-4}      # seconds; what is shorter is no finding
SKEW = 1.0              # seconds between clocks
LEAST_FREE = 1 << 30    # bytes
FEWEST = 3              # values of which a median says something


def by_node(ranks):
    """{node: its ranks}, in the order of ranks."""
    nodes = {}
    for each in ranks:
        nodes.setdefault(each["host"], []).append(each)
    return nodes


# ---- findings -----------------------------------------------------------------------------------------------------

def outliers(ranks):
    """{key: {ranks, median, worst}} of ranks far from the median of all that compute on the same kind of device.

    Ranks that share cores are left out: there the times tell how the system shares them out.
    """
    alone = [each for own in by_node(ranks).values() if not crowded(own) for each in own]
    found = {}
    for key, (_, _, bound) in (RATES | TIMES).items():
        for on_gpu in (False, True):
            values = {each["rank"]: each[key] for each in alone if each[key] is not None and (each["gpu"] is not None) == on_gpu}
            if len(values) < FEWEST:
                continue
            middle = statistics.median(values.values())
            far = {rank: value for rank, value in values.items()
                   if (value < bound * middle if key in RATES else value > max(bound * middle, SLOW[key]))}
            if far:
                before = found.get(key, {"ranks": []})["ranks"]
                found[key] = {"ranks": sorted([*before, *far]), "median": middle, "worst": (min if key in RATES else max)(far.values())}
    return found


def findings(known):
    """(problems, warnings), lines for people."""
    ranks, system = known["ranks"], known["file_system"]
    problems, warnings = [], list(known["notes"])
    if system["error"]:
        problems.append(f"checkpoints cannot be written: {system['error']}")
    elif system["free_bytes"] < LEAST_FREE:
        problems.append(f"only {bytes_text(system['free_bytes'])} are free in {system['directory']}")
    for each in known["all_reduce"]:
        if each["wrong"]:
            problems.append(f"MPI's sum of {bytes_text(each['bytes'])} over all ranks is wrong on {ranks_text(each['wrong'])}")
    clocks = [each["clock"] for each in ranks]
    if max(clocks) - min(clocks) > SKEW:
        warnings.append(f"the clocks of the nodes differ by {max(clocks) - min(clocks):.1f} s")
    if known["num_ranks"] > 1 and not system["parallel_hdf5"]:
        warnings.append("h5py has no MPI: checkpoints are written by offsets, which works; for parallel HDF5 load its module and run jobs/setup.sh again")
    warnings += [outlier_text(key, outlier, ranks) for key, outlier in outliers(ranks).items()]
    return problems, warnings + binding(ranks)


def outlier_text(key, outlier, ranks):
    """A line on the ranks that are far from the median."""
    hosts = sorted({each["host"] for each in ranks if each["rank"] in outlier["ranks"]})
    name, unit, _ = (RATES | TIMES)[key]
    return (f"{name} of {ranks_text(outlier['ranks'])} (node{'s' * (len(hosts) > 1)} {', '.join(hosts)}) is slow: "
            f"{amount(outlier['worst'], unit)}, where the median is {amount(outlier['median'], unit)}")


def amount(value, unit):
    """A number with its unit, for people: 1.5 GB/s, 2e-05 s."""
    if unit == "s":
        return f"{value:.2g} s"
    text = scaled(value)
    return f"{text[:-1]} {text[-1]}{unit}" if text[-1].isalpha() else f"{text} {unit}"


def binding(ranks):
    """Findings about the cores that ranks may use, once a kind."""
    nodes = by_node(ranks)
    full = [host for host, own in nodes.items() if crowded(own)]
    shared = [host for host, own in nodes.items() if host not in full and in_the_way(own)]
    lines = [f"more threads than cores on {', '.join(full)}: start fewer ranks or set OMP_NUM_THREADS; the ranks there are not compared"] if full else []
    return lines + ([f"ranks are bound to cores of other ranks on {', '.join(shared)}: check --cpu-bind or mpirun --bind-to"] if shared else [])


def crowded(own):
    """Whether the ranks of a node have more threads than cores."""
    return sum(each["threads"] for each in own) > num_cores(own)


def in_the_way(own):
    """Whether ranks of a node are bound to masks that overlap in part, or to one that is too small for their threads."""
    threads = collections.Counter()
    for each in own:
        threads[frozenset(each["cpus"])] += each["threads"]
    masks = [mask for mask in threads if len(mask) < num_cores(own)]
    return any(threads[mask] > len(mask) for mask in masks) or any(a & b for place, a in enumerate(masks) for b in masks[:place])


def excluded(known):
    """Nodes with slow hardware, for `sbatch --exclude`; none where that would be half of them or more."""
    found = outliers(known["ranks"])
    far = {rank for key in RATES if key in found for rank in found[key]["ranks"]}
    slow = sorted({each["host"] for each in known["ranks"] if each["rank"] in far})
    return slow if 2 * len(slow) < len(by_node(known["ranks"])) else []


def judge(known):
    """`known` with a summary of the machine, outliers, problems, warnings, exclude and verdict."""
    problems, warnings = findings(known)
    verdict = "not fit" if problems else "fit, with warnings" if warnings else "fit"
    return known | {"machine": machine(known), "outliers": outliers(known["ranks"]), "problems": problems, "warnings": warnings,
                    "exclude": excluded(known), "verdict": verdict}


def machine(known):
    """What `mpillm plan` has to know of these nodes: medians of the ranks, in SI units; None for what is not there."""
    ranks, nodes, system = known["ranks"], by_node(known["ranks"]), known["file_system"]

    def median(key):
        return statistics.median(values) if (values := [each[key] for each in ranks if each[key] is not None]) else None
    return {
        "nodes": len(nodes), "ranks_per_node": max(map(len, nodes.values())),
        "cores_per_node": min(num_cores(own) for own in nodes.values()), "threads": min(each["threads"] for each in ranks),
        "memory_bytes": min((each["memory_bytes"] for each in ranks if each["memory_bytes"]), default=None),
        "gpus_per_node": min(num_gpus(own) for own in nodes.values()), "gpu_name": next((each["gpu_name"] for each in ranks if each["gpu_name"]), None),
        "gpu_free_bytes": min((each["gpu_free_bytes"] for each in ranks if each["gpu_free_bytes"]), default=None),
        "gemm_flops": {key.removeprefix("gemm_"): median(key) for key in RATES if key.startswith("gemm_")},
        **{key: median(key) for key in (*RATES, *TIMES) if not key.startswith("gemm_")}, "all_reduce": known["all_reduce"],
        "write_rate": system.get("write_rate"), "read_rate": system.get("read_rate")}


def num_cores(ranks):
    """Logical CPUs that the ranks of a node may use together."""
    return len(set().union(*(each["cpus"] for each in ranks)))


def num_gpus(ranks):
    """GPUs that the ranks of a node compute on."""
    return len({each["gpu"] for each in ranks} - {None})


# ---- the table ----------------------------------------------------------------------------------------------------

def table(judged):
    """Lines: what runs here, a row a node, sums and files, findings, verdict."""
    lines = [*head(judged), *node_rows(judged), *sums_and_files(judged)]
    lines += [f"problem: {line}" for line in judged["problems"]] + [f"warning: {line}" for line in judged["warnings"]]
    if judged["exclude"]:
        lines.append(f"leave out: sbatch --exclude={','.join(judged['exclude'])}")
    return [*lines, f"verdict: {judged['verdict']} ({judged['seconds']:.0f} s)"]


def head(judged):
    """Lines on MPI, Python and BLAS."""
    mpi, ranks = judged["mpi"], judged["ranks"]
    how = f"thread level {mpi['thread_level']}, {judged['num_ranks']} ranks started by {judged['launcher']}" if judged["launcher"] else "not used by one rank"
    return [f"MPI           {mpi['library']}, MPI {'.'.join(map(str, mpi['standard']))}, {how}" if mpi else "MPI           none",
            f"Python        {judged['python']}: start {_span(ranks, 'start_seconds')} s, imports {_span(ranks, 'import_seconds')} s"
            + (f", MPI_Init {_span(ranks, 'mpi_seconds')} s" if judged["launcher"] else ""),
            f"BLAS          {', '.join(sorted({each['blas'] or '?' for each in ranks}))}"]


COLUMNS = (     # title, key of a rank, factor of the unit
    ("cores", num_cores, 1), ("threads", "threads", 1), ("float32 GF/s", "gemm_float32", 1e-9), ("float64 GF/s", "gemm_float64", 1e-9),
    ("bfloat16 GF/s", "gemm_bfloat16", 1e-9), ("us on node", "latency_within", 1e6), ("us across", "latency_across", 1e6),
    ("GB/s on node", "bandwidth_within", 1e-9), ("GB/s across", "bandwidth_across", 1e-9), ("GPUs", num_gpus, 1), ("GB/s to GPU", "to_gpu", 1e-9),
    ("GB/s from GPU", "from_gpu", 1e-9), ("memory GB", "memory_bytes", 1e-9))


def node_rows(judged):
    """A row a node, each number of its slowest and fastest rank, those with an outlier marked; columns that are empty everywhere are left out."""
    found = judged["outliers"]
    rows = [["node", "ranks", *(title for title, _, _ in COLUMNS), "GPU-aware MPI"]]
    for host, own in by_node(judged["ranks"]).items():
        cells = [host, str(len(own))]
        for _, key, factor in COLUMNS:
            mark = " *" if key in found and any(each["rank"] in found[key]["ranks"] for each in own) else ""
            cells.append(str(key(own) or "-") if callable(key) else _span(own, key, factor) + mark)
        rows.append([*cells, {True: "yes", False: "no", None: "-"}[own[0]["gpu_aware_mpi"]]])
    columns = [column for column in zip(*rows) if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in columns]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in zip(*columns)]


def sums_and_files(judged):
    """Lines on sums over all ranks and on the file system."""
    system, lines = judged["file_system"], []
    if judged["all_reduce"]:
        lines.append("all-reduce    " + ", ".join(f"{bytes_text(each['bytes'])} in {1e3 * each['seconds']:.3g} ms" for each in judged["all_reduce"]))
    stripes = {None: "", -1: ", striped over all servers"}.get(system["stripe_count"], f", {system['stripe_count']} stripes")
    place = f"files         {system['directory']}: {system['type']}{stripes}, {bytes_text(system['free_bytes'])} free"
    if not system["error"]:
        form = "parallel HDF5" if system["form"] == "parallel" else "HDF5 by offsets"
        place += f"; {form}: wrote {bytes_text(system['bytes'])} at {amount(system['write_rate'], 'B/s')}, read back at {amount(system['read_rate'], 'B/s')}"
    return [*lines, place]


def _span(ranks, key, scale=1.0):
    """The least and the most of a value, for people."""
    values = [each[key] * scale for each in ranks if each[key] is not None]
    if not values:
        return "-"
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low}-{high}"
