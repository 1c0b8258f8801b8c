"""Reinforcement learning through the command: killed and started again, it draws and learns what it would have."""

import random
from pathlib import Path

import pytest

from megatron_mm.checkpoint import paths
from tests import runs
from tests.checkpoints import assert_same, content

STEPS = 20
RUN = (
    f"train.steps={STEPS}",
    f"rl.stages=[{{steps: 8, max_response_tokens: 6, group_size: 2}}, {{steps: {STEPS - 8}, max_response_tokens: 9, "
    "group_size: 3, temperature: 1.2, lr: 1.0e-3}]",
    "optim.lr=1.0e-4",
    "rl.reward={name: weighted, format: think}",
    "data.blend={digits/easy/non_thinking: 1, digits/hard/non_thinking: 1}",
    "rl.updates=2",
    "parallel.tensor=2",
    "precision=bf16",
    "train.validate_every=null",
    "checkpoint.save_every=3",
    "checkpoint.asynchronous=true",
)


def _rollouts(run_dir: Path) -> dict[str, str]:
    return {file.name: file.read_text(encoding="utf-8") for file in sorted((run_dir / "rollouts").iterdir())}


@pytest.fixture(scope="module")
def uninterrupted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    runs.train("mini/bpo", digits, run_dir, 2, *RUN, command="rl")
    return run_dir


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_run_draws_and_learns_the_same(digits: Path, tmp_path: Path, uninterrupted: Path) -> None:
    run_dir, draws = tmp_path / "run", random.Random(0)
    for _ in range(3):
        before = runs.steps_done(run_dir)
        process = runs.start("mini/bpo", digits, run_dir, 2, *RUN, command="rl")
        goal = before + draws.randint(1, 6)
        runs.wait_until(lambda goal=goal: runs.steps_done(run_dir) >= goal, process)
        runs.kill_all(process)
    runs.train("mini/bpo", digits, run_dir, 2, *RUN, command="rl")
    assert _rollouts(run_dir) == _rollouts(uninterrupted)
    assert_same(content(run_dir), content(uninterrupted))
    lines, expected = runs.metrics(run_dir), runs.metrics(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for name in ("loss", "reward", "kl", "lr", "trained_tokens"):
        assert [line[name] for line in lines] == [line[name] for line in expected]
    assert len({line["reward"] for line in lines}) > 1
    assert paths.newest(run_dir) == paths.step_directory(run_dir, STEPS)
    # Stages: lengths, groups and rates.
    assert [line["lr"] for line in lines] == [1e-4] * 8 + [1e-3] * (STEPS - 8)
    assert len(_rollouts(run_dir)["step_00000008.jsonl"].splitlines()) == 8 * 4
    assert len(_rollouts(run_dir)["step_00000009.jsonl"].splitlines()) == 8 * 6
