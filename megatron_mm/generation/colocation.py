"""What vLLM does to its process and machine, and must not where a trainer or another run lives there too."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

_SHARED_MEMORY = Path("/dev/shm")


@contextmanager
def kept_apart(*, has_own_memory: bool) -> Iterator[None]:
    """Make an engine within.

    - vLLM's CPU worker replaces `torch.set_num_threads` by a function that does nothing. A process that is forked
      later, such as the writer of a checkpoint, must set its threads.
    - Ranks of an engine on the CPU share memory under a name that says nothing of the run: a second run on the machine,
      or one after a run that was killed, would find the name taken. And nobody removes it when the engine ends.
    - An engine in this process seeds the global random generators of Python, numpy and torch with its own seed.

    vLLM asks for torchrun's variables; a job of one rank need not have them.

    Args:
        has_own_memory: whether the engine computes on a device, whose generator it seeds as well.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    set_num_threads, make_name = torch.set_num_threads, _CPUSHMDistributed.make_group_name
    made: list[str] = []

    def name_of_this_run(communicator: Any) -> str:
        # All ranks of a machine have the same parent.
        name = f"{os.getppid()}-{os.environ.get('MASTER_PORT', '')}-{make_name(communicator)}".replace("/", "")
        made.append(f"{name}_{communicator.rank}")
        return name

    _CPUSHMDistributed.make_group_name = staticmethod(name_of_this_run)
    of_one_rank = {"RANK", "LOCAL_RANK"} - set(os.environ)
    os.environ.update(dict.fromkeys(of_one_rank, "0"))
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if has_own_memory else []):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for name in of_one_rank:
            del os.environ[name]
        torch.set_num_threads = set_num_threads
        _CPUSHMDistributed.make_group_name = staticmethod(make_name)
        # All ranks have opened it by now; without a name it goes with the last of them.
        for name in made:
            (_SHARED_MEMORY / name).unlink(missing_ok=True)


def keep_process_groups(llm: Any) -> None:
    """Have an engine go with its process: its own end would take the whole job's process group with it."""
    finalizer = getattr(llm.llm_engine.engine_core, "_finalizer", None)
    if finalizer is not None:
        finalizer.detach()
