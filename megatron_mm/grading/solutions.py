"""Sets of real numbers: intervals, inequalities, set-builder notation, "all real numbers", "no solution"."""

import re
from dataclasses import dataclass
from typing import Any

import sympy
from sympy import EmptySet, FiniteSet, Interval, S, oo

from megatron_mm.grading.symbolic import parsed

_DOMAINS = {"R": S.Reals, "Z": S.Integers, "N": S.Naturals, "Q": S.Rationals, "C": S.Complexes}
_DOMAIN = re.compile(r"\\(?:mathbb|mathbf)\s*\{?\s*([RZNQC])\s*\}?(?:\s*\^\s*\{?([+*-])\}?)?")
_BUILDER = re.compile(
    r"\A(?P<variable>[a-z])\s*(?:\\in\s*(?P<domain>\\math\w+\s*\{?\s*[RZNQ]\s*\}?)\s*)?(?:\\mid|\||:)\s*(?P<condition>.+)\Z"
)
_NOTHING = re.compile(
    r"\A(?:\\emptyset|\{\s*\}|no\s+(?:real\s+)?solutions?(?:\s+exists?)?|there\s+(?:is|are)\s+no\s+(?:real\s+)?solutions?|none|"
    r"no\s+real\s+roots?|无(?:实数)?解|the\s+empty\s+set|empty\s+set|空集)\Z",
    re.IGNORECASE,
)
_EVERYTHING = re.compile(
    r"\A(?:all|any|every)\s+(?:the\s+)?real(?:s|\s+numbers?)?(?:\s+[a-z](?![a-z]))?(?P<rest>.*)\Z|\A(?:一切|全体|所有|任意)实数\Z",
    re.IGNORECASE,
)
_EXCEPT = re.compile(r"\A\s*(?:except(?:\s+for)?|but|other\s+than|excluding)\s*(?P<what>.+)\Z", re.IGNORECASE)
_SIGN = re.compile(r"(<|>|\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z]))")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
_INTERVAL = re.compile(
    r"(?P<opening>[(\[\]])(?P<start>[^,()\[\]]*(?:\([^()]*\)[^,()\[\]]*)*),(?P<end>.*)(?P<closing>[)\]\[])", re.DOTALL
)
_ELEMENT = re.compile(r"\A\s*(?P<variable>[a-z])\s*\\in(?![a-z])\s*(?P<set>.+)\Z", re.DOTALL)
_AND, _OR = (
    re.compile(r"\s*(?:\band\b|且|\\land|\\text\s*\{\s*and\s*\})\s*"),
    re.compile(r"\s*(?:\bor\b|或|\\lor|\\text\s*\{\s*or\s*\})\s*"),
)
_VARIABLE = re.compile(r"[a-z]|\\(?:theta|alpha|beta|lambda)")
# More elements than this nobody lists.
_MAX_ELEMENTS = 200


@dataclass(frozen=True, slots=True)
class Solutions:
    """A set, and the variable that lies in it, if it is named.

    Attributes:
        is_certain: false for `(1, 2)`, which may be a point.
    """

    numbers: Any
    variable: str = ""
    is_certain: bool = True


def equal_solutions(answer: str, reference: str) -> bool | None:
    """Whether two sets are the same; None where neither is certainly a set of numbers."""
    try:
        return _equal(answer, reference)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # noqa: BLE001 - sympy raises of every kind for what it cannot solve
        return None


def _equal(answer: str, reference: str) -> bool | None:
    right = solutions(reference)
    given = solutions(answer) if right is not None else None
    if right is None or given is None:
        return False if right is not None and right.is_certain else None
    if not (right.is_certain or given.is_certain):
        return None
    if given.variable and right.variable and given.variable != right.variable:
        return False
    return _same(given.numbers, right.numbers)


def _same(one: Any, other: Any) -> bool:
    if one == other:
        return True
    # Pieces that touch or overlap; sympy may leave what it cannot decide.
    return bool(one.symmetric_difference(other) == EmptySet)


def solutions(text: str) -> Solutions | None:
    """Return the set of numbers that a text describes; None where it describes none, or one with variables in it."""
    text = text.strip()
    if _NOTHING.match(text):
        return Solutions(EmptySet)
    if everything := _EVERYTHING.match(text):
        return _some_reals((everything["rest"] or "").strip())
    if element := _ELEMENT.match(text):
        inside = solutions(element["set"])
        return inside and Solutions(inside.numbers, element["variable"])
    for separator, join in ((_OR, sympy.Union), (_AND, sympy.Intersection)):
        if len(pieces := separator.split(text)) > 1:
            return _joined(pieces, join)
    if _SIGN.search(text) and not text.startswith("{"):
        return _relation(text)
    return _set(text)


def _some_reals(rest: str) -> Solutions | None:
    if not rest:
        return Solutions(S.Reals)
    if exception := _EXCEPT.match(rest):
        values = [_number(part) for part in re.split(r",|\band\b", re.sub(r"\A[a-z]\s*=", "", exception["what"]))]
        return None if None in values else Solutions(S.Reals - FiniteSet(*values))
    rest = re.sub(r"\A(?:such\s+that|with|where|[,:])\s*", "", rest)
    if re.fullmatch(r"(?:greater|more|larger|bigger)\s+than\s+(?P<value>\S+)", rest):
        rest = f"> {rest.split()[-1]}"
    elif re.fullmatch(r"(?:less|smaller)\s+than\s+\S+", rest):
        rest = f"< {rest.split()[-1]}"
    return solutions(rest if re.match(r"[a-z]\s*(?:<|>|\\)", rest) else f"x {rest}")


def _joined(pieces: list[str], join: Any) -> Solutions | None:
    """Return union or intersection of relations, where each is one about the same variable."""
    found = [solutions(piece) if _SIGN.search(piece) else None for piece in pieces]
    if any(one is None for one in found):
        return None
    sets = [one for one in found if one is not None]
    variables = {one.variable for one in sets}
    return Solutions(join(*(one.numbers for one in sets)), sets[0].variable) if len(variables) == 1 else None


def _relation(text: str) -> Solutions | None:
    """Return what `1 < x \\le 2`, `x \\ne 3` or `|x| > 2` leave to their variable."""
    parts = _SIGN.split(text)
    sides, signs = [part.strip() for part in parts[::2]], parts[1::2]
    place = [place for place, side in enumerate(sides) if _VARIABLE.fullmatch(side) or side.startswith("|")]
    if len(place) != 1 or len(signs) > 2:
        return None
    name, numbers = sides[place[0]], S.Reals
    for index, sign in enumerate(signs):
        if place[0] not in (index, index + 1):
            return None
        is_left = place[0] == index
        bound = _number(sides[index + 1] if is_left else sides[index])
        if bound is None:
            return None
        numbers = numbers.intersect(_bounded(name, sign if is_left else _FLIPPED[sign], bound))
    variables = re.findall(r"[a-z]", name) if name.startswith("|") else [name]
    return Solutions(numbers, variables[0]) if len(set(variables)) == 1 else None


def _bounded(name: str, sign: str, bound: Any) -> Any:
    """Return the numbers that a bound leaves; of an absolute value, too."""
    if sign == r"\ne":
        numbers: Any = S.Reals - FiniteSet(bound)
    elif sign in ("<", r"\le"):
        numbers = Interval(-oo, bound, True, sign == "<")
    else:
        numbers = Interval(bound, oo, sign == ">", True)
    if not name.startswith("|"):
        return numbers
    variable = sympy.Symbol("x", real=True)
    inside = parsed(name.strip("|"))
    names = inside.free_symbols
    if len(names) != 1:
        raise ValueError(f"{name} has {len(names)} variables")
    value = sympy.Abs(inside.subs({next(iter(names)): variable}))
    relation = {"<": value < bound, r"\le": value <= bound, ">": value > bound, r"\ge": value >= bound}
    return sympy.solveset(relation[sign], variable, S.Reals) if sign in relation else numbers


def _set(text: str) -> Solutions | None:
    """Return a union, difference, domain, interval, or set in braces."""
    for command, join in (
        (r"\\setminus(?![a-z])|\\backslash(?![a-z])", sympy.Complement),
        (r"\\cup(?![a-z])", sympy.Union),
    ):
        if len(pieces := re.split(command, text)) > 1:
            found = [_set(piece.strip()) for piece in pieces]
            sets = [one.numbers for one in found if one is not None]
            return Solutions(join(*sets)) if len(sets) == len(pieces) and len(sets) < _MAX_ELEMENTS else None
    if domain := _DOMAIN.fullmatch(text):
        sign = {"+": Interval.open(0, oo), "-": Interval.open(-oo, 0), "*": S.Reals - FiniteSet(0)}.get(domain[2] or "")
        return Solutions(_DOMAINS[domain[1]].intersect(sign) if sign else _DOMAINS[domain[1]])
    if text.startswith("{") and text.endswith("}"):
        return _braced(text[1:-1].strip())
    match = _INTERVAL.fullmatch(text)
    if match is None:
        return None
    start, end = _number(match["start"]), _number(match["end"])
    if start is None or end is None or not bool(start <= end):
        return None
    is_open = match["opening"] in "(]", match["closing"] in ")["
    is_reversed = match["opening"] == "]" or match["closing"] == "["
    is_certain = is_reversed or oo in (end, -start) or match["opening"] + match["closing"] in ("[)", "(]")
    return Solutions(Interval(start, end, *is_open), is_certain=is_certain)


def _braced(inside: str) -> Solutions | None:
    if builder := _BUILDER.match(inside):
        found = solutions(builder["condition"])
        if found is None or (found.variable and found.variable != builder["variable"]):
            return None
        domain = _DOMAIN.fullmatch((builder["domain"] or "").strip())
        numbers = found.numbers.intersect(_DOMAINS[domain[1]]) if domain else found.numbers
        if isinstance(numbers, sympy.Range) and numbers.is_finite_set and numbers.size <= _MAX_ELEMENTS:
            numbers = FiniteSet(*numbers)
        return Solutions(numbers)
    values = [_number(part) for part in inside.split(",")]
    if None in values or len(values) > _MAX_ELEMENTS:
        return None
    return Solutions(FiniteSet(*values), is_certain=False)


def _number(text: str) -> Any:
    """Return a real number or infinity; None for anything else."""
    text = text.strip().lstrip("+")
    if text in (r"\infty", r"-\infty"):
        return -oo if text.startswith("-") else oo
    found = parsed(text)
    if not isinstance(found, sympy.Expr) or found.free_symbols:
        return None
    found = found.doit()
    return found if found.is_real else None
