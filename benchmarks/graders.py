"""Graders: do they agree with people, and does anything stop them?

The labelled pairs of tests/unit/grading, by which the graders were changed (first_sight.json says how they did before),
10,000 random strings and 200 hostile ones (tests/hostile.py), each graded as the answer of a response by a pool of one
worker with the limits that runs have. The seconds that are held against the bar are processor time, which is what an
answer is limited in; by the clock a busy machine takes longer, and that figure informs only.
"""

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.figure import Figure
from benchmarks.run import ROOT
from megatron_mm.grading.keeper import Limits
from megatron_mm.grading.rewards import Failure, Grade, RewardSpec, Submission
from megatron_mm.grading.workers import Graders, Tally
from tests.hostile import fuzzed, hostile

# Name, file, least agreement, and the largest share of wrong answers that are paid.
PAIRS: list[tuple[str, str, float, float]] = [
    ("labelled pairs", "pairs.jsonl", 0.995, 0.01),
    ("pairs unseen before", "unseen_pairs.jsonl", 0.98, 0.003),
]
NUM_FUZZED = 10_000
# Mathematics, so that every string gets as far as it can.
REFERENCE = r"\frac{3}{7}x+2"
MAX_SECONDS = 2
# What a keeper itself takes, generously, beside what an answer may.
KEEPER_BYTES = 128 * 2**20


def measure() -> list[Figure]:
    """Ten minutes on a busy machine."""
    agreement = [figure for given in PAIRS for figure in _agreement(*given)]
    return [*agreement, *_survival("fuzzed", fuzzed(NUM_FUZZED, seed=0)), *_survival("hostile", hostile())]


def _agreement(name: str, file: str, least: float, most_paid: float) -> list[Figure]:
    pairs, seconds = graded(ROOT / "tests" / "unit" / "grading" / file)
    agreed = 0
    for pair in pairs:
        if pair["paid"] == pair["equal"]:
            agreed += 1
        else:
            print("disagrees:", json.dumps(pair, ensure_ascii=False))
    unequal = [pair["paid"] for pair in pairs if not pair["equal"]]
    return [
        Figure(name, len(pairs), "pairs", 300, "at least"),
        Figure(f"{name}: unequal", round(len(unequal) / len(pairs), 4), "share", 0.4, "at least"),
        Figure(f"{name}: agreement with the labels", round(agreed / len(pairs), 4), "share", least, "at least"),
        Figure(f"{name}: wrong answers that are paid", round(sum(unequal) / len(unequal), 4), "share", most_paid),
        Figure(f"{name}: time for one", round(1000 * seconds / len(pairs), 1), "ms"),
    ]


def graded(file: Path) -> tuple[list[dict[str, Any]], float]:
    """Return labelled pairs, each with whether its answer is `paid`, and the seconds that grading took."""
    pairs: list[dict[str, Any]] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    seconds = 0.0
    for kind in sorted({pair["kind"] for pair in pairs}):
        of_kind = [pair for pair in pairs if pair["kind"] == kind]
        with Graders(RewardSpec(format="think", kind=kind), 1) as graders:
            started = time.monotonic()
            grades = graders.grade(
                [_asked(pair["answer"], pair["reference"], pair.get("question", "")) for pair in of_kind]
            )
            seconds += time.monotonic() - started
        for pair, grade in zip(of_kind, grades, strict=True):
            pair["paid"] = bool(grade.reward)
    return pairs, seconds


def _survival(name: str, strings: list[str]) -> list[Figure]:
    started = time.monotonic()
    with Graders(RewardSpec(format="think"), 1) as graders:
        grades = graders.grade([_asked(string, REFERENCE) for string in strings])
        seconds = time.monotonic() - started
        # It still works.
        (after,) = graders.grade([_asked("2+3x/7", REFERENCE)])
        return [
            *_figures(name, grades, graders.tally),
            Figure(f"{name}: whole batch, start included", round(seconds, 1), "s"),
            Figure(f"{name}: reward of a right answer afterwards", after.reward, "", 1, "at least"),
        ]


def _figures(name: str, grades: list[Grade], tally: Tally) -> list[Figure]:
    limits = Limits()
    return [
        Figure(f"{name}: strings", len(grades), "strings"),
        Figure(f"{name}: graded as right", sum(bool(grade.reward) for grade in grades), "strings", 0),
        Figure(f"{name}: graders lost", tally.num_lost_keepers, "processes", 0),
        *(Figure(f"{name}: {failure}", tally.failures[failure], "strings") for failure in Failure),
        Figure(f"{name}: longest, processor time", round(tally.slowest_cpu_seconds, 2), "s", MAX_SECONDS),
        Figure(f"{name}: longest, by the clock", round(tally.slowest_seconds, 2), "s"),
        Figure(
            f"{name}: largest fork, resident",
            round(tally.peak_bytes / 2**20, 1),
            "MiB",
            (limits.memory_bytes + KEEPER_BYTES) / 2**20,
        ),
    ]


def _asked(answer: str, reference: str, question: str = "") -> Submission:
    return Submission(f"<think>\n\n</think>\n\n{answer}", reference, question)
