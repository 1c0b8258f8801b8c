"""How often the graders are right about answers that they were not changed for, for each topic.

tests/unit/grading/unseen_pairs.jsonl holds pairs of an answer and a reference. They were labelled by hand before any
grader was run on them, and most of them are wrong answers that are close to a right one. The figures describe the
graders at the time of the run.
"""

from collections import defaultdict
from typing import Any

from benchmarks.figure import Figure
from benchmarks.graders import graded
from benchmarks.run import ROOT

PAIRS = ROOT / "tests" / "unit" / "grading" / "unseen_pairs.jsonl"


def measure() -> list[Figure]:
    """Agreement with the labels, and the share of wrong answers that are paid, over all pairs and for each topic."""
    pairs, _ = graded(PAIRS)
    by_topic: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for pair in pairs:
        by_topic[pair["topic"]].append(pair)
    return [
        Figure("pairs", len(pairs), "pairs", 400, "at least"),
        Figure("pairs that are unequal", _share([not pair["equal"] for pair in pairs]), "share", 0.5, "at least"),
        *_figures("all", pairs),
        *(figure for topic in sorted(by_topic) for figure in _figures(topic, by_topic[topic])),
    ]


def _figures(name: str, pairs: list[dict[str, Any]]) -> list[Figure]:
    wrong = [pair["paid"] for pair in pairs if not pair["equal"]]
    return [
        Figure(f"{name}: agreement", _share([pair["paid"] == pair["equal"] for pair in pairs]), "share"),
        Figure(f"{name}: wrong answers that are paid", _share(wrong), "share"),
    ]


def _share(flags: list[bool]) -> float:
    return round(sum(flags) / len(flags), 3)
