"""Starting ranks on this machine, and ending with their exit code."""

import json
import os
import sys
import time
import uuid

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_mm.config.errors import BAD_INPUT_CODE


def run_ranks(arguments: list[str], num_ranks: int) -> int:
    """Run `python -m megatron_mm.cli ARGUMENTS` on `num_ranks` ranks and return the exit code of the first to fail.

    The first failure's message is printed once; the other ranks are stopped.
    """
    # gloo's and OpenMP's threads would fight for the cores; waiting ones must sleep, not spin.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    config = LaunchConfig(
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "megatron_mm.cli", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == BAD_INPUT_CODE:
            print(f"megatron-mm: {failure.message}", file=sys.stderr)
        else:
            print(f"megatron-mm: rank {rank} ended with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def report_bad_input(message: str) -> None:
    """Tell the launcher why this rank ends; print it where there is none."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file is None:
        print(f"megatron-mm: {message}", file=sys.stderr)
        return
    report = {"message": {"message": message, "extraInfo": {"py_callstack": "", "timestamp": str(int(time.time()))}}}
    with open(error_file, "w", encoding="utf-8") as file:
        json.dump(report, file)
