"""The quickstart: how long it takes after installation, and how well vLLM's answers come out."""

import json
import subprocess
import time

from benchmarks.figure import Figure
from benchmarks.run import ROOT


def measure() -> list[Figure]:
    """Run it whole; set-up is done before the clock starts."""
    subprocess.run(["bash", "tools/setup_env.sh"], cwd=ROOT, check=True)
    started = time.monotonic()
    subprocess.run(["bash", "examples/quickstart.sh", "--force"], cwd=ROOT, check=True)
    minutes = (time.monotonic() - started) / 60
    run = ROOT / "runs" / "quickstart"
    figures = [Figure("time after installation", round(minutes, 2), "min", 25)]
    for stage in ("language", "stage1", "stage2", "stage3", "anneal"):
        last = json.loads((run / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        figures.append(Figure(f"{stage}: {last['step']} steps", last["seconds"], "s"))
    for score in json.loads((run / "report.json").read_text(encoding="utf-8")):
        name = f"{score['source']} {score['mode']}, {score['num_questions']} questions"
        easy = score["source"] == "digits/easy" and score["mode"] != "auto"
        figures += [
            Figure(f"{name}: accuracy", score["accuracy"], "share", 0.9 if easy else None, "at least"),
            Figure(f"{name}: mean response", score["mean_tokens"], "tokens"),
            Figure(f"{name}: with reasoning", score["think_rate"], "share"),
        ]
    return figures
