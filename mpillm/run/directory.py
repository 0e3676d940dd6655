"""The run directory `runs/<name>/`: who may write in it, and the small files that tell how the run stands.

Rank 0 works and shares the outcome, so all ranks go on or are refused alike. Nothing is changed before the lock is
held, and what a refused run made is removed again.
"""

import contextlib
import json
import os
import re
import stat
import time
import uuid
from pathlib import Path

from ..config import UserError
from . import ending, lock

FOLDERS = ("checkpoints",)
FILES = ("job.toml", "log.txt", "metrics.jsonl", "status.json", lock.NAME)
TEMPORARY = re.compile(r"\.(job\.toml|status\.json)\.[0-9a-f]{12}")    # of `write_atomic`
STOP, SAVE = "STOP", "SAVE"     # files of these names, made by anyone who may write here: the run saves and stops, or saves and goes on
STATUS_LIMIT = 65536    # characters of status.json that are read
HEARTBEAT = 30.0        # seconds between renewals of the lock


def write_atomic(path, data):
    """Replaces a file in one piece: another process, or a crash, sees the old or the new bytes."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # some file systems cannot fsync a directory
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check(path):
    """Refuses a run directory that this run could not use.

    Raises
    ------
    UserError
        A link, not a directory, or with files of another kind than ours where ours go.
    """
    if path.is_symlink():
        raise UserError(f"{path}: is a symbolic link; a run directory has to be a directory itself (its parent may be a link)")
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path}: is a file, not a directory; choose another run.name")
    for name, right, kind in [*((name, stat.S_ISDIR, "directory") for name in FOLDERS),
                              *((name, stat.S_ISREG, "plain file") for name in FILES)]:
        with contextlib.suppress(FileNotFoundError):  # not made yet
            if not right((path / name).lstat().st_mode):
                raise UserError(f"{path / name}: is not a {kind}; move it away or choose another run.name")
            if not os.access(path / name, os.W_OK):
                raise UserError(f"{path / name}: may not be written to; make it writable or choose another run.name")
    if (path / STOP).exists():
        raise UserError(f"{path / STOP}: this run was told to stop; delete that file to let it go on")


def status_text(path):
    """What status.json of a run directory holds; None where there is none."""
    try:
        with open(Path(path) / "status.json", encoding="utf-8", errors="replace") as file:
            return file.read(STATUS_LIMIT)
    except FileNotFoundError:
        return None


def failure_since(path, before):
    """The exit code of the failure in status.json; None where it tells of none, or is what was there `before` this run."""
    text = status_text(path)
    if text is None or text == before:
        return None
    with contextlib.suppress(ValueError, TypeError, KeyError):
        status = json.loads(text)
        return int(status["exit"]) if status["state"] == "failed" else None
    return None


class RunDirectory:
    """A run directory, locked for this job; a context manager. Collective.

    Leaving it after an error writes status.json (state "failed") and gives the lock back. After a `UserError` that
    came before the first `status()` the directory is left as it was found.

    Parameters
    ----------
    path : path-like
        `runs/<name>`, made if missing.
    group : Group or Solo
        All ranks of the job.

    Raises
    ------
    UserError
        On all ranks: not usable, or in use by another run.
    """

    def __init__(self, path, group):
        self.path, self.group = Path(path), group
        self.checkpoints = self.path / "checkpoints"
        self.held, self.made, self.before = None, [], None
        self.deaf = False           # a file SAVE that cannot be removed is not heard again
        self.begun = False          # a status was written: from here on the run has left traces
        self.step = None            # of the last heartbeat
        refusal = self._open() if group.rank == 0 else None
        refusal, self.token, self.before = group.share([refusal, self.held.token if self.held else None, self.before])
        if refusal is not None:
            raise UserError(refusal)

    def _open(self):
        """Makes, checks and locks the directory; the line of the refusal, or None."""
        try:
            check(self.path)
            for folder in reversed([self.path, *self.path.parents]):
                self._make(folder)
            self.held = lock.acquire(self.path)
            check(self.path)  # once more: now nobody else changes it
            self._make(self.checkpoints)
            self.before = status_text(self.path)
        except (UserError, OSError) as error:
            self._undo()
            if isinstance(error, UserError):
                return str(error)
            return (f"{error.filename or self.path}: the run directory cannot be made or written to: {error.strerror}; "
                    "choose a place where you may write")
        return None

    def _make(self, folder):
        if folder.is_dir():
            return
        try:
            folder.mkdir()
            self.made.append(folder)
        except FileExistsError:
            if not folder.is_dir():  # a run that starts at the same time may have made it
                raise UserError(f"{folder}: is a file, not a directory; choose another place for the run") from None

    def _undo(self):
        """Gives the lock back and removes the folders that this run made and that are still empty."""
        if self.held:
            self.held.release()
        for folder in reversed(self.made):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def file(self, name):
        """The path of a file in the run directory."""
        return self.path / name

    def write_job(self, text):
        """Keeps the resolved job as job.toml; removes what a killed run left half-written."""
        if self.group.rank == 0:
            for leftover in filter(TEMPORARY.fullmatch, os.listdir(self.path)):
                os.unlink(self.path / leftover)
            write_atomic(self.file("job.toml"), text.encode())

    def status(self, state, exit=None, reason=None, step=None, rank=None):
        """Writes status.json (rank 0, unless `rank` says that another one reports its failure).

        A failure that any rank of this run has written stays: the first one is the cause, and the end of the job.

        Parameters
        ----------
        state : str
            "running", "finished", "stopped" or "failed".
        exit : int or None
            The exit code, once there is one; launchers remap codes, this is the truth.
        reason : str or None
        step : int or None
            The last step done; that of the last heartbeat when left out.
        """
        self.begun = True
        if self.group.rank != (rank or 0):
            return
        self.step = self.step if step is None else step
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        status = {"state": state, "exit": exit, "reason": reason, "rank": rank, "step": self.step, "time": stamp}
        with lock.guard(self.path):
            if self.failure() is None:
                write_atomic(self.file("status.json"), json.dumps(status).encode() + b"\n")

    def heartbeat(self, step=None):
        """Notes the step; renews the lock when that is due. Called once a step on every rank, costs nothing in between."""
        self.step = self.step if step is None else step
        if self.held and time.monotonic() - self.held.refreshed > HEARTBEAT:
            self.held.heartbeat()

    def wish(self):
        """What someone wants who has put a file into the directory: "STOP", "SAVE" or None; asks the disk."""
        heard = (STOP,) if self.deaf else (STOP, SAVE)
        return next((name for name in heard if os.path.lexists(self.file(name))), None)

    def granted(self):
        """A checkpoint was written: who wanted one sees that the file is gone."""
        if self.group.rank == 0:
            try:
                self.file(SAVE).unlink(missing_ok=True)
            except OSError:     # it is a folder, or the disk is in disorder
                self.deaf = True

    def inherit(self, group):
        """After ranks were lost: `group` goes on, its rank 0 with the lock; a rank without a group leaves. Not collective."""
        first = group is not None and group.rank == 0
        if self.held and not first:
            os.close(self.held.descriptor)
            self.held = None
        elif first and not self.held:
            self.held = lock.adopt(self.path / lock.NAME, self.token)
        self.group = group or self.group

    def close(self):
        """Gives the lock back (rank 0)."""
        if self.held:
            self.held.release()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None:
            self.close()
        elif isinstance(error, UserError) and not self.begun:
            self._undo()
        else:
            self._report(error)

    def _report(self, error):
        """After a failure of this rank: the reason for people and scripts, then the lock, for the job is about to end."""
        code = ending.code_of(error)
        words = str(error) if isinstance(error, ending.RanksDied) else f"{type(error).__name__}: {error}"
        reason = " ".join(words.split())[:2000]
        with contextlib.suppress(OSError, ValueError):
            self.status("failed", code, reason, rank=self.group.rank)
        with contextlib.suppress(OSError):
            lock.remove(self.path / lock.NAME, self.token)
        self.close()

    def failure(self):
        """The exit code of the failure that a rank of this run has written; None where there is none."""
        return failure_since(self.path, self.before)
