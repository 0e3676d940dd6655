"""`mpillm submit`: what each site's script asks for, what is refused, and what the script does at the end of a run."""

import json
import os
import subprocess

import pytest
from command_runs import run, write_job

from mpillm.config import UserError, read_job
from mpillm.run.submit import Request, read_site, render, sites

SITES = ["alps", "generic", "juwels-booster", "leonardo", "lumi-c", "lumi-g", "marenostrum5", "perlmutter"]
GPU_SITES = ["alps", "juwels-booster", "leonardo", "marenostrum5", "perlmutter"]


@pytest.fixture
def job_file(tmp_path):
    write_job(tmp_path / "job.toml", run='name = "mine"')
    return tmp_path / "job.toml"


def script(job_file, site, *overrides, **request):
    job = read_job(job_file, overrides)
    return render(job, read_site(site, job.run.device == "gpu"), Request(str(job_file), list(overrides), **request))


def directives(text):
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_these_are_the_sites():
    assert sites() == SITES


@pytest.mark.parametrize("links", [1, 4])
@pytest.mark.parametrize("device, site", [*(("cpu", site) for site in SITES), *(("gpu", site) for site in GPU_SITES)])
def test_every_site_gives_a_script_that_bash_reads(job_file, device, site, links):
    text = script(job_file, site, f"run.device={device}", nodes=2, account="project", links=links, qos="standard")
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False).stderr == "" and "@" not in text.replace("USR1@", "")
    found = directives(text)
    assert "--nodes=2" in found and "--signal=USR1@180" in found and "--open-mode=append" in found and "--account=project" in found
    assert ("--requeue" in found) == (links == 1) and ("--array=1-4%1" in found) == (links == 4)
    assert any("gpu" in line and "gpu-bind" not in line for line in found if "constraint" not in line) == (device == "gpu")
    assert "srun --kill-on-bad-exit=1 --wait=60" in text and "mpillm train" in text and ("scontrol requeue" in text) == (links == 1)


def test_figures_of_known_sites(job_file):
    perlmutter = directives(script(job_file, "perlmutter", "run.device=gpu", account="m1_g"))
    assert {"--constraint=gpu", "--ntasks-per-node=4", "--cpus-per-task=16", "--gpus-per-node=4", "--qos=regular"} <= set(perlmutter)
    leonardo = directives(script(job_file, "leonardo", "run.device=gpu", account="x", ranks_per_node=2))
    assert {"--partition=boost_usr_prod", "--ntasks-per-node=2", "--cpus-per-task=16", "--gres=gpu:2"} <= set(leonardo)
    lumi = directives(script(job_file, "lumi-c", account="project_1", nodes=3, ranks_per_node=128))
    assert {"--partition=standard", "--nodes=3", "--ntasks-per-node=128", "--cpus-per-task=1"} <= set(lumi)


@pytest.mark.parametrize("site, overrides, request_, line", [
    ("perlmuter", [], {}, "did you mean 'perlmutter'"), ("none.toml", [], {}, "cannot read the site profile"), ("perlmutter", [], {}, "--account: Perlmutter, NERSC needs one"),
    ("lumi-g", ["run.device=gpu"], {"account": "x"}, "its GPUs are of AMD"), ("lumi-c", ["run.device=gpu"], {"account": "x"}, "the profile has no GPUs"),
    ("perlmutter", ["run.device=gpu"], {"account": "x", "ranks_per_node": 5}, "a node of Perlmutter, NERSC has 4 GPUs"),
    ("generic", [], {"ranks_per_node": 33}, "has 32 cores for jobs"), ("generic", ["mesh.tp=2"], {"ranks_per_node": 3}, "2 does not divide the 3 ranks"),
    ("generic", ["mesh.dp=1", "mesh.tp=3"], {"ranks_per_node": 3}, "tp=3"), ("generic", [], {"time": "soon"}, "--time soon"), ("generic", [], {"time": "25:99:99"}, "--time 25:99:99"), ("generic", [], {"time": "0"}, "above 0"), ("generic", [], {"time": "UNLIMITED"}, "above 0"), ("generic", [], {"time": ""}, "above 0"),
    ("generic", ["run.name=$(touch x)"], {}, "use letters, digits"), ("generic", ['run.name="a b"'], {}, "use letters, digits"), ("generic", ["run.name=a%j"], {}, "use letters, digits"), ("generic", [], {"account": "a; rm"}, "--account 'a; rm'")])
def test_what_does_not_fit_is_refused(job_file, site, overrides, request_, line):
    with pytest.raises(UserError, match=line.replace("(", r"\(").replace("+", r"\+")):
        script(job_file, site, *overrides, **request_)


def test_a_profile_of_ones_own_is_checked(job_file, tmp_path):
    own = tmp_path / "own.toml"
    own.write_text('description = "ours"\ncores = 8\nmodules = ["mpi x"]\n[environment]\nA = "b c"\n')
    text = script(job_file, str(own))
    assert "module load 'mpi x'" in text and "export A='b c'" in text
    for content, line in (("core = 8", "unknown key core; did you mean 'cores'"), ('cores = "8"', "expected a whole number"), ("ranks = 2", "cores is missing"), ("cores = [", "not a TOML file"),
                          ("cpu = 3", "expected a table"), ("cores = 0", "expected 1 or more"), ("cores = 8\nranks = -1", "ranks = -1: expected 1 or more"), ("modules = [1]", "expected a list of texts"),
                          ('stripe = " "', "expected a command"), ("stripe = \"lfs '{directory}\"", "expected a command"), ('stripe = "lfs {folder}"', "expected a command"), ('stripe = "lfs setstripe"', "expected a command"),
                          ('gpu_request = "--gpus={n}"', "expected options with {gpus}"), ('partition = "a\\nb"', "text of one line"), ('gpu_vendor = "intel"', 'expected "nvidia" or "amd"'),
                          ("[environment]\nA = [1]", "expected NAME = text"), ('[environment]\n"A B" = "1"', "expected NAME = text"), ("[gpu]\n[cpu]\ngpus = -1", "expected 0 or more")):
        own.write_text(content)
        with pytest.raises(UserError, match=line) as refused:
            script(job_file, str(own))
        assert len(str(refused.value).splitlines()) == 1


def test_names_of_folders_are_no_commands(job_file, tmp_path):
    text = script(job_file, "generic", venv="it's $(touch x)", directory=str(tmp_path / "a $(touch y) \"b"))
    (tmp_path / "a $(touch y) \"b").mkdir()
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "it's $(touch x)/bin/activate" in done.stderr and not list(tmp_path.rglob("[xy]"))


def test_the_command_prints_or_submits(job_file, tmp_path, monkeypatch):
    done = run("submit", "job.toml", "train.steps=7", "--site", "generic", "--nodes", 2, cwd=tmp_path)
    assert done.code == 0 and done.out.startswith("#!/bin/bash") and "mpillm train job.toml train.steps=7" in done.out and done.err == ""
    monkeypatch.setenv("PATH", f"{programs(tmp_path, sbatch='cat > submitted; echo 42')}:{os.environ['PATH']}")
    now = run("submit", "job.toml", "train.steps=7", "--site", "generic", "--nodes", 2, "--now", cwd=tmp_path)
    assert (now.code, now.out) == (0, "submitted job 42\n") and (tmp_path / "submitted").read_text() == done.out
    programs(tmp_path, sbatch="echo no such account >&2; exit 1")
    assert run("submit", "job.toml", "--site", "generic", "--now", cwd=tmp_path).ours == ["mpillm: error: --now: sbatch refused the script: no such account"]
    assert run("submit", "job.toml", "--site", "generic", "--nodes", 0, cwd=tmp_path).code == 2


# ---- the end of a run ------------------------------------------------------------------------------------------------

def programs(folder, **scripts):
    """A folder of programs for PATH."""
    place = folder / "programs"
    place.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (place / name).write_text(f"#!/bin/bash\n{text}\n")
        (place / name).chmod(0o755)
    return place


def end_of(tmp_path, job_file, status, code, links=1, stop=False, progress=True, restarts="0", array="1"):
    """Runs the script with an srun that leaves `status` and a new checkpoint; (exit code, what it said, calls of scontrol and scancel)."""
    path = tmp_path / "runs" / "mine"
    (path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (path / "status.json").write_text('{"state": "running", "exit": null, "time": "before"}\n')
    if stop:
        (path / "STOP").touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    work = f"echo '{json.dumps(status)}' > runs/mine/status.json; " if status else ""
    work += "mkdir -p runs/mine/checkpoints/step-00000002; " if progress else ""
    path_ = programs(tmp_path, srun=f"{work}exit {code}", scontrol='echo "scontrol $*" >> calls; kill -TERM $PPID', scancel='echo "scancel $*" >> calls')
    monkeypatched = os.environ | {"PATH": f"{path_}:{os.environ['PATH']}", "SLURM_JOB_ID": "42", "SLURM_ARRAY_JOB_ID": "40", "SLURM_RESTART_COUNT": restarts,
                                  "SLURM_ARRAY_TASK_ID": array}
    previous = os.getcwd()
    os.chdir(tmp_path)
    try:
        text = script(job_file, "generic", links=links)
    finally:
        os.chdir(previous)
    done = subprocess.run(["bash", "-c", text], env=monkeypatched, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    calls = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
    return done.returncode, done.stdout + done.stderr, calls


def ended(state, code):
    return {"state": state, "exit": code, "reason": "why", "rank": None, "step": 2, "time": "after"}


@pytest.mark.parametrize("status, code, options, exit_code, calls", [
    (ended("finished", 0), 0, {}, 0, ""), (ended("stopped", 75), 75, {}, -15, "scontrol requeue 42\n"), (ended("stopped", 75), 9, {}, -15, "scontrol requeue 42\n"),
    (ended("stopped", 75), 75, {"stop": True}, 75, ""), (ended("failed", 76), 76, {}, 76, ""), (None, 2, {"progress": False}, 2, ""),
    (ended("failed", 77), 137, {}, -15, "scontrol requeue 42\n"), (ended("running", None), 137, {}, -15, "scontrol requeue 42\n"),
    (ended("failed", 1), 1, {"progress": False, "restarts": "2"}, 1, ""), (ended("failed", 1), 1, {"restarts": "2"}, -15, "scontrol requeue 42\n"),
    (ended("stopped", 75), 75, {"progress": False, "restarts": "3"}, 75, ""), (ended("stopped", 75), 75, {"links": 3}, 75, ""),
    (ended("failed", 76), 76, {"links": 3}, 76, "scancel --state=PENDING 40\n"), (ended("finished", 0), 0, {"links": 3}, 0, "")])
def test_what_a_job_does_at_its_end(tmp_path, job_file, status, code, options, exit_code, calls):
    found = end_of(tmp_path, job_file, status, code, **options)
    assert (found[0], found[2]) == (exit_code, calls), found[1]


def test_a_link_after_the_end_has_nothing_to_do(tmp_path, job_file):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    first = end_of(tmp_path, job_file, ended("finished", 0), 0, links=3, array="1")
    assert first[0] == 0 and "mpillm train: finished" in first[1]
    text = subprocess.run(["bash", "-c", script(job_file, "generic", links=3).replace(os.getcwd(), str(tmp_path))], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"SLURM_ARRAY_TASK_ID": "2"}, timeout=30, check=False)
    assert text.returncode == 0 and "mpillm train" not in text.stdout
