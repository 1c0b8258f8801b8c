"""Numbers with units: `1,234.5`, `\\frac{3}{4}`, `1.2 \\times 10^3 m/s`, `6 ft 2 in`, `25%`.

Values are exact fractions, so that nothing is equal by rounding alone. Exponents are bounded, for a power of ten with
a large one would not end.
"""

import re
from dataclasses import dataclass, field
from fractions import Fraction

# A double's range; no answer is larger.
_MAX_EXPONENT = 308
_PERCENT = "%"


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit: `factor` times the base units (m, g, s, A, degree, dollar, or a word of its own) to their powers."""

    factor: Fraction = Fraction(1)
    dimension: dict[str, int] = field(default_factory=dict)

    def __mul__(self, other: "Unit") -> "Unit":
        powers = {
            base: self.dimension.get(base, 0) + other.dimension.get(base, 0)
            for base in {*self.dimension, *other.dimension}
        }
        return Unit(self.factor * other.factor, {base: power for base, power in powers.items() if power})

    def __pow__(self, power: int) -> "Unit":
        return Unit(self.factor**power, {base: one * power for base, one in self.dimension.items() if power})


@dataclass(frozen=True, slots=True)
class Quantity:
    """A value as it is written, with its unit.

    Attributes:
        unit: None where none is given, or one that says nothing ("units").
        is_decimal: whether it is written with a point or a power of ten, so that it may be rounded.
        is_product: whether it may be meant as a product: `5m`.
    """

    value: Fraction
    unit: Unit | None
    is_decimal: bool
    is_product: bool = False


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a value may be off; either is enough. Values written without a point on both sides have to be equal.

    Attributes:
        relative: share of the reference. 1e-6 of ours is what math-verify rounds to; MM-Math is scored with 1e-2.
        absolute: in the reference's unit.
    """

    relative: float = 1e-6
    absolute: float = 0.0

    def holds(self, value: Fraction, reference: Fraction) -> bool:
        """Whether `value` is near enough."""
        # From the digits that the user wrote: 1e-6 as a double lies a little below 1e-6.
        allowed = max(Fraction(repr(self.relative)) * abs(reference), Fraction(repr(self.absolute)))
        return abs(value - reference) <= allowed


def equal_quantities(answer: Quantity, reference: Quantity, tolerance: Tolerance) -> bool:
    """Whether two quantities are the same.

    Units of one dimension are converted; where either side has none, the bare values are compared. 25% is 0.25 and, to
    a question for a percentage, 25; but a bare reference of at most 1 is a share: there 0.5% is not 0.5.
    """
    is_rounded = answer.is_decimal or reference.is_decimal

    def near(value: Fraction, other: Fraction) -> bool:
        return tolerance.holds(value, other) if is_rounded else value == other

    if reference.unit is None and _is_percentage(answer):
        return near(answer.value / 100, reference.value) or (
            abs(reference.value) > 1 and near(answer.value, reference.value)
        )
    if answer.unit is None and _is_percentage(reference):
        return near(answer.value, reference.value / 100) or near(answer.value, reference.value)
    if answer.unit is None or reference.unit is None:
        # Where only one side has the m, it is a variable.
        return not (answer.is_product or reference.is_product) and near(answer.value, reference.value)
    if answer.unit.dimension != reference.unit.dimension:
        return False
    return near(answer.value * answer.unit.factor / reference.unit.factor, reference.value)


def _is_percentage(quantity: Quantity) -> bool:
    return quantity.unit is not None and quantity.unit.dimension == {_PERCENT: 1}


def parse_quantity(text: str) -> Quantity | None:
    """A number with its unit, if there is nothing else; None otherwise.

    Several may stand side by side where they add up, as in `6 ft 2 in`.
    """
    text = plain_text(text)
    if (in_words := text.lower().replace(" ", "-")) in _NUMBER_WORDS:
        return Quantity(Fraction(_NUMBER_WORDS[in_words]), None, False)
    total: Quantity | None = None
    position = 0
    while number := _NUMBER.match(text, position):
        unit = _UNIT_TEXT.match(text, number.end())
        assert unit is not None  # it matches nothing as well
        part = _one_quantity(number, unit.group())
        total = part if total is None or part is None else _sum(total, part)
        if total is None:
            return None
        position = unit.end()
    return total if total is not None and position == len(text) else None


def _sum(first: Quantity, second: Quantity) -> Quantity | None:
    """`6 ft` and `2 in` make 6 1/6 ft; None where a sum makes no sense."""
    if first.unit is None or second.unit is None or first.unit.dimension != second.unit.dimension:
        return None
    if second.unit.factor >= first.unit.factor or first.value < 0 or second.value < 0:
        return None
    value = first.value + second.value * second.unit.factor / first.unit.factor
    return Quantity(value, first.unit, first.is_decimal or second.is_decimal)


def _one_quantity(number: re.Match[str], unit_text: str) -> Quantity | None:
    value, is_product = _value(number), _LETTER.fullmatch(unit_text) is not None
    unit_text = unit_text.strip()
    if value is None or (number["currency"] and unit_text):
        return None
    unit = parse_unit(number["currency"] or unit_text)
    if unit is None:
        return None
    is_decimal = "." in (number["digits"] or "") or number["power"] is not None
    return Quantity(value, unit if unit.dimension else None, is_decimal, is_product)


def _value(number: re.Match[str]) -> Fraction | None:
    """Value of a match; None where it cannot be told, or is larger than a double."""
    power = int((number["power"] or "0").lstrip("+"))
    divisor = int(number["under"] or number["divisor"] or "1")
    if abs(power) > _MAX_EXPONENT or divisor == 0:
        return None
    if number["under"]:
        value = int(number["whole"]) + Fraction(int(number["over"]), divisor)
    else:
        digits = re.sub("[, ]", "", number["digits"])
        value = Fraction(digits + "0" if digits.endswith(".") else digits) / divisor
    value *= Fraction(10) ** power * MAGNITUDES.get((number["magnitude"] or "").lower(), 1)
    return -value if number["sign"] == "-" else value


_ONES = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
MAGNITUDES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Up to ninety-nine, and one hundred and the like.
_NUMBER_WORDS = {
    "zero": 0,
    **{word: number for number, word in enumerate(_ONES + _TEENS, start=1)},
    **{word: 10 * number for number, word in enumerate(_TENS, start=2)},
    **{f"{ten}-{one}": 10 * i + j for i, ten in enumerate(_TENS, start=2) for j, one in enumerate(_ONES, start=1)},
    **{f"{one}-{word}": i * size for word, size in MAGNITUDES.items() for i, one in enumerate(_ONES, start=1)},
}
_INTEGER = r"[+-]?\d{1,9}"
# The digits end where they end, so that no match is found again with fewer of them.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})++(?![,\d])|\d{1,3}(?:[ ]\d{3})++(?![\d./])|\d++)(?:\.\d*+)?|\.\d++"
_NUMBER = re.compile(
    rf"""\s*(?P<sign>[+-]?)\s*(?P<currency>[$€£¥]?)\s*
    (?:(?P<whole>\d++)\s+(?P<over>\d++)\s*/\s*(?P<under>\d++)(?![.\d])
      |(?P<digits>{_DIGITS})(?:\s*/\s*(?P<divisor>\d++)(?![.\d]))?)
    (?:(?:[eE]|\s*[*x]\s*10\s*\^\s*)(?P<power>{_INTEGER})(?!\w)|\s*(?P<magnitude>(?i:{"|".join(MAGNITUDES)}))\b)?
    """,
    re.VERBOSE,
)
# Until the next number that is not a power.
_UNIT_TEXT = re.compile(r"(?:\^\s*[+-]?\d|(?<=[A-Za-z])\d(?![\d.])|[^\d.+^-]|\.(?!\d))*+")
_LETTER = re.compile("[A-Za-z]")


# Words and LaTeX around numbers -> plain characters; in this order.
_REPLACED = [
    (re.compile(r"([\^_])\s*\{\s*([+-]?\w+)\s*\}"), r"\1\2"),
    (re.compile(r"\\(?:text|mathrm|mbox|textrm|textbf|mathbf|operatorname|rm)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\left|\\right|\\displaystyle|\\!|\\(?=\$)"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;: ]|~|\\q?quad"), " "),
    (re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r" \1/\2"),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r" \1/\2"),
    (re.compile(r"\{\s*([+-]?\w+)\s*\}"), r"\1"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|\bdegrees?\b(?!\s*[CF]\b)"), "°"),
    (re.compile(r"\\times|\\cdot|×|·|⋅"), "*"),
    (re.compile(r"\\%|\bper\s?cent\b|\bpct\b"), _PERCENT),
    (re.compile(r"\\Omega|Ω|\bohms?\b"), "Ω"),
    (re.compile(r"\\mu\b|μ|µ"), "µ"),
    (re.compile(r"\s+"), " "),
]


def plain_text(text: str) -> str:
    """A text without the LaTeX that is written around numbers and units."""
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    return text.strip()


def _unit(factor: float | str, **dimension: int) -> Unit:
    return Unit(Fraction(factor), dimension)


def _prefixed(names: str, prefixes: str, unit: Unit) -> dict[str, Unit]:
    """A unit under each of its names and prefixes."""
    found = {}
    for name in names.split():
        for prefix in ("", *prefixes):
            short, long, power = _PREFIXES[prefix]
            # "meter" takes "kilo", "m" takes "k".
            word = (long if len(name) > 2 else short) + name
            found[word] = Unit(unit.factor * Fraction(10) ** power, unit.dimension)
    return found


# Short, long, power of ten.
_PREFIXES: dict[str, tuple[str, str, int]] = {
    "": ("", "", 0),
    "n": ("n", "nano", -9),
    "u": ("µ", "micro", -6),
    "m": ("m", "milli", -3),
    "c": ("c", "centi", -2),
    "d": ("d", "deci", -1),
    "h": ("h", "hecto", 2),
    "k": ("k", "kilo", 3),
    "M": ("M", "mega", 6),
    "G": ("G", "giga", 9),
}
# The inch, pound and pint are legal definitions in metres, grams and litres.
_UNITS: dict[str, Unit] = {
    **_prefixed("m meter metre", "numcdk", _unit(1, m=1)),
    **_prefixed("g gram gramme", "numk", _unit(1, g=1)),
    **_prefixed("s sec second", "num", _unit(1, s=1)),
    **_prefixed("L l liter litre", "mcd", _unit("1/1000", m=3)),
    **_prefixed("N newton", "mkM", _unit(1000, g=1, m=1, s=-2)),
    **_prefixed("J joule", "mkMG", _unit(1000, g=1, m=2, s=-2)),
    **_prefixed("W watt", "mkMG", _unit(1000, g=1, m=2, s=-3)),
    **_prefixed("Wh", "kM", _unit(3600000, g=1, m=2, s=-2)),
    **_prefixed("Pa pascal", "hkMG", _unit(1000, g=1, m=-1, s=-2)),
    **_prefixed("A ampere amp", "num", _unit(1, A=1)),
    **_prefixed("V volt", "numkM", _unit(1000, g=1, m=2, s=-3, A=-1)),
    **_prefixed("Ω", "mkM", _unit(1000, g=1, m=2, s=-3, A=-2)),
    **_prefixed("C coulomb", "num", _unit(1, A=1, s=1)),
    **_prefixed("Hz hertz", "kMG", _unit(1, s=-1)),
    **_prefixed("cal calorie", "k", _unit(4184, g=1, m=2, s=-2)),
    **_prefixed("eV", "kMG", _unit("1.602176634e-16", g=1, m=2, s=-2)),
    **dict.fromkeys(("min", "minute"), _unit(60, s=1)),
    **dict.fromkeys(("h", "hr", "hour"), _unit(3600, s=1)),
    **dict.fromkeys(("day", "d"), _unit(86400, s=1)),
    "week": _unit(604800, s=1),
    **dict.fromkeys(("in", "inch", "inches"), _unit("0.0254", m=1)),
    **dict.fromkeys(("ft", "foot", "feet"), _unit("0.3048", m=1)),
    **dict.fromkeys(("yd", "yard"), _unit("0.9144", m=1)),
    **dict.fromkeys(("mi", "mile"), _unit("1609.344", m=1)),
    "mph": _unit("0.44704", m=1, s=-1),
    **dict.fromkeys(("t", "ton", "tonne"), _unit(10**6, g=1)),
    **dict.fromkeys(("lb", "lbs", "pound"), _unit("453.59237", g=1)),
    **dict.fromkeys(("oz", "ounce"), _unit("28.349523125", g=1)),
    # Degrees of heat have zeros of their own, so they are not converted.
    **dict.fromkeys(("°C", "degree C", "degrees C", "celsius", "Celsius"), _unit(1, celsius=1)),
    **dict.fromkeys(("°F", "degree F", "degrees F", "fahrenheit", "Fahrenheit"), _unit(1, fahrenheit=1)),
    **dict.fromkeys(("K", "kelvin"), _unit(1, kelvin=1)),
    "°": _unit(1, degree=1),
    # 180 / pi, as near as a double has it.
    **dict.fromkeys(("rad", "radian"), _unit(57.29577951308232, degree=1)),
    _PERCENT: Unit(Fraction(1), {_PERCENT: 1}),
    **dict.fromkeys(("$", "dollar", "USD"), _unit(1, dollar=1)),
    **dict.fromkeys(("¢", "cent"), _unit("1/100", dollar=1)),
    **dict.fromkeys(("€", "euro", "EUR"), _unit(1, euro=1)),
    **dict.fromkeys(("£", "GBP"), _unit(1, pound=1)),
    **dict.fromkeys(("¥", "yen", "yuan"), _unit(1, yen=1)),
    # Says nothing.
    "unit": Unit(),
}
_WORD = re.compile(r"(?P<name>°?[A-Za-zµΩ]+|[°%$¢€£¥])(?:\s*\^\s*(?P<power>[+-]?\d)|(?P<digit>\d))?\.?")
_POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}
# A count of things is no product: their words are one unit of its own.
_THINGS = re.compile(r"(?!(?:sin|cos|tan|log|sqrt)\b)[A-Za-z]{3}[A-Za-z' -]*")


def parse_unit(text: str) -> Unit | None:
    """A unit such as `cm^2`, `square feet`, `kg m/s^2`, `miles per hour`, `apples`; None where it is none."""
    text = re.sub(r"\bper\b", "/", text).strip().rstrip(".")
    if text in _UNITS:
        return _UNITS[text]
    unit, sign, position, power_ahead, name = Unit(), 1, 0, 1, ""
    while position < len(text):
        if text[position] in " */":
            sign = -1 if text[position] == "/" else sign
            position += 1
            continue
        word = _WORD.match(text, position)
        if word is None:
            return None
        position, name = word.end(), word["name"]
        if name in ("squared", "cubed"):
            return None if len(unit.dimension) != 1 else unit ** _POWERS[name]
        if name in _POWERS:
            power_ahead = _POWERS[name]
            continue
        known = _known(name)
        if known is None:
            # A word that is no unit: what is counted.
            things = text.lower().removesuffix("s")
            return Unit(Fraction(1), {things: 1}) if _THINGS.fullmatch(text) else None
        unit *= known ** (sign * power_ahead * int(word["power"] or word["digit"] or 1))
        power_ahead = 1
    return None if position and not name else unit


def _known(name: str) -> Unit | None:
    for one in (name, name.removesuffix("s"), name.lower(), name.lower().removesuffix("s")):
        # "Km" is read as km, but "MA" is not "mA".
        if one in _UNITS and (one[:1] == name[:1] or len(one) > 2):
            return _UNITS[one]
    return None
