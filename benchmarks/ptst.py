"""Vision-R1's progressive thinking suppression training against long responses from the beginning, at equal tokens.

mini/ptst draws responses of at most 32 tokens in groups of 16 for 20 updates, then 64 in groups of 8 for 20; mini/long
draws 128 in groups of 4 from the beginning, as Vision-R1-Long (arXiv 2503.06749v4, Table 3), for as many updates as the
same number of drawn tokens allows. Both begin with a cold start that was stopped after 105 steps, while it still
garbles the form in nine of ten draws: after all of its steps nothing is left to learn. Answers to easy questions take
26 tokens, to hard ones 38, so hard ones are out of reach in the first stage. What the paper suppresses, thoughts that
ramble on, this model never had; whether stages help here is an open question, and the table says what came of it.

Compared where the one that drew fewer tokens ended: the reward of the last five updates' draws, and greedy answers to
held-out questions. What is done is kept in runs/ptst; it draws results/ptst.svg. 20 to 65 minutes.
"""

import statistics
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.figure import Figure
from benchmarks.mini_rl import Arm, command, draw_curves, quickstart, reinforce, side_by_side
from benchmarks.run import RESULTS, ROOT

RUNS = ROOT / "runs" / "ptst"
SEEDS = (0, 1, 2)
KINDS = ("ptst", "long")
COLD_STEPS = 105
ROWS = {
    "reward of draws": "reward",
    "easy: right": "heldout/digits/easy/auto/accuracy",
    "hard: right": "heldout/digits/hard/auto/accuracy",
}
LAST = 5


def measure() -> list[Figure]:
    """Learn whatever is not there yet; a run that is done is started again, and has nothing left to do."""
    start = _cold_start()
    arms = [Arm(RUNS / f"{kind}-{seed}", f"mini/{kind}", start, seed) for seed in SEEDS for kind in KINDS]
    side_by_side(lambda arm: reinforce(arm, 1), arms)
    lines = {arm.run_dir.name: _with_tokens(arm) for arm in arms}
    figures: list[Figure] = []
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for seed in SEEDS:
        budget = min(lines[f"{kind}-{seed}"][-1]["drawn"] for kind in KINDS)
        for kind in KINDS:
            values = dict(_at(lines[f"{kind}-{seed}"], budget))
            found[kind].append(values)
            figures += [Figure(f"{kind}, seed {seed}: {name}", round(value, 4), "") for name, value in values.items()]
    for kind in KINDS:
        for name in found[kind][0]:
            mean = statistics.mean(values[name] for values in found[kind])
            figures.append(Figure(f"{kind}, mean: {name}", round(mean, 4), ""))
    groups = {kind: [arm for arm in arms if arm.recipe == f"mini/{kind}"] for kind in KINDS}
    millions = {
        (arm.run_dir.name, line["step"]): line["drawn"] / 1e6 for arm in arms for line in lines[arm.run_dir.name]
    }
    draw_curves(
        RESULTS / "ptst.svg",
        ROWS,
        groups,
        lambda arm, line: millions[arm.run_dir.name, line["step"]],
        "million tokens drawn",
    )
    return figures


def _cold_start() -> Path:
    run = RUNS / "cold_start"
    start = quickstart()
    given = (f"data.path={start / 'data'}", f"init_from={start / 'stage3'}", f"run_dir={run}")
    steps = (f"train.steps={COLD_STEPS}", "optim.warmup_steps=5")
    command("train", "mini/cold_start", *given, *steps, "--nproc", "1")
    return run


def _with_tokens(arm: Arm) -> list[dict[str, Any]]:
    """A run's metrics, with the tokens drawn up to each step."""
    lines = arm.metrics()
    drawn = accumulate(sum(one["tokens"] for one in arm.rollouts(line["step"])) for line in lines)
    return [{**line, "drawn": tokens} for line, tokens in zip(lines, drawn, strict=True)]


def _at(lines: list[dict[str, Any]], budget: int) -> Iterator[tuple[str, float]]:
    """Where a run was when it had drawn so many tokens."""
    within = [line for line in lines if line["drawn"] <= budget]
    yield "updates", len(within)
    yield "million tokens", within[-1]["drawn"] / 1e6
    yield "reward of draws", statistics.mean(line["reward"] for line in within[-LAST:])
    asked = next(line for line in reversed(within) if ROWS["hard: right"] in line)
    for name in ("easy: right", "hard: right"):
        yield name, asked[ROWS[name]]
