"""Characters that mean what plainer ones do: full-width letters, dashes, quotes, raised digits, fractions, signs.

Unicode's own compatible forms are no help: they make x² into x2.
"""

import re
import unicodedata

_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₙₓ", "0123456789+-=()aenx", strict=True))
_RUN = re.compile("[" + "".join(_RAISED) + "]+|[" + "".join(_LOWERED) + "]+")
_SHIFTED = str.maketrans({**_RAISED, **_LOWERED})
# U+FF01 to U+FF5E are ASCII's, each as wide as a Chinese character.
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_PLAIN = _FULL_WIDTH | str.maketrans(
    {
        **dict.fromkeys("‐‑‒–—―−", "-"),
        **dict.fromkeys("\u3000\u00a0\u2009\u202f", " "),
        **dict.fromkeys("‘’′", "'"),
        **dict.fromkeys("“”″", '"'),
        "。": ".",
        "、": ",",
        "￠": "¢",
        "￡": "£",
        "￥": "¥",
        "∠": r"\angle ",
        "△": r"\triangle ",
        "∥": r"\parallel ",
        "⊥": r"\perp ",
        "℃": "°C",
        "℉": "°F",
        "Å": "Å",
        "µ": "μ",
        "∛": r"\sqrt[3]",
        "⁄": "/",
        "→": "->",
        "⟶": "->",
        "⇌": "<->",
        "…": "...",
    }
)
# One half and the like, each one character; with a whole number before it, it is a mixed number.
_FRACTION = re.compile("[¼-¾⅐-⅞]")


def plain_characters(text: str) -> str:
    """Return a text in ASCII and LaTeX, as far as its characters have such a form."""
    return _RUN.sub(_shifted, _FRACTION.sub(_fraction, text).translate(_PLAIN))


def _shifted(run: re.Match[str]) -> str:
    """Return `⁻³` as `^{-3}` and `₂` as `_2`."""
    mark, text = "^" if run[0][0] in _RAISED else "_", run[0].translate(_SHIFTED)
    return mark + (text if len(text) == 1 else f"{{{text}}}")


def _fraction(match: re.Match[str]) -> str:
    """Return `½` as `1/2`, and after a digit as ` 1/2`."""
    text = unicodedata.normalize("NFKD", match[0]).replace("⁄", "/")
    is_mixed = match.start() > 0 and match.string[match.start() - 1].isdecimal()
    return f" {text}" if is_mixed else text
