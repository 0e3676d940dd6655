"""The batch script of a job: from a job file, a site profile (slurm/sites/*.toml) and the template (slurm/train.sbatch.in)."""

import dataclasses
import math
import os
import re
import shlex
import sys
import tomllib
from dataclasses import dataclass, field, replace

from ..config import UserError, nearest
from ..layout.compose import check_layout
from ..layout.mesh import sizes_of
from .walltime import seconds_of

SIGNAL = 180            # seconds before the limit at which Slurm signals the ranks, where the run has not stopped by itself
TEMPLATE = "train.sbatch.in"
VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
TYPES = {str: "text", int: "a whole number", bool: "true or false", list: "a list of texts", dict: "a table"}
WORD = re.compile(r"[\w.@%+-]*")     # an account or a partition
NAME = re.compile(r"[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Site:
    """A site profile; tables [cpu] and [gpu] in it replace values for jobs on CPUs and on GPUs."""
    description: str = ""
    cores: int = 0              # of a node that jobs may use
    gpus: int = 0               # of a node
    ranks: int = 1              # on a node, for jobs on CPUs
    gpu_vendor: str = ""        # nvidia | amd
    gpu_request: str = "--gpus-per-node={gpus}"
    account: bool = False       # whether sbatch needs one
    partition: str = ""
    qos: str = ""
    constraint: str = ""
    mpi: str = ""               # srun --mpi
    bind: str = ""              # srun --cpu-bind
    directives: list = field(default_factory=list)      # further #SBATCH lines
    modules: list = field(default_factory=list)
    environment: dict = field(default_factory=dict)
    scratch: str = ""           # the fast file system
    stripe: str = ""            # command for {directory}, new checkpoints


def folders():
    """Where the templates and profiles may be: beside the package, or installed with it."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return [os.path.join(os.path.dirname(package), "slurm"), os.path.join(sys.prefix, "share", "mpillm", "slurm")]


def find(name):
    """A file below `slurm/`."""
    for folder in folders():
        if os.path.exists(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise UserError(f"slurm/{name}: not found beside mpillm nor in {folders()[1]}; install mpillm anew")


def sites():
    """Names of the profiles."""
    return sorted(name[:-5] for name in os.listdir(find("sites")) if name.endswith(".toml"))


def read_site(name, on_gpu):
    """The Site of a name, or of a file whose path ends in .toml, for jobs on GPUs or on CPUs.

    Raises
    ------
    UserError
        Unknown name, unreadable file, unknown key, value of another type.
    """
    if not name.endswith(".toml") and name not in sites():
        raise UserError(f"--site {name}: unknown{nearest(name, sites())}; sites are {', '.join(sites())}, or the path of a profile of your own")
    path = name if name.endswith(".toml") else find(os.path.join("sites", f"{name}.toml"))
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot read the site profile: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a TOML file: {str(error).splitlines()[0]}") from None
    parts = {kind: values.pop(kind, {}) for kind in ("cpu", "gpu")}
    for kind, part in parts.items():
        if type(part) is not dict:
            raise UserError(f"{path}: {kind} = {part!r}: expected a table, [{kind}] with keys below it")
    site = Site()
    for table in (values, parts["gpu" if on_gpu else "cpu"]):
        site = _changed(site, table, path)
    if on_gpu and site.gpu_vendor == "amd":
        raise UserError(f"run.device = \"gpu\" on {site.description}: its GPUs are of AMD, for which mpillm has no kernels; use run.device = \"cpu\" or another site")
    if on_gpu and not site.gpus:
        raise UserError(f"run.device = \"gpu\" on {site.description or name}: the profile has no GPUs; use run.device = \"cpu\", another site, or set gpus in {path}")
    if not site.cores:
        raise UserError(f"{path}: cores is missing: the cores of a node that a job may use")
    return site


def _changed(site, table, path):
    kinds = {item.name: type(getattr(site, item.name)) for item in dataclasses.fields(Site)}
    for key, value in table.items():
        if key not in kinds:
            raise UserError(f"{path}: unknown key {key}{nearest(key, kinds)}; keys are {', '.join(kinds)}")
        if type(value) is not kinds[key]:
            raise UserError(f"{path}: {key} = {value!r}: expected {TYPES[kinds[key]]}")
        problem = _problem(key, value)
        if problem:
            raise UserError(f"{path}: {key} = {value!r}: {problem}")
    return replace(site, **table)


def _problem(key, value):
    """What is wrong with a value of the right type; None where nothing is."""
    texts = [value] if type(value) is str else value if type(value) is list else []
    if not all(type(text) is str and text.isprintable() for text in texts):
        return "expected text of one line" if type(value) is str else "expected a list of texts of one line"
    if type(value) is int and value < (key != "gpus"):
        return f"expected {int(key != 'gpus')} or more"
    if key == "gpu_vendor" and value not in ("", "nvidia", "amd"):
        return 'expected "nvidia" or "amd"'
    if key == "environment":
        for name, setting in value.items():
            if not VARIABLE.fullmatch(name) or type(setting) not in (str, int, float):
                return f"{name} = {setting!r}: expected NAME = text or a number"
    if key in ("gpu_request", "stripe") and value:
        field = "gpus" if key == "gpu_request" else "directory"
        try:
            words = shlex.split(value.format(**{field: "1"}))
        except (ValueError, KeyError, IndexError, AttributeError):
            words = []
        if not words or key == "stripe" and not value.count("{directory}"):
            return f"expected options with {{{field}}} in them" if key == "gpu_request" else "expected a command with {directory} in it"
    return None


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""
    job_file: str
    overrides: list
    nodes: int = 1
    ranks_per_node: int | None = None
    time: str = "01:00:00"
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    links: int = 1
    venv: str = ".venv"
    directory: str = "."


def fitting_ranks(job, site, request, on_gpu):
    """(ranks on a node, cores of a rank), once they fit the nodes and the mesh fits the ranks."""
    per_node = request.ranks_per_node or (site.gpus if on_gpu else min(site.ranks, site.cores))
    if on_gpu and per_node > site.gpus:
        raise UserError(f"--ranks-per-node {per_node}: a node of {site.description} has {site.gpus} GPUs, one a rank; use at most {site.gpus}, or more --nodes")
    if per_node > site.cores:
        raise UserError(f"--ranks-per-node {per_node}: a node of {site.description} has {site.cores} cores for jobs; use at most {site.cores}, or more --nodes")
    try:
        sizes = sizes_of(job.mesh, per_node * request.nodes)
    except UserError as error:
        raise UserError(f"{request.nodes} nodes of {per_node} ranks: {error}; change --nodes or --ranks-per-node") from None
    check_layout(replace(job, model=replace(job.model, vocabulary=job.model.vocabulary or 2**30)), sizes)
    return per_node, site.cores // per_node


def render(job, site, request):
    """The script, as text."""
    on_gpu = job.run.device == "gpu"
    for option, value in (("--account", request.account), ("--partition", request.partition), ("--qos", request.qos)):
        if value is not None and not WORD.fullmatch(value):
            raise UserError(f"{option} {value!r}: expected a name")
    if not NAME.fullmatch(job.run.name):
        raise UserError(f"run.name = {job.run.name!r}: names the job in a batch script; use letters, digits and . _ - only")
    if not 0 < (seconds_of(request.time) or 0) < math.inf:
        raise UserError(f"--time {request.time}: expected minutes, minutes:seconds, hours:minutes:seconds, days-hours or days-hours:minutes:seconds, above 0")
    if site.account and not request.account:
        raise UserError(f"--account: {site.description} needs one; give the project that pays, such as --account myproject")
    per_node, cores = fitting_ranks(job, site, request, on_gpu)
    run = f"runs/{job.run.name}"
    values = {
        "title": f"{job.run.name} on {site.description}: {request.nodes} node{'s' * (request.nodes > 1)} of {per_node} ranks",
        "directives": "\n".join(f"#SBATCH {line}" for line in directives(job, site, request, per_node, cores, on_gpu)),
        "directory": shlex.quote(os.path.abspath(request.directory)), "activate": shlex.quote(os.path.join(request.venv, "bin", "activate")), "cpus": str(cores), "threads": str(cores), "name": job.run.name,
        "modules": "\n".join(f"module load {shlex.quote(name)}" for name in site.modules),
        "environment": "\n".join(f"export {name}={shlex.quote(str(value))}" for name, value in site.environment.items()),
        "stripe": stripe(site, run),
        "srun": " ".join([*([shlex.quote(f"--mpi={site.mpi}")] if site.mpi else []), *([shlex.quote(f"--cpu-bind={site.bind}")] if site.bind else [])]),
        "arguments": " ".join(map(shlex.quote, [request.job_file, *request.overrides])),
    } | ending(request.links)
    with open(find(TEMPLATE), encoding="utf-8") as file:
        text = re.sub(r"@(\w+)@", lambda match: values[match[1]], file.read())
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text))


def directives(job, site, request, per_node, cores, on_gpu):
    """The #SBATCH options, without that word."""
    given = {"--account": request.account, "--partition": request.partition or site.partition, "--qos": request.qos or site.qos, "--constraint": site.constraint}
    name = "-%A_%a" if request.links > 1 else "-%j"
    return [f"--job-name={job.run.name}", *(f"{option}={value}" for option, value in given.items() if value),
            f"--nodes={request.nodes}", f"--ntasks-per-node={per_node}", f"--cpus-per-task={cores}",
            *([site.gpu_request.format(gpus=per_node)] if on_gpu else []), f"--time={request.time}",
            *([f"--array=1-{request.links}%1"] if request.links > 1 else ["--requeue"]),
            f"--signal=USR1@{SIGNAL}", f"--output=slurm-%x{name}.out", "--open-mode=append", *site.directives]


def stripe(site, run):
    """The command for the stripes of new checkpoints, where the file system has some."""
    if not site.stripe:
        return ""
    command = site.stripe.format(directory='"$run/checkpoints"')
    program = shlex.split(site.stripe)[0]
    return f'if [ ! -d "{run}" ] && command -v {shlex.quote(program)} > /dev/null; then mkdir -p "$run/checkpoints" && {command}; fi'


def ending(links):
    """What a job does at its end and a link at its beginning."""
    if links == 1:
        return {"chain": "", "give_up": "", "again": '  echo "queued again: $1"\n  scontrol requeue "$SLURM_JOB_ID" && sleep 60      # Slurm ends this shell'}
    return {"chain": '# A link after the end of the run has nothing to do.\n'
                     'if [ "${SLURM_ARRAY_TASK_ID:-1}" -gt 1 ] && [ "$(word state)" = finished ]; then exit 0; fi',
            "give_up": '\n    scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"',
            "again": '  echo "the next link goes on: $1"'}
