"""Twenty steps in every layout of trainer and engines: after each exchange both sides compute the same."""

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_mm.config.schema import RunConfig
from megatron_mm.grading.rewards import Grade
from megatron_mm.rl.job import ENGINE, reinforce
from megatron_mm.rl.sampler import Sampler
from tests.layouts import PP2, TP2, Overrides
from tests.ranks import run_alone, run_on_ranks
from tests.runs import metrics
from tests.tiny import digits_config

STEPS = 20
# fp32 on both sides, sums in another order.
TOLERANCE = 1e-4
LAYOUTS: dict[str, tuple[int, Overrides]] = {
    "DP 1": (1, {}),
    "TP 2": (2, TP2),
    "PP 2": (2, PP2),
    "TP 2 x DP 2": (4, TP2),
}
# Trainer's layout, ranks of an engine.
CASES = [("TP 2", 1)]
SLOW_CASES = [("PP 2", 2), ("DP 1", 1), ("TP 2", 2), ("PP 2", 1), ("TP 2 x DP 2", 1), ("TP 2 x DP 2", 2)]


def _config(digits: Path, run_dir: Path, ranks: int, **overrides: Any) -> RunConfig:
    stage = f"steps: {STEPS // 2}, max_response_tokens: 8, group_size: 3"
    stages = f"[{{{stage}}}, {{{stage}, temperature: 1.5}}]"
    values = {
        "data__blend": "{digits/easy/non_thinking: 1, digits/caption/non_thinking: 1}",
        "train__steps": STEPS,
        "train__global_batch": 4,
        "train__micro_batch": 8,
        "train__log_every": 1,
        "optim__lr": 1e-3,
        "optim__schedule": "constant",
        "optim__warmup_steps": 0,
        "checkpoint__save_every": 1000,
        "rl": f"{{algorithm: bpo, stages: {stages}, rollout: {{ranks: {ranks}, compare_all_every: 1}}}}",
    }
    return digits_config(digits, run_dir, **{**values, **overrides})


def _reinforced(config: RunConfig) -> None:
    """A run whose rewards are drawn by lot, so that every step has something to learn. Runs on every rank."""

    def graded(self: Sampler, groups: Any) -> Any:
        del self
        return [[_with_reward(rollout) for rollout in group] for group in groups]

    Sampler._graded = graded
    reinforce(config)


def _with_reward(rollout: Any) -> Any:
    return replace(rollout, grade=Grade(float(zlib.crc32(str(rollout.drawn.tolist()).encode()) % 2)))


def _assert_both_sides_agree(digits: Path, run_dir: Path, name: str, ranks: int) -> None:
    num_ranks, overrides = LAYOUTS[name]
    config = _config(digits, run_dir, ranks, **overrides)
    # Left by a start with another model that came to no checkpoint.
    (run_dir / ENGINE).mkdir()
    (run_dir / ENGINE / "config.json").write_text("{}", encoding="utf-8")
    if num_ranks == 1:
        run_alone(_reinforced, config)  # without torchrun's variables
    else:
        run_on_ranks(_reinforced, num_ranks, config)
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert max(line["logprob_difference/max"] for line in lines) < TOLERANCE
    # The policy moves, and away from where it began; otherwise weights that never arrive would do as well.
    assert lines[0]["kl"] < 1e-6
    assert lines[-1]["kl"] > 1e-3
    assert all(line["grad_norm"] > 0 for line in lines)


@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_engine_and_trainer_agree_after_every_exchange(digits: Path, tmp_path: Path, name: str, ranks: int) -> None:
    _assert_both_sides_agree(digits, tmp_path, name, ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), SLOW_CASES)
def test_engine_and_trainer_agree_in_every_layout(digits: Path, tmp_path: Path, name: str, ranks: int) -> None:
    _assert_both_sides_agree(digits, tmp_path, name, ranks)
