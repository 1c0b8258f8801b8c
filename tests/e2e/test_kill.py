"""A run that is killed at any moment and started again ends as if it had never been."""

import random
import shutil
import time
from pathlib import Path

import numpy as np
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


# fp32, since layouts agree to within rounding, which bf16 has much of.
ELASTIC = ("train.steps=100", "checkpoint.save_every=50", "checkpoint.keep_last=9")


def test_a_run_goes_on_in_another_layout(digits: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    runs.train("mini/stage3", digits, whole, 4, *ELASTIC, "parallel.tensor=2")
    expected = np.array([line["loss"] for line in runs.metrics(whole)])
    first = tmp_path / "first"
    # The learning rate falls over the run's steps, so the first half is a run that is cut off, not a shorter one.
    process = runs.start("mini/stage3", digits, first, 4, *ELASTIC, "parallel.tensor=2")
    runs.wait_until(lambda: (first / "checkpoints" / "latest").is_file(), process)
    runs.kill_all(process)
    for name, num_ranks, layout in (
        ("DP 2", 2, ()),
        ("PP 2", 2, ("parallel.pipeline=2",)),
        ("DP 4", 4, ()),
    ):
        run_dir = tmp_path / name.replace(" ", "_")
        shutil.copytree(first, run_dir)
        runs.train("mini/stage3", digits, run_dir, num_ranks, *ELASTIC, *layout)
        lines = runs.metrics(run_dir)
        assert [line["step"] for line in lines] == list(range(1, 101))
        losses = np.array([line["loss"] for line in lines])
        assert (losses[:50] == expected[:50]).all()
        difference = np.abs(losses[50:] - expected[50:]).max()
        assert 0 < difference < 1e-4, name
    # It learns, or that losses agree would say little.
    assert expected[-10:].mean() < expected[:10].mean() - 0.5
