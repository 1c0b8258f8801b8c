"""What is no sum although it looks like one: ranges, scores, dates, times, addresses, numbers in a base, formulas.

`10-20` is not -10, `5/12/2020` no quotient and `3_7` no variable: computed, answers would be equal that have nothing to
do with each other. They are compared as they are written, up to what is another way to write the same.
"""

import re

from megatron_mm.grading.quantities import MAGNITUDES, Unit, parse_unit, plain_text

# Not the sign of a power.
_JOINT = re.compile(r"(?<!\^)-{1,3}|\bto\b")
# A telephone number has four.
_MAX_PIECES = 8
# A number or a time; half of the day or size; what stands behind it.
_PIECE = re.compile(
    r"(?P<currency>[$€£¥]?)\s*+(?P<number>\d++(?:,\d{3})*+(?:\.\d++|:\d\d)?+)"
    rf"(?:\s*+(?P<mark>(?i:[ap]m|{'|'.join(MAGNITUDES)}))\b)?"
    r"(?P<behind>\s*+(?:(?P<letter>[A-Za-z])\Z|[^\d\s].*+))?",
    re.DOTALL,
)
_TIME = re.compile(r"(?P<hour>\d{1,2})(?P<rest>(?::\d\d){0,2}+)\s*+(?P<half>(?i:[ap]m))?")
_DATE = re.compile(r"(\d++)\s*+/\s*+(\d++)\s*+/\s*+(\d++)")
_ADDRESS = re.compile(r"\d++(?:\.\d++){2,}+")
_IN_BASE = re.compile(r"\(?(?P<digits>[0-9A-F.]++)\)?_\(?(?P<base>\d{1,2})\)?")
_FORMULA = re.compile(r"(?=[A-Z])(?:[A-Z][a-z]?(?:_?\d++)?|\(|\)(?:_?\d++)?)++")


# A number of a range as text, and its unit.
_Piece = tuple[str, Unit | None]


def equal_as_written(answer: str, reference: str) -> bool | None:
    """Whether two are the same that are not to be computed; None where neither is such."""
    given, right = plain_text(answer), plain_text(reference)
    for compare in (_equal_in_base, _equal_formulas, _equal_times, _equal_numerals, _equal_ranges):
        if (is_equal := compare(given, right)) is not None:
            return is_equal
    return None


def _equal_in_base(answer: str, reference: str) -> bool | None:
    """The base may be left out where the reference says it: these digits are what was asked for."""
    given, right = _in_base(answer), _in_base(reference)
    if right and not given:
        return "".join(answer.split()) == right[0]
    return given == right if given else None


def _in_base(text: str) -> tuple[str, int] | None:
    match = _IN_BASE.fullmatch("".join(text.split()))
    if match is None:
        return None
    digits, base = match["digits"], int(match["base"])
    # A_1 and A_{16} are names, FF_{16} is a number.
    is_number = re.search(r"\d", digits) or (base == 16 and len(digits) > 1)
    return (digits, base) if is_number else None


def _equal_formulas(answer: str, reference: str) -> bool | None:
    """Formulas of chemistry: `H_2O` is H2O, but not HO2."""
    if not (_is_formula(answer) and _is_formula(reference)):
        return None
    if answer.replace("_", "") == reference.replace("_", ""):
        return True
    # A_1B_1 may be a product or the segment B_1A_1; nobody writes a product as A1B1.
    return False if re.search(r"[A-Za-z]\d", answer + " " + reference) else None


def _is_formula(text: str) -> bool:
    return _FORMULA.fullmatch(text) is not None and re.search(r"\d", text) is not None


def _equal_times(answer: str, reference: str) -> bool | None:
    """Two times; a time beside what is none may be a ratio: `6:10` is 3:5."""
    given, right = _time(answer), _time(reference)
    return given == right if given and right else None


def _time(text: str) -> str | None:
    match = _TIME.fullmatch(text)
    if match is None or not (match["rest"] or match["half"]):
        return None
    return f"{int(match['hour'])}{match['rest'] or ':00'}{(match['half'] or '').lower()}"


def _equal_numerals(answer: str, reference: str) -> bool | None:
    given, right = _numerals(answer), _numerals(reference)
    return given == right if given or right else None


def _numerals(text: str) -> list[str] | None:
    """Those of a date, without zeros ahead, or of an address or version."""
    if date := _DATE.fullmatch(text):
        return ["/", *(part.lstrip("0") for part in date.groups())]
    return text.split(".") if _ADDRESS.fullmatch(text) else None


def _equal_ranges(answer: str, reference: str) -> bool | None:
    given, right = _range(answer), _range(reference)
    if given is None and right is None:
        return None
    if given is None or right is None or len(given) != len(right):
        return False
    return all(map(_same_piece, given, right))


def _same_piece(one: _Piece, other: _Piece) -> bool:
    # A unit on one side only does not count.
    return one[0] == other[0] and (one[1] is None or other[1] is None or one[1] == other[1])


def _range(text: str) -> list[_Piece] | None:
    """Pieces of a range; None where there is something to be computed: `x-3`, `5-2i`, `3-5m`, `-5`."""
    sign, text = ("-", text[1:]) if text.startswith("-") else ("", text)
    pieces = _pieces(text)
    if len(pieces) < 2:
        return None
    read: list[_Piece] = []
    for piece in pieces:
        unit = _unit_of(piece if piece["currency"] or piece["behind"] else pieces[-1])
        if unit is None:
            return None
        mark = (piece["mark"] or pieces[-1]["mark"] or "").lower()
        read.append((sign + piece["number"].replace(",", "") + mark, unit if unit.dimension else None))
        sign = ""
    return read


def _pieces(text: str) -> list[re.Match[str]]:
    """What is joined, if it is nothing but numbers with units; a letter behind one number only is a variable."""
    pieces = _JOINT.split(text, maxsplit=_MAX_PIECES)
    matches = [match for piece in pieces if (match := _PIECE.fullmatch(piece.strip()))]
    if len(matches) != len(pieces):
        return []
    letters = {match["letter"] for match in matches}
    has_unit_of_all = letters - {matches[-1]["letter"]} == {None} and matches[-1]["behind"].startswith(" ")
    return matches if len(letters) == 1 or has_unit_of_all else []


def _unit_of(match: re.Match[str]) -> Unit | None:
    """Unit of a piece; None where what stands behind it is none. `$10$-$20$` are no dollars."""
    currency, behind = match["currency"], (match["behind"] or "").strip()
    if currency and behind == currency:
        return Unit()
    units = parse_unit(currency), parse_unit(behind)
    return None if units[0] is None or units[1] is None else units[0] * units[1]
