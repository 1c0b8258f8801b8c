"""A run that is killed at any moment and started again ends as if it had never been."""

import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import runs
from tests.checkpoints import assert_same, content

SETTINGS = (
    "parallel.tensor=2",
    "parallel.sequence=true",
    "precision=bf16",
    "checkpoint.save_every=10",
    "checkpoint.asynchronous=true",
    "train.micro_batch=4",
)


@dataclass(frozen=True)
class _Course:
    """Of a run that is killed."""

    steps: int
    ranks: int
    kills: int
    seed: int

    @property
    def settings(self) -> tuple[str, ...]:
        return (f"train.steps={self.steps}", *SETTINGS)


def _is_writing(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("*.partial*"))


def _run_with_kills(course: _Course, digits: Path, run_dir: Path) -> int:
    """Kill the run again and again, every third time while it writes a checkpoint; returns the kills."""
    draws, killed, steps = random.Random(course.seed), 0, course.steps
    while True:
        before = runs.steps_done(run_dir)
        process = runs.start("mini/stage3", digits, run_dir, course.ranks, *course.settings)
        if killed == course.kills:
            code, said = runs.end(process)
            assert code == 0, said[-6000:]
            return killed
        # At least one checkpoint further, so that the kills are spread over the run.
        goal = min(before + draws.randint(1, max(2 * (steps - before) // (course.kills - killed + 1), 12)), steps - 5)
        runs.wait_until(lambda goal=goal: runs.steps_done(run_dir) >= goal, process)
        if killed % 3 == 0:
            runs.wait_until(lambda: _is_writing(run_dir), process)
        time.sleep(draws.uniform(0, 0.3))  # any moment of a step or a write
        runs.kill_all(process)
        killed += 1


def _assert_as_if_never_killed(course: _Course, run_dir: Path, uninterrupted: Path) -> None:
    assert_same(content(run_dir), content(uninterrupted))
    lines, expected = runs.metrics(run_dir), runs.metrics(uninterrupted)
    # Exactly once: no gap and no double step, in what was trained on as in what was recorded.
    for name in ("step", "data_step"):
        assert [line[name] for line in lines] == list(range(1, course.steps + 1))
    for name in ("loss", "grad_norm", "lr", "trained_tokens"):
        assert [line[name] for line in lines] == [line[name] for line in expected]
    leftovers = [path.name for path in (run_dir / "checkpoints").iterdir() if "partial" in path.name]
    assert not leftovers


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "course",
    [
        pytest.param(_Course(steps=50, ranks=2, kills=3, seed=0), id="three kills"),
        pytest.param(_Course(steps=200, ranks=4, kills=20, seed=1), id="twenty kills", marks=pytest.mark.slow),
    ],
)
def test_kills_leave_no_trace(course: _Course, digits: Path, tmp_path: Path) -> None:
    runs.train("mini/stage3", digits, tmp_path / "uninterrupted", course.ranks, *course.settings)
    assert _run_with_kills(course, digits, tmp_path / "killed") == course.kills
    _assert_as_if_never_killed(course, tmp_path / "killed", tmp_path / "uninterrupted")
