"""A real Slurm of two nodes on this machine, for tests: munged, slurmctld and two slurmd, ended with the test.

Needs Debian's `slurm-wlm` and `munge` (tests/setup_slurm.sh installs them).
"""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

NODES = ("n1", "n2")
_DAEMONS = ("munged", "slurmctld", "slurmd")
# A requeued job waits as long as the credential of its last start is valid (slurm.conf, AuthInfo, cred_expire); the
# default is 120.
_REQUEUE_SECONDS = 5

_CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_seconds}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
ReturnToService=2
SlurmdParameters=config_overrides
MinJobAge=3600
FirstJobId={first_job}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True, slots=True)
class Slurm:
    """A cluster that is up.

    Attributes:
        folder: configuration, state and logs.
    """

    folder: Path

    def run(self, *command: str, directory: Path | None = None) -> str:
        """Output of one of Slurm's commands.

        Raises:
            AssertionError: it failed, with what it said.
        """
        result = subprocess.run(command, env=self._environment(), cwd=directory, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def submit(self, directory: Path, *arguments: str) -> str:
        """`sbatch ARGUMENTS` in a directory; the job's number."""
        return self.run("sbatch", "--parsable", *arguments, directory=directory).strip()

    def field(self, job: str, name: str) -> str:
        """What `scontrol show job` says, such as JobState or Restarts."""
        fields = dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", job).split() if "=" in word)
        return fields[name]

    def wait(self, job: str, *states: str) -> str:
        """Wait until a job is in one of these states and return it; the test's time limit is the limit."""
        while (state := self.field(job, "JobState")) not in states:
            time.sleep(0.5)
        return state

    def _environment(self) -> dict[str, str]:
        # Jobs inherit it: a launcher in one must not take itself for a rank or job of somebody else's.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf")}


@contextmanager
def running_slurm(folder: Path) -> Iterator[Slurm]:
    """A cluster of two nodes with one core each, whose daemons keep everything in `folder`.

    Raises:
        AssertionError: Slurm is not installed, or a daemon does not start.
    """
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in _DAEMONS if shutil.which(name, path=path) is None]
    assert not missing, (
        f"{', '.join(missing)} not found; install slurm-wlm and munge: bash tests/setup_slurm.sh as root"
    )
    (folder / "state").mkdir()
    for node in NODES:
        (folder / f"spool_{node}").mkdir()
    ports = _free_ports(3)
    config = _CONFIG.format(
        host=socket.gethostname(),
        user=getpass.getuser(),
        folder=folder,
        ports=ports,
        # Jobs meet at a port that follows from their number: two of these clusters on one machine need other numbers.
        first_job=ports[0] % 15000 + 1,
        requeue_seconds=_REQUEUE_SECONDS,
    )
    (folder / "slurm.conf").write_text(config, encoding="utf-8")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    munge_files = {
        "key-file": "munge.key",
        "socket": "munge.socket",
        "pid-file": "munge.pid",
        "seed-file": "munge.seed",
    }
    options = [f"--{option}={folder / name}" for option, name in munge_files.items()]
    cluster = Slurm(folder)
    with ExitStack() as daemons:
        # --force: it would otherwise insist on a user of its own, and on directories that only that one can change.
        daemons.enter_context(_daemon(folder, path, "munged", "--foreground", "--force", *options))
        while not (folder / "munge.socket").exists():
            time.sleep(0.1)
        daemons.enter_context(_daemon(folder, path, "slurmctld", "-D"))
        for node in NODES:
            daemons.enter_context(_daemon(folder, path, "slurmd", "-D", "-N", node))
        while cluster_states(cluster) != ["idle"] * len(NODES):
            time.sleep(0.5)
        yield cluster
        cluster.run("scancel", "--user", getpass.getuser())


def cluster_states(cluster: Slurm) -> list[str]:
    """State of every node; none while the controller does not answer."""
    result = subprocess.run(
        ["sinfo", "--Node", "--noheader", "--format=%T"],
        env={**os.environ, "SLURM_CONF": str(cluster.folder / "slurm.conf")},
        capture_output=True,
        text=True,
    )
    return result.stdout.split()


@contextmanager
def _daemon(folder: Path, path: str, *command: str) -> Iterator[None]:
    log = folder / f"{command[0]}_{command[-1].rpartition('/')[2]}.out"
    environment = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        time.sleep(0.3)
        assert process.poll() is None, f"{command}: {log.read_text(encoding='utf-8')}"
        yield
    finally:
        process.terminate()
        process.wait()


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("localhost", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
