"""Numbers with units: `1,234.5`, `\\frac{3}{4}`, `1.2 \\times 10^3 m/s`, `6 ft 2 in`, `25%`, `$1.2 million`, `5厘米`.

Values are exact fractions, so that nothing is equal by rounding alone. Exponents are bounded, for a power of ten with
a large one would not end.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_mm.grading.numerals import in_digits
from megatron_mm.grading.units import PERCENT, Unit, parse_unit, same_money

# A double's range; no answer is larger.
_MAX_EXPONENT = 308
# What is left to rounding: six digits, as math-verify leaves it.
ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Quantity:
    """A value as it is written, with its unit.

    Attributes:
        unit: None where none is given, or one that says nothing ("units").
        place: what one unit of the last written digit is worth; 0 for whole numbers and fractions.
        is_product: whether it may be meant as a product: `5m`.
        other: what may be meant instead: 5,000 by `5K`, 36 by `3 dozen`.
    """

    value: Fraction
    unit: Unit | None
    place: Fraction = Fraction(0)
    is_product: bool = False
    other: "Quantity | None" = None

    @property
    def readings(self) -> "list[Quantity]":
        """All that may be meant."""
        return [self] if self.other is None else [self, self.other]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a value may be off; either is enough. Values written without a point on both sides have to be equal.

    Attributes:
        relative: share of the reference. 1e-6 and less is for digits that were left out; MM-Math is scored with 1e-2.
        absolute: in the reference's unit.
    """

    relative: float = ROUNDING
    absolute: float = 0.0

    def holds(self, value: Fraction, reference: Fraction, place: Fraction) -> bool:
        """Whether `value` is near enough.

        Args:
            place: worth of the last digit of the one of both that has fewer. Unless more than rounding is allowed, it
                has to be finer than the tolerance, and nothing but digits behind it may differ: neither is 1234567.0
                the number 1234568, nor 0.3333 one third.
        """
        # From the digits that the user wrote: 1e-6 as a double lies a little below 1e-6.
        relative = Fraction(repr(self.relative)) * abs(reference)
        difference = abs(value - reference)
        if self.relative > ROUNDING or self.absolute > 0:
            return difference <= max(relative, Fraction(repr(self.absolute)))
        return difference == 0 or difference < place <= relative


def equal_quantities(answer: Quantity, reference: Quantity, tolerance: Tolerance) -> bool:
    """Whether two quantities are the same.

    Units of one dimension are converted; where either side has none, the bare values are compared. 25% is 0.25 and, to
    a question for a percentage, 25; but a bare reference of at most 1 is a share: there 0.5% is not 0.5.
    """
    return any(_equal(one, other, tolerance) for one in answer.readings for other in reference.readings)


def _equal(answer: Quantity, reference: Quantity, tolerance: Tolerance) -> bool:
    place = max(answer.place, reference.place)

    def near(value: Fraction, other: Fraction, place: Fraction = place) -> bool:
        return tolerance.holds(value, other, place) if place else value == other

    if reference.unit is None and _is_percentage(answer):
        return near(answer.value / 100, reference.value, place / 100) or (
            abs(reference.value) > 1 and near(answer.value, reference.value)
        )
    if answer.unit is None and _is_percentage(reference):
        return near(answer.value * 100, reference.value, place * 100) or near(answer.value, reference.value)
    if answer.unit is None or reference.unit is None:
        # Where only one side has the m, it is a variable.
        return not (answer.is_product or reference.is_product) and near(answer.value, reference.value)
    value = answer.unit.converted(answer.value, reference.unit)
    if value is None:
        return _means_the_same(answer.unit, reference.unit) and near(answer.value, reference.value)
    scale = abs(answer.unit.factor / reference.unit.factor)
    return near(value, reference.value, max(answer.place * scale, reference.place))


def _means_the_same(one: Unit, other: Unit) -> bool:
    """Whether two units that cannot be converted are other names of the same: ¥ and yuan, `boxes` and `个`."""
    if same_money(one, other):
        return True
    # What is counted is a word in another language.
    is_chinese = [re.fullmatch("[一-鿿]+", "".join(unit.dimension)) is not None for unit in (one, other)]
    return not (one.is_known or other.is_known) and is_chinese[0] != is_chinese[1]


def _is_percentage(quantity: Quantity) -> bool:
    return quantity.unit is not None and quantity.unit.dimension == {PERCENT: 1}


def parse_quantity(text: str) -> Quantity | None:
    """Return a number with its unit, if there is nothing else; None otherwise.

    Several may stand side by side where they add up, as in `6 ft 2 in`.
    """
    text = in_digits(plain_text(text))
    text = _ARC.sub(_arc, _HALF_MORE.sub(r"\1 1/2 \2", text))
    if _EUROPEAN.search(text) and _HAS_CURRENCY.search(text):
        text = _EUROPEAN.sub(lambda match: match[0].replace(".", "").replace(",", "."), text)
    total: Quantity | None = None
    position = 0
    while number := _NUMBER.match(text, position):
        unit = _UNIT_TEXT.match(text, number.end())
        assert unit is not None  # it matches nothing as well
        part = _one_quantity(number, re.sub(r"\s+and\s*\Z|,\s*\Z", "", unit.group()) if total is None else unit.group())
        total = part if total is None or part is None else _sum(total, part)
        if total is None:
            return None
        position = unit.end()
    return total if total is not None and position == len(text) else None


def is_measured(quantity: Quantity | None) -> bool:
    """Whether it has a unit that can be converted, not just a word for what is counted."""
    return quantity is not None and quantity.unit is not None and quantity.unit.is_known


def _sum(first: Quantity, second: Quantity) -> Quantity | None:
    """Return 6 1/6 ft for `6 ft` and `2 in`; None where a sum makes no sense."""
    if first.unit is None or second.unit is None or not (first.unit.is_known and second.unit.is_known):
        return None
    if first.unit.dimension != second.unit.dimension or PERCENT in first.unit.dimension:
        return None
    if second.unit.factor >= first.unit.factor or second.value < 0:
        return None
    scale = second.unit.factor / first.unit.factor
    value = first.value + second.value * scale * (-1 if first.value < 0 else 1)
    return Quantity(value, first.unit, second.place * scale)


def _one_quantity(number: re.Match[str], unit_text: str) -> Quantity | None:
    value = _value(number)
    if value is None or unit_text.startswith("."):
        return None
    is_product, other = _LETTER.fullmatch(unit_text) is not None, None
    if (letter := _GLUED.match(unit_text)) is not None:
        scaled, rest = value * _GLUED_MAGNITUDES[letter[0].strip()], unit_text[letter.end() :]
        if number["currency"] or (rest and letter[0] != " dozen"):
            value, unit_text = scaled, rest
        else:
            other = _quantity(scaled, rest, _place(number))
    unit_text = unit_text.strip()
    if unit_text in ("pound", "pounds"):
        other = _quantity(value, "GBP", _place(number))
    currency = (number["currency"] or "").strip()
    if currency and unit_text.startswith("/"):
        unit_text = f"{currency}{unit_text}"
    elif currency and unit_text.startswith("per "):
        unit_text = f"{currency} {unit_text}"
    elif currency and unit_text:
        written = [parse_unit(currency), parse_unit(unit_text)]
        if None in written or written[0] != written[1]:
            return None
    return _quantity(value, unit_text or currency, _place(number), is_product, other)


def _quantity(
    value: Fraction, unit_text: str, place: Fraction, is_product: bool = False, other: Quantity | None = None
) -> Quantity | None:
    unit = parse_unit(unit_text)
    if unit is None:
        return None
    return Quantity(value, unit if unit.dimension else None, place, is_product, other)


def _place(number: re.Match[str]) -> Fraction:
    """Worth of one unit of the last digit; 0 where there is no point and no power of ten."""
    digits = number["digits"] or ""
    if "." not in digits and number["power"] is None:
        return Fraction(0)
    num_decimals = len(digits.partition(".")[2])
    power = int((number["power"] or "0").lstrip("+")) - num_decimals
    if abs(power) > 2 * _MAX_EXPONENT:
        return Fraction(0)
    return Fraction(10) ** power * MAGNITUDES.get((number["magnitude"] or "").lower(), 1)


def _value(number: re.Match[str]) -> Fraction | None:
    """Value of a match; None where it cannot be told, or is larger than a double."""
    power = int((number["power"] or number["pure"] or "0").lstrip("+"))
    divisor = int(number["under"] or number["divisor"] or "1")
    if abs(power) > _MAX_EXPONENT or divisor == 0:
        return None
    if number["under"]:
        value = int(number["whole"]) + Fraction(int(number["over"]), divisor)
    elif number["pure"]:
        value = Fraction(1)
    else:
        digits = re.sub("[, ]", "", number["digits"])
        value = Fraction(digits + "0" if digits.endswith(".") else digits) / divisor
    value *= Fraction(10) ** power * MAGNITUDES.get((number["magnitude"] or "").lower(), 1)
    return -value if "-" in (number["sign"] or "") + (number["inner"] or "") else value


# As words behind a number; `hundred` and the like in words alone are text2num's.
MAGNITUDES = {
    "hundred": 10**2, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "mn": 10**6, "mio": 10**6, "crore": 10**7,
    "billion": 10**9, "bn": 10**9, "trillion": 10**12, "tn": 10**12, "万": 10**4, "百万": 10**6, "千万": 10**7,
    "亿": 10**8,
}  # fmt: skip
# Stuck to the digits, where they may be units too (but a dozen is a word).
_GLUED_MAGNITUDES = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "dozen": 12}
_GLUED = re.compile(r"[kKMB](?![A-Za-z0-9/^*·])| dozen\b")
_INTEGER = r"[+-]?\d{1,9}"
# The digits end where they end, so that no match is found again with fewer of them.
_DIGITS = (
    r"(?:\d{1,3}(?:,\d{3})++(?![,\d])|\d{1,2}(?:,\d{2}(?!\d))++,\d{3}(?![,\d])|\d{1,3}(?:[ ]\d{3})++(?![\d./])"
    r"|\d++)(?:\.\d*+)?|\.\d++"
)
_CURRENCY = r"(?:US|HK|AU?|CA?)?\$|[€£¥₹₩₽]|(?:USD|EUR|GBP|JPY|CNY|RMB|INR|HKD|AUD|CAD|CHF|Rs\.?)(?![A-Za-z])"
_HAS_CURRENCY = re.compile(rf"{_CURRENCY}")
_EUROPEAN = re.compile(r"(?<![\d.,])\d{1,3}(?:\.\d{3})*,\d{1,2}(?![\d.,])")
_MAGNITUDE = "|".join(sorted(MAGNITUDES, key=len, reverse=True))
_NUMBER = re.compile(
    rf"""\s*(?P<sign>[+-]?)\s*(?P<currency>{_CURRENCY})?\s*(?P<inner>-?)
    (?:(?P<whole>\d++)\s+(?P<over>\d++)\s*/\s*(?P<under>\d++)(?![.\d])
      |10\s*\^\s*(?P<pure>{_INTEGER})(?![\w.])
      |(?P<digits>{_DIGITS})(?:\s*/\s*(?P<divisor>\d++)(?![.\d]))?)
    (?:(?:[eE]|\s*[*xX]\s*10\s*\^\s*)(?P<power>{_INTEGER})(?!\w)|\s*(?P<magnitude>(?i:{_MAGNITUDE}))(?![A-Za-z]))?
    """,
    re.VERBOSE,
)
# Until the next number that is not a power.
_UNIT_TEXT = re.compile(r"(?:\^\s*[+-]?\d|(?<=[A-Za-z])-?\d(?![\d.])|[^\d.+^-]|\.(?!\d))*+")
_LETTER = re.compile("[A-Za-z]")
# Minutes and seconds of an angle, which are written as feet and inches are.
_ARC = re.compile(r"(?<=°)\s*(\d+(?:\.\d+)?)\s*'(?:\s*(\d+(?:\.\d+)?)\s*\")?|(?<=度)(\d+)分(?:(\d+)秒)?")
# `3个半小时`
_HALF_MORE = re.compile(r"(\d+)个半(\S+)")


def _arc(match: re.Match[str]) -> str:
    minutes, seconds = match[1] or match[3], match[2] or match[4]
    return f" {minutes} arcminute" + (f" {seconds} arcsecond" if seconds else "")


# Words and LaTeX around numbers -> plain characters; in this order.
_REPLACED = [
    (re.compile(r"([\^_])\s*\{\s*([+-]?\w+)\s*\}"), r"\1\2"),
    (re.compile(r"\\(?:text|mathrm|mbox|textrm|textbf|mathbf|operatorname|rm|ce)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\left|\\right|\\displaystyle|\\!|\\(?=\$)"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;: ]|~|\\q?quad"), " "),
    (re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r" \1/\2"),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r" \1/\2"),
    (re.compile(r"\{\s*([+-]?\w+)\s*\}"), r"\1"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|\b(?:degrees?|deg)\b(?!\s*(?:[CF]\b|Celsius|Fahrenheit))"), "°"),
    (
        re.compile(r"(?:\bdegrees?|°)\s*(Celsius|Fahrenheit|C\b|F\b)", re.IGNORECASE),
        lambda match: f"°{match[1][0].upper()}",
    ),
    (re.compile(r"\\times|\\cdot|×|·|⋅"), "*"),
    (re.compile(r"\\%|\bper\s?cent\b|\bpct\b"), PERCENT),
    (re.compile(r"\\Omega|Ω|\bohms?\b"), "Ω"),
    (re.compile(r"\\mu\s*|μ|µ"), "μ"),
    (re.compile("''"), '"'),
    (re.compile(r"(?<=\d)\s+(?=[万亿])"), ""),
    (re.compile(r"\s+"), " "),
]


def plain_text(text: str) -> str:
    """Return a text without the LaTeX that is written around numbers and units."""
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    return text.strip()
