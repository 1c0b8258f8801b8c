"""What is no sum although it looks like one: ranges, scores, ratios in words, numbers in a base, remainders.

`10-20` is not -10 and `3_7` no variable: computed, answers would be equal that have nothing to do with each other. They
are compared as they are written, up to what is another way to write the same.
"""

import re

from megatron_mm.grading.quantities import MAGNITUDES, plain_text
from megatron_mm.grading.units import Unit, parse_unit

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
_IN_BASE = re.compile(r"\(?(?P<digits>[0-9A-F.]++)\)?_\(?(?P<base>\d{1,2})\)?")
_REMAINDER = re.compile(
    r"(?:quotient\D{0,6})?(\d+)\s*(?:,?\s*(?:and\s+)?(?:remainder\D{0,6}|[Rr]\.?\s?)|\.{3,6}\s*|余)\s*(\d+)"
)
_RATIO_IN_WORDS = re.compile(r"(\d+(?:\.\d+)?)\s+to\s+(\d+(?:\.\d+)?)")
_PROPORTION = re.compile(r"\d{1,9}(?::\d{1,9}){2,8}")
_RATIO = re.compile(r"\d+(?:\.\d+)?\s*:\s*\d+(?:\.\d+)?")


# A number of a range as text, and its unit.
_Piece = tuple[str, Unit | None]


def equal_as_written(answer: str, reference: str) -> bool | None:
    """Whether two are the same that are not to be computed; None where neither is such."""
    given, right = plain_text(answer), plain_text(reference)
    if _RATIO.fullmatch(right):
        given = _RATIO_IN_WORDS.sub(r"\1:\2", given)
        # A ratio that is left may be reduced.
        return True if given == right else None
    if _RATIO.fullmatch(given) and _RATIO_IN_WORDS.fullmatch(right):
        return _RATIO_IN_WORDS.sub(r"\1:\2", right) == re.sub(r"\s", "", given)
    for compare in (_equal_in_base, _equal_remainders, _equal_proportions, _equal_ranges):
        if (is_equal := compare(given, right)) is not None:
            return is_equal
    return None


def _equal_remainders(answer: str, reference: str) -> bool | None:
    given, right = (_REMAINDER.fullmatch(text.strip()) for text in (answer, reference))
    if right is None:
        return None
    return given is not None and given.groups() == right.groups()


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


def _equal_proportions(answer: str, reference: str) -> bool | None:
    """Whether two ratios of three numbers or more are the same up to a factor."""
    given, right = (_PROPORTION.fullmatch(re.sub(r"\s", "", text)) for text in (answer, reference))
    if right is None:
        return None
    if given is None:
        return False
    first, second = ([int(part) for part in match[0].split(":")] for match in (given, right))
    return len(first) == len(second) and all(a * second[0] == b * first[0] for a, b in zip(first, second, strict=True))


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
