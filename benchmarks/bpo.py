"""What BPO and GRPO do to the annealed miniature model: accuracy and think rate in auto mode, over the steps.

R-4B's base hardly thinks when it may choose, though it would be right more often if it did (arXiv 2508.21113v2, section
3, "thinking atrophy"); BPO mends that, and the rates at which it thinks part by difficulty (its Fig. 8). Here the base
is the quickstart's model after annealing, which answers easy questions as well without thinking. Both algorithms draw
as many responses. Seeds change what is drawn and in which order questions come; the base is the same.

Base and runs are kept in runs/bpo; the same command goes on from there.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.figure import Figure
from benchmarks.run import ROOT

RUNS = ROOT / "runs" / "bpo"
QUICKSTART = ROOT / "runs" / "quickstart"
SEEDS = (0, 1, 2)
ALGORITHMS = ("bpo", "grpo")
NUM_QUESTIONS = 400
HARD, EASY = "digits/hard", "digits/easy"


def measure() -> list[Figure]:
    """Train and ask whatever is not there yet: about 40 minutes on two free cores behind the quickstart."""
    if not (QUICKSTART / "report.json").exists():
        subprocess.run(["bash", "examples/quickstart.sh"], cwd=ROOT, check=True)
    before = _scores(QUICKSTART / "anneal", "base")
    figures = _of_modes("base", [before])
    for algorithm in ALGORITHMS:
        after = [_scores(_trained(algorithm, seed), f"{algorithm}-{seed}") for seed in SEEDS]
        figures += _of_modes(algorithm, after)
        gains = [one[HARD, "auto"]["accuracy"] - before[HARD, "auto"]["accuracy"] for one in after]
        gaps = [one[HARD, "thinking"]["accuracy"] - one[HARD, "auto"]["accuracy"] for one in after]
        is_bpo = algorithm == "bpo"
        figures += [
            Figure(
                f"{algorithm}: gained in auto mode on hard questions, worst seed",
                round(min(gains), 4),
                "share",
                0.15 if is_bpo else None,
                "at least",
            ),
            Figure(
                f"{algorithm}: auto mode behind thinking mode on hard questions, worst seed",
                round(max(gaps), 4),
                "share",
                0.05 if is_bpo else None,
            ),
        ]
        figures += _curve(algorithm)
    return figures


def _of_modes(name: str, scores: list[dict[tuple[str, str], dict[str, Any]]]) -> list[Figure]:
    figures = []
    for source in (EASY, HARD):
        for mode in ("thinking", "non_thinking", "auto"):
            for field, unit in (("accuracy", "share"), ("think_rate", "share"), ("mean_tokens", "tokens")):
                if field == "think_rate" and mode != "auto":
                    continue
                values = [one[source, mode][field] for one in scores]
                spread = "" if len(values) == 1 else f" ({', '.join(f'{value:.3g}' for value in values)})"
                figures.append(
                    Figure(f"{name}: {source} {mode}, {field}{spread}", round(statistics.mean(values), 4), unit)
                )
    return figures


def _curve(algorithm: str) -> list[Figure]:
    """Accuracy and think rate on held-out questions while it learned, mean over the seeds."""
    lines = [_metrics(_run_dir(algorithm, seed)) for seed in SEEDS]
    figures = []
    for step in sorted({line["step"] for line in lines[0] if f"heldout/{HARD}/non_thinking/accuracy" in line}):
        for source in (EASY, HARD):
            for field in ("accuracy", "think_rate"):
                name = f"heldout/{source}/non_thinking/{field}"
                values = [line[name] for of_seed in lines for line in of_seed if line["step"] == step]
                figures.append(
                    Figure(
                        f"{algorithm}, step {step}: {source} auto, {field}", round(statistics.mean(values), 4), "share"
                    )
                )
    return figures


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _run_dir(algorithm: str, seed: int) -> Path:
    return RUNS / f"{algorithm}-{seed}"


def _trained(algorithm: str, seed: int) -> Path:
    """A run, continued where it was cut off."""
    run_dir = _run_dir(algorithm, seed)
    given = [f"run_dir={run_dir}", f"data.path={QUICKSTART / 'data'}", f"init_from={QUICKSTART / 'anneal'}"]
    _command("rl", f"mini/{algorithm}", *given, f"seed={seed}", "--nproc", "2")
    return run_dir


def _scores(run_dir: Path, name: str) -> dict[tuple[str, str], dict[str, Any]]:
    """How vLLM answers held-out questions with a run's last weights, by source and mode."""
    report = RUNS / f"{name}.json"
    if not report.exists():
        model = RUNS / f"{name}-model"
        if not model.exists():
            _command("export", str(run_dir), str(model))
        _command("evaluate", str(model), str(QUICKSTART / "data"), str(report), "--questions", str(NUM_QUESTIONS))
    scores = json.loads(report.read_text(encoding="utf-8"))
    return {(score["source"], score["mode"]): score for score in scores}


def _command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "megatron_mm.cli", *arguments], cwd=ROOT, check=True)
