"""What stands around an answer and says nothing of it: tags, `$..$`, boxes, bold, quotes, "The answer is", 答案为."""

import re

from megatron_mm.chat.modes import bare_answer
from megatron_mm.grading.characters import plain_characters
from megatron_mm.grading.formats import last_box

FONTS = ("text", "textbf", "textit", "textrm", "mathbf", "mathrm", "mathit", "underline", "mbox")
_ANSWER = r"(?:the\s+|my\s+)?(?:final\s+|correct\s+|right\s+)?(?:answer|option|choice|result)"
_IS = r"(?:is\b(?!\s+not\b|n't)\s*:?|:|=|-(?=\s))"
_SAID_BEFORE = re.compile(
    rf"\A(?:(?:(?:so|thus|hence|therefore)\b,?\s*)?{_ANSWER}\s*{_IS}"
    # In bold, with the colon inside or behind.
    rf"|\*\*{_ANSWER}\s*(?:{_IS}\s*\*\*|\*\*\s*{_IS})"
    r"|(?:correct|solution)\s*[:.]|(?:so|thus|hence|therefore)\b,?(?=\s*[\\$(\d])|about\b|approximately\b|around\b"
    r"|roughly\b|≈|~(?=\s*\d)|\\approx(?![a-z])|\\sim(?![a-z])|=|:(?=\s*\S))\s*",
    re.IGNORECASE,
)
_SAID_BEFORE_IN_CHINESE = re.compile(
    r"\A(?:(?:因此|所以|故而|综上所述|综上|由此可得|于是)[,:]?\s*)?"
    r"(?:故?(?:最终|最后|正确|本题)?的?(?:答案|结果)(?:应?(?:为|是|选)|:)\s*:?|解\s*:|答\s*:|故?应?选(?:择|项)?\s*(?:为|是)?\s*:?|选项)\s*"
    r"|\A(?:因此|所以|故|综上所述|综上|由此可得|于是|约为|大约|约|共有|共|一共(?:有)?)[,:]?\s*(?=[\dA-Za-z\\$一二三四五六七八九十(])"
)
_SAID_BEHIND = re.compile(
    r"(?<=[\dA-Z)])\s*(?:is\s+(?:the\s+)?(?:correct|right)(?:\s+(?:answer|option|choice))?|选项|是正确的|正确)\s*\.?\Z"
)
_NAMED_IN_CHINESE = re.compile(
    r"\A(?P<name>[A-Za-z∠\\ ]{1,12}?)\s*的?(?:长度?|值|面积|周长|度数|大小|取值范围)?\s*(?:为|是|等于)\s*(?=\S)"
)
_AROUND = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("```", "```"), ("`", "`")]
_AROUND += [('"', '"'), ("'", "'"), ("<", ">"), ("``", "''"), ("「", "」")]
_AROUND += [(rf"\{font}{{", "}") for font in FONTS]
_COLOUR = re.compile(r"\A\\(?:color|textcolor)\s*\{[a-z]+\}\s*(?=\{)")
_DISPLAY = re.compile(r"\A(?:\\displaystyle|\\[,;:! ]|\\q?quad)\s*|(?:\\[,;:! ]|\\q?quad)\s*\Z")
# What LaTeX takes for a remark; after plain text a percent sign is one.
_REMARK = re.compile(r"(?<!\\)%\s+\S.*\Z", re.DOTALL)
# `5 (five)`
_SAID_TWICE = re.compile(r"\A(\d+)\s*\(\s*([a-z]+(?:[ -][a-z]+)*)\s*\)\Z")
_HALF_DAY = re.compile(r"\b([ap])\.m\b\.?", re.IGNORECASE)
# More layers than this nobody writes.
_MAX_LAYERS = 8


def bare(text: str) -> str:
    """Return an answer or reference in plain characters, without what is around it."""
    text = plain_characters(text)
    for _ in range(_MAX_LAYERS):
        before = text
        text = _SAID_BEFORE.sub("", bare_answer(text))
        text = _SAID_BEFORE_IN_CHINESE.sub("", _SAID_BEHIND.sub("", text))
        text = _NAMED_IN_CHINESE.sub(r"\g<name> = ", text)
        text = text.removesuffix(".").rstrip() if not text.endswith("..") and text != "." else text
        text = _DISPLAY.sub("", _COLOUR.sub("", text)).strip()
        if "\\" in text:
            text = _REMARK.sub("", text).strip() or text
        for opening, closing in _AROUND:
            text = _without(text, opening, closing)
        if text.startswith("{") and text.endswith("}") and text[1:-1].isalnum():
            text = text[1:-1]
        text = last_box(text) or text
        if text == before:
            break
    return _HALF_DAY.sub(r"\1m", _SAID_TWICE.sub(r"\1", text))


def _without(text: str, opening: str, closing: str) -> str:
    inside = text.removeprefix(opening).removesuffix(closing)
    # Not the sign of dollars, nor feet and inches.
    marks = inside.replace(r"\$", "")
    is_around = len(inside) == len(text) - len(opening + closing) and closing not in marks and opening not in marks
    return inside.strip() or text if is_around else text
