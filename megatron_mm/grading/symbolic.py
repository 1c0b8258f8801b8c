"""Single expressions, equations and matrices, compared exactly: latex2sympy reads them, sympy's numbers decide.

Two constants are equal where 150 digits are, whatever their size, so neither 1/2^99 and 1/2^98 nor 0 and 10^-30 are.
Two expressions with variables are equal where they are at several points, to many digits: an identity of the functions
that answers have cannot hold there by chance. Decimals are read as fractions. It may take any time and memory: see
workers.py.
"""

import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig
from sympy import Eq, Float, I, Ne, Rational, S, Symbol
from sympy.core.relational import Relational

# Capitals are other variables than small letters; the library's default makes them the same.
_CONVERSION = ConversionConfig(lowercase_symbols=False)
_AS_IT_IS = NormalizationConfig(
    basic_latex=False, units=False, malformed_operators=False, nits=False, boxed="none", equations=False
)
_DIGITS, _NEAR = 150, Rational(1, 10**140)
_DIGITS_AT_POINTS, _NEAR_AT_POINTS = 40, Rational(1, 10**30)
# What the values of the variables at a point begin with; positive, then of both signs.
_POINTS = ((1, 1, 1), (3, 2, 5), (7, 11, 4), (1, -1, 1), (-2, 3, -5), (-3, -2, -7))
_NUM_POSITIVE = 3
_MIN_POINTS = 2
# No expression: numbers side by side, primes (which the parser drops), words, characters of other scripts.
_UNREADABLE = re.compile(
    r"\d\s+\d|(?<![\\A-Za-z])[A-Za-z]\s+\d|'|\\text|\\mbox|[^\x00-\x7f]|(?<![\\A-Za-z])[A-Za-z]{13}"
)
_CAPITAL_I = re.compile(r"(?<![\\A-Za-z])I|(?<=[A-Z])I(?![a-z])")
_BRACED = [
    (re.compile(r"_\s*([A-Za-z\d])"), r"_{\1}"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\s*\{[^{}]*\})\s*(\d)"), r"\1{\2}"),
    (re.compile(r"(\\sqrt\s*\[[^\[\]]*\])\s*(\w)"), r"\1{\2}"),
    (re.compile(r"\\sqrt\s*(\d|[A-Za-z](?![A-Za-z])|\\[a-z]+)"), r"\\sqrt{\1}"),
    (re.compile(r"\\(?:mathrm|mathbf|mathit|operatorname|boldsymbol|rm|bf)\s*\{([A-Za-z])\}"), r"\1"),
    (re.compile(r"\\(?:mathrm|operatorname)\s*\{([a-z]{2,})\}"), r"\\\1 "),
    (re.compile(r"\\l?vert\b|\\rvert\b"), "|"),
    (re.compile(r"\\lg(?![a-z])"), r"\\log"),
    (re.compile(r"\^\s*\(([^()]*)\)"), r"^{\1}"),
    # A mixed number in plain text.
    (re.compile(r"(?<![\w.}])(\d+) +(\d+)/(\d+)(?![\d.])"), r"(\1+\\frac{\2}{\3})"),
]


def parsed(text: str) -> Any:
    """Return what a piece of LaTeX means, as an object of sympy; None where it cannot be told."""
    text = text.replace("$", "")
    for pattern, replacement in _BRACED:
        text = pattern.sub(replacement, text)
    if not re.search(r"\w|\\[a-z]", text) or _UNREADABLE.search(text):
        return None
    # latex2sympy takes I and I_1 for the imaginary unit; in physics they are currents.
    text = _CAPITAL_I.sub(r"\\check{I}", text)
    try:
        found = latex2sympy(text, convert_degrees=True, normalization_config=_AS_IT_IS, conversion_config=_CONVERSION)
        return _exact(found) if hasattr(found, "free_symbols") else None
    except (MemoryError, RecursionError):
        raise
    except Exception:  # noqa: BLE001 - the parser raises of every kind for what it cannot read
        return None


def _exact(found: Any) -> Any:
    """Replace decimals by fractions, and the variable i by the imaginary unit."""
    replaced: dict[Any, Any] = {one: Rational(str(one)) for one in found.atoms(Float)}
    replaced |= {one: I for one in found.free_symbols if getattr(one, "name", "") == "i"}
    found = (
        found.subs(replaced) if isinstance(found, sympy.MatrixBase) else found.xreplace(replaced) if replaced else found
    )
    if isinstance(found, sympy.Expr):
        # As quotients, for sympy does not work out a logarithm that is given its base and left unevaluated.
        found = found.replace(_has_base, lambda log: sympy.log(log.args[0]) / sympy.log(log.args[1]))
        # The real root of a negative number, which schools mean.
        found = found.replace(_is_odd_root, lambda power: -((-power.base) ** power.exp))
    return found


def _has_base(one: Any) -> bool:
    return isinstance(one, sympy.log) and len(one.args) > 1


def _is_odd_root(one: Any) -> bool:
    is_root = one.is_Pow and one.exp.is_Rational and one.exp.p % 2 == 1 and one.exp.q % 2 == 1 and one.exp.q > 1
    return bool(is_root and one.base.is_Rational and one.base < 0)


def equal_objects(one: Any, other: Any) -> bool:
    """Whether two objects of sympy mean the same; False too where that cannot be decided."""
    try:
        return _equal(one, other)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # noqa: BLE001 - sympy raises of every kind for what it cannot compare
        return False


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, sympy.MatrixBase) or isinstance(other, sympy.MatrixBase):
        if not (isinstance(one, sympy.MatrixBase) and isinstance(other, sympy.MatrixBase) and one.shape == other.shape):
            return False
        return all(_equal(first, second) for first, second in zip(one.flat(), other.flat(), strict=True))
    if isinstance(one, Relational) or isinstance(other, Relational):
        return isinstance(one, Relational) and isinstance(other, Relational) and _equal_relations(one, other)
    if isinstance(one, sympy.Set) or isinstance(other, sympy.Set):
        return one == other
    if not (isinstance(one, sympy.Expr) and isinstance(other, sympy.Expr)):
        return bool(one == other)
    if one == other:
        return True
    first, second = one.doit(), other.doit()
    if not first.free_symbols and not second.free_symbols:
        return _equal_constants(first, second)
    return _equal_functions(first, second)


def _equal_constants(one: Any, other: Any) -> bool:
    if one in (S.Infinity, S.NegativeInfinity) or other in (S.Infinity, S.NegativeInfinity):
        return one == other
    if one.is_Rational and other.is_Rational:
        return one == other
    values = one.evalf(_DIGITS), other.evalf(_DIGITS)
    return all(_is_number(value) for value in values) and _near(*values, _NEAR)


def _is_number(value: Any) -> bool:
    return bool(value.is_number and value.is_finite and not value.has(sympy.Integral, sympy.Sum, sympy.Limit))


def _near(one: Any, other: Any, share: Any) -> bool:
    return bool(abs(one - other) <= share * max(abs(one), abs(other)))


def _equal_functions(one: Any, other: Any) -> bool:
    """Whether two expressions agree wherever both are real, and at points with positive variables in any case."""
    pairs = list(_values(one, other, variables=one.free_symbols | other.free_symbols))
    num_positive = sum(is_positive for is_positive, _, _ in pairs)
    return num_positive >= _MIN_POINTS and all(_near(first, second, _NEAR_AT_POINTS) for _, first, second in pairs)


def _values(one: Any, other: Any, variables: Iterable[Any]) -> "Iterable[tuple[bool, Any, Any]]":
    """Yield whether the variables are positive, and both values, for each point at which there are such."""
    names = sorted(variables, key=str)
    both: Any = sympy.Tuple(one, other)
    # Roots and logarithms of negative numbers are left out: there an identity of real numbers need not hold.
    parts: list[Any] = list(sympy.preorder_traversal(both))
    guarded = [part.base for part in parts if _is_root(part)]
    guarded += [part.args[0] for part in parts if isinstance(part, sympy.log)]
    for index, point in enumerate(_POINTS):
        # Fractions that no formula is made for, other ones for each variable.
        chosen = {
            name: Rational(point[place % 3] * 1000 + 7 * place * (index + 1) + 13, 997 + 6 * place)
            for place, name in enumerate(names)
        }
        is_positive = index < _NUM_POSITIVE
        if not is_positive and any(_is_negative(part, chosen) for part in guarded):
            continue
        first, second = (part.subs(chosen).evalf(_DIGITS_AT_POINTS) for part in (one, other))
        if not (_is_number(first) and _is_number(second)):
            continue
        if is_positive or (first.is_real and second.is_real):
            yield is_positive, first, second


def _is_root(part: Any) -> bool:
    return bool(part.is_Pow and not part.exp.is_integer)


def _is_negative(part: Any, values: dict[Any, Any]) -> bool:
    value = part.subs(values).evalf(_DIGITS_AT_POINTS)
    return not value.is_real or bool(value < 0)


def _equal_relations(one: Any, other: Any) -> bool:
    """Whether one equation or inequality is a multiple of the other."""
    if isinstance(one, Eq | Ne) != isinstance(other, Eq | Ne):
        return False
    is_equation = isinstance(one, Eq | Ne)
    if is_equation and type(one) is not type(other):
        return False
    first, second = (_difference(relation) for relation in (one, other))
    if not is_equation and (one.rel_op in (">=", "<=")) != (other.rel_op in (">=", "<=")):
        return False
    if not first.free_symbols or first.free_symbols != second.free_symbols:
        return False
    ratios = [left / right for _, left, right in _values(first, second, first.free_symbols) if right != 0]
    if len(ratios) < _MIN_POINTS or ratios[0] == 0:
        return False
    return all(_near(ratio, ratios[0], _NEAR_AT_POINTS) for ratio in ratios) and (is_equation or bool(ratios[0] > 0))


def _difference(relation: Any) -> Any:
    """Return left less right, the other way round where less than is said."""
    left, right = relation.lhs, relation.rhs
    if not (isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr)):
        raise TypeError("sides that are no expressions")
    return (right - left).doit() if relation.rel_op in ("<", "<=") else (left - right).doit()


def constant(found: Any) -> Fraction | None:
    """Return a real constant to 60 digits as a fraction; None for anything else."""
    try:
        if not isinstance(found, sympy.Expr) or found.free_symbols:
            return None
        exact: Any = found.doit()
        value = exact if exact.is_Rational else exact.evalf(60)
        if not (_is_number(value) and value.is_real):
            return None
        return Fraction(int(value.p), int(value.q)) if value.is_Rational else Fraction(str(value))
    except (MemoryError, RecursionError):
        raise
    except Exception:  # noqa: BLE001 - sympy raises of every kind for what it cannot evaluate
        return None


def is_variable(found: Any) -> bool:
    """Whether it is a variable alone."""
    return isinstance(found, Symbol)
