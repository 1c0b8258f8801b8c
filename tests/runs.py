"""Training runs through the command, as a user or a cluster starts, watches and kills them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

SHORT = (
    "init_from=null",
    "precision=fp32",
    "parallel.tensor=1",
    "data.num_workers=0",
    "data.blend={digits/easy/thinking: 1, digits/hard/non_thinking: 1}",
    "train.global_batch=8",
    "train.micro_batch=2",
    "train.log_every=1",
    "optim.warmup_steps=0",
    "telemetry.tensorboard=false",
)


def start(
    recipe: str, data: Path, run_dir: Path, num_ranks: int, *overrides: str, command: str = "train"
) -> subprocess.Popen[str]:
    """Begin `megatron-mm train`, or another command, on ranks of this machine; its output is kept for `end`."""
    arguments = [recipe, f"data.path={data}", f"run_dir={run_dir}", *SHORT, *overrides, "--nproc", str(num_ranks)]
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_mm.cli", command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str], seconds: float = 900) -> tuple[int, str]:
    """Wait for a run, and return its exit code and what it said."""
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


def train(recipe: str, data: Path, run_dir: Path, num_ranks: int, *overrides: str, command: str = "train") -> None:
    """A run that must end well."""
    code, said = end(start(recipe, data, run_dir, num_ranks, *overrides, command=command))
    assert code == 0, said[-6000:]


def wait_until(
    condition: Callable[[], Any], process: subprocess.Popen[str] | None = None, seconds: float = 240
) -> None:
    """Wait for something that a run does.

    Raises:
        AssertionError: the run, if it is given, ended, or it took too long.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None:
            assert process.poll() is None, end(process)[1][-6000:]
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.005)


def descendants(process: int) -> list[int]:
    """Processes that a process has started, and those that they have."""
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
        for file in Path(f"/proc/{process}/task").glob("*/children"):
            for child in file.read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process of each rank of a run."""
    found = {}
    for child in descendants(process.pid):
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")), None)
        if rank is not None:
            found.setdefault(rank, child)
    return found


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a run's launcher and everything that it has started, as when a machine dies."""
    victims = [process.pid, *descendants(process.pid)]
    # Stopped first, so that nobody sees another one die. Some live for a moment only, such as those that grade.
    for sent in (signal.SIGSTOP, signal.SIGKILL):
        for victim in victims:
            with suppress(ProcessLookupError):
                os.kill(victim, sent)
    process.communicate()


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl; a last line that is cut off is left out."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]


def steps_done(run_dir: Path) -> int:
    """The last step that was logged."""
    lines = metrics(run_dir)
    return int(lines[-1]["step"]) if lines else 0
