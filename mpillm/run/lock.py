"""The lock of a run directory: one file, made with O_EXCL, that names its owner.

It is taken over only when the owner is provably dead: its process is gone on this host (or its id is in use by a
process that started at another time), its Slurm job has ended, or it was the same Slurm job before a requeue.
In doubt a second run is refused. Nothing here communicates; rank 0 calls it.
"""

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import time
import uuid
from pathlib import Path

from ..config import UserError
from . import launch

NAME = "lock"
SIZE = 1024             # bytes of the file, padded so that a heartbeat rewrites it in one piece
REBOOTED = 600          # seconds without a heartbeat after which an owner from before a reboot of this host is dead
READ_AGAIN = 1.0        # seconds in which another process that has just made the file will have filled it
SQUEUE_TIMEOUT = 20     # seconds


class Held:
    """A lock held by this process; `heartbeat()` now and then, `release()` at the end."""

    def __init__(self, path, owner, descriptor):
        self.path, self.owner, self.descriptor, self.refreshed = path, owner, descriptor, time.monotonic()

    @property
    def token(self):
        return self.owner["token"]

    def heartbeat(self):
        """Renews the time in the file.

        Raises
        ------
        RuntimeError
            The lock is no longer ours: it was deleted or taken over, and a second run may be writing.
        """
        if (read(self.path) or {}).get("token") != self.token:
            raise RuntimeError(f"{self.path}: the lock of this run was removed or taken over; stopping before two runs write to one directory")
        self.owner["heartbeat"] = time.time()
        os.pwrite(self.descriptor, encode(self.owner), 0)
        self.refreshed = time.monotonic()

    def release(self):
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
            remove(self.path, self.token)


def remove(path, token):
    """Deletes the lock file if it is the one with this token (any rank of its run may do so)."""
    if (read(path) or {}).get("token") == token:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def encode(owner):
    """The bytes of a lock file."""
    return json.dumps(owner).encode().ljust(SIZE - 1) + b"\n"


def read(path):
    """The owner a lock file names; None when there is no file, {} when it names none."""
    try:
        with open(path, "rb") as file:
            owner = json.loads(file.read(SIZE))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def text_of(path):
    """The first line of a small system file, or None."""
    try:
        with open(path) as file:
            return file.readline().strip()
    except OSError:
        return None


def namespace():
    """What process ids on this machine are relative to (containers have their own)."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def process_start(process):
    """When a process started (clock ticks since boot); None for one that is gone or only waits to be reaped."""
    try:
        with open(f"/proc/{process}/stat") as file:
            text = file.read()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2:].split()
    return None if fields[0] in "ZX" else int(fields[19])


def this_process():
    """This process as the owner of a lock."""
    environ = os.environ
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid()),
            "boot": text_of("/proc/sys/kernel/random/boot_id"), "namespace": namespace(),
            "job": launch.job_id(), "slurm": environ.get("SLURM_JOB_ID"), "cluster": environ.get("SLURM_CLUSTER_NAME"),
            "restarts": int(environ.get("SLURM_RESTART_COUNT") or 0), "heartbeat": time.time(), "token": uuid.uuid4().hex}


def is_dead(owner, me):
    """Whether the owner of a lock provably no longer runs.

    Parameters
    ----------
    owner, me : dict
        As made by `this_process()`; `owner` comes from a file and may hold anything.
    """
    if me["slurm"] and owner.get("slurm") == me["slurm"] and owner.get("cluster") == me["cluster"]:
        restarts = owner.get("restarts")
        if isinstance(restarts, int) and restarts < me["restarts"]:
            return True
    if owner.get("host") == me["host"] and type(owner.get("pid")) is int:
        if owner.get("boot") != me["boot"]:
            beat = owner.get("heartbeat")
            return isinstance(beat, (int, float)) and time.time() - beat > REBOOTED
        if owner.get("namespace") == me["namespace"]:
            return _process_is_gone(owner)
    slurm = owner.get("slurm")
    return (isinstance(slurm, str) and slurm.isdigit() and slurm != me["slurm"]
            and owner.get("cluster") == me["cluster"] and slurm_job_ended(slurm))


def _process_is_gone(owner):
    if not os.path.exists("/proc/self/stat"):
        try:
            os.kill(owner["pid"], 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
        return False
    started = process_start(owner["pid"])
    return started is None or (isinstance(owner.get("start"), int) and started != owner["start"])


def slurm_job_ended(job):
    """Whether Slurm answers that a job runs no more; False where there is no answer."""
    try:
        answer = subprocess.run(["squeue", "--noheader", "--job", job, "--format", "%T"], capture_output=True, text=True,
                                timeout=SQUEUE_TIMEOUT, check=False)
    except (OSError, subprocess.SubprocessError):
        return False
    if answer.returncode:
        return "Invalid job id" in answer.stderr
    return not set(answer.stdout.split()) - {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}


def acquire(directory):
    """Takes the lock of a run directory.

    Raises
    ------
    UserError
        Another run owns it, or may own it.
    OSError
        The directory cannot be written to.
    """
    path, me = Path(directory) / NAME, this_process()
    deadline = time.monotonic() + READ_AGAIN
    while True:
        try:
            return Held(path, me, _create(path, me))
        except FileExistsError:
            owner = read(path)
            if owner is None:
                continue  # released between the two calls
            if not owner and time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            if not owner or not is_dead(owner, me):
                raise refused(path, owner) from None
            return _take_over(path, owner, me)


def adopt(path, token):
    """The lock of this run, whose owner was a rank that died, for this process."""
    me = this_process() | {"token": token}
    temporary = Path(path).with_name(f"{NAME}.{me['token']}")
    descriptor = _create(temporary, me)
    os.rename(temporary, path)
    return Held(path, me, descriptor)


def _create(path, me):
    """Makes a lock file that was not there; returns its descriptor."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        os.pwrite(descriptor, encode(me), 0)
        os.fsync(descriptor)
    except OSError:
        os.close(descriptor)
        os.unlink(path)
        raise
    return descriptor


def _take_over(path, dead, me):
    """Replaces the lock of a dead owner; of several that try at once, one succeeds."""
    with guard(path.parent):
        if (read(path) or {}).get("token") != dead.get("token"):
            raise refused(path, read(path) or {})
        temporary = path.with_name(f"{NAME}.{me['token']}")
        descriptor = _create(temporary, me)
        os.rename(temporary, path)
    return Held(path, me, descriptor)


@contextlib.contextmanager
def guard(directory):
    """One process at a time in the block, where the file system has flock; the kernel lets go when the process ends."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def refused(path, owner):
    """The error that names the owner of a lock."""
    if not owner:
        return UserError(f"{path}: is there but names no owner; if no run uses {path.parent}, delete {path}")
    beat = owner.get("heartbeat")
    ago = f", last heartbeat {max(0.0, time.time() - beat):.0f} s ago" if isinstance(beat, (int, float)) else ""
    job = f" (job {owner['job']})" if owner.get("job") else ""
    return UserError(f"{path.parent}: in use by process {owner.get('pid')} on {owner.get('host')}{job}{ago}; wait until it ends "
                     f"or choose another run.name; if that process is surely dead, delete {path}")
