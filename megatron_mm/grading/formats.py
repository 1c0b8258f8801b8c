"""The form that a response must have, and the answer in it.

A format finds the answer by splitting at tags: its time grows with the length of the response and not faster, which a
regular expression with a lookahead at every character does at the price of 100 bytes for each.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_mm.chat.modes import ANSWER, END_ANSWER, END_THINK, THINK, bare_answer, split_response

_TAGS = (THINK, END_THINK, ANSWER, END_ANSWER)
_AT_TAGS = re.compile("(" + "|".join(map(re.escape, _TAGS)) + ")")
# What Vision-R1's cold start writes before an answer (arXiv 2503.06749v4, Figs. 4, 6, 7), in bold or not.
_FINAL_ANSWER = re.compile(r"\A\s*(?:\*\*)?Final Answer:?(?:\*\*)?\s*", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Format:
    """A form of responses.

    Attributes:
        strict: response, trigger included -> answer; None where the form is not kept.
        loose: the same for a form that is kept in part, so that a model that has yet to learn it can be paid for its
            answer; None where no answer can be told from the rest.
    """

    name: str
    strict: Callable[[str], str | None]
    loose: Callable[[str], str | None]


def vision_r1(response: str) -> str | None:
    """Content of `<answer>` in `<think>..</think><answer>..</answer>`, each tag once and nothing but space around.

    Vision-R1 does not say how it tells the form; nested and repeated tags are refused, which the closest public code
    (EasyR1's r1v reward) lets pass.
    """
    # One part more than a right response has is enough to refuse.
    parts = _AT_TAGS.split(response, maxsplit=len(_TAGS) + 1)
    if tuple(parts[1::2]) != _TAGS or any(part.strip() for part in (parts[0], parts[4], parts[8])):
        return None
    return _without_final_answer(parts[6])


def tagged(response: str) -> str | None:
    """Content of the last `<answer>..</answer>`, whatever stands around."""
    before, closed, _ = response.rpartition(END_ANSWER)
    _, opened, answer = before.rpartition(ANSWER)
    return _without_final_answer(answer) if opened and closed else None


def think(response: str) -> str | None:
    """The answer in `<think>..</think>answer`: the last box's content if there is a box, else all of it."""
    return _boxed_or_whole(_after_only_thought(response))


def think_in_part(response: str) -> str | None:
    """As `think`, whatever stands before the last thought, and without any."""
    return _boxed_or_whole(after_thought(response))


def _boxed_or_whole(text: str | None) -> str | None:
    return text and (last_box(text) or text)


def _after_only_thought(response: str) -> str | None:
    """What follows the thought, which may be empty."""
    parts = _AT_TAGS.split(response, maxsplit=2)
    if tuple(parts[1::2]) != (THINK, END_THINK) or parts[0].strip():
        return None
    answer = bare_answer(parts[4])
    # Tags that are left: a second thought, or an answer that is more than wrapped as a whole.
    return answer if answer and not _AT_TAGS.search(answer) else None


def after_thought(response: str) -> str | None:
    """What follows the last thought; the whole response where nothing is thought, None where a thought stays open."""
    if THINK not in response and END_THINK not in response:
        return response.strip() or None
    answer = split_response(response)[1]
    return None if THINK in answer else answer or None


def boxed(response: str) -> str | None:
    """Content of the last `\\boxed{..}` after the thought, if there is one: a box in a thought is no answer."""
    text = after_thought(response)
    return None if text is None else last_box(text)


def think_boxed(response: str) -> str | None:
    """As `boxed`, in a response that has the form of `think`."""
    text = _after_only_thought(response)
    return None if text is None else last_box(text)


def last_box(text: str) -> str | None:
    """Content of the last `\\boxed{..}` of a text; None where there is none or it is not closed."""
    starts = [box.end() for box in _BOXED.finditer(text)]
    depth = 1
    for brace in _BRACES.finditer(text, starts[-1]) if starts else ():
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[starts[-1] : brace.start()].strip()
    return None


def _without_final_answer(text: str) -> str:
    return _FINAL_ANSWER.sub("", text, count=1).strip()


FORMATS = {
    one.name: one
    for one in (
        Format("vision_r1", vision_r1, tagged),
        Format("think", think, think_in_part),
        Format("boxed", boxed, boxed),
        Format("think_boxed", think_boxed, boxed),
    )
}
