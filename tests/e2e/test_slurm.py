"""slurm/ on a real Slurm of two nodes: a run is asked to end, saves, is requeued, goes on and ends whole."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_mm.parallel.output import log_file
from tests.slurm import Slurm, running_slurm

ROOT = Path(__file__).parents[2]
SHRUNK = (
    "init_from=null",
    "precision=fp32",
    "data.num_workers=0",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.log_every=1",
    "optim.warmup_steps=0",
)
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A cluster for the tests of this file."""
    with running_slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose Slurm logs are the test's."""
    directory = tmp_path_factory.mktemp("checkout")
    for name in ("megatron_mm", "slurm"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__", "*.log"))
    (directory / ".venv").symlink_to(ROOT / ".venv")
    return directory


def _submit(slurm: Slurm, checkout: Path, run: Path, digits: Path, options: list[str], overrides: list[str]) -> str:
    """Stage 3 in miniature on two nodes without GPUs, one rank each."""
    nodes = ["--nodes=2", "--gpus-per-node=0", "--export=ALL,NPROC=1", *options]
    recipe = ["--recipe", "mini/stage3", f"run_dir={run}", f"data.path={digits}", *SHRUNK, *overrides]
    return slurm.submit(checkout, *nodes, "slurm/pretrain_stage3.sh", *recipe)


def _steps(run: Path) -> list[int]:
    """Steps of metrics.jsonl, in their order."""
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line)["step"] for line in lines]


def _log(checkout: Path, job: str) -> str:
    return (checkout / "slurm" / "logs" / f"pretrain_stage3-{job}.log").read_text(encoding="utf-8")


def _assert_whole(slurm: Slurm, checkout: Path, job: str, run: Path, num_steps: int) -> None:
    """The job completed after at least one requeue, and no step is missing or was done twice."""
    state, log = slurm.wait(job, *ENDED), _log(checkout, job)
    assert state == "COMPLETED", log
    num_requeues = int(slurm.field(job, "Restarts"))
    assert num_requeues >= 1
    assert log.count("slurm: saved; requeued") == num_requeues
    assert _steps(run) == list(range(1, num_steps + 1)), log
    for rank in range(2):
        text = log_file(run / "logs", rank).read_text(encoding="utf-8")
        assert text.count(f"rank {rank} of 2 starts on") == num_requeues + 1
    starts = (run / "logs" / "starts.jsonl").read_text(encoding="utf-8").splitlines()
    begun = [json.loads(line)["step"] for line in starts]
    assert begun[0] == 0
    assert begun == sorted(set(begun)), "a start made no checkpoint"


@pytest.mark.timeout(900)
def test_a_signalled_job_saves_is_requeued_and_goes_on(
    slurm: Slurm, checkout: Path, digits: Path, tmp_path: Path
) -> None:
    run, num_steps = tmp_path / "run", 60
    job = _submit(
        slurm, checkout, run, digits, ["--time=60"], [f"train.steps={num_steps}", "checkpoint.save_every=1000"]
    )
    while len(_steps(run)) < 3 and slurm.field(job, "JobState") not in ENDED:
        time.sleep(0.1)
    # What --signal=B:USR1@300 does before the time limit.
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    _assert_whole(slurm, checkout, job, run, num_steps)


@pytest.mark.timeout(300)
def test_bad_input_ends_the_job(slurm: Slurm, checkout: Path, digits: Path, tmp_path: Path) -> None:
    job = _submit(slurm, checkout, tmp_path / "run", digits, [], ["train.stpes=3"])
    assert slurm.wait(job, *ENDED) == "FAILED"
    assert slurm.field(job, "Restarts") == "0"
    assert "nearest valid one is train.steps" in _log(checkout, job)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_time_limit_requeues_and_scancel_does_not(
    slurm: Slurm, checkout: Path, digits: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # The signal may come a minute earlier than is asked for (sbatch, --signal): after 90 to 150 seconds.
    options = ["--time=3", "--signal=B:USR1@30"]
    job = _submit(slurm, checkout, run, digits, options, ["train.steps=1000000", "checkpoint.save_every=1000000"])
    while slurm.field(job, "Restarts") == "0" and slurm.field(job, "JobState") not in ENDED:
        time.sleep(1)
    slurm.wait(job, "RUNNING", *ENDED)
    saved = len(_steps(run))
    while len(_steps(run)) < saved + 3 and slurm.field(job, "JobState") not in ENDED:
        time.sleep(1)
    log = _log(checkout, job)
    assert slurm.field(job, "Restarts") == "1", log
    slurm.run("scancel", job)
    assert slurm.wait(job, *ENDED) == "CANCELLED", _log(checkout, job)
    assert slurm.field(job, "Restarts") == "1"
    steps = _steps(run)
    assert saved > 0
    assert steps == list(range(1, len(steps) + 1)), log
