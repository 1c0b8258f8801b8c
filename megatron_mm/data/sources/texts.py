"""Texts of a conversation, whatever format it came in: where pictures stand, and what of a response is reasoning.

Pictures: with pictures, `<image>` marks in the questions stand for them in order, and there are as many marks as
pictures; without any mark, all pictures go in front of the first question, each on a line of its own. Any other mark,
`<video>` and `<audio>` too, stands for something that the sample does not hold: `stray_mark` finds it.
"""

import math
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from megatron_mm.chat.modes import END_THINK, THINK, bare_answer
from megatron_mm.chat.tokenizer import IMAGE
from megatron_mm.data.records import StoredContent, StoredParts, StoredTurn
from megatron_mm.data.sources.faults import Fault

# A question before its pictures are numbered: texts, and None where a picture stands.
Segments = list[str | None]
# In any case, and Qwen-VL's own placeholders.
_MARK = re.compile(r"<(?:image|video|audio)>|<\|(?:image|video|audio)_pad\|>", re.IGNORECASE)


def stray_mark(content: StoredContent) -> str | None:
    """Return where a mark is left that stands for no picture, None where there is none."""
    texts = [("a question" if content.document is None else "its text", part) for part in content.parts]
    texts += [("an answer", turn.answer) for turn in content.turns]
    texts += [("a reasoning", turn.reasoning or "") for turn in content.turns]
    texts.append(("the system's text", content.system or ""))
    found = ((_MARK.search(text), where) for where, text in texts if isinstance(text, str))
    return next((f"{mark[0]} in {where}" for mark, where in found if mark), None)


def place_pictures(questions: Sequence[Segments], num_pictures: int) -> list[StoredParts]:
    """Number the pictures of a conversation's questions; see the top of this file for the rule.

    Raises:
        Fault: the marks do not fit the pictures, or a question is empty.
    """
    are_placed = any(None in question for question in questions)
    if num_pictures and not are_placed:
        questions = [_split_at_marks(question) for question in questions]
    num_marks = sum(question.count(None) for question in questions)
    if num_marks == 0:
        in_front: Segments = [None, "\n"] * num_pictures
        questions = [in_front + questions[0], *questions[1:]]
    elif num_marks != num_pictures:
        raise Fault(f"{num_marks} {IMAGE} marks for {num_pictures} pictures")
    numbers = iter(range(num_pictures))
    placed = [joined(next(numbers) if segment is None else segment for segment in question) for question in questions]
    for number, parts in enumerate(placed, 1):
        if not any(isinstance(part, int) or part.strip() for part in parts):
            raise Fault(f"question {number} is empty")
    return placed


def _split_at_marks(question: Segments) -> Segments:
    found: Segments = []
    for segment in question:
        assert segment is not None, "only questions without pictures are split"
        for number, text in enumerate(segment.split(IMAGE)):
            found += [None, text] if number else [text]
    return found


def joined(parts: Iterable[str | int]) -> StoredParts:
    """With neighbouring texts as one and without empty ones, so that equal contents are stored alike."""
    found: StoredParts = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif part != "":
            found.append(part)
    return found


def response_of(text: str) -> tuple[str, str | None]:
    """An assistant's text as answer and reasoning.

    A text that begins with `<think>`, or has `</think>` alone, as models write behind a template that opens the
    thought, holds its reasoning up to the last `</think>`; an answer that is wrapped as a whole in `<answer>` and
    `</answer>` loses them. Anywhere else these are plain text.

    Raises:
        Fault: the reasoning does not end, or the answer is empty.
    """
    answer, reasoning = text.strip(), None
    if answer.startswith(THINK) or (END_THINK in answer and THINK not in answer):
        reasoning, closed, answer = answer.removeprefix(THINK).rpartition(END_THINK)
        if not closed:
            raise Fault(f"{THINK} without {END_THINK}")
        reasoning = reasoning.strip() or None
    answer = bare_answer(answer)
    if not answer:
        raise Fault("empty answer")
    return answer, reasoning


def one_turn(question: str, answer: str, num_pictures: int) -> StoredContent:
    """A question with `<image>` marks or without, and the assistant's whole text.

    Raises:
        Fault: see `place_pictures` and `response_of`.
    """
    (parts,) = place_pictures([[question]], num_pictures)
    return StoredContent((StoredTurn(parts, *response_of(answer)),))


def captioned(question: str, caption: Any, num_pictures: int) -> StoredContent:
    """A question about pictures, answered by their caption as it stands.

    Raises:
        Fault: the caption is no text, or empty.
    """
    if not required_text(caption, "caption").strip():
        raise Fault("empty caption")
    (parts,) = place_pictures([[question]], num_pictures)
    return StoredContent((StoredTurn(parts, caption.strip()),))


def plain_answer(value: Any, name: str) -> str:
    """Return an answer as text; a number, as columns of tables have them, is written as one.

    Raises:
        Fault: it is neither.
    """
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and math.isfinite(value):
        # A column with gaps has 3.0 for 3.
        return str(value).removesuffix(".0")
    return required_text(value, name)


def required_text(value: Any, name: str) -> str:
    """The value itself.

    Raises:
        Fault: it is no text.
    """
    if not isinstance(value, str):
        raise Fault(f"{name} is {type(value).__name__}, not text" if value is not None else f"no {name}")
    return value


def decoded(content: bytes) -> str:
    """UTF-8, with a byte order mark or without.

    Raises:
        Fault: it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Fault(f"text is not UTF-8 at byte {error.start}") from None
