"""The whole quickstart learns to read, and the examples of reinforcement learning go on from it: in the slow set.

Writes benchmarks/results/quickstart.json.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import runs

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(45 * 60)]


@pytest.fixture(scope="module")
def scores() -> dict[tuple[str, str], dict[str, Any]]:
    """The quickstart's report, by source and mode."""
    subprocess.run([sys.executable, "benchmarks/run.py", "quickstart"], cwd=ROOT, check=True)
    report = json.loads((ROOT / "runs" / "quickstart" / "report.json").read_text(encoding="utf-8"))
    return {(score["source"], score["mode"]): score for score in report}


def test_vllm_reads_heldout_digits_after_the_quickstart(scores: dict[tuple[str, str], dict[str, Any]]) -> None:
    for mode in ("thinking", "non_thinking", "auto"):
        assert scores["digits/easy", mode]["num_questions"] == 200
        assert scores["digits/easy", mode]["accuracy"] >= 0.9
    # Forced modes are kept to, and steps are worth more than a guess from the picture alone.
    for source in ("digits/easy", "digits/hard"):
        assert scores[source, "thinking"]["think_rate"] >= 0.99
        assert scores[source, "non_thinking"]["think_rate"] <= 0.01
    assert scores["digits/hard", "thinking"]["accuracy"] >= scores["digits/hard", "non_thinking"]["accuracy"] + 0.3
    # Annealing trained the decision. Of easy questions 14% were taught with a thought; how often hard ones get one, of
    # which 49% were, is measured and has no bar: the greedy choice between two so even ones is luck.
    assert scores["digits/easy", "auto"]["think_rate"] <= 0.1
    # Captions were taught without thoughts only.
    assert scores["digits/caption", "auto"]["think_rate"] <= 0.01
    assert scores["digits/caption", "auto"]["accuracy"] >= 0.8


def _example(name: str, run_dir: Path, *overrides: str) -> list[dict[str, Any]]:
    """The metrics of an example that is run in miniature, as its first lines say."""
    subprocess.run(["bash", f"examples/{name}.sh", "--mini", f"run_dir={run_dir}", *overrides], cwd=ROOT, check=True)
    return runs.metrics(run_dir)


def _mean(lines: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(line[name] for line in lines)


def test_bpo_teaches_when_to_think(scores: dict[tuple[str, str], dict[str, Any]], tmp_path: Path) -> None:
    lines = _example("bpo_qwen3_4b", tmp_path)
    assert len(lines) == 40
    accuracy = lines[-1]["heldout/digits/hard/auto/accuracy"]
    assert accuracy >= scores["digits/hard", "auto"]["accuracy"] + 0.15
    assert accuracy >= scores["digits/hard", "thinking"]["accuracy"] - 0.05
    # It thinks where it helps. The paper's Fig. 8 has the same order.
    assert lines[-1]["heldout/digits/hard/auto/think_rate"] >= 0.9
    assert lines[-1]["heldout/digits/easy/auto/think_rate"] <= 0.1
    assert lines[-1]["heldout/digits/easy/auto/accuracy"] >= 0.9


def test_ptst_teaches_the_form_that_a_cold_start_garbles(
    scores: dict[tuple[str, str], dict[str, Any]], tmp_path: Path
) -> None:
    lines = _example("vision_r1_ptst", tmp_path)
    assert len(lines) == 40
    # The cold start ends while it learns the form. How far it has come by then differs: of two quickstarts one left it
    # paid 0.02 a draw, which 40 updates made 0.14, and the other several times as much.
    assert _mean(lines[-5:], "reward") >= _mean(lines[:5], "reward") + 0.1
    # The first stage has no room for answers to hard questions.
    hard = "heldout/digits/hard/auto/accuracy"
    assert lines[19][hard] <= 0.05
    assert lines[-1][hard] >= 0.3


def test_the_example_of_grpo_starts(scores: dict[tuple[str, str], dict[str, Any]], tmp_path: Path) -> None:
    stages = "rl.stages=[{steps: 5, max_response_tokens: 64, group_size: 16}]"
    lines = _example("grpo_qwen3_4b", tmp_path, "train.steps=5", stages)
    assert len(lines) == 5
    assert _mean(lines, "reward/auto") > 0
