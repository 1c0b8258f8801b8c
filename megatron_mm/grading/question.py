"""What a question says about its answer: its unit, its name, its order, and whether it is a text to be read off."""

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_mm.grading.characters import plain_characters
from megatron_mm.grading.numerals import in_digits
from megatron_mm.grading.quantities import MAGNITUDES, plain_text
from megatron_mm.grading.units import Unit, parse_unit

_UNIT_WORDS = r"(?P<unit>[A-Za-z°μΩ%$€£¥Å][A-Za-z°μΩ%$€£¥Å²³/^*.\d ·-]{0,40}?)"
_IN_UNIT = [
    re.compile(rf"\b(?:in|as)\s+(?:units?\s+of\s+)?{_UNIT_WORDS}\s*(?:[?.,;:)]|\Z)", re.MULTILINE),
    re.compile(rf"\(\s*(?:in\s+)?(?!.\)){_UNIT_WORDS}\s*\)"),
    re.compile(
        r"\b[Hh]ow\s+many\s+(?P<unit>[A-Za-z°]+(?:\s+per\s+[A-Za-z]+)?)"
        r"\s+(?:is|are|was|were|does|do|did|has|have|will|can|would|could|in|long|tall|wide|high|deep|there)\b"
    ),
    re.compile(r"(?:单位|用|以)[:：]?\s*(?P<unit>[一-鿿]{1,4}|[A-Za-z/]+)"),
    re.compile(r"多少(?P<unit>[一-鿿]{1,4}?)(?:[?？。,，]|\Z)"),
]
_PERCENTAGE = re.compile(r"\b(?:what|which|the)\s+(?:is\s+the\s+)?percent(?:age)?\b|百分之几|百分比", re.IGNORECASE)
_NAME = (
    r"(?P<name>(?:m\s*)?(?:\\(?:angle|triangle|overline|vec)\s*\{?\s*)?"
    r"(?:\\?[A-Za-z]+)(?:_\{?\w+\}?)?(?:\([a-z]\))?\}?)"
)
_FIND = re.compile(
    r"\b(?i:find|determine|calculate|compute|evaluate|solve\b[^.?]*\bfor|value\s+of|formula\s+for|what\s+is|express)"
    r"\s+(?:the\s+)?(?:[a-z]{3,}\s+(?:of\s+)?)?"
    rf"\$?{_NAME}\$?(?=\s*(?:[.,;?]|\Z|in\b|if\b|when\b|as\b|to\b))"
)
_IS_NAME = re.compile(r"(?:\\[A-Za-z]+\s*|m\s*\\angle\s*)?\\?(?:[A-Za-z]|[A-Z]{2,3}|pO?H)(?:_\{?\w+\}?)?(?:\([a-z]\))?")
# What is read off a picture or a paper: no arithmetic makes one of them another.
_READ_OFF = re.compile(
    r"\b(?:plate|seat|gate|room|pin|codes?|versions?|section|chapter|heading|serial|zip|postal|flight|(?:tele)?phone"
    r"|isbn|label|initials|abbreviation|sign|printed|written\s+on|apartment|bus\s+line|platform|score|time\s+signature"
    r"|blood|genotype|hex|roman\s+numeral|password|account|order\s+number|model\s+number|page\s+of\s+how|move|copy\s+it"
    r"|read\s+the|what\s+text|which\s+line|jersey|tracking|licen[cs]e|barcode|username|id\s+number|resolution"
    r"|dimensions?\s+of\s+the\s+matrix|size\s+(?:is|of)\s+the\s+matrix|which\s+(?:train|tram|bus))\b|车牌|密码|版本|编号|型号|门牌",
    re.IGNORECASE,
)
_CASE = re.compile(r"\b(?:genotypes?|formula|symbol|alleles?|password|case[- ]sensitive)\b", re.IGNORECASE)
_ORDER = re.compile(
    r"\b(?:arrange|rank|in\s+(?:the\s+)?(?:correct\s+|right\s+)?order|in\s+(?:which|what)\s+order|ascending|descending"
    r"|first\s+\w+\s+(?:terms|[A-Z]\w*\s+numbers|numbers|primes|multiples)|from\s+\w+\s+to\s+\w+est|order\s+from"
    r"|left\s+to\s+right|top\s+to\s+bottom|sequence|sort|chronological\w*)\b|从小到大|从大到小|顺序",
    re.IGNORECASE,
)
_UNIT_REQUIRED = re.compile(
    r"\bunits?\b[^.?]*\b(?:must|required|part\s+of\s+the\s+answer|have\s+to)\b|\b(?:include|give|state|with)\s+(?:the\s+|"
    r"its\s+|a\s+|proper\s+|correct\s+)*units?\b",
    re.IGNORECASE,
)
_POINT = re.compile(r"\b(?:coordinates?|ordered\s+pair|point)\b|坐标", re.IGNORECASE)
_SEGMENT = re.compile(
    r"\b(?:segments?|sides?|lines?|edges?|diameters?|radius|radii|chords?|diagonals?|lengths?|parallel|triangle|hypotenuse)\b"
)
_TIME = re.compile(
    r"\b(?:what|which)\s+time\b|\bclock\b|\bwhen\s+(?:do|does|did|is|was|will)\b|几时|几点", re.IGNORECASE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked for.

    Attributes:
        unit: in which a bare number is meant; None where the question names none.
        unit_required: whether an answer without a unit is none.
        name: of the asked value, as `x` or `AB`; empty where the question does not name one.
        read_off: whether the answer is a text, a code or a label, even if it looks like arithmetic.
        keeps_case: whether capitals count in it.
        in_order: whether the order of a list counts.
        is_point: whether coordinates are asked for.
        is_segment: whether two capitals are the ends of a segment: AB is BA.
        is_time: whether a time of day is asked for.
    """

    unit: Unit | None = None
    unit_required: bool = False
    name: str = ""
    read_off: bool = False
    keeps_case: bool = False
    in_order: bool = False
    is_point: bool = False
    is_segment: bool = False
    is_time: bool = False

    @classmethod
    def of(cls, question: str) -> "Asked":
        """Read a question; nothing is asked for where it is empty."""
        if not question.strip():
            return _NOTHING
        text = plain_characters(question).replace("U.S.", "US")
        return cls(
            unit=_unit_of(text),
            unit_required=_UNIT_REQUIRED.search(text) is not None,
            name=_name_of(text),
            read_off=_READ_OFF.search(text) is not None,
            keeps_case=_CASE.search(text) is not None,
            in_order=_ORDER.search(text) is not None,
            is_point=_POINT.search(text) is not None,
            is_segment=_SEGMENT.search(text) is not None,
            is_time=_TIME.search(text) is not None,
        )


_NOTHING = Asked()


def _unit_of(question: str) -> Unit | None:
    if _PERCENTAGE.search(question):
        return parse_unit("%")
    for pattern in _IN_UNIT:
        for match in pattern.finditer(plain_text(question)):
            if (unit := _unit(match["unit"].strip())) is not None:
                return unit
    return None


def _unit(text: str) -> Unit | None:
    """Return a unit that a question asks for, such as `cm` or `millions of dollars`; words for things are none."""
    words = in_digits(text).split()
    scale = Fraction(1)
    if words and (magnitude := MAGNITUDES.get(words[0].lower().removesuffix("s"))):
        scale, words = Fraction(magnitude), [word for word in words[1:] if word != "of"]
        text = " ".join(words)
        money = parse_unit(text) if words else Unit()
        money = money if money is not None and money.is_known else Unit()
        return Unit(scale * money.factor, money.dimension)
    if len(text) == 1 and text.islower() and text not in "mgshl":
        return None
    unit = parse_unit(text)
    return unit if unit is not None and unit.is_known and unit.dimension else None


def _name_of(question: str) -> str:
    """Return the name of the only value that is asked for."""
    found = [match["name"] for match in _FIND.finditer(question) if _IS_NAME.fullmatch(match["name"])]
    return found[-1] if len(set(found)) == 1 else ""
