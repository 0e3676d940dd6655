"""What the launcher tells a process before MPI is there: its rank, the ranks on its node, the cores it may use.

Standard library only, and nothing here starts MPI: it runs before NumPy is imported.
"""

import os
import re
import time

from ..layout.launcher import LOCAL_SIZE_VARIABLES, ends_on_terminate, first_number, launched, rank, step_of_srun

STARTED = time.monotonic()  # seconds; this module is imported first, so it is the start of the process

DAEMONS = ("prterun", "prted", "orterun", "orted", "mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy", "hydra_bstrap_p",
           "slurmstepd", "palsd", "flux-shell")  # names as /proc shows them, at most 15 letters


moments = []        # (what was done, seconds since this process began) of the start of a run


def since_start():
    """Seconds since this process began, the start of the interpreter included; since this module was imported where there is no /proc."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return time.monotonic() - STARTED


def moment(name):
    """A part of the start of a run is done."""
    moments.append((name, since_start()))


def job_id(environ=os.environ):
    """The batch system's name for this job, or None."""
    for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID", "COBALT_JOBID"):
        if environ.get(name):
            return environ[name]
    return None


def tasks_of_nodes(text):
    """Slurm's tasks per node, one number a node: "2(x3),1" -> [2, 2, 2, 1]; [] for other text."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            return []
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def local_size(environ=os.environ):
    """Ranks of this job on this node."""
    found = first_number(LOCAL_SIZE_VARIABLES, environ)
    if found is None and step_of_srun(environ):
        counts = tasks_of_nodes(environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", ""))
        node = first_number(["SLURM_NODEID"], environ) or 0
        found = counts[node] if node < len(counts) else first_number(["SLURM_NTASKS_PER_NODE"], environ)
    return max(1, found or 1)


def physical_cores(cpus, sysfs="/sys/devices/system/cpu"):
    """How many cores the logical CPUs `cpus` lie on: two hardware threads of a core count once."""
    cores = set()
    for cpu in cpus:
        try:
            with open(f"{sysfs}/cpu{cpu}/topology/thread_siblings_list") as file:
                cores.add(file.read().strip())
        except OSError:
            cores.add(cpu)
    return max(1, len(cores))


def affinity(process):
    """The logical CPUs that a process may use; all of the machine where the system cannot tell."""
    try:
        return os.sched_getaffinity(process)
    except (AttributeError, OSError):
        return set(range(os.cpu_count() or 1))


def ancestors(process=None, depth=8):
    """(process id, program name) of the parent, its parent and so on; empty where there is no /proc."""
    found, process = [], os.getppid() if process is None else process
    while process > 1 and len(found) < depth:
        try:
            with open(f"/proc/{process}/stat") as file:
                text = file.read()
        except OSError:
            break
        name, rest = text[text.index("(") + 1:text.rindex(")")], text[text.rindex(")") + 2:].split()
        found.append((process, name))
        process = int(rest[1])
    return found


def node_cpus():
    """Logical CPUs of this job on this node: those of the launcher's daemon, which is not bound to a core."""
    daemons = [process for process, name in ancestors() if name in [daemon[:15] for daemon in DAEMONS]]
    return affinity(0) | affinity(daemons[0] if daemons else os.getppid())


def num_threads(environ=os.environ, own=None, node=None, cores_of=physical_cores):
    """Threads of BLAS and OpenMP of this rank: the cores of this node over the ranks on it, and no more than it may use.

    A launcher that binds each rank to its own cores has divided the node already: this rank's CPUs are then no
    more than its share, and are not divided again. A mask that ranks share (unbound, or bound to a socket) is
    larger than the share, and the share counts.

    Parameters
    ----------
    own, node : set of int, optional
        Logical CPUs of this rank and of the job on this node; asked from the system when left out.
    """
    own = affinity(0) if own is None else own
    if node is None:
        node = node_cpus() if launched(environ) else own
    cores, ranks = cores_of(node), local_size(environ)
    on_node = first_number(["SLURM_CPUS_ON_NODE"], environ)  # logical CPUs of the job here
    if on_node and on_node < len(node):
        cores = max(1, cores * on_node // len(node))
    share = max(1, cores // ranks)
    return max(1, min(share, cores_of(own)))
