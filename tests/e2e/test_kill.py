"""A run that is killed at any moment and started again ends as if it had never been."""

import random
import time
from pathlib import Path

import pytest

from tests import runs
from tests.checkpoints import assert_same, content

STEPS = 200
RUN = (
    f"train.steps={STEPS}",
    "parallel.tensor=2",
    "parallel.sequence=true",
    "precision=bf16",
    "checkpoint.save_every=10",
    "checkpoint.asynchronous=true",
    "train.micro_batch=4",
)


@pytest.fixture(scope="module")
def uninterrupted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    runs.train("mini/stage3", digits, run_dir, 4, *RUN)
    return run_dir


def _is_writing(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("*.partial*"))


def _run_with_kills(digits: Path, run_dir: Path, num_kills: int, seed: int) -> int:
    """Kill the run again and again, every third time while it writes a checkpoint; returns the kills."""
    draws, killed = random.Random(seed), 0
    while True:
        before = runs.steps_done(run_dir)
        process = runs.start("mini/stage3", digits, run_dir, 4, *RUN)
        if killed == num_kills:
            code, said = runs.end(process)
            assert code == 0, said[-6000:]
            return killed
        # At least one checkpoint further, so that the kills are spread over the run.
        goal = min(before + draws.randint(1, max(2 * (STEPS - before) // (num_kills - killed + 1), 12)), STEPS - 5)
        runs.wait_until(lambda goal=goal: runs.steps_done(run_dir) >= goal, process)
        if killed % 3 == 0:
            runs.wait_until(lambda: _is_writing(run_dir), process)
        time.sleep(draws.uniform(0, 0.3))  # any moment of a step or a write
        runs.kill_all(process)
        killed += 1


def _assert_as_if_never_killed(run_dir: Path, uninterrupted: Path) -> None:
    assert_same(content(run_dir), content(uninterrupted))
    lines, expected = runs.metrics(run_dir), runs.metrics(uninterrupted)
    # Exactly once: no gap and no double step, in what was trained on as in what was recorded.
    for name in ("step", "data_step"):
        assert [line[name] for line in lines] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "lr", "trained_tokens"):
        assert [line[name] for line in lines] == [line[name] for line in expected]
    leftovers = [path.name for path in (run_dir / "checkpoints").iterdir() if "partial" in path.name]
    assert not leftovers


def test_three_kills(digits: Path, tmp_path: Path, uninterrupted: Path) -> None:
    assert _run_with_kills(digits, tmp_path / "run", 3, seed=0) == 3
    _assert_as_if_never_killed(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills(digits: Path, tmp_path: Path, uninterrupted: Path) -> None:
    assert _run_with_kills(digits, tmp_path / "run", 20, seed=1) == 20
    _assert_as_if_never_killed(tmp_path / "run", uninterrupted)
