"""A Slurm of two nodes on this machine: munged, slurmctld and two slurmd in a private folder, on free ports. Needs root."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
READY = 30              # seconds until both nodes are idle

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CryptoType=crypto/munge
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
SchedulerType=sched/backfill
MinJobAge=300
KillWait=10
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}-{ports[2]} CPUs=4 RealMemory=4000
PartitionName=main Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """Why there can be no Slurm here; "" where there can."""
    lacking = [name for name in PROGRAMS if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin")]
    if lacking:
        return f"Slurm is not installed: no {', '.join(lacking)} (packages slurm-wlm and munge)"
    return "" if os.geteuid() == 0 else "the daemons of Slurm need root"


def neighbouring_ports():
    """Three free ports, the last two next to each other."""
    while True:
        first = 20000 + secrets.randbelow(20000)
        try:
            for port in (first, first + 1, first + 2):
                with socket.socket() as probe:
                    probe.bind(("", port))
            return [first, first + 1, first + 2]
        except OSError:
            continue


class Cluster:
    """A context manager; the daemons end with it.

    Parameters
    ----------
    folder : Path
        Empty.
    """

    def __init__(self, folder):
        self.folder, self.daemons = Path(folder), []
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI_", "PMI", "PRTE"))}
        self.environ |= {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": os.environ["PATH"] + ":/usr/sbin"}

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _daemon(self, *command):
        log = open(self.folder / f"{command[0]}-{len(self.daemons)}.out", "wb")
        self.daemons.append(subprocess.Popen(command, env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True))
        log.close()

    def _start(self):
        os.chmod(self.folder, 0o755)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        os.chmod(key, 0o400)
        for name in ("state", "spool-n0", "spool-n1", "tmp-n0", "tmp-n1"):
            (self.folder / name).mkdir()
        host = socket.gethostname().partition(".")[0]
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=self.folder, ports=neighbouring_ports()))
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munge.pid",
                     f"--log-file={self.folder}/munge.log", f"--seed-file={self.folder}/munge.seed")
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-c", "-D")
        self._daemon("slurmd", "-D", "-N", "n0")
        self._daemon("slurmd", "-D", "-N", "n1")
        self._until(lambda: self.call("sinfo", "--noheader", "--format", "%T %D").split() == ["idle", "2"], "both nodes")

    def _until(self, condition, what):
        deadline = time.monotonic() + READY
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-2000:]}" for path in self.folder.glob("*.log"))
                raise RuntimeError(f"Slurm does not start: {what}\n{logs}")
            time.sleep(0.2)

    def __exit__(self, *error):
        if len(self.daemons) == 4:      # the daemons of steps outlive theirs
            self.call("scancel", "--user=root")
            deadline = time.monotonic() + 15
            while self.call("squeue", "--noheader").strip() and time.monotonic() < deadline:
                time.sleep(0.3)
        for daemon in reversed(self.daemons):
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def call(self, *command, check=False, **options):
        """Standard output of a command of Slurm."""
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=30, **options)
        if check and done.returncode:
            raise AssertionError(f"{command}: {done.stderr}")
        return done.stdout

    def show(self, job):
        """{key: value} of `scontrol show job`; {} where it is unknown."""
        return dict(word.partition("=")[::2] for word in self.call("scontrol", "show", "job", job, "--oneliner").split("\n")[0].split())
