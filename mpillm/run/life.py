"""The life of a run in its directory: the ranks train to the end, or until one of them dies and the others go on (recovery.py)."""

import contextlib

from ..config import job_to_toml
from ..layout import comm, ulfm
from ..layout.journal import JOURNAL
from ..layout.mesh import Mesh
from . import launch, recovery
from .connect import connect
from .data import TrainingData
from .health import poison
from .metrics import Metrics
from .progress import Progress
from .replicas import flip_bit
from .session import build
from .training import Training
from .watchdog import Watchdog


class Life:
    """
    Parameters
    ----------
    job : Job
    data : TrainingData
    ops : backend
    line : str
        For the user, about the transport of GPU arrays; "" for nothing.
    directory : RunDirectory
    stop : StopFlag

    Attributes
    ----------
    training : Training or None
        Under way.
    watchdog : Watchdog or None
        Of the ranks that began together last; after a failure it may still be open (`unwatch`).
    """

    def __init__(self, job, data, ops, line, directory, stop):
        self.job, self.data, self.ops, self.line, self.directory, self.stop, self.training = job, data, ops, line, directory, stop, None
        self.watchdog = None

    def faults(self):
        """What MPILLM_FAULT may do to the model, by name."""
        return {"flip": lambda: flip_bit(self.training.model), "nan": lambda: poison(self.training.trainer)}

    def first(self, group, sizes):
        """Trains on the ranks that the job was started with; the exit code. Collective."""
        with self._watched(group) as (progress, metrics):
            session = self._build(group, sizes)
            for note in filter(None, (session.ops.note, self.line)):
                progress.note(note)
            launch.moment("model")
            self.training = Training(session, self.directory, self.data, metrics, progress, self.stop)
            self.training.prepare()
            launch.moment("weights")
            return self._run()

    def go_on(self, recovered, began):
        """Trains on the ranks that are left; the exit code. Collective over those.

        Parameters
        ----------
        recovered : Recovered
        began : float
            time.monotonic() of the moment at which a death was noticed.
        """
        with self._watched(recovered.group) as (progress, metrics):
            group = connect(recovered.group, self.ops, self.job.communication.transport)[0]
            session = self._build(group, recovered.sizes)
            self.training = Training(session, self.directory, TrainingData(self.job, recovered.group), metrics, progress, self.stop)
            recovery.take_over(self.training, recovered, began)
            launch.moments.clear()      # of a start that was told
            self.training.make_up()
            return self._run()

    @contextlib.contextmanager
    def _watched(self, group):
        """What is around a Training of these ranks, which end it together where one that dies can be borne."""
        with Watchdog(group, self.directory, self.stop, self.job.run.hang_timeout) as self.watchdog:
            with Progress(group, self.directory.file("log.txt")) as progress, Metrics(self.directory.file("metrics.jsonl"), group) as metrics:
                yield progress, metrics
            JOURNAL.phase("meet")       # a file that cannot be closed is a failure too
            ulfm.check_all(comm.world())

    def unwatch(self):
        """Ends the watch over ranks that have met after a failure."""
        if self.watchdog:
            self.watchdog.close()
        self.watchdog = None

    def _build(self, group, sizes):
        return build(self.job, Mesh(group, sizes), self.data.vocabulary, self.ops)

    def _run(self):
        self.directory.write_job(job_to_toml(self.job))
        self.directory.status("running", step=self.training.step)
        return self.training.run()
