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
    for mode in ("thinking", "non_thinking"):
        assert scores["digits/easy", mode]["num_questions"] == 200
        assert scores["digits/easy", mode]["accuracy"] >= 0.9
    # Forced modes are kept to, and steps are worth more than a guess from the picture alone.
    for source in ("digits/easy", "digits/hard"):
        assert scores[source, "thinking"]["think_rate"] >= 0.99
        assert scores[source, "non_thinking"]["think_rate"] <= 0.01
    assert scores["digits/hard", "thinking"]["accuracy"] >= scores["digits/hard", "non_thinking"]["accuracy"] + 0.3
