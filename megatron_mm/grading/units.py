"""Units of measurement, from pint; and what it does not have: money, percent, counted things, Chinese names."""

import functools
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pint

PERCENT = "%"
_DEGREE = "degree"


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit: `factor` times base units to their powers, and where its zero lies.

    Attributes:
        dimension: power of each base unit: those of SI (but degrees for angles), a currency, "%", or a word for what
            is counted.
        zero: of a scale of temperature, in kelvins.
        is_known: false for a word that is no unit, which says what is counted.
    """

    factor: Fraction = Fraction(1)
    dimension: dict[str, int] = field(default_factory=dict)
    zero: Fraction = Fraction(0)
    is_known: bool = True

    def __mul__(self, other: "Unit") -> "Unit":
        if self == Unit():
            return other
        powers = {
            base: self.dimension.get(base, 0) + other.dimension.get(base, 0)
            for base in {*self.dimension, *other.dimension}
        }
        known = self.is_known and other.is_known
        return Unit(
            self.factor * other.factor, {base: power for base, power in powers.items() if power}, is_known=known
        )

    def __pow__(self, power: int) -> "Unit":
        if power == 1:
            return self
        powers = {base: one * power for base, one in self.dimension.items() if power}
        return Unit(self.factor**power, powers, is_known=self.is_known)

    def converted(self, value: Fraction, to: "Unit") -> Fraction | None:
        """Return a value of this unit in another one; None where they measure different things."""
        if self.dimension != to.dimension:
            return None
        return (value * self.factor + self.zero - to.zero) / to.factor


def _money(code: str, factor: Fraction | int = 1) -> Unit:
    return Unit(Fraction(factor), {code: 1})


_CENT = Fraction(1, 100)
# Symbols, codes and words of the currencies that we have met in data; no library reads `Rs. 500` or `35p`.
CURRENCIES: dict[str, Unit] = {
    **dict.fromkeys(("$", "US$", "USD", "dollar", "US dollar", "U.S. dollar", "buck"), _money("USD")),
    **dict.fromkeys(("¢", "cent"), _money("USD", _CENT)),
    **dict.fromkeys(("€", "EUR", "euro"), _money("EUR")),
    **dict.fromkeys(("£", "GBP"), _money("GBP")),
    **dict.fromkeys(("p", "pence", "penny"), _money("GBP", _CENT)),
    **dict.fromkeys(("¥", "yen", "yuan"), _money("¥")),
    **dict.fromkeys(("JPY", "Japanese yen"), _money("JPY")),
    **dict.fromkeys(("CNY", "RMB", "renminbi", "元"), _money("CNY")),
    **dict.fromkeys(("角", "jiao"), _money("CNY", Fraction(1, 10))),
    **dict.fromkeys(("₹", "Rs.", "Rs", "INR", "rupee"), _money("INR")),
    **dict.fromkeys(("HK$", "HKD", "Hong Kong dollar"), _money("HKD")),
    **dict.fromkeys(("A$", "AU$", "AUD", "Australian dollar"), _money("AUD")),
    **dict.fromkeys(("C$", "CA$", "CAD", "Canadian dollar"), _money("CAD")),
    **dict.fromkeys(("CHF", "Swiss franc"), _money("CHF")),
    **dict.fromkeys(("₩", "KRW", "won"), _money("KRW")),
    **dict.fromkeys(("₽", "RUB", "rouble", "ruble"), _money("RUB")),
}
# ¥ and "yen" are written for the money of Japan and of China.
_SAME_MONEY = {"¥": ("JPY", "CNY")}
_CHINESE_PREFIXES = {
    "毫": "milli",
    "厘": "centi",
    "分": "deci",
    "千": "kilo",
    "微": "micro",
    "纳": "nano",
    "兆": "mega",
}
_CHINESE_UNITS = {
    **{
        before + name: prefix + unit
        for name, unit in {
            "米": "meter", "克": "gram", "升": "liter", "瓦": "watt", "瓦特": "watt", "伏": "volt", "伏特": "volt",
            "安": "ampere", "安培": "ampere", "焦": "joule", "焦耳": "joule", "牛": "newton", "牛顿": "newton",
            "帕": "pascal", "帕斯卡": "pascal", "赫兹": "hertz", "秒": "second", "欧": "ohm", "欧姆": "ohm",
            "库仑": "coulomb", "摩尔": "mole", "卡": "calorie", "法拉": "farad", "亨": "henry", "特斯拉": "tesla",
        }.items()
        for before, prefix in {"": "", **_CHINESE_PREFIXES}.items()
    },
    "公里": "kilometer", "里": "(500 meter)", "公斤": "kilogram", "吨": "metric_ton", "斤": "(500 gram)",
    "小时": "hour", "时": "hour", "分钟": "minute", "分": "minute", "天": "day", "日": "day", "周": "week",
    "星期": "week", "月": "month", "个月": "month", "年": "year", "度": "degree", "摄氏度": "°C", "公顷": "hectare",
    "弧度": "radian", "元": "CNY", "块": "CNY", "角": "jiao", "美元": "USD", "日元": "JPY", "欧元": "EUR",
    "英镑": "GBP",
    "人民币": "CNY", "港元": "HKD", "寸": "(1/30 meter)", "尺": "(1/3 meter)", "毫升": "milliliter",
}  # fmt: skip
# Names that pint does not read, or reads as something that answers do not mean (its ton is 2,000 lb).
_ALIASES = {
    "°C": "degree_Celsius", "°F": "degree_Fahrenheit", "celsius": "degree_Celsius", "fahrenheit": "degree_Fahrenheit",
    "deg": "degree", "ton": "metric_ton", "gramme": "gram", "kilogramme": "kilogram", "rev": "revolution",
    "sec": "second", "hr": "hour", "yr": "year", "km/h": "kph", "kmh": "kph", "kmph": "kph", "Ω": "ohm",
    "mph": "mile_per_hour", "'": "foot", '"': "inch", "Km": "kilometer", "KM": "kilometer", "Kg": "kilogram",
    "KG": "kilogram", "CM": "centimeter",
}  # fmt: skip
_WORD = re.compile(
    r"(?P<name>°?[A-Za-zμΩÅ]+|[一-鿿]+|[°%'\"]|(?:US|HK|AU?|CA?)?\$|[¢€£¥₹₩₽])"
    r"(?:\s*\^\s*(?P<power>[+-]?\d)|(?P<digit>-?\d))?\.?"
)
_POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}
# Functions are products of no units, and words beside a number are no units where they judge it.
_THINGS = re.compile(r"(?!(?:sin|cos|tan|log|sqrt|root|mod|and|or|not|but)\b)[A-Za-z]{3}[A-Za-z' -]*|[一-鿿]+")
_FORCE_WORDS = re.compile(r"\b(?:per|a|each|every)\b(?=\s+[A-Za-z])|每")


@functools.cache
def _registry() -> Any:  # pint's own type says nothing of Fraction
    of_numbers: Any = Fraction
    return pint.UnitRegistry(non_int_type=of_numbers, cache_folder=None, autoconvert_offset_to_baseunit=True)


def parse_unit(text: str) -> Unit | None:
    """Return a unit such as `cm^2`, `square feet`, `kg m/s^2`, `miles per hour`, `apples`; None where it is none.

    One of dimension {} says nothing: "units", or no text at all.
    """
    text = re.sub(r"(?<=[^\s])\s*平方(?=米)", "平方", _FORCE_WORDS.sub("/", text)).strip().rstrip(".").strip()
    if (whole := _currency(text)) is not None:
        return whole
    unit, sign, position, power_ahead, name = Unit(), 1, 0, 1, ""
    while position < len(text):
        if text[position] in " */()":
            sign = -1 if text[position] == "/" else sign
            position += 1
            continue
        word = _WORD.match(text, position)
        if word is None:
            return None
        position, name = word.end(), word["name"]
        if name in ("squared", "cubed"):
            return None if len(unit.dimension) == 0 else _last_power(unit, _POWERS[name], sign)
        if name in _POWERS:
            power_ahead = _POWERS[name]
            continue
        if (ahead := re.match("平方|立方", name)) and len(name) > 2:
            power_ahead, name = {"平方": 2, "立方": 3}[ahead[0]], name[2:]
        known = _known(name)
        if known is None:
            return _things(text)
        unit *= known ** (sign * power_ahead * int(word["power"] or word["digit"] or 1))
        power_ahead = 1
    return None if position and not name else unit


def _last_power(unit: Unit, power: int, sign: int) -> Unit | None:
    """Return `meters squared`, or `meters per second squared`, whose second is meant."""
    if sign > 0:
        return unit**power if len(unit.dimension) == 1 else None
    return unit * Unit(dimension={"second": 1}) ** (-(power - 1)) if unit.dimension.get("second") == -1 else None


def _things(text: str) -> Unit | None:
    """Return a word for what is counted as a unit of its own."""
    if not _THINGS.fullmatch(text):
        return None
    words = text.lower().split()
    return Unit(Fraction(1), {" ".join(word.removesuffix("s") for word in words): 1}, is_known=False)


def _currency(name: str) -> Unit | None:
    for one in (name, name.removesuffix("s"), name.lower(), name.lower().removesuffix("s")):
        if one in CURRENCIES and (len(one) > 1 or one == name):
            return CURRENCIES[one]
    return None


@functools.lru_cache(maxsize=4096)
def _known(name: str) -> Unit | None:
    """Return a unit by its name, in singular or plural; `Km` is km, but `MA` is not mA."""
    if name in ("unit", "units"):
        return Unit()
    if name in ("%", "percent"):
        return Unit(Fraction(1), {PERCENT: 1})
    if (money := _currency(name)) is not None:
        return money
    if name in _CHINESE_UNITS:
        return _known(_CHINESE_UNITS[name])
    if scaled := re.fullmatch(r"\((\d+)(?:/(\d+))? (\w+)\)", name):
        base = _known(scaled[3])
        factor = Fraction(int(scaled[1]), int(scaled[2] or 1))
        return base and Unit(base.factor * factor, base.dimension)
    names = [name, name.removesuffix("s"), name.lower(), name.lower().removesuffix("s")]
    # A capital makes another unit of a symbol, but not of a word.
    names = [one for one in names if one and (one[:1] == name[:1] or len(one) > 2)]
    names = [_ALIASES[one] for one in names if one in _ALIASES] + names
    return next((unit for one in names if (unit := _of_pint(one)) is not None), None)


def _of_pint(name: str) -> Unit | None:
    registry = _registry()
    try:
        factor, base = registry.get_base_units(name, check_nonmult=False)
        powers = {one: int(power) for one, power in base._units.items()}
    except Exception:  # noqa: BLE001 - pint raises of every kind for what is no name
        return None
    if not powers:
        return None
    factor, zero = Fraction(factor), Fraction(0)
    if powers.get("radian"):
        # Degrees are exact, radians are as near as pint's 49 digits of pi.
        degree = Fraction(registry.get_base_units(_DEGREE)[0])
        factor /= degree ** powers["radian"]
        powers[_DEGREE] = powers.pop("radian")
    if powers == {"kelvin": 1} and name.startswith("degree_"):
        zero = Fraction(registry.Quantity(Fraction(0), name).to("kelvin").magnitude)
    return Unit(factor, powers, zero)


def same_money(one: Unit, other: Unit) -> bool:
    """Whether both may be the same money, although a sign like ¥ stands for several."""
    if len(one.dimension) != 1 or len(other.dimension) != 1:
        return False
    (first,), (second,) = one.dimension, other.dimension
    return second in _SAME_MONEY.get(first, ()) or first in _SAME_MONEY.get(second, ())
