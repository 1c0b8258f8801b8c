"""Whether a run that Slurm starts again and again gets anywhere.

RUN/logs/starts.jsonl    a line a start of a Slurm job: job, date, step it began with
"""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from megatron_mm.checkpoint import paths
from megatron_mm.config.errors import REQUEUE_CODE, InputError

# Starts in a row that may end without a new checkpoint.
MAX_FRUITLESS_STARTS = 2
STUCK_CODE = 1


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a run.

    Attributes:
        job: Slurm's id of the job, the same after a requeue.
        date: when, in ISO 8601.
        step: of the newest checkpoint then, 0 for none.
    """

    job: str
    date: str
    step: int


def record_start(run_dir: Path) -> None:
    """Note that a run starts, before its ranks do, on one node; nothing is noted without Slurm.

    Raises:
        InputError: run_dir cannot be written.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    start = Start(job, datetime.now().astimezone().isoformat(timespec="seconds"), _newest_step(run_dir))
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        with _file(run_dir).open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(start)) + "\n")
    except OSError as error:
        raise InputError(f"run_dir {run_dir} cannot be written: {error.strerror}; choose another") from None


def judge_end(run_dir: Path, code: int) -> int:
    """The exit code of a start whose ranks ended with `code`.

    A start that asks to be requeued fails instead if neither it nor the one before it made a new checkpoint: the next
    one would not either.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if code != REQUEUE_CODE or job is None:
        return code
    lines = _file(run_dir).read_text(encoding="utf-8").splitlines()
    starts = [start for line in lines if (start := Start(**json.loads(line))).job == job][-MAX_FRUITLESS_STARTS:]
    step = _newest_step(run_dir)
    if len(starts) < MAX_FRUITLESS_STARTS or any(start.step != step for start in starts):
        return code
    print(
        f"megatron-mm: {MAX_FRUITLESS_STARTS} starts in a row made no checkpoint after step {step}; give the job more "
        "time (--time, --signal), or look into logs",
        file=sys.stderr,
    )
    return STUCK_CODE


def _file(run_dir: Path) -> Path:
    return run_dir / "logs" / "starts.jsonl"


def _newest_step(run_dir: Path) -> int:
    checkpoint = paths.newest(run_dir)
    return 0 if checkpoint is None else paths.step_of(checkpoint) or 0
