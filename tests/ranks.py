"""Runs a function in processes of its own, as gloo ranks or alone, and brings back what each returned."""

import functools
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.multiprocessing as multiprocessing

# What a rank imports takes it seven seconds; ranks are forked off a process that has nothing but imported it. Not where
# there is a GPU: Megatron-Core's imports ask CUDA whether there is, and a fork of a process that did cannot use it.
PRELOADED = ["megatron_mm.train.loop", "megatron_mm.weights.export", "tests.layouts"]


def run_on_ranks(function: Callable[..., Any], num_ranks: int, *arguments: Any, hides_gpus: bool = False) -> list[Any]:
    """Call `function(*arguments)` in `num_ranks` processes of their own; it opens the process group itself.

    Args:
        hides_gpus: have the processes see none, as platform=cpu needs on a machine with a GPU.

    Raises:
        AssertionError: a rank failed, with its traceback.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(PRELOADED)
    shared = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
    # Already when a process starts: what it imports first asks CUDA.
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""} if hides_gpus else {}):
        return _run(function, environments, arguments, "spawn" if torch.cuda.device_count() else "forkserver")


def run_alone(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call `function(*arguments, **keywords)` in a fresh process that is no rank.

    Raises:
        AssertionError: it failed, with its traceback.
    """
    return _run(functools.partial(function, **keywords), [{}], arguments, "spawn")[0]


def _run(
    function: Callable[..., Any], environments: list[dict[str, str]], arguments: tuple[Any, ...], start_method: str
) -> list[Any]:
    # A server that forks has the environment of the time when it started.
    environments = [{**os.environ, **environment} for environment in environments]
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.start_processes(
            _process,
            (folder, environments, function, arguments),
            len(environments),
            join=False,
            start_method=start_method,
        )
        assert context is not None
        while not context.join():
            pass
        files = [Path(folder) / str(number) for number in range(len(environments))]
        results = [pickle.loads(file.read_bytes()) for file in files]  # noqa: S301 (our own processes wrote them)
    failures = [text for failed, text in results if failed]
    assert not failures, "\n".join(failures)
    return [result for _, result in results]


def _process(
    number: int,
    folder: str,
    environments: list[dict[str, str]],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environments[number], OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    try:
        result = (False, function(*arguments))
    except BaseException:  # noqa: BLE001 (the test that started us reports it)
        result = (True, f"process {number}: {traceback.format_exc()}")
    (Path(folder) / str(number)).write_bytes(pickle.dumps(result))
