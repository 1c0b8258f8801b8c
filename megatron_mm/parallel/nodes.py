"""The machines of a job, by what the command line and Slurm say of them. Without torch."""

import os
from dataclasses import dataclass

from megatron_mm.config.errors import InputError


@dataclass(frozen=True, slots=True)
class Nodes:
    """The machines of a job, and which of them this is.

    Attributes:
        num_nodes: launchers of the job, one a machine.
        node: this one's number, from 0.
        host: address of node 0.
        port: where node 0 listens; 0 for any, on one node.
    """

    num_nodes: int = 1
    node: int = 0
    host: str = "localhost"
    port: int = 0


def find_nodes(num_nodes: int, rendezvous: str | None) -> Nodes:
    """The machines that `--nodes` and `--rendezvous HOST:PORT` name; Slurm says which of them this is.

    Raises:
        InputError: they do not make sense, or srun did not start us.
    """
    if num_nodes == 1:
        return Nodes()
    if num_nodes < 1:
        raise InputError(f"--nodes {num_nodes} is not a number of machines")
    host, _, port = (rendezvous or "").rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(
            f"--nodes {num_nodes} needs --rendezvous HOST:PORT of the first one"
            + (f", not {rendezvous}" if rendezvous else "")
        )
    node = os.environ.get("SLURM_NODEID", "")
    if not node.isdecimal() or int(node) >= num_nodes:
        raise InputError(
            f"--nodes {num_nodes} is for srun, which starts one launcher a node and sets SLURM_NODEID (seen: {node!r})"
            "; without Slurm start `megatron-mm train` by torchrun, without --nproc"
        )
    return Nodes(num_nodes, int(node), host, int(port))
