"""The whole quickstart learns to read: minutes, so in the slow set. Writes benchmarks/results/quickstart.json."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(45 * 60)
def test_vllm_reads_heldout_digits_after_the_quickstart() -> None:
    subprocess.run([sys.executable, "benchmarks/run.py", "quickstart"], cwd=ROOT, check=True)
    report = json.loads((ROOT / "runs" / "quickstart" / "report.json").read_text(encoding="utf-8"))
    scores = {(score["source"], score["mode"]): score for score in report}
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
