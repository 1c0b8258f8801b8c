"""The one owner of mode tokens.

A response begins with `<think>`; the single token after it decides the mode: `\\n` opens reasoning, `\\n\\n` closes it
at once. Forcing a mode means appending its trigger to the prompt (R-4B, arXiv 2508.21113v2, section 4.1).
"""

from enum import StrEnum

THINK = "<think>"
END_THINK = "</think>"
# What stands between the tags and the answer, as Qwen3's own template has it.
AFTER_THINK = "\n\n"
EMPTY_THOUGHT = "\n\n"
THOUGHT_START = "\n"
THOUGHT_END = "\n"
# Around the answer in Vision-R1's cold start (arXiv 2503.06749v4, Figs. 4, 6, 7): plain text, spaces included.
ANSWER = "<answer>"
END_ANSWER = "</answer>"


class Mode(StrEnum):
    """How a response comes about."""

    THINKING = "thinking"
    NON_THINKING = "non_thinking"
    AUTO = "auto"


# Appended after the assistant header (R-4B 4.1), and what the exported chat template calls it.
TRIGGERS = {
    Mode.THINKING: THINK + THOUGHT_START,
    Mode.NON_THINKING: THINK + EMPTY_THOUGHT + END_THINK,
    Mode.AUTO: THINK,
}
TEMPLATE_NAMES = {Mode.THINKING: "long", Mode.NON_THINKING: "short", Mode.AUTO: "auto"}


def begins_thought(text: str) -> bool:
    """Whether a whole response, trigger included, begins to reason: what follows `<think>` alone decides."""
    return not text.removeprefix(THINK).startswith((EMPTY_THOUGHT, END_THINK))


def split_response(text: str) -> tuple[str | None, str]:
    """Split a whole response, trigger included, into (reasoning, answer).

    The reasoning is None where the thought is empty; the answer is without the tags of `bare_answer`. A response whose
    thought never closes has no answer: it was cut off, and its answer is the empty string.
    """
    head, closed, answer = text.rpartition(END_THINK)
    if not closed:
        return text.removeprefix(THINK).strip() or None, ""
    return head.removeprefix(THINK).strip() or None, bare_answer(answer)


def bare_answer(text: str) -> str:
    """An answer without the `<answer>` and `</answer>` that it may be wrapped in as a whole, and white space around."""
    answer = text.strip()
    if not (answer.startswith(ANSWER) and answer.endswith(END_ANSWER) and len(answer) >= len(ANSWER + END_ANSWER)):
        return answer
    inside = answer.removeprefix(ANSWER).removesuffix(END_ANSWER)
    # Two answers side by side are not one that is wrapped.
    return answer if ANSWER in inside or END_ANSWER in inside else inside.strip()
