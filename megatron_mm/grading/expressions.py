"""Mathematical expressions: their structure is compared here, what has none by math-verify.

Tuples, intervals, lists, sets and unions are taken apart, so that order and brackets count where they have to. What is
left are single expressions, equations and inequalities. It may take any time and memory: see workers.py.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Eq, I, Symbol, simplify

from megatron_mm.grading.quantities import (
    Tolerance,
    Unit,
    equal_quantities,
    parse_quantity,
    parse_unit,
)
from megatron_mm.grading.written import equal_as_written

_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|theta|alpha|beta|infty"
# Plain text and Unicode -> LaTeX that math-verify reads; in this order.
_REPLACED = [
    (re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|(?<!\\)\\!"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|~|\\q?quad"), " "),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"(?<=\d)\{,\}(?=\d)"), ","),
    (re.compile("√"), r"\\sqrt "),
    (re.compile("×|·|⋅"), r"\\cdot "),
    (re.compile("÷"), r"\\div "),
    (re.compile("π"), r"\\pi "),
    (re.compile("∞"), r"\\infty "),
    (re.compile("±"), r"\\pm "),
    (re.compile("°"), r"^{\\circ}"),
    (re.compile("≤|<=|\\\\leq(?![a-z])|\\\\leqslant"), r"\\le "),
    (re.compile("≥|>=|\\\\geq(?![a-z])|\\\\geqslant"), r"\\ge "),
    (re.compile(r"\\lt(?![a-z])"), "<"),
    (re.compile(r"\\gt(?![a-z])"), ">"),
    (re.compile("≠|(?<![\\w)])!=|\\\\neq(?![a-z])"), r"\\ne "),
    (re.compile("∪"), r"\\cup "),
    (re.compile("∩"), r"\\cap "),
    (re.compile(r"∅|\\varnothing"), r"\\emptyset "),
    (re.compile("ℝ"), r"\\mathbb{R}"),
    (re.compile(r"(?<![\\A-Za-z])(?:inf|oo|infinity)(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])"), r"\\\1 "),
    (re.compile(r"\*\*"), "^"),
    # math-verify leaves degrees out.
    (
        re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc))\s*\(?\s*(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\circ\s*\}?\s*\)?"),
        r"\1(\\frac{\2\\pi}{180})",
    ),
    (re.compile(r"(\d{1,9})\.(\d{0,9})\\overline\s*\{(\d{1,9})\}"), lambda match: _repeating(*match.groups())),
]

# Braces of sets, which LaTeX escapes, must not be taken for those that group.
_SET = "\u2983\u2984"
_OPENING, _CLOSING = "([{" + _SET[0], ")]}" + _SET[1]
_BETWEEN = re.compile(r"\\(?:text|mathrm)\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|;")
_ELEMENT_OF = re.compile(r"\A\s*[A-Za-z]\s*\\in\b")
# `AB`, `x_1`, `f(x)`, `m\angle A`: what may stand before an equals sign without saying anything.
_NAME = re.compile(r"\s*(?:m\s*)?(?:\\(?:angle|triangle)\s+)?[A-Za-z]+(?:_\w|_\{\w+\})?(?:\([a-z]\))?\s*")
_ASSIGNED = re.compile(rf"({_NAME.pattern})(?<![<>!])=(?!=)([^=<>]*)")
_SIGNS = {"<": r"<|\\le(?![a-z])", ">": r">|\\ge(?![a-z])"}
# x < a, a < x < b and the like, in both directions.
_RELATIONS = [
    re.compile(
        rf"(?:(?P<{first}>[^<>]+?)(?P<{first}_sign>{sign}))?"
        rf"\s*(?P<name>[a-z])\s*(?:(?P<{last}_sign>{sign})(?P<{last}>[^<>]+))?"
    )
    for first, sign, last in (("start", _SIGNS["<"], "end"), ("end", _SIGNS[">"], "start"))
]
_UNIT_BEHIND = re.compile(
    r"(?P<value>.*[\d})a-z])\s*(?:\\(?:text|mathrm|mbox)\s*\{(?P<inside>[^{}]*)\}|\s(?P<plain>[A-Za-z]+))"
    r"\s*(?:\^\s*\{?\s*(?P<power>\d)\s*\}?)?\s*",
    re.DOTALL,
)
_LATEX = LatexExtractionConfig()
_UNREAL = Symbol("i", real=False)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Something with parts.

    Attributes:
        brackets: those of a tuple or interval; empty where the order of the parts does not count.
        variable: that lies in the interval, if it is named.
    """

    brackets: str
    parts: tuple[str, ...]
    variable: str = ""


def equal_expressions(answer: str, reference: str, tolerance: Tolerance) -> bool:
    """Whether two expressions mean the same."""
    return _equal(_latex(answer), _latex(reference), tolerance)


def _equal(answer: str, reference: str, tolerance: Tolerance) -> bool:
    if _squeezed(answer) == _squeezed(reference) != "":
        return True
    answer, reference = _without_names(answer, reference)
    if (is_equal := equal_as_written(answer, reference)) is not None:
        return is_equal
    numbers = parse_quantity(answer), parse_quantity(reference)
    if numbers[0] is not None and numbers[1] is not None:
        return equal_quantities(numbers[0], numbers[1], tolerance)
    parts = _parts(answer), _parts(reference)
    if parts[0] is None and parts[1] is None:
        return _equal_atoms(answer, reference)
    if parts[0] is None or parts[1] is None:
        return False
    if _equal_parts(parts[0], parts[1], tolerance):
        return True
    # Pieces that overlap or touch.
    return r"\cup" in answer and r"\cup" in reference and _verify(answer, reference)


def _equal_parts(answer: _Parts, reference: _Parts, tolerance: Tolerance) -> bool:
    if answer.brackets != reference.brackets:
        # x = 1, y = 2 for the point (1, 2)
        first, second = _point(answer), _point(reference)
        return first is not None and second is not None and _equal_parts(first, second, tolerance)
    if len(answer.parts) != len(reference.parts) or len({answer.variable, reference.variable} - {""}) > 1:
        return False
    if answer.brackets:
        pairs = zip(answer.parts, reference.parts, strict=True)
        return all(_equal(one, other, tolerance) for one, other in pairs)
    left = list(answer.parts)
    for part in reference.parts:
        match = next((one for one in left if _equal(one, part, tolerance)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _point(parts: _Parts) -> _Parts | None:
    """Values assigned to different names, in the names' order, as a point; a point is one already."""
    if parts.brackets:
        return parts if parts.brackets == "()" else None
    assigned = {match[1].strip(): match[2] for part in parts.parts if (match := _ASSIGNED.fullmatch(part))}
    if len(assigned) != len(parts.parts):
        return None
    return _Parts("()", tuple(assigned[name] for name in sorted(assigned)))


def _parts(text: str) -> _Parts | None:
    """The parts of a tuple, interval, set, list or union; None where there is one part only."""
    text = text.strip()
    if r"\cap" in text:
        return None
    if len(pieces := _split(text, re.compile(r"\\cup(?![a-z])"))) > 1:
        return _Parts("", tuple(pieces))
    if len(elements := _split(text, _BETWEEN)) > 1:
        return _Parts("", tuple(part for element in elements for part in _listed(element)))
    # A comma before three digits sets thousands apart, but not in brackets.
    if len(elements := _listed(text)) > 1:
        return _Parts("", tuple(elements))
    if "\\pm" in text and text.count("\\pm") == 1:
        return _Parts("", tuple(text.replace("\\pm", sign) for sign in ("+", "-")))
    for relation in _RELATIONS:
        if (match := relation.fullmatch(text)) and (match["start"] or match["end"]):
            return _interval(match)
    brackets = text[:1] + text[-1:]
    if len(text) < 2 or brackets[0] not in _OPENING or brackets[1] not in _CLOSING or not _is_enclosed(text):
        return None
    elements = _split(text[1:-1], re.compile(","))
    if brackets in ("{}", _SET):
        return _Parts("", tuple(elements))
    return _Parts(brackets, tuple(elements)) if len(elements) > 1 else None


def _listed(text: str) -> list[str]:
    return _split(text, re.compile(r",(?!(?<=\d,)\d{3}(?!\d))"))


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Parts between separators that stand in no brackets; empty ones are left out."""
    depth, depths = 0, []
    for character in text:
        depth += (character in _OPENING) - (character in _CLOSING)
        depths.append(depth)
    parts, start = [], 0
    for match in separator.finditer(text):
        if depths[match.start()] == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [part for part in (*parts, text[start:].strip()) if part]


def _is_enclosed(text: str) -> bool:
    """Whether the first bracket is closed by the last character."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth == 0:
            return position == len(text) - 1
    return False


def _interval(relation: re.Match[str]) -> _Parts:
    """What a relation leaves to its variable; a bound is in it unless its sign is strict."""
    start, end = (relation["start"] or r"-\infty").strip(), (relation["end"] or r"\infty").strip()
    opening = "(" if (relation["start_sign"] or "<") in "<>" else "["
    closing = ")" if (relation["end_sign"] or "<") in "<>" else "]"
    return _Parts(opening + closing, (start, end), relation["name"])


def _without_names(answer: str, reference: str) -> tuple[str, str]:
    """Both without the name that one of them, or both alike, are assigned to: `AB = 12` is 12."""
    names, values = [], []
    for text in (answer, reference):
        match = _ASSIGNED.fullmatch(text)
        names.append(_squeezed(match[1]) if match else "")
        values.append(match[2].strip() if match else text)
    if "=" in answer and "=" in reference and names[0] != names[1]:
        return answer, reference
    return values[0], values[1]


def _equal_atoms(answer: str, reference: str) -> bool:
    values, units = zip(*(_without_unit(text) for text in (answer, reference)), strict=True)
    if units[0] is not None and units[1] is not None:
        if units[0].dimension != units[1].dimension:
            return False
        ratio = units[0].factor / units[1].factor
        if ratio != 1:
            return _verify(rf"({values[0]})\cdot\frac{{{ratio.numerator}}}{{{ratio.denominator}}}", values[1])
    return _verify(values[0], values[1])


def _without_unit(text: str) -> tuple[str, Unit | None]:
    """An expression without the unit behind it, and the unit."""
    match = _UNIT_BEHIND.fullmatch(text)
    if match is None:
        return text, None
    name = (match["inside"] or match["plain"] or "").strip()
    if name in ("rad", "radian", "radians"):
        return rf"({match['value']})\cdot\frac{{180}}{{\pi}}", parse_unit("°")
    unit = parse_unit(name + (f"^{match['power']}" if match["power"] else ""))
    return (text, None) if unit is None else (match["value"], unit if unit.dimension else None)


def _verify(answer: str, reference: str) -> bool:
    """What math-verify says of two pieces of LaTeX."""
    expected, given = _parsed(reference), _parsed(answer)
    if not (expected and given):
        return False
    try:
        # The time is limited from outside: math-verify's own limit is a signal, which C code does not hear.
        return _same_equation(expected[0], given[0]) or verify(
            expected, given, timeout_seconds=None, allow_set_relation_comp=True, raise_on_error=True
        )
    except (MemoryError, RecursionError):
        raise
    except Exception:  # noqa: BLE001 - sympy raises of every kind for what it cannot compare
        return False


def _same_equation(one: Any, other: Any) -> bool:
    """Whether one equation is a multiple of the other, which math-verify tells for some only."""
    if not (isinstance(one, Eq) and isinstance(other, Eq)):
        return False
    ratio = simplify((one.lhs - one.rhs) / (other.lhs - other.rhs))  # pyright: ignore[reportOperatorIssue]
    return bool(ratio.is_number and ratio.is_finite and ratio.is_nonzero)


def _parsed(text: str) -> list[Any]:
    """A list of the expression, empty where it is none."""
    text = text.replace(_SET[0], r"\{").replace(_SET[1], r"\}").replace("$", "")
    found = parse(f"${text}$", [_LATEX], fallback_mode="no_fallback", parsing_timeout=None)  # pyright: ignore
    # math-verify tells that i is no real variable, but not that its square is -1.
    return [one.subs(_UNREAL, I) if _UNREAL in one.free_symbols else one for one in found]


def _latex(text: str) -> str:
    text = text.replace(r"\{", _SET[0]).replace(r"\}", _SET[1])
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    text = _ELEMENT_OF.sub("", text).strip()
    return r"(-\infty,\infty)" if text == r"\mathbb{R}" else text


def _repeating(whole: str, digits: str, period: str) -> str:
    """A repeating decimal as a fraction."""
    value = Fraction(f"{whole}.{digits}0") + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(digits))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _squeezed(text: str) -> str:
    return re.sub(r"\s|\{\}", "", text)
