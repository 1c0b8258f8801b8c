"""Runs a function on N gloo ranks and brings back what each returned."""

import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as multiprocessing


def run_on_ranks(function: Callable[..., Any], num_ranks: int, *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` in `num_ranks` fresh processes; `function` opens the process group itself.

    Raises:
        AssertionError: a rank failed, with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.start_processes(
            _rank, (num_ranks, port, folder, function, arguments), num_ranks, join=False, start_method="spawn"
        )
        assert context is not None
        while not context.join():
            pass
        files = [Path(folder) / str(rank) for rank in range(num_ranks)]
        results = [pickle.loads(file.read_bytes()) for file in files]  # noqa: S301 (our own ranks wrote them)
    failures = [text for failed, text in results if failed]
    assert not failures, "\n".join(failures)
    return [result for _, result in results]


def _rank(
    rank: int, num_ranks: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    try:
        result = (False, function(*arguments))
    except BaseException:  # noqa: BLE001 (the test that started us reports it)
        result = (True, f"rank {rank}: {traceback.format_exc()}")
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))
