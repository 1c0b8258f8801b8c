"""Equations: `x = 5` says 5 of x, `2x = 5` and `7 = 5` do not, and `P = 2(4+6) = 20` says 20 of P."""

import re
from dataclasses import dataclass

from megatron_mm.grading.symbolic import constant, equal_objects, parsed

_SUBSCRIPT = r"(?:\s*_\s*(?:\w|\{[\w+-]+\}))?"
_SYMBOL = r"(?:\\?[A-Za-z]|\\[A-Za-z]+|[A-Z]{2,4}'?|pO?H)'{0,2}"
# What may stand before an equals sign as the name of a value: `AB`, `x_1`, `f(x)`, `m\angle A`, `\frac{dy}{dx}`.
_NAME = re.compile(
    rf"""\s*(?:m\s*)?(?:\\(?:angle|triangle|overline|vec|overrightarrow|mathbf|mathrm|bar|hat|Delta)(?![A-Za-z])\s*\{{?\s*)?
    (?:{_SYMBOL}{_SUBSCRIPT}(?:\s*\(\s*(?:[a-z]|\d+|[A-Z])(?:\s*,\s*[a-z])*\s*\))?
      |\(\s*[a-z]\s*,\s*[a-z]\s*(?:,\s*[a-z]\s*)?\)
      |(?!(?:sin|cos|tan|log|ln|sqrt|exp|cot|sec|csc)\b)[A-Za-z]{{3,}}(?:\s+[A-Za-z]{{2,}})*)\}}?\s*
    |\s*(?:m\s*)?\\angle\s*\d\s*
    |\s*\\frac\s*\{{\s*d\s*\w*\s*\}}\s*\{{\s*d\s*\w\s*\}}\s*""",
    re.VERBOSE,
)
_NO_NAMES = re.compile(r"\\(?:sin|cos|tan|log|ln|sqrt|pi|infty|pm|emptyset)(?![a-z])")
_EQUALS = re.compile(r"(?<![<>!=:])=(?![=<>])")
# Words before a value that say which kind it is, not which of several.
_WORDS = re.compile(r"[A-Za-z]{4,}|[A-Za-z]+\s.*")


@dataclass(frozen=True, slots=True)
class Assignment:
    """A value, and the name that it is said of; empty where it has none."""

    name: str
    value: str


def sides(text: str) -> list[str]:
    """Return what stands between equals signs."""
    return [part.strip() for part in _EQUALS.split(text)]


def assignment(text: str) -> Assignment | None:
    """Return what a text says of which name; None for an equation that is not solved, or is not true.

    Of a chain, everything but the name has to be the same constant: `5 + 7 = 12`, `A = 2 \\cdot 3 = 6`.
    """
    parts = sides(text)
    if len(parts) == 1:
        return Assignment("", text.strip())
    if not all(parts):
        return None
    if is_name(parts[0]):
        name, values = parts[0], parts[1:]
    elif len(parts) == 2 and is_name(parts[1]):
        return Assignment(parts[1], parts[0])
    else:
        name, values = "", parts
    if len(values) > 1:
        found = [parsed(value) for value in values]
        if any(one is None or constant(one) is None for one in found):
            return None
        if not all(equal_objects(one, found[0]) for one in found[1:]):
            return None
    return Assignment(name, values[-1])


def is_name(text: str) -> bool:
    """Whether a text may be the name of a value."""
    return _NAME.fullmatch(text) is not None and _NO_NAMES.match(text.strip()) is None


def same_name(one: str, other: str) -> bool:
    """Whether two names mean the same value: AB and BA, `m\\angle A` and `\\angle A`, y and f(x), a word and any."""
    first, second = _plain(one), _plain(other)
    if first == second or not (first and second) or _WORDS.fullmatch(one.strip()) or _WORDS.fullmatch(other.strip()):
        return True
    if len(first) == 2 and first.isupper():
        return first[::-1] == second
    functions = [re.fullmatch(r"y|[fgh]\([a-z]\)|[fgh]", name) is not None for name in (first, second)]
    return all(functions) and (first == "y" or second == "y" or first[0] == second[0])


def _plain(name: str) -> str:
    name = re.sub(r"\\(?:overline|vec|overrightarrow|mathbf|mathrm|bar|text)(?![A-Za-z])|[{}\s$]", "", name)
    return re.sub(r"\Am(?=\\angle)", "", name).replace("\\", "")
