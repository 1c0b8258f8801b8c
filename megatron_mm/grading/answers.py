"""Is an answer right? One question, asked in several ways: the kinds of answers, by name."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_mm.chat.modes import bare_answer
from megatron_mm.grading.characters import plain_characters
from megatron_mm.grading.choices import FONTS, are_letters, equal_choices, is_letter, options_of
from megatron_mm.grading.expressions import equal_expressions
from megatron_mm.grading.formats import last_box
from megatron_mm.grading.quantities import Tolerance, equal_quantities, parse_quantity


@dataclass(frozen=True, slots=True)
class Expected:
    """What an answer is compared with.

    Attributes:
        question: options of a multiple choice are looked for in it.
    """

    reference: str
    question: str = ""
    tolerance: Tolerance = field(default_factory=Tolerance)


def exact_match(answer: str, reference: str) -> bool:
    """Equal up to white space at the ends and in runs."""
    return answer.split() == reference.split()


def equal(answer: str, expected: Expected, kind: str = "auto") -> bool:
    """Whether an answer is right, compared in the way of `kind`; an empty one never is.

    It may take any time and memory: see workers.py.
    """
    return bool(answer.strip()) and KINDS[kind](answer, expected)


def settled(answer: str, expected: Expected, kind: str = "auto") -> bool | None:
    """What `equal` says where that takes no time: of the same text, and of two plain integers; None otherwise."""
    if not answer.strip():
        return False
    if exact_match(answer, expected.reference):
        return True
    given, right = answer.strip(), expected.reference.strip()
    are_integers = _INTEGER.fullmatch(given) and _INTEGER.fullmatch(right)
    if are_integers and kind in ("auto", "math", "number") and not options_of(expected.question):
        return int(given) == int(right)
    return None


def _exact(answer: str, expected: Expected) -> bool:
    return exact_match(answer, expected.reference)


def _text(answer: str, expected: Expected) -> bool:
    return _words(answer) == _words(expected.reference)


def _number(answer: str, expected: Expected) -> bool:
    given, right = parse_quantity(bare(answer)), parse_quantity(bare(expected.reference))
    return given is not None and right is not None and equal_quantities(given, right, expected.tolerance)


def _math(answer: str, expected: Expected) -> bool:
    return equal_expressions(bare(answer), bare(expected.reference), expected.tolerance)


def _choice(answer: str, expected: Expected) -> bool:
    def same(one: str, other: str) -> bool:
        return _plain(one, Expected(other, tolerance=expected.tolerance))

    return equal_choices(bare(answer), bare(expected.reference), options_of(expected.question), same)


def _plain(answer: str, expected: Expected) -> bool:
    """What is no choice: words as text, everything else as mathematics."""
    given, right = bare(answer), bare(expected.reference)
    is_text = _TEXT.fullmatch(right) and parse_quantity(right) is None and right.casefold() not in _INFINITY
    if is_text or not _SHORT_WORDS.isdisjoint((given.casefold(), right.casefold())):
        return _text(answer, expected)
    return _math(answer, expected)


def _auto(answer: str, expected: Expected) -> bool:
    given, right = bare(answer), bare(expected.reference)
    # `A,B` for AB; two that are alike may be products or lists.
    is_choice = is_letter(right) or bool(options_of(expected.question)) or are_letters(given, right)
    return _choice(answer, expected) if is_choice else _plain(answer, expected)


KINDS: dict[str, Callable[[str, Expected], bool]] = {
    "exact": _exact,
    "text": _text,
    "choice": _choice,
    "number": _number,
    "math": _math,
    "auto": _auto,
}

_INTEGER = re.compile(r"[0-9]{1,18}")
_ANSWER = r"(?:the\s+)?(?:final\s+|correct\s+|right\s+)?(?:answer|option|choice)"
_IS = r"(?:is\b\s*:?|:)"
_SAID_BEFORE = re.compile(
    rf"\A(?:(?:(?:so|thus|hence|therefore)\b,?\s*)?{_ANSWER}\s*{_IS}"
    # In bold, with the colon inside or behind.
    rf"|\*\*{_ANSWER}\s*(?:{_IS}\s*\*\*|\*\*\s*{_IS})"
    r"|about\b|approximately\b|≈|\\approx(?![a-z])|=)\s*",
    re.IGNORECASE,
)
# A word of three letters or more, and nothing that counts or computes.
_TEXT = re.compile(r"(?=.*[^\W\d_]{3})[^\W\d_][^\d_\\$^=<>+*/{}()\[\]|]*", re.DOTALL)
_INFINITY = ("inf", "infinity")
# Words that are no products: `on` is not `no`. Other letters side by side may be.
_SHORT_WORDS = frozenset(["no", "on", "up", "us", "uk", "am", "pm", "ne", "nw", "se", "sw"])
_ARTICLE = re.compile(r"\A(?:the|an?)\s+(?=\S)")
_AROUND = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**")]
_AROUND += [(rf"\{font}{{", "}") for font in FONTS]
_HALF_DAY = re.compile(r"\b([ap])\.m\b\.?", re.IGNORECASE)
# More layers than this nobody writes.
_MAX_LAYERS = 8


def bare(text: str) -> str:
    """An answer or reference without tags, `$..$`, `\\boxed{..}`, bold, "The answer is" and a full stop."""
    text = plain_characters(text)
    for _ in range(_MAX_LAYERS):
        before = text
        text = _SAID_BEFORE.sub("", bare_answer(text))
        text = text.removesuffix(".").rstrip() if not text.endswith("..") else text
        for opening, closing in _AROUND:
            inside = text.removeprefix(opening).removesuffix(closing)
            # Not the sign of dollars.
            marks = inside.replace(r"\$", "")
            if len(inside) == len(text) - len(opening + closing) and closing not in marks and opening not in marks:
                text = inside.strip()
        text = last_box(text) or text
        if text == before:
            break
    return _HALF_DAY.sub(r"\1m", text)


def _words(text: str) -> str:
    text = re.sub(rf"\\(?:{'|'.join(FONTS)})\s*\{{([^{{}}]*)\}}", r"\1", bare(text))
    return _ARTICLE.sub("", " ".join(text.casefold().split()).rstrip(".!"))
