"""Numbers that are written in words, English and Chinese, as digits.

The words are read by text2num and cn2an. What neither knows is here: fractions (`three quarters`), mixed numbers
(`two and a half`), ordinals, `a dozen`.
"""

import re
import warnings

import cn2an
from text_to_num import alpha2digit

_ONES = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
)
_ONES += (
    "|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|half|quarters?|dozen"
)
_ORDINALS = "first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|[a-z]+(?:teen|tie)th"
_HAS_WORDS = re.compile(rf"\b(?:{_ONES}|{_ORDINALS})\b", re.IGNORECASE)
_HAS_CHINESE = re.compile("[〇零一二两三四五六七八九十百千半]")
# What stands in Chinese texts and counts nothing.
_NO_NUMBER = re.compile("第[一二三四]象限|一定|一样|一般|一些|唯一|统一|一次|二次|三角|四边|一元")
_CHINESE_NUMBER = re.compile("负?(?:百分之|[零一二两三四五六七八九十百]+分之)?[〇零一二两三四五六七八九十百千万亿点]+")
_ARTICLE = re.compile(
    r"\b(?:an?)[ -](?=(?:half|third|quarter|fourth|fifth|sixth|eighth|tenth|hundred|thousand|dozen)\b)"
)
_HALVES = [
    (re.compile(r"\A(?=(?:half|quarter)\b(?!\s+(?:past|to)\b))"), "one "),
    (re.compile(r"\b(?:halves|half)\b(?!\s+past)"), "2th"),
    (re.compile(r"\b(?:quarters?)\b(?!\s+(?:past|to)\b)"), "4th"),
]
_FRACTIONS = [
    # three 4ths
    (re.compile(r"\b(\d+)[ -](\d+)(?:st|nd|rd|th)s?\b"), r"\1/\2"),
    # 2 and 1/2
    (re.compile(r"\b(\d+)\s+and\s+(\d+/\d+)"), r"\1 \2"),
    (re.compile(r"\b(\d+)\s+over\s+(\d+)\b"), r"\1/\2"),
    (re.compile(r"\A(\d+)\s+(?:out\s+of|in)\s+(\d+)\Z"), r"\1/\2"),
    (re.compile(r"\b(?:minus|negative)\s+(?=\d)"), "-"),
    (re.compile(r"\A(\d+)\s*(?:st|nd|rd|th)\Z"), r"\1"),
]


def in_digits(text: str) -> str:
    """Return a text with its numbers in digits; those that count nothing (`second`, `no one`) may change too.

    It is for comparing numbers with numbers only.
    """
    if _HAS_CHINESE.search(text) and not _NO_NUMBER.search(text):
        text = _chinese(text)
    plain = text
    if _HAS_WORDS.search(text):
        plain = _ARTICLE.sub("one ", plain.lower())
        # A unit, unless it stands alone.
        plain = re.sub(r"(?<=\w )second\b", "seconds", plain)
        for pattern, replacement in _HALVES:
            plain = pattern.sub(replacement, plain)
        plain = alpha2digit(re.sub(r"(?<=[a-z\d])-(?=[a-z\d])", " ", plain), "en", 0)
    for pattern, replacement in _FRACTIONS:
        plain = pattern.sub(replacement, plain)
    return re.sub(r"(\d/\d+)\s+(?:of\s+)?an?\b", r"\1", plain)


def _chinese(text: str) -> str:
    def read(match: re.Match[str]) -> str:
        number = match[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return cn2an.transform(number)
            except ValueError:
                return number

    return _CHINESE_NUMBER.sub(read, text.replace("点半", ":30"))
