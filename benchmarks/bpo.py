"""What BPO does to a model that decides by itself when to think, beside GRPO with as many responses.

R-4B's claims in miniature (arXiv 2508.21113v2, section 3 and Fig. 8 to 10): the annealed model hardly thinks in auto
mode, also where thinking would help; BPO makes it think where it helps, and only there. The model is the quickstart's,
annealed on easy questions (one digit is read) that it answers as well without a thought, and hard ones (a chain of
sums) that it mostly gets right with one and mostly wrong without. From it mini/bpo (8 responses with a thought and 8
without) and mini/grpo (16 in auto mode) learn, with three seeds each; seeds change questions and responses, not the
model they begin with. The learning rate was chosen with seed 3, which is not counted: 1e-4 and 5e-5 give the same
accuracy, but from step 15 and 26 on easy questions are thought about as well.

What is done is kept in runs/bpo; the same command goes on from there. It draws results/bpo.svg. 25 to 60 minutes.
"""

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.figure import Figure
from benchmarks.mini_rl import Arm, draw_curves, learn, model_of, quickstart, scores, side_by_side
from benchmarks.run import RESULTS, ROOT

RUNS = ROOT / "runs" / "bpo"
SEEDS = (0, 1, 2)
ALGORITHMS = ("bpo", "grpo")


def measure() -> list[Figure]:
    """Learn and ask whatever is not there yet."""
    start = quickstart()
    arms = [
        Arm(RUNS / f"{name}-{seed}", f"mini/{name}", start / "anneal", seed) for seed in SEEDS for name in ALGORITHMS
    ]
    side_by_side(learn, arms)
    before = scores(start / "model")
    figures = list(_figures("before", before))
    gains: dict[str, list[dict[str, float]]] = {name: [] for name in ALGORITHMS}
    for arm in arms:
        after = scores(model_of(arm.run_dir))
        name = arm.run_dir.name.replace("-", ", seed ")
        figures += _figures(name, after)
        gain = after["hard", "auto"]["accuracy"] - before["hard", "auto"]["accuracy"]
        gap = after["hard", "thinking"]["accuracy"] - after["hard", "auto"]["accuracy"]
        parts = after["hard", "auto"]["think_rate"] - after["easy", "auto"]["think_rate"]
        gains[arm.recipe.removeprefix("mini/")].append({"gain": gain, "gap": gap, "parts": parts})
        bars = (0.15, 0.05) if name.startswith("bpo") else (None, None)
        figures += [
            Figure(f"{name}: gained on hard questions, auto mode", round(gain, 4), "share", bars[0], "at least"),
            Figure(f"{name}: behind thinking mode on hard questions", round(gap, 4), "share", bars[1]),
            Figure(f"{name}: thinks about hard questions rather than easy ones", round(parts, 4), "share"),
        ]
    for algorithm, of_seeds in gains.items():
        for key, text in (("gain", "gained on hard questions, auto mode"), ("parts", "thinks about hard, not easy")):
            mean = statistics.mean(one[key] for one in of_seeds)
            figures.append(Figure(f"{algorithm}, mean: {text}", round(mean, 4), "share"))
    rows, first = {}, {}
    for key, text in (("think_rate", "think rate"), ("accuracy", "right")):
        for part in ("easy", "hard"):
            rows[f"{part}: {text}"] = metric = f"heldout/digits/{part}/auto/{key}"
            first[metric] = before[part, "auto"][key]
    groups = {name: [arm for arm in arms if arm.recipe == f"mini/{name}"] for name in ALGORITHMS}
    draw_curves(RESULTS / "bpo.svg", rows, groups, lambda _, line: line["step"], "updates", first)
    return figures


def _figures(name: str, found: dict[tuple[str, str], dict[str, Any]]) -> Iterator[Figure]:
    for part in ("easy", "hard"):
        for mode in ("auto", "thinking", "non_thinking"):
            yield Figure(f"{name}: {part}, {mode}: right", found[part, mode]["accuracy"], "share")
        yield Figure(f"{name}: {part}, auto: thinks", found[part, "auto"]["think_rate"], "share")
