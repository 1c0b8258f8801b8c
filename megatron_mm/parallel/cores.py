"""How many cores a process may use, and a warning where ranks have to share them."""

import math
import os
import socket
from pathlib import Path


def usable_cores(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float:
    """Return the number of cores that this process and those that it starts may use.

    That is the fewer of the cores that it is bound to (Slurm binds by these) and its quota of processor time, which
    may be a fraction (Docker's and Kubernetes' limits; cgroup v2, Documentation/admin-guide/cgroup-v2.rst, cpu.max).

    Args:
        cgroups: directory that the hierarchy of cgroups is mounted at.
        membership: file that names this process's cgroup.
    """
    return min(len(os.sched_getaffinity(0)), _quota(cgroups, membership))


def _quota(cgroups: Path, membership: Path) -> float:
    """Cores' worth of processor time of the narrowest cgroup that this process is in; infinity without a limit."""
    if not membership.is_file():
        return math.inf
    paths = [line[3:] for line in membership.read_text(encoding="utf-8").splitlines() if line.startswith("0::")]
    quota = math.inf
    for path in paths:
        group = cgroups / path.lstrip("/")
        for limits in (folder / "cpu.max" for folder in (group, *group.parents) if folder.is_relative_to(cgroups)):
            if limits.is_file():
                share, period = limits.read_text(encoding="utf-8").split()
                quota = min(quota, math.inf if share == "max" else int(share) / int(period))
    return quota


def shared_cores(num_ranks: int, cores: float) -> str | None:
    """Return a warning for the user if `num_ranks` ranks of this machine share fewer `cores`, otherwise None."""
    if cores >= num_ranks:
        return None
    # Slurm's own bindings are the common cause: one core for the one task of a node.
    fix = (
        "ask Slurm for the whole node (--exclusive --mem=0) or for cores (--cpus-per-task=N)"
        if "SLURM_JOB_ID" in os.environ
        else "start fewer ranks, or allow more cores (taskset, the container's limit)"
    )
    return (
        f"{num_ranks} ranks on {socket.gethostname()} share {cores:g} of its {os.cpu_count()} cores and wait for one "
        f"another; {fix}"
    )
