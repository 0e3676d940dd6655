"""Job files: every wrong one gives one line that names the key and what to do; the written form reads back the same."""

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given, strategies as st

from mpillm import config
from mpillm.config import Job, UserError, divisors, job_from_dict, job_to_dict, job_to_toml, nearest, read_job

SMALL = """
[model]
family = "llama"
layers = 2
width = 24
heads = 6
kv_heads = 2
context = 16

[data]
train = "data/train.h5"

[train]
steps = 10
batch = 4

[run]
name = "small"
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(SMALL)
    return path


def line_of(path, *overrides):
    """The one line of the error that a job file gives."""
    with pytest.raises(UserError) as error:
        read_job(path, overrides)
    line = str(error.value)
    assert line.isprintable(), "one line, no control characters"
    return line


# -- reading ------------------------------------------------------------------------------------------------------

def test_values_and_defaults(path):
    job = read_job(path)
    assert (job.model.family, job.model.kv_heads, job.model.tied, job.model.mlp_width) == ("llama", 2, True, None)
    assert (job.mesh.dp, job.mesh.tp, job.mesh.zero) == ("rest", 1, 1)
    assert (job.optimizer.betas, job.optimizer.rate, job.precision.compute) == ([0.9, 0.95], 1e-3, "float32")
    assert (job.data.train, job.run.name, job.run.device, job.checkpoint.keep) == ("data/train.h5", "small", "cpu", 2)


def test_jobs_are_frozen_and_do_not_share_lists(path):
    first, second = read_job(path), read_job(path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.train.steps = 3
    first.optimizer.betas[0] = 0.5
    assert second.optimizer.betas == [0.9, 0.95] and read_job(path).optimizer.betas == [0.9, 0.95]


@pytest.mark.parametrize("override, section, key, value", [
    ("train.steps=200", "train", "steps", 200),
    (" train.steps = 200", "train", "steps", 200),
    ("optimizer.rate=1e-2", "optimizer", "rate", 0.01),
    ("optimizer.rate=1", "optimizer", "rate", 1.0),             # a whole number where a number is expected
    ("optimizer.betas=[0.8, 0.9]", "optimizer", "betas", [0.8, 0.9]),
    ("model.tied=false", "model", "tied", False),
    ("mesh.dp=2", "mesh", "dp", 2),
    ("mesh.dp=rest", "mesh", "dp", "rest"),                     # not TOML: taken as text
    ("run.name=a=b", "run", "name", "a=b"),
    ('run.name="12"', "run", "name", "12"),
    ("data.train=runs/x y.h5", "data", "train", "runs/x y.h5"),
    ('data.train={"a.h5" = 1, "b.h5" = 0.5}', "data", "train", {"a.h5": 1, "b.h5": 0.5}),
    ("data.train.corpus=0.25", None, None, "data.train.corpus"),
])
def test_overrides(path, override, section, key, value):
    if section is None:
        assert value in line_of(path, override)
    else:
        assert getattr(getattr(read_job(path, [override]), section), key) == value


def test_the_last_override_wins_and_a_missing_section_is_made(path):
    assert read_job(path, ["train.steps=1", "train.steps=2"]).train.steps == 2
    assert read_job(path, ["checkpoint.every=5"]).checkpoint.every == 5


# -- wrong job files: what is written, and words that the line must have ------------------------------------------

WRONG_FILES = {
    "not toml": ("[model\nfamily", ["job.toml: not a TOML file"]),
    "twice": (SMALL + "[run]\nname = 'x'", ["not a TOML file"]),
    "section of numbers": ("model = 3", ["model is a section, found 3", "write [model]"]),
    "array of tables": ("[[model]]\nlayers = 1", ["model is a section", "write [model]"]),
    "unknown section": (SMALL + "[optimiser]\nrate = 1", ["unknown section [optimiser]", "did you mean 'optimizer'?", "sections are model, data,"]),
    "key outside sections": ("steps = 3\n" + SMALL, ["unknown section [steps]", "sections are"]),
    "control characters": (SMALL + '["a\\nb"]\nrate = 1', ["unknown section"]),
    "control characters in a key": (SMALL + '[optimizer]\n"ra\\nte" = 1', ["unknown key optimizer."]),
    "empty": ("", ["model.family is missing", "kind of Transformer"]),
    "no steps": (SMALL.replace("steps = 10", ""), ["train.steps is missing: optimizer steps of the whole run"]),
    "a number too long": (SMALL.replace("steps = 10", "steps = " + "9" * 5000), ["not a TOML file"]),
    "too deep": (SMALL.replace("steps = 10", "steps = " + "[" * 5000 + "]" * 5000), ["not a TOML file"]),
}


@pytest.mark.parametrize("text, words", WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_wrong_file_gives_one_line(path, text, words):
    path.write_text(text)
    line = line_of(path)
    assert all(word in line for word in words), line
    assert "job.toml" in line


WRONG_VALUES = {
    # unknown keys
    "train.step=3": ["unknown key train.step", "did you mean 'steps'?"],
    "model.kvheads=3": ["unknown key model.kvheads", "did you mean 'kv_heads'?"],
    "optimizer.zzz=3": ["unknown key optimizer.zzz"],
    # types
    'train.steps="ten"': ["train.steps = 'ten'", "expected a whole number", "optimizer steps of the whole run"],
    "train.steps=2.5": ["train.steps = 2.5", "expected a whole number"],
    "train.steps=true": ["train.steps = True", "expected a whole number"],
    "train.steps=": ["train.steps = ''", "expected a whole number"],
    "model.tied=1": ["model.tied = 1", "expected true or false"],
    "optimizer.rate=fast": ["optimizer.rate = 'fast'", "expected a number"],
    "optimizer.rate=true": ["optimizer.rate = True", "expected a number"],
    "optimizer.betas=0.9": ["optimizer.betas = 0.9", "expected a list"],
    "run.name=5": ["run.name = 5", "expected text"],
    "run.name=2024-01-01": ["run.name", "expected text"],
    "data.train=3": ["data.train = 3", "expected text or a table"],
    "mesh.dp=1.5": ["mesh.dp = 1.5", "expected a whole number or text"],
    "mesh.ep=rest": ["mesh.ep = 'rest'", "expected a whole number"],
    "mesh.stages=2": ["mesh.stages = 2", "expected a list"],
    "mesh.sequence=1": ["mesh.sequence = 1", "expected true or false"],
    # bounds
    "train.steps=-1": ["train.steps = -1", "expected at least 0"],
    "train.batch=0": ["train.batch = 0", "expected at least 1", "sequences per optimizer step"],
    "train.micro_batch=0": ["train.micro_batch = 0", "expected at least 1"],
    "train.seed=9223372036854775808": ["train.seed = 9223372036854775808", "expected less than"],
    "model.layers=0": ["model.layers = 0", "expected at least 1"],
    "model.dropout=1.0": ["model.dropout = 1.0", "expected less than 1.0"],
    "model.dropout=-0.1": ["model.dropout = -0.1", "expected at least 0"],
    "optimizer.rate=0": ["optimizer.rate = 0.0", "expected more than 0"],
    "optimizer.rate=inf": ["optimizer.rate = inf", "expected a finite number"],
    "optimizer.clip=nan": ["optimizer.clip = nan", "expected a finite number"],
    "optimizer.rate=1" + "0" * 400: ["optimizer.rate", "expected a finite number"],
    "checkpoint.keep=1": ["checkpoint.keep = 1", "expected at least 2"],
    "run.time_limit=0": ["run.time_limit = 0.0", "expected more than 0"],
    "mesh.dp=0": ["mesh.dp = 0", "expected at least 1"],
    "mesh.tp=0": ["mesh.tp = 0", "expected at least 1"],
    "mesh.pp=-1": ["mesh.pp = -1", "expected at least 1"],
    "mesh.chunks=0": ["mesh.chunks = 0", "expected at least 1"],
    "model.experts=-1": ["model.experts = -1", "expected at least 0"],
    "model.experts_per_token=0": ["model.experts_per_token = 0", "expected at least 1"],
    "model.balance_loss=-0.1": ["model.balance_loss = -0.1", "expected at least 0"],
    # choices
    "model.family=lama": ["model.family = 'lama'", "expected one of gpt, llama", "did you mean 'llama'?"],
    "mesh.zero=4": ["mesh.zero = 4", "expected one of 0, 1, 2, 3"],
    "mesh.schedule=zerobubble": ["mesh.schedule = 'zerobubble'", "expected one of gpipe, 1f1b, interleaved, zero_bubble",
                                 "did you mean 'zero_bubble'?"],
    "mesh.cp_form=rings": ["mesh.cp_form = 'rings'", "expected one of ring, ulysses", "did you mean 'ring'?"],
    "train.recompute=blocks": ["train.recompute = 'blocks'", "expected one of none, selective, block", "did you mean 'block'?"],
    "precision.compute=fp32": ["precision.compute = 'fp32'", "expected one of float32, bfloat16"],
    "optimizer.rate_schedule=cos": ["optimizer.rate_schedule = 'cos'", "cosine, linear, constant_then_decay"],
    "run.device=gpus": ["run.device = 'gpus'", "did you mean 'gpu'?"],
    # between fields
    "model.heads=5": ["model.heads=5 does not divide model.width=24", "use heads of 1, 2, 3, 4, 6, 8, 12, 24"],
    "model.kv_heads=4": ["model.kv_heads=4 does not divide model.heads=6", "use kv_heads of 1, 2, 3, 6"],
    "model.family=gpt": ["model.kv_heads=2", "leave kv_heads out"],
    "model.head_width=3": ["model.head_width = 3", "even head width", "change it"],
    "model.rope_scaling={kind='yarn',factor=2.0}": ["kind = 'yarn'", "expected one of linear, llama3"],
    "model.rope_scaling={kind=['linear'],factor=2.0}": ["kind = ['linear']", "expected one of linear, llama3"],
    "model.rope_scaling={factor=2.0}": ["kind = None", "expected one of linear, llama3"],
    "model.rope_scaling={kind='linear',factor=2.0,beta=1.0}": ["keys kind, factor, beta", "linear has kind, factor"],
    "model.rope_scaling={kind='llama3',factor=2.0}": ["llama3 has kind, factor, low_frequency_factor, high_frequency_factor, original_context"],
    "model.rope_scaling={kind='linear',factor=0}": ["factor = 0", "more than 0"],
    "model.rope_scaling={kind='linear',factor='2'}": ["factor = '2'", "more than 0"],
    "model.rope_scaling={kind='llama3',factor=8,low_frequency_factor=4,high_frequency_factor=4,original_context=8192}": ["low_frequency_factor = 4", "less than high_frequency_factor = 4"],
    "model.width=18": ["model.width/model.heads = 3", "even head width", "change heads or width"],
    "optimizer.betas=[0.9]": ["optimizer.betas = [0.9]", "expected two numbers from 0 to below 1"],
    "optimizer.betas=[0.9, 1.0]": ["optimizer.betas", "expected two numbers"],
    'optimizer.betas=["a", 0.9]': ["optimizer.betas", "expected two numbers"],
    "mesh.dp=all": ["mesh.dp = 'all'", 'expected a whole number or "rest"'],
    "mesh.tp=all": ["mesh.tp = 'all'", 'expected a whole number or "rest"'],
    "mesh.pp=two": ["mesh.pp = 'two'", 'expected a whole number or "rest"'],
    "mesh.cp=": ["mesh.cp = ''", 'expected a whole number or "rest"'],
    "model.experts=1": ["model.experts_per_token=2 is more than model.experts=1", "use 1 to 1"],
    "model.shared_experts=1": ["model.shared_experts=1 with model.experts=0", "set experts too"],
    'run.name=""': ["run.name = ''", "expected a plain folder name"],
    "run.name=../x": ["run.name = '../x'", "expected a plain folder name"],
    "run.name=a/b": ["run.name = 'a/b'", "expected a plain folder name"],
    "run.name=.": ["run.name = '.'", "expected a plain folder name"],
    'run.name="a\\u0000b"': ["run.name", "expected a plain folder name"],
    "data.train={}": ["data.train is an empty table", "{file = weight}"],
    'data.train={"a.h5" = 0}': ["data.train: weight 0 of a.h5", "expected a number more than 0"],
    'data.train={"a.h5" = "x"}': ["data.train: weight 'x' of a.h5", "expected a number more than 0"],
    'data.train={"a.h5" = true}': ["data.train: weight True of a.h5"],
    'data.train={"a.h5" = inf}': ["data.train: weight inf of a.h5"],
    'data.train={"a\\nb" = 0}': ["data.train: weight 0"],
    # overrides themselves
    "train.steps": ["override 'train.steps'", "expected section.key=value"],
    "steps=3": ["override 'steps=3'", "such as train.steps=100"],
    "trian.steps=3": ["unknown section [trian]", "did you mean 'train'?"],
}


@pytest.mark.parametrize("override, words", WRONG_VALUES.items(), ids=[text[:40] for text in WRONG_VALUES])
def test_a_wrong_value_gives_one_line_that_names_the_key_and_the_remedy(path, override, words):
    line = line_of(path, override)
    assert all(word in line for word in words), line
    assert "job.toml" in line or line.startswith("override")


def test_experts_of_gpt_are_refused(path):
    assert line_of(path, "model.family=gpt", "model.kv_heads=6", "model.experts=2").endswith(
        'model.experts=2: the gpt family has dense MLPs only; use family = "llama" or experts = 0')


@pytest.mark.parametrize("override", ["mesh.tp=2", "mesh.pp=rest", "mesh.cp=3", "mesh.ep=2", "mesh.zero=3", "mesh.stages=[1, 1]",
                                      "train.recompute=selective"])
def test_layouts_are_no_matter_of_the_job_file_alone(path, override):
    """Whether a layout fits is known with the number of ranks (layout/compose.py)."""
    read_job(path, [override])


def test_an_override_into_what_is_no_section(path):
    path.write_text("model = 3")
    assert "model is not a section" in line_of(path, "model.layers=3")


def test_files_that_cannot_be_read(tmp_path):
    assert line_of(tmp_path / "none.toml").endswith("none.toml: cannot read the job file: No such file or directory")
    assert "cannot read the job file: Is a directory" in line_of(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "binary: not a TOML file" in line_of(tmp_path / "binary")


def test_divisors():
    assert divisors(12) == "1, 2, 3, 4, 6, 12" and divisors(1) == "1" and divisors(7) == "1, 7" and divisors(36) == "1, 2, 3, 4, 6, 9, 12, 18, 36"


def test_a_huge_wrong_width_is_refused_at_once(path):
    assert "model.heads=6 does not divide" in line_of(path, "model.width=1000000000001")


def test_nearest():
    assert nearest("stpes", ["steps", "batch"]) == "; did you mean 'steps'?"
    assert nearest("zzz", ["steps", "batch"]) == ""


# -- writing ------------------------------------------------------------------------------------------------------

def test_the_written_job_reads_back_the_same(path):
    written = path.with_name("written.toml")
    for overrides in ([], ["data.train={\"a b.h5\" = 1, \"c\\\"d\" = 0.5}", "data.validation=v.h5"],
                      ["optimizer.rate=1e-22", "optimizer.epsilon=1e300", "train.seed=9223372036854775807", "model.tied=false"],
                      ["run.time_limit=3600", "train.start=x", "model.vocabulary=50257", "mesh.dp=3", "mesh.zero=2"]):
        job = read_job(path, overrides)
        written.write_text(job_to_toml(job))
        assert read_job(written) == job
        assert job_from_dict(json.loads(json.dumps(job_to_dict(job))), "manifest") == job


# What a TOML file can hold: no lone surrogates.
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(file=texts, name=texts, weights=st.dictionaries(texts, st.floats(1e-300, 1e300) | st.integers(1, 2**62), min_size=1, max_size=3),
       rate=st.floats(1e-300, 1e300), beta=st.floats(0.0, 0.999), steps=st.integers(0, 2**62), tied=st.booleans())
def test_any_value_reads_back_the_same(tmp_path_factory, file, name, weights, rate, beta, steps, tied):
    values = job_to_dict(job_from_dict(config.tomllib.loads(SMALL), "small"))
    values["data"] = {"train": weights, "validation": file}
    values["train"] |= {"steps": steps, "start": file}
    values["model"]["tied"], values["optimizer"]["rate"], values["optimizer"]["betas"] = tied, rate, [beta, 0.5]
    values["run"]["name"] = "x" + name.replace("/", "").replace("\0", "")
    job = job_from_dict(values, "values")
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(job_to_toml(job), encoding="utf-8", newline="")
    assert read_job(path) == job


def test_every_written_key_has_its_comment(path):
    for line in job_to_toml(read_job(path)).splitlines():
        assert not line or line.startswith("[") or "# " in line


def test_every_field_has_a_comment_and_there_are_about_60():
    fields = [field for section in dataclasses.fields(Job) for field in dataclasses.fields(section.type)]
    assert len(fields) <= 65 and all(field.metadata["doc"] for field in fields)


def test_reading_a_job_imports_nothing_heavy():
    code = "import sys, mpillm.config; print([m for m in ('numpy', 'mpi4py', 'h5py', 'tokenizers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
