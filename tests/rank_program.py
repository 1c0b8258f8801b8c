"""Ranks without training, for tests of the launcher: `python -m tests.rank_program FOLDER NUM_RANKS SCENARIO`.

Started like this it is a launcher of ranks that run this module too. Each leaves FOLDER/pid_RANK once it is at work.
torch is imported where it is needed, since starting ranks is what these tests spend their time on.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_mm.config.errors import REQUEUE_CODE, InputError
from megatron_mm.parallel.failure import run_rank
from megatron_mm.telemetry.terminal import Terminal

FAILING_RANK = 1


def _rank(folder: Path, scenario: str) -> int:
    rank = int(os.environ["RANK"])
    asked: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: asked.append(number))
    (folder / f"pid_{rank}").write_text(str(os.getpid()), encoding="utf-8")
    print(f"rank {rank} at work")
    print(f"rank {rank} complains", file=sys.stderr)
    if scenario == "print":
        return 0
    if scenario == "bar":
        return _draw_bar(folder, rank)
    if scenario == "asked":
        while not asked:
            time.sleep(0.05)
        # One rank takes longer to save than the others.
        time.sleep(1.5 if rank == 0 else 0)
        (folder / f"saved_{rank}").touch()
        return REQUEUE_CODE
    if scenario == "deaf":
        subprocess.Popen(["sleep", "1000"])
        time.sleep(1000)
    _work_together(rank, scenario)
    return 0


def _draw_bar(folder: Path, rank: int) -> int:
    """Rank 0 shows how far it is, and rank 1 says something meanwhile."""
    if rank == 0:
        terminal = Terminal("tiny", 3, 0)
        terminal.show(1, {"loss": 2.5})
        (folder / "drawn").touch()
        while not (folder / "said").exists():
            time.sleep(0.05)
        time.sleep(0.5)  # until the launcher has passed it on
        terminal.show(2, {"loss": 2.0})
        terminal.show(3, {"loss": 1.5})
        terminal.end("done: all of it")
    if rank == 1:
        while not (folder / "drawn").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        print("rank 1 warns", file=sys.stderr, flush=True)
        (folder / "said").touch()
    return 0


def _work_together(rank: int, scenario: str) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    if rank == FAILING_RANK:
        if scenario in ("raise", "no exception"):
            # The others hear of it before anybody knows why.
            dist.destroy_process_group()
            time.sleep(1)
        _fail(scenario)
    if rank > FAILING_RANK and scenario == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        dist.all_reduce(torch.ones(1))


def _fail(scenario: str) -> None:
    if scenario == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if scenario == "bad input":
        raise InputError("data.path=nowhere is missing")
    # Long enough for a rank to have stopped itself.
    time.sleep(1 if scenario == "stopped" else 0)
    if scenario == "no exception":
        from torch.distributed.checkpoint.api import CheckpointException

        # torch's, for a load or a save that failed on some rank.
        raise CheckpointException("load", {FAILING_RANK: (ValueError("the planted fault"), None)})  # pyright: ignore
    raise ValueError("the planted fault")


def main() -> int:
    """Be a rank or a launcher."""
    folder, num_ranks, scenario = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if "RANK" in os.environ:
        return run_rank(lambda: _rank(folder, scenario))
    from megatron_mm.parallel.launch import run_ranks
    from megatron_mm.parallel.nodes import find_nodes

    nodes = find_nodes(*((2, sys.argv[4]) if len(sys.argv) > 4 else (1, None)))
    return run_ranks(sys.argv[1:4], num_ranks, nodes, folder / "logs", module="tests.rank_program")


if __name__ == "__main__":
    sys.exit(main())
