"""Figures of held-out questions are named by how they were asked, not by how their samples are stored."""

from types import SimpleNamespace
from typing import Any

from megatron_mm.chat.modes import Mode
from megatron_mm.data.index import PartRange
from megatron_mm.rl.heldout import HeldOut
from tests.tiny import tiny_config

# Row -> whether its response thinks, and whether it is right.
ANSWERS = {0: (True, True), 1: (True, False), 2: (False, True), 3: (True, None), 4: (False, None)}


class _Sampler:
    """Has the answers."""

    def draw(self, rows: list[int], modes: tuple[Mode, ...], *_: object, **__: object) -> list[list[Any]]:
        assert modes == (Mode.AUTO,)
        return [[self._rollout(*ANSWERS[row])] for row in rows]

    @staticmethod
    def _rollout(thinks: bool, right: bool | None) -> Any:
        text = "<think>\nso\n</think>\n\n1" if thinks else "<think>\n\n</think>\n\n1"
        grade = SimpleNamespace(answer_right=right, reward=1.0)
        return SimpleNamespace(text=text, drawn=[1] * (4 if thinks else 2), grade=grade)


def test_a_sources_parts_are_told_together_by_the_mode_that_was_asked_in() -> None:
    parts = [
        PartRange("heldout", "easy/non_thinking", 0, 2),
        PartRange("heldout", "easy/thinking", 2, 1),
        PartRange("heldout", "hard/thinking", 3, 2),
    ]
    data: Any = SimpleNamespace(index=SimpleNamespace(ranges=lambda _: parts), path="x")
    sampler: Any = _Sampler()
    metrics = HeldOut(tiny_config(data__blend="{}"), data, num_questions=100).run(sampler, 64)
    assert metrics == {
        "heldout/easy/auto/accuracy": 2 / 3,
        "heldout/easy/auto/think_rate": 2 / 3,
        "heldout/easy/auto/response_tokens": 10 / 3,
        # A reward that does not say what is right: what is paid.
        "heldout/hard/auto/accuracy": 1.0,
        "heldout/hard/auto/think_rate": 0.5,
        "heldout/hard/auto/response_tokens": 3.0,
        "heldout/accuracy": 0.8,
        "heldout/think_rate": 0.6,
    }
