"""Characters that mean what plainer ones do: full-width letters and digits, dashes, raised and lowered digits, signs.

Unicode's own compatible forms are no help: they make x² into x2.
"""

import re

_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₙₓ", "0123456789+-=()aenx", strict=True))
_RUN = re.compile("[" + "".join(_RAISED) + "]+|[" + "".join(_LOWERED) + "]+")
_SHIFTED = str.maketrans({**_RAISED, **_LOWERED})
# U+FF01 to U+FF5E are ASCII's, each as wide as a Chinese character.
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_PLAIN = _FULL_WIDTH | str.maketrans(
    {
        **dict.fromkeys("‐‑‒–—―−", "-"),
        "\u3000": " ",
        "。": ".",
        "、": ",",
        "￠": "¢",
        "￡": "£",
        "￥": "¥",
        "∠": r"\angle ",
        "△": r"\triangle ",
        "℃": "°C",
        "℉": "°F",
    }
)


def plain_characters(text: str) -> str:
    """A text in ASCII and LaTeX, as far as its characters have such a form."""
    return _RUN.sub(_shifted, text.translate(_PLAIN))


def _shifted(run: re.Match[str]) -> str:
    """`⁻³` as `^{-3}`, `₂` as `_2`."""
    mark, text = "^" if run[0][0] in _RAISED else "_", run[0].translate(_SHIFTED)
    return mark + (text if len(text) == 1 else f"{{{text}}}")
