"""How the graders do on answers that they were never mended by, by topic.

tests/unit/grading/unseen_pairs.jsonl holds pairs of an answer and a reference, labelled by hand before any grader saw
them, most of them wrong answers near a right one. The figures are of the graders as they are when this is run.
"""

import json
from collections import defaultdict

from benchmarks.figure import Figure
from benchmarks.run import ROOT
from megatron_mm.grading.rewards import RewardSpec, Submission
from megatron_mm.grading.workers import Graders

PAIRS = ROOT / "tests" / "unit" / "grading" / "unseen_pairs.jsonl"


def measure() -> list[Figure]:
    """Agreement with the labels, and the share of wrong answers that are paid, over all pairs and of each topic."""
    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    paid: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for kind in sorted({pair["kind"] for pair in pairs}):
        of_kind = [pair for pair in pairs if pair["kind"] == kind]
        with Graders(RewardSpec(format="think", kind=kind), 2) as graders:
            grades = graders.grade(
                [
                    Submission(f"<think>\n\n</think>\n\n{pair['answer']}", pair["reference"], pair.get("question", ""))
                    for pair in of_kind
                ]
            )
        for pair, grade in zip(of_kind, grades, strict=True):
            paid[pair["topic"]].append((bool(grade.reward), pair["equal"]))
    every = [verdict for verdicts in paid.values() for verdict in verdicts]
    return [
        Figure("pairs", len(every), "pairs", 400, "at least"),
        Figure("pairs that are unequal", round(_share([not right for _, right in every]), 3), "share", 0.5, "at least"),
        *_figures("all", every),
        *(figure for topic in sorted(paid) for figure in _figures(topic, paid[topic])),
    ]


def _figures(name: str, verdicts: list[tuple[bool, bool]]) -> list[Figure]:
    wrong = [was_paid for was_paid, right in verdicts if not right]
    return [
        Figure(f"{name}: agreement", round(_share([was_paid == right for was_paid, right in verdicts]), 3), "share"),
        Figure(f"{name}: wrong answers that are paid", round(_share(wrong), 3), "share"),
    ]


def _share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)
