"""Mathematics: its structure is compared here, single expressions by symbolic.py, quantities by quantities.py.

Tuples, lists, sets and unions are taken apart, so that order and brackets count where they have to. What is left are
single expressions, equations and inequalities. It may take any time and memory: see workers.py.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_mm.grading.equations import Assignment, assignment, same_name, sides
from megatron_mm.grading.quantities import Quantity, Tolerance, equal_quantities, parse_quantity
from megatron_mm.grading.question import Asked
from megatron_mm.grading.solutions import equal_solutions
from megatron_mm.grading.symbolic import constant, equal_objects, is_variable, parsed
from megatron_mm.grading.texts import items
from megatron_mm.grading.units import Unit, parse_unit
from megatron_mm.grading.written import equal_as_written

_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|theta|alpha|beta|infty"
# Braces of sets, which LaTeX escapes, must not be taken for those that group.
_SET = "\u2983\u2984"
# Plain text and Unicode -> LaTeX; in this order.
_REPLACED = [
    (re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\limits|(?<!\\)\\!"), ""),
    (re.compile(r"\\(?:langle|lbrack)(?![a-z])"), "("),
    (re.compile(r"\\(?:rangle|rbrack)(?![a-z])"), ")"),
    (re.compile(r"\\begin\{cases\}|\\end\{cases\}"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|~|\\q?quad"), " "),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"(?<=\d)\{,\}(?=\d)"), ","),
    (re.compile(r"(?<=\d) ?root (?=\d)|√"), r"\\sqrt "),
    (re.compile("×|·|⋅|∙"), r"\\cdot "),
    (re.compile("÷"), r"\\div "),
    (re.compile("π"), r"\\pi "),
    (re.compile("∞"), r"\\infty "),
    (re.compile("±|\\+/-|\\+-"), r"\\pm "),
    (re.compile(r"\\degree|°"), r"^{\\circ}"),
    (re.compile("≤|<=|=<|\\\\leq(?![a-z])|\\\\leqslant"), r"\\le "),
    (re.compile("≥|>=|\\\\geq(?![a-z])|\\\\geqslant"), r"\\ge "),
    (re.compile(r"\\lt(?![a-z])"), "<"),
    (re.compile(r"\\gt(?![a-z])"), ">"),
    (re.compile("≠|(?<![\\w)])!=|\\\\neq(?![a-z])"), r"\\ne "),
    (re.compile("∪"), r"\\cup "),
    (re.compile("∩"), r"\\cap "),
    (re.compile("∈"), r"\\in "),
    (re.compile("∖"), r"\\setminus "),
    (re.compile(r"∅|\\varnothing"), r"\\emptyset "),
    (re.compile("ℝ"), r"\\mathbb{R}"),
    (re.compile(r"\|\|"), r"\\parallel "),
    (re.compile(r"(?<!\\)\btriangle\s+(?=[A-Z]{3}\b)"), r"\\triangle "),
    (re.compile(r"(?<!\\)\bangle\s+(?=[A-Z1-9])"), r"\\angle "),
    (re.compile(r"(?<![\\A-Za-z])(?:inf|oo|infinity)(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"(?<![A-Za-z])\\?sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])"), r"\\\1 "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(\d{1,9})\.(\d{0,9})\\overline\s*\{(\d{1,9})\}"), lambda match: _repeating(*match.groups())),
    (re.compile(r"(?<![\d,.])(\d{1,3}(?:,\d{3})+)(?![\d,])"), lambda match: match[1].replace(",", "")),
    (re.compile("或者?"), " or "),
    (re.compile("[和与且及]"), " and "),
]
_TOKEN = re.compile(r"\\[A-Za-z]+|\d+(?:\.\d+)?|[^\W\d_]+\d*|\S")
_BRACED_TOKEN = re.compile(r"\{\s*(\\?[A-Za-z]|\\[A-Za-z]+|\d+)\s*\}")
_OPENING, _CLOSING = "([{" + _SET[0], ")]}" + _SET[1]
_BETWEEN = re.compile(r"\\(?:text|mathrm)\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|;|\\\\|\n")
_PARTS_IN_NUMBERS = re.compile(r"\(\d\)\s*([^()]+?)[\s;,]*(?=\(\d\)|\Z)")
_ELEMENT_OF_SET = re.compile(r"\A\s*[A-Za-z]\s*\\in\b")
_RELATION_SIGNS = {"<": r"<|\\le(?![a-z])", ">": r">|\\ge(?![a-z])"}
# x < a, a < x < b and the like, in both directions, with bounds that are no numbers.
_RELATIONS = [
    re.compile(
        rf"(?:(?P<{first}>[^<>]+?)(?P<{first}_sign>{sign}))?"
        rf"\s*(?P<name>[a-z])\s*(?:(?P<{last}_sign>{sign})(?P<{last}>[^<>]+))?"
    )
    for first, sign, last in (("start", _RELATION_SIGNS["<"], "end"), ("end", _RELATION_SIGNS[">"], "start"))
]
_UNIT_BEHIND = re.compile(
    r"(?P<value>.*[\d})a-z])\s*(?:\\(?:text|mathrm|mbox)\s*\{(?P<inside>[^{}]*)\}|\s(?P<plain>[A-Za-z]+))"
    r"\s*(?:\^\s*\{?\s*(?P<power>\d)\s*\}?)?\s*"
    r"|(?P<number>.*[\d})a-z])\s*(?P<chinese>[一-鿿]+)",
    re.DOTALL,
)
# What a unit does not stand behind: `\\triangle ABC`, `\\ln e`.
_COMMAND_AHEAD = re.compile(r"\\(?!pi|infty)[A-Za-z]+\s*\Z")
_FIGURE = re.compile(r"\\(?P<figure>angle|triangle)\s*(?P<points>[A-Z]{1,4})")
_VECTOR = re.compile(r"\\(?:mathbf|vec|hat|overrightarrow|boldsymbol)\s*\{\s*\\?([ijk])(?:math)?\s*\}")
_ROWS = re.compile(r"\[\s*(\[[^\[\]]*\](?:\s*,\s*\[[^\[\]]*\])*)\s*\]")
_ARRAY = re.compile(r"\(?\s*\\begin\{array\}\s*\{[clr|\s]*\}(.*?)\\end\{array\}\s*\)?", re.DOTALL)
_OVERLINE = re.compile(
    r"\A\\(?:overline|overleftrightarrow)\s*\{\s*([A-Z]{2})\s*\}\Z|\A(?:segment|line|side)\s+([A-Z]{2})\Z"
)
_ORDER_SIGN = re.compile(r"<|->|\\(?:rightarrow|to)(?![a-z])|,?\s*\bthen\b")
_BULLET = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+\S", re.MULTILINE)
_NUMBERS_APART = re.compile(r"-?\d+(?:\.\d+)?(?:\s+-?\d+(?:\.\d+)?)+")


@dataclass(frozen=True, slots=True)
class _Parts:
    """Something with parts.

    Attributes:
        brackets: those of a tuple or interval, "{}" of a set; empty for a list, whose order does not count either.
        variable: that lies in the interval, if it is named.
    """

    brackets: str
    parts: tuple[str, ...]
    variable: str = ""


@dataclass(frozen=True, slots=True)
class _Comparison:
    """How two expressions are compared."""

    tolerance: Tolerance
    asked: Asked


def equal_expressions(answer: str, reference: str, tolerance: Tolerance, asked: Asked | None = None) -> bool:
    """Whether two expressions mean the same."""
    how = _Comparison(tolerance, asked or Asked())
    given, right = latex(answer), latex(reference)
    if how.asked.name and not _is_asked(given, right, how.asked):
        return False
    if how.asked.in_order and not _ORDER_SIGN.search(right):
        given = _ORDER_SIGN.sub(",", given)
    return _equal(given, right, how)


def equal_numbers(answer: str, reference: str, tolerance: Tolerance, asked: Asked) -> bool | None:
    """Whether two numbers with units are the same, where the question's unit is that of a bare one; None for others."""
    given, right = parse_quantity(answer), parse_quantity(reference)
    if given is None or right is None:
        return None
    if asked.unit_required and right.unit is not None and given.unit is None:
        return False
    if asked.unit is not None:
        given, right = _in_asked_unit(given, right, asked.unit)
    return equal_quantities(given, right, tolerance)


def _in_asked_unit(given: Quantity, right: Quantity, unit: Unit) -> tuple[Quantity, Quantity]:
    if right.unit is None and unit.factor != 1 and not (unit.dimension and given.unit is None) and _is_scale(unit):
        # "In millions": 340 may be written out.
        bare = None if not unit.dimension else Unit(Fraction(1), unit.dimension)
        absolute = Quantity(right.value * unit.factor, bare, right.place * unit.factor)
        # A number of dollars that is written out is no number of millions.
        is_absolute = given.unit is not None and given.value >= unit.factor
        return given, absolute if is_absolute else Quantity(right.value, None, right.place, other=absolute)
    if not unit.dimension:
        return given, right
    has_unit = [one.unit is not None and one.unit.is_known for one in (given, right)]
    if not any(has_unit):
        return given, right
    return tuple(
        one if has else Quantity(one.value, unit, one.place) for one, has in zip((given, right), has_unit, strict=True)
    )  # pyright: ignore[reportReturnType]


def _is_scale(unit: Unit) -> bool:
    return set(unit.dimension) <= {"USD", "EUR", "GBP", "CNY", "JPY", "INR"} and unit.factor >= 1000


def _is_asked(given: str, right: str, asked: Asked) -> bool:
    """Whether an answer that names what it says is about what is asked."""
    said, wanted = assignment(given), assignment(right)
    if said is None or not said.name or (wanted is not None and wanted.name):
        return True
    return same_name(said.name, asked.name)


def _equal(answer: str, reference: str, how: _Comparison) -> bool:
    if _tokens(answer) == _tokens(reference) != []:
        return True
    if (is_equal := _equal_equations(answer, reference, how)) is not None:
        return is_equal
    answer, reference = _value_of(answer), _value_of(reference)
    if (is_equal := equal_as_written(answer, reference)) is not None:
        return is_equal
    if (is_equal := equal_numbers(answer, reference, how.tolerance, how.asked)) is not None:
        return is_equal
    if (is_equal := equal_solutions(_plain_braces(answer), _plain_braces(reference))) is not None:
        return is_equal
    return _equal_structures(answer, reference, how)


def _value_of(text: str) -> str:
    """Return what is said of a name; a list of assignments as it is."""
    text = _ELEMENT_OF_SET.sub("", text)
    said = assignment(text) if _parts(text) is None else None
    return text if said is None else said.value


def _equal_structures(answer: str, reference: str, how: _Comparison) -> bool:
    parts = _parts(answer), _parts(reference)
    if parts[1] is not None and parts[0] is None and _NUMBERS_APART.fullmatch(answer):
        parts = _Parts("", tuple(answer.split())), parts[1]
    if parts[0] is None and parts[1] is None:
        if (is_equal := _equal_figures(answer, reference)) is not None:
            return is_equal
        return _equal_intersections(answer, reference) or _equal_atoms(answer, reference, how)
    if parts[0] is None or parts[1] is None:
        return False
    return _equal_parts(parts[0], parts[1], how)


def _equal_figures(answer: str, reference: str) -> bool | None:
    """Whether two angles or triangles are the same, which are no products; None where the reference is none of them."""
    given, right = _FIGURE.fullmatch(answer.strip()), _FIGURE.fullmatch(reference.strip())
    if right is None:
        return None
    if given is None or given["figure"] != right["figure"]:
        return False
    if right["figure"] == "triangle":
        return sorted(given["points"]) == sorted(right["points"])
    return given["points"] in (right["points"], right["points"][::-1])


def _equal_intersections(answer: str, reference: str) -> bool:
    """Whether two intersections of named sets have the same sets, in any order."""
    sets = [sorted(_tokens(part) for part in text.split(r"\cap")) for text in (answer, reference)]
    return len(sets[1]) > 1 and sets[0] == sets[1]


def _equal_equations(answer: str, reference: str, how: _Comparison) -> bool | None:
    """Whether two are the same of which one is an equation; None where values are to be compared."""
    if "=" not in answer and "=" not in reference:
        return None
    if _parts(answer) is not None or _parts(reference) is not None:
        return None
    given, right = assignment(answer), assignment(reference)
    if given is not None and right is not None:
        if not (given.name and right.name) or same_name(given.name, right.name):
            return None
        # Lines and curves: x = y^2 and y = sqrt(x) are no assignments of the same name.
        if not _is_constant(right.value):
            return _equal_atoms(answer, reference, how)
        return False
    if "=" not in reference or "=" not in answer:
        return False
    # A solution is asked for, and an equation that has it is none.
    is_solution = right is not None and bool(right.name) and _is_constant(right.value)
    return not is_solution and len(sides(answer)) == 2 and _equal_atoms(answer, reference, how)


def _is_constant(value: str) -> bool:
    return parse_quantity(value) is not None or constant(parsed(value)) is not None


def _equal_parts(answer: _Parts, reference: _Parts, how: _Comparison) -> bool:
    if answer.brackets != reference.brackets:
        return _equal_unlike(answer, reference, how)
    if len(answer.parts) != len(reference.parts) or len({answer.variable, reference.variable} - {""}) > 1:
        return False
    if answer.brackets not in ("", "{}") or how.asked.in_order:
        pairs = zip(answer.parts, reference.parts, strict=True)
        return all(_equal(one, other, how) for one, other in pairs)
    names = _names(answer), _names(reference)
    if max(map(len, names)) > 1 or (names[0] and names[1] and names[0] != names[1]):
        return _equal_named(answer, reference, how)
    left = list(_values(answer))
    for part in _values(reference):
        match = next((one for one in left if _equal(one, part, how)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _equal_unlike(answer: _Parts, reference: _Parts, how: _Comparison) -> bool:
    """Whether parts in other brackets are the same: values of x and y for a point, `[1, 2]` for a list."""
    # x = 1, y = 2 for the point (1, 2)
    first, second = _point(answer), _point(reference)
    if first is not None and second is not None:
        return _equal_parts(first, second, how)
    pair = {answer.brackets, reference.brackets}
    if pair == {"", "()"} and how.asked.is_point:
        return _equal_parts(_Parts("()", answer.parts), _Parts("()", reference.parts), how)
    if pair in ({"", "[]"}, {"", "{}"}):
        return _equal_parts(_Parts("", answer.parts), _Parts("", reference.parts), how)
    return False


def _names(parts: _Parts) -> set[str]:
    """Return the names that values of a list are said of: x of `x = 3 or x = -1`, and of `x_1 = 3, x_2 = -1`."""
    assigned = [assignment(part) for part in parts.parts]
    names = {one.name.strip() for one in assigned if one is not None and one.name}
    bases = {re.sub(r"_\{?\d+\}?\Z", "", name) for name in names}
    return bases if len(bases) == 1 else names


def _values(parts: _Parts) -> list[str]:
    return [one.value if (one := assignment(part)) is not None else part for part in parts.parts]


def _equal_named(answer: _Parts, reference: _Parts, how: _Comparison) -> bool:
    """Whether lists say the same of different names; one without names gives the values in their order."""
    given, right = _point(answer), _point(reference)
    if given is not None and right is not None:
        return _names(answer) == _names(reference) and _equal_parts(given, right, how)
    for named, bare in ((given, reference), (right, answer)):
        if named is not None and not _names(bare):
            return _equal_parts(named, _Parts("()", bare.parts), how)
    return False


def _point(parts: _Parts) -> _Parts | None:
    """Values assigned to different names, in the names' order, as a point; a point is one already."""
    if parts.brackets:
        return parts if parts.brackets == "()" else None
    assigned: dict[str, Assignment] = {}
    for part in parts.parts:
        one = assignment(part)
        if one is None or not one.name:
            return None
        assigned[one.name.strip()] = one
    if len(assigned) != len(parts.parts):
        return None
    return _Parts("()", tuple(assigned[name].value for name in sorted(assigned)))


def _parts(text: str) -> _Parts | None:
    """The parts of a tuple, interval, set, list or union; None where there is one part only."""
    text = text.strip()
    if r"\cap" in text or r"\begin" in text:
        return None
    if len(pieces := _split(text, re.compile(r"\\cup(?![a-z])"))) > 1:
        return _Parts("", tuple(pieces))
    if len(numbered := _PARTS_IN_NUMBERS.findall(text)) > 1 and text.startswith("(1)"):
        return _Parts("", tuple(numbered))
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
    return _bracketed(text)


def _bracketed(text: str) -> _Parts | None:
    brackets = text[:1] + text[-1:]
    if len(text) < 2 or brackets[0] not in _OPENING or brackets[1] not in _CLOSING or not _is_enclosed(text):
        return None
    elements = _split(text[1:-1], re.compile("[,;]"))
    if brackets in ("{}", _SET):
        return _Parts("{}", tuple(elements))
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


def _equal_atoms(answer: str, reference: str, how: _Comparison) -> bool:
    values, units = zip(*(_without_unit(text) for text in (answer, reference)), strict=True)
    asked = how.asked.unit if how.asked.unit is not None and how.asked.unit.dimension else None
    if (units[0] is None) != (units[1] is None) and asked is not None:
        units = tuple(asked if unit is None else unit for unit in units)
    given, right = parsed(_plain_braces(values[0])), parsed(_plain_braces(values[1]))
    if given is None or right is None:
        return False
    if units[0] is not None and units[1] is not None:
        if units[0].dimension != units[1].dimension:
            return False
        ratio = units[0].factor / units[1].factor
        given = given * ratio.numerator / ratio.denominator if ratio != 1 else given
    return equal_objects(given, right) or _nearly_equal(values, given, right, how.tolerance)


def _nearly_equal(values: tuple[str, ...], given: object, right: object, tolerance: Tolerance) -> bool:
    """Whether a decimal on one side has the digits of a constant on the other."""
    written = [parse_quantity(value) for value in values]
    if all(one is None for one in written):
        return False
    exact = [
        one.value if one is not None else constant(found) for one, found in zip(written, (given, right), strict=True)
    ]
    if exact[0] is None or exact[1] is None:
        return False
    place = max(one.place for one in written if one is not None)
    return place > 0 and tolerance.holds(exact[0], exact[1], place)


def _without_unit(text: str) -> tuple[str, Unit | None]:
    """An expression without the unit behind it, and the unit."""
    match = _UNIT_BEHIND.fullmatch(text)
    if match is None:
        return text, None
    value = match["value"] or match["number"]
    name = (match["inside"] or match["plain"] or match["chinese"] or "").strip()
    if name in ("rad", "radian", "radians"):
        return value, None
    unit = parse_unit(name + (f"^{match['power']}" if match["power"] else ""))
    is_letter = match["plain"] is not None and len(name) == 1 and is_variable(parsed(name))
    if unit is None or is_letter or _COMMAND_AHEAD.search(value):
        return text, None
    return value, unit if unit.dimension and unit.is_known else None


def latex(text: str) -> str:
    """Return an expression as LaTeX, with the braces of sets marked."""
    if len(_BULLET.findall(text)) > 1:
        text = ", ".join(items(text))
    text = text.replace(r"\{", _SET[0]).replace(r"\}", _SET[1])
    text = re.sub(r"\\lbrace(?![a-z])", _SET[0], re.sub(r"\\rbrace(?![a-z])", _SET[1], text))
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    text = _ARRAY.sub(r"\\begin{pmatrix}\1\\end{pmatrix}", _matrix(text))
    text = re.sub(r"\\(begin|end)\{[bvV]?matrix\}", r"\\\1{pmatrix}", text) if r"\det" not in text else text
    if (segment := _OVERLINE.match(text.strip())) is not None:
        text = segment[1] or segment[2]
    if _VECTOR.search(text):
        text = _components(text)
    # A point with its name.
    text = re.sub(r"\A\s*[A-Z]\s*(?=\([^()]*,[^()]*\)\s*\Z)", "", text)
    return text.strip()


def _matrix(text: str) -> str:
    """Return rows in square brackets as a matrix of LaTeX."""
    match = _ROWS.fullmatch(text.strip())
    if match is None:
        return text
    rows = [row.replace(",", "&") for row in re.findall(r"\[([^\[\]]*)\]", match[1])]
    return r"\begin{pmatrix}" + r"\\".join(rows) + r"\end{pmatrix}"


def _components(text: str) -> str:
    """Return `2\\vec{i} + 3\\vec{j}` as `(2, 3)`; the text as it is where it is no sum of unit vectors."""
    found = parsed(_VECTOR.sub(lambda match: rf"\hat{{{match[1]}}}", text))
    if found is None:
        return text
    directions = {
        name: symbol
        for symbol in found.free_symbols
        if (name := str(symbol)[4:5]) in "ijk" and str(symbol)[:4] == "hat{"
    }
    expanded = found.expand()
    names = "ijk" if "k" in directions else "ij"
    parts = [expanded.coeff(directions[name]) if name in directions else 0 for name in names]
    rest = expanded - sum(
        part * directions[name] for part, name in zip(parts, names, strict=True) if name in directions
    )
    return f"({','.join(map(str, parts))})" if rest == 0 else text


def _plain_braces(text: str) -> str:
    return text.replace(_SET[0], "{").replace(_SET[1], "}")


def _repeating(whole: str, digits: str, period: str) -> str:
    """A repeating decimal as a fraction."""
    value = Fraction(f"{whole}.{digits}0") + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(digits))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _tokens(text: str) -> list[str]:
    """Return numbers, commands, words and signs: white space sets them apart, braces around one of them say nothing."""
    return [token for token in _TOKEN.findall(_BRACED_TOKEN.sub(r" \1 ", text)) if token != "$"]
