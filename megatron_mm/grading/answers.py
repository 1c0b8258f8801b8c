"""Is an answer right? One question, asked in several ways: the kinds of answers, by name.

docs/rewards.md says in which order an answer of kind `auto` is judged.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_mm.grading.chemistry import equal_chemistry
from megatron_mm.grading.choices import are_letters, equal_choices, is_letter, options_of
from megatron_mm.grading.codes import equal_codes, equal_labels
from megatron_mm.grading.expressions import equal_expressions, equal_numbers
from megatron_mm.grading.quantities import Tolerance, is_measured, parse_quantity
from megatron_mm.grading.question import Asked
from megatron_mm.grading.sentences import holds_words, named, value_in
from megatron_mm.grading.solutions import equal_solutions
from megatron_mm.grading.texts import are_short_words, equal_word_lists, equal_words, is_text, items
from megatron_mm.grading.times import equal_dates, equal_times
from megatron_mm.grading.wrappings import bare
from megatron_mm.grading.written import equal_as_written


@dataclass(frozen=True, slots=True)
class Expected:
    """What an answer is compared with.

    Attributes:
        question: what it asks for is looked for in it: options, a unit, a name, an order.
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
    """Return what `equal` says where that takes no time: of the same text, and of two plain integers; else None."""
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
    return equal_words(bare(answer), bare(expected.reference))


def _number(answer: str, expected: Expected) -> bool:
    given, right = bare(answer), bare(expected.reference)
    return equal_numbers(given, right, expected.tolerance, Asked.of(expected.question)) is True


def _math(answer: str, expected: Expected) -> bool:
    asked = Asked.of(expected.question)
    return equal_expressions(bare(answer), bare(expected.reference), expected.tolerance, asked)


def _choice(answer: str, expected: Expected) -> bool:
    def same(one: str, other: str) -> bool:
        return _plain(one, Expected(other, tolerance=expected.tolerance))

    return equal_choices(bare(answer), bare(expected.reference), options_of(expected.question), same)


def _auto(answer: str, expected: Expected) -> bool:
    given, right = bare(answer), bare(expected.reference)
    options = options_of(expected.question)
    # `A,B` for AB; two that are alike may be products or lists.
    is_choice = is_letter(right) or are_letters(given, right)
    if is_choice or options:
        return _choice(answer, expected)
    return _plain(answer, expected)


def _plain(answer: str, expected: Expected) -> bool:
    """Whether an answer that is no choice is right; the first judge that knows what the reference is decides."""
    given, right, asked = bare(answer), bare(expected.reference), Asked.of(expected.question)
    if not re.search(r"\w|\{\s*\\?\}", given):
        return exact_match(answer, expected.reference)
    judges: list[Callable[[], bool | None]] = [
        lambda: _read_off(given, right, expected, asked),
        lambda: equal_times(given, right, asked.is_time),
        lambda: equal_dates(given, right),
        lambda: equal_chemistry(given, right),
        lambda: equal_labels(given, right),
        lambda: _words_of(given, right, expected, asked),
    ]
    for judge in judges:
        if (is_equal := judge()) is not None:
            return is_equal
    if equal_expressions(named(given), named(right), expected.tolerance, asked):
        return True
    # The one value that a sentence holds.
    value = value_in(given) if parse_quantity(given) is None or not is_measured(parse_quantity(given)) else None
    return value is not None and value != given and _plain(value, expected)


def _read_off(given: str, right: str, expected: Expected, asked: Asked) -> bool | None:
    if not asked.read_off:
        return None
    return equal_codes(given, right, expected.question, asked.keeps_case)


def _words_of(given: str, right: str, expected: Expected, asked: Asked) -> bool | None:
    """Whether a reference in words is what an answer says; None where it is no words."""
    is_short = are_short_words(given, right)
    if asked.keeps_case and re.fullmatch(r"[A-Za-z]+", right):
        return given == right
    if re.fullmatch(r"[A-Z]{2,3}", right) and re.fullmatch(r"[A-Za-z]{2,3}", given) and not is_short:
        return given == right or (given[::-1] == right and asked.is_segment)
    if not (is_short or is_text(right)) or parse_quantity(right) is not None:
        return None
    if equal_words(given, right):
        return True
    # `18-24 years`
    if (is_equal := equal_as_written(given, right)) is not None:
        return is_equal
    if (is_equal := equal_solutions(given, right)) is not None:
        return is_equal
    if (is_equal := equal_word_lists(given, right, asked.in_order)) is not None:
        return is_equal
    if len(items(given)) == 1 and equal_words(items(given)[0], right):
        return True
    return holds_words(given, right, expected.question) and not is_letter(right)


KINDS: dict[str, Callable[[str, Expected], bool]] = {
    "exact": _exact,
    "text": _text,
    "choice": _choice,
    "number": _number,
    "math": _math,
    "auto": _auto,
}

_INTEGER = re.compile(r"0|[1-9][0-9]{0,17}")
