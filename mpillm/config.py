"""The job file: TOML read into frozen dataclasses, every field with its meaning, unit and bounds.

Standard library only, so that every rank and `mpillm --help` can import it at no cost. What a field means is
written once, in its `option(...)`; the reader, the checks and the writer all work from that.
"""

import copy
import dataclasses
import difflib
import json
import math
import os
import tomllib
from dataclasses import dataclass, field

REQUIRED = dataclasses.MISSING


class UserError(Exception):
    """A mistake the user can mend: one line (found, expected, what to do), printed once, exit code 2."""

    def __str__(self):
        """The line; control characters of file names and keys are shown as escapes, so that it stays one line."""
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())


def option(doc, default=REQUIRED, choices=None, at_least=None, below=None, above=None):
    """A field of a job file: its comment and the values it takes."""
    metadata = {"doc": doc, "choices": choices, "at_least": at_least, "below": below, "above": above}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata) if default is not REQUIRED else field(metadata=metadata)


# Kinds of model.rope_scaling, and their numbers.
ROPE_SCALING = {"linear": ("factor",), "llama3": ("factor", "low_frequency_factor", "high_frequency_factor", "original_context")}


@dataclass(frozen=True)
class Model:
    family: str = option("kind of Transformer", choices=("gpt", "llama"))
    layers: int = option("number of blocks (L)", at_least=1)
    width: int = option("model width (C)", at_least=1)
    heads: int = option("query heads (H)", at_least=1)
    context: int = option("tokens of a sequence (T)", at_least=1)
    kv_heads: int | None = option("key/value heads (K); heads when left out", None, at_least=1)
    mlp_width: int | None = option("MLP width (F); gpt: 4 C, llama: 8/3 C rounded up to 64, when left out", None, at_least=1)
    tied: bool = option("output table = input table", True)
    dropout: float = option("share of activations dropped in training", 0.0, at_least=0.0, below=1.0)
    vocabulary: int | None = option("tokens of the table (V); at least the tokenizer's; the tokenizer's when left out", None, at_least=1)
    head_width: int | None = option("llama: channels of a head (D); width / heads when left out", None, at_least=1)
    qkv_bias: bool = option("llama: biases of query, key and value, as Qwen 2 has them", False)
    rope_base: float = option("llama: base of the rotary angles", 10000.0, above=0.0)
    rope_scaling: dict | None = option("llama: slower rotary angles for a longer context: { kind = \"linear\", factor = 2.0 }, or as Llama 3 has them: "
                                       "{ kind = \"llama3\", factor = 8.0, low_frequency_factor = 1.0, high_frequency_factor = 4.0, original_context = 8192 }", None)
    norm_epsilon: float = option("added to the variance in norms", 1e-5, above=0.0)
    experts: int = option("llama: experts of each MLP (E), each of mlp_width; 0: a dense MLP", 0, at_least=0)
    experts_per_token: int = option("experts that a token is sent to", 2, at_least=1)
    shared_experts: int = option("experts that every token is sent to, beside the routed ones", 0, at_least=0)
    balance_loss: float = option("coefficient of the load-balancing loss of the router", 0.01, at_least=0.0)
    router_z_loss: float = option("coefficient of the z-loss of the router's logits", 0.001, at_least=0.0)

    @property
    def channels(self):
        """Of a head (D)."""
        return self.head_width or self.width // self.heads


@dataclass(frozen=True)
class Data:
    train: str | dict = option("token file, a table of {file = weight}, or \"random\"")
    validation: str | None = option("token file for the validation loss", None)


@dataclass(frozen=True)
class Mesh:
    dp: int | str = option("data-parallel ranks, or \"rest\"", "rest", at_least=1)
    pp: int | str = option("pipeline stages", 1, at_least=1)
    cp: int | str = option("context-parallel ranks", 1, at_least=1)
    tp: int | str = option("tensor-parallel ranks", 1, at_least=1)
    ep: int = option("expert-parallel ranks, carved out of dp x cp", 1, at_least=1)
    zero: int = option("what is split over replicas: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights", 1, choices=(0, 1, 2, 3))
    sequence: bool = option("split the tokens over tp too, between its matrix products", True)
    cp_form: str = option("how context-parallel ranks see each other's keys", "ring", choices=("ring", "ulysses"))
    schedule: str = option("order of micro-batches in the pipeline", "1f1b", choices=("gpipe", "1f1b", "interleaved", "zero_bubble"))
    chunks: int = option("interleaved: parts of the model on each pipeline stage", 1, at_least=1)
    stages: list | None = option("blocks of each part of the pipeline, in the order of the model; dealt by cost when left out", None)


@dataclass(frozen=True)
class Train:
    steps: int = option("optimizer steps of the whole run", at_least=0)
    batch: int = option("sequences per optimizer step, all ranks", at_least=1)
    micro_batch: int | None = option("sequences per rank and pass; the rank's whole share when left out", None, at_least=1)
    seed: int = option("seed of weights, sample order and dropout", 1, at_least=0, below=2**63)
    recompute: str = option("activations recomputed in backward", "none", choices=("none", "selective", "block"))
    offload: str = option("optimizer: masters and moments lie in host memory and are updated there", "none", choices=("none", "optimizer"))
    start: str | None = option("weights to start from: a checkpoint", None)
    evaluate_every: int = option("steps between validation losses; 0: only at the end", 0, at_least=0)
    validation_samples: int = option("windows of the validation file that are read", 64, at_least=1)
    spike: float = option("a loss that many standard deviations above those of the last 100 steps goes back to the last checkpoint and skips its batches; 0: never", 0.0, at_least=0.0)


@dataclass(frozen=True)
class Optimizer:
    name: str = option("update rule", "adamw", choices=("adamw",))
    rate: float = option("peak learning rate", 1e-3, above=0.0)
    rate_schedule: str = option("rate after the warm-up", "cosine", choices=("cosine", "linear", "constant_then_decay"))
    final_rate_share: float = option("rate at the last step, as a share of the peak", 0.1, at_least=0.0)
    decay_share: float = option("constant_then_decay: share of the steps that decay, at the end", 0.2, at_least=0.0)
    warmup: int = option("steps of linear warm-up", 0, at_least=0)
    betas: list = option("decay of the moments", [0.9, 0.95])
    epsilon: float = option("added to the root of the second moment", 1e-8, above=0.0)
    weight_decay: float = option("decoupled decay of matrices; norms and biases have none", 0.1, at_least=0.0)
    clip: float = option("largest global gradient norm; 0: no clipping", 1.0, at_least=0.0)


@dataclass(frozen=True)
class Precision:
    compute: str = option("type of weights and activations", "float32", choices=("float32", "bfloat16", "float16", "float64"))
    tf32: bool = option("GPU: products of float32 matrices with factors of 10 bits", False)


@dataclass(frozen=True)
class Communication:
    transport: str = option("of GPU arrays: device memory to MPI, pinned memory to MPI, or NCCL; auto asks MPI", "auto",
                            choices=("auto", "cuda_aware", "staged", "nccl"))


@dataclass(frozen=True)
class Checkpoint:
    every: int = option("steps between checkpoints; 0: only at the end, a killed run then loses all", 100, at_least=0)
    keep: int = option("newest checkpoints kept", 2, at_least=2)


@dataclass(frozen=True)
class Run:
    name: str = option("runs/<name>/ is the run directory")
    device: str = option("where numbers are computed; auto: GPUs for as many ranks of a node as it has", "cpu", choices=("cpu", "gpu", "auto"))
    time_limit: float | None = option("seconds after which the run saves and stops; Slurm's limit counts too", None, above=0.0)
    hang_timeout: float | None = option("seconds without progress after which the run ends and tells who waits for whom; learned when left out", None, above=0.0)
    on_failure: str = option("a rank dies: the run ends, or goes on without its replica (Open MPI 5: mpirun --with-ft ulfm)", "end", choices=("end", "continue"))
    check_replicas: int = option("steps between comparisons of the weights that several ranks hold; 0: never", 100, at_least=0)
    log_every: int = option("steps between lines of metrics.jsonl", 1, at_least=1)


@dataclass(frozen=True)
class Job:
    """A whole job; sections in the order of a job file."""
    model: Model
    data: Data
    mesh: Mesh
    train: Train
    optimizer: Optimizer
    precision: Precision
    communication: Communication
    checkpoint: Checkpoint
    run: Run


def nearest(word, words):
    """"; did you mean 'x'?" for the nearest of `words`, or nothing."""
    match = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def read_job(path, overrides=()):
    """Reads a job file and applies `section.key=value` overrides.

    Parameters
    ----------
    path : str
        TOML file (DESIGN.md section 3).
    overrides : sequence of str
        Values are parsed as TOML, else taken as strings.

    Raises
    ------
    UserError
        Missing or unreadable file, bad TOML, unknown section or key, wrong type or value.
    """
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot read the job file: {error.strerror}") from None
    except (ValueError, RecursionError) as error:       # bad TOML or UTF-8, a number or a nesting beyond Python's limits
        raise UserError(f"{path}: not a TOML file: {str(error).splitlines()[0]}") from None
    for text in overrides:
        _override(values, text)
    return job_from_dict(values, str(path))


def _override(values, text):
    name, equals, value = text.partition("=")
    parts = name.strip().split(".", 1)
    if not equals or len(parts) != 2:
        raise UserError(f"override {text!r}: expected section.key=value, such as train.steps=100")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = value
    section = values.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise UserError(f"override {text!r}: {parts[0]} is not a section of the job file")
    section[parts[1]] = parsed


def mesh_of(overrides):
    """The [mesh] section that `mesh.key=value` overrides make, as plain values; nothing but mesh may be overridden."""
    values = {}
    for text in overrides:
        _override(values, text)
    for section in values:
        if section != "mesh":
            raise UserError(f"override of [{section}]: the rest of the job is that of the checkpoint; only mesh.key=value may be given")
    _section(Mesh, values.get("mesh", {}), "mesh", "command line")      # refuses what is no key or no value
    return values.get("mesh", {})


def job_from_dict(values, source):
    """The Job of a nested dict; `source` names the file in errors."""
    sections = {item.name: item.type for item in dataclasses.fields(Job)}
    for name, section in values.items():
        if name not in sections:
            raise UserError(f"{source}: unknown section [{name}]{nearest(name, sections)}; sections are {', '.join(sections)}")
        if not isinstance(section, dict):
            raise UserError(f"{source}: {name} is a section, found {section!r}; write [{name}] and its keys below it")
    job = Job(**{name: _section(kind, values.get(name, {}), name, source) for name, kind in sections.items()})
    _check(job, source)
    return job


def _section(kind, values, name, source):
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise UserError(f"{source}: unknown key {name}.{key}" + (nearest(key, fields) or f"; keys of [{name}] are {', '.join(fields)}"))
    taken = {}
    for key, item in fields.items():
        if key in values:
            taken[key] = _value(item, values[key], f"{source}: {name}.{key}")
        elif item.default is REQUIRED and item.default_factory is REQUIRED:
            raise UserError(f"{source}: {name}.{key} is missing: {item.metadata['doc']}")
    return kind(**taken)


def _types(item):
    """The Python types of a field (`int | None` -> (int,)), without None."""
    kind = item.type
    return tuple(t for t in getattr(kind, "__args__", (kind,)) if t is not type(None))


def _value(item, value, where):
    types = _types(item)
    if float in types and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    good = isinstance(value, types) and (bool in types or not isinstance(value, bool))
    if not good:
        names = " or ".join({"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false",
                             "list": "a list", "dict": "a table"}[t.__name__] for t in types)
        raise UserError(f"{where} = {value!r}: expected {names} ({item.metadata['doc']})")
    limits = item.metadata
    if limits["choices"] and value not in limits["choices"]:
        raise UserError(f"{where} = {value!r}: expected one of {', '.join(map(str, limits['choices']))}"
                        + (nearest(value, limits["choices"]) if isinstance(value, str) else ""))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where} = {value}: expected a finite number")
        for bound, words, bad in (("at_least", "at least", lambda b: value < b), ("above", "more than", lambda b: value <= b),
                                  ("below", "less than", lambda b: value >= b)):
            if limits[bound] is not None and bad(limits[bound]):
                raise UserError(f"{where} = {value}: expected {words} {limits[bound]} ({limits['doc']})")
    return value


def divisors(number):
    """The divisors of `number` as text, for messages: "1, 2, 3, 4, 6, 12"."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    every = sorted({*small, *(number // d for d in small)})
    return ", ".join(map(str, every))


def _check(job, source):
    """What must hold between fields, before anything is computed."""
    model, optimizer = job.model, job.optimizer
    def refuse(line):
        raise UserError(f"{source}: {line}")
    if not model.head_width and model.width % model.heads:
        refuse(f"model.heads={model.heads} does not divide model.width={model.width}; use heads of {divisors(model.width)}" + ", or set head_width" * (model.family == "llama"))
    if model.kv_heads and model.heads % model.kv_heads:
        refuse(f"model.kv_heads={model.kv_heads} does not divide model.heads={model.heads}; use kv_heads of {divisors(model.heads)}")
    if model.family == "gpt" and model.kv_heads not in (None, model.heads):
        refuse(f"model.kv_heads={model.kv_heads}: the gpt family has as many key/value heads as heads; leave kv_heads out or use family = \"llama\"")
    if model.family == "llama" and model.channels % 2:
        name, remedy = ("model.head_width", "it") if model.head_width else ("model.width/model.heads", "heads or width")
        refuse(f"{name} = {model.channels}: rotary positions need an even head width; change {remedy}")
    for key in ("head_width", "qkv_bias", "rope_scaling"):
        if model.family != "llama" and getattr(model, key):
            refuse(f"model.{key} = {getattr(model, key)}: the {model.family} family has none; leave it out or use family = \"llama\"")
    if model.rope_scaling is not None:
        _check_rope_scaling(model.rope_scaling, refuse)
    if model.experts and model.family != "llama":
        refuse(f"model.experts={model.experts}: the {model.family} family has dense MLPs only; use family = \"llama\" or experts = 0")
    if model.shared_experts and not model.experts:
        refuse(f"model.shared_experts={model.shared_experts} with model.experts=0: a dense MLP has no experts; set experts too")
    if model.experts and model.experts_per_token > model.experts:
        refuse(f"model.experts_per_token={model.experts_per_token} is more than model.experts={model.experts}; use 1 to {model.experts}")
    if len(optimizer.betas) != 2 or not all(isinstance(b, (int, float)) and not isinstance(b, bool) and 0 <= b < 1 for b in optimizer.betas):
        refuse(f"optimizer.betas = {optimizer.betas}: expected two numbers from 0 to below 1")
    for axis in ("dp", "pp", "cp", "tp"):
        size = getattr(job.mesh, axis)
        if isinstance(size, str) and size != "rest":
            refuse(f"mesh.{axis} = {size!r}: expected a whole number or \"rest\"")
    _check_run(job, refuse)


def _check_rope_scaling(scaling, refuse):
    kind = scaling.get("kind")
    if not isinstance(kind, str) or kind not in ROPE_SCALING:
        refuse(f"model.rope_scaling: kind = {kind!r}: expected one of {', '.join(ROPE_SCALING)}" + (nearest(kind, ROPE_SCALING) if isinstance(kind, str) else ""))
    wanted = ROPE_SCALING[kind]
    if scaling.keys() - {"kind"} != set(wanted):
        refuse(f"model.rope_scaling: keys {', '.join(scaling)}: {kind} has kind, {', '.join(wanted)}")
    for key in wanted:
        value = scaling[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            refuse(f"model.rope_scaling: {key} = {value!r}: expected a number more than 0")
    if kind == "llama3" and scaling["low_frequency_factor"] >= scaling["high_frequency_factor"]:
        refuse(f"model.rope_scaling: low_frequency_factor = {scaling['low_frequency_factor']}: expected less than high_frequency_factor = {scaling['high_frequency_factor']}")


def _check_run(job, refuse):
    name = job.run.name
    if not name or name.startswith(".") or os.sep in name or "\0" in name:
        refuse(f"run.name = {name!r}: expected a plain folder name, runs/<name>/ is made of it")
    if isinstance(job.data.train, dict):
        for file, weight in job.data.train.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
                refuse(f"data.train: weight {weight!r} of {file}: expected a number more than 0")
        if not job.data.train:
            refuse("data.train is an empty table: expected {file = weight}")


def job_to_dict(job):
    """The job as nested plain values (JSON and TOML have them); fields that are None are left out."""
    return {section: {key: value for key, value in values.items() if value is not None}
            for section, values in dataclasses.asdict(job).items()}


def job_to_toml(job):
    """The job as a job file, each field with its comment; those left out stand in comments of their own."""
    lines = []
    for section in dataclasses.fields(job):
        lines.append(f"[{section.name}]")
        part = getattr(job, section.name)
        for item in dataclasses.fields(part):
            value = getattr(part, item.name)
            text = f"# {item.name} =" if value is None else f"{item.name} = {_toml(value)}"
            lines.append(f"{text:<31} # {item.metadata['doc']}")
        lines.append("")
    return "\n".join(lines)


def _toml(value):
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml_text(key)} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        return _toml_text(value)
    return json.dumps(value) if isinstance(value, bool) else repr(value)


def _toml_text(text):
    """JSON's strings are TOML's, except that TOML has no surrogate pairs and wants DEL escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
