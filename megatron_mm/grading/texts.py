"""Words: the same ones, in any case; lists of them, in any order where none is asked for."""

import re
from collections import Counter

from megatron_mm.grading.wrappings import FONTS

# No words of a language: functions, names of letters, what joins numbers.
_MATHEMATICAL = frozenset(
    re.findall(
        r"\w+",
        "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp sqrt root lim min max gcd lcm mod det inf"
        " infinity and alpha beta gamma delta theta lambda sigma omega phi rad",
    )
)
# Words that are no products: `on` is not `no`. Other letters side by side may be.
_SHORT_WORDS = frozenset(
    re.findall(
        r"\w+",
        "no on up us uk am pm ne nw se sw is it in of to at by he me my we go do so an as be or if hi ok",
    )
)
_WORD = re.compile(r"[^\W\d_]{3,}")
_FORMULA = re.compile(r"[\\^=<>{}|_]|\d\s*[*/]\s*\d")
_CHINESE = re.compile("[一-鿿]")
_ARTICLE = re.compile(r"\A(?:the|an?)\s+(?=\S)")
_DIRECTION = re.compile(r"\b(north|south)[ -](east|west)\b")
_SPELLINGS = [
    (re.compile(r"\bgray(?=\b|ish)"), "grey"), (re.compile(r"\b(col|fav|flav|neighb|harb|hon)or"), r"\1our"),
    (re.compile(r"\bcenter\b"), "centre"), (re.compile(r"\baluminum\b"), "aluminium"),
    (re.compile(r"\bsulfur"), "sulphur"),
    (re.compile(r"\A(?:d\.?n\.?e|undefined|none exists)\Z"), "does not exist"),
]  # fmt: skip
_BULLET = re.compile(r"(?:\A|(?<=\n))\s*(?:[-*•]|\(?\d{1,2}[.)])\s+")
_BETWEEN = re.compile(
    r"\s*(?:[,;\n]\s*(?:(?:and|or|then)\b)?|\b(?:and|or|then)\b|&|->|\\text\s*\{\s*(?:and|or)\s*\}|、|和|或)\s*"
)
_CIRCLED = re.compile("[①-⑳]")
_CIRCLED_LIST = re.compile(r"[①-⑳](?:\s|[,;、和与及]|and)*(?:[①-⑳](?:\s|[,;、和与及]|and)*)*")


def is_text(reference: str) -> bool:
    """Whether a reference is words rather than mathematics or a quantity."""
    if _CIRCLED_LIST.fullmatch(reference.strip()):
        return True
    if _CHINESE.search(reference) and not re.search(r"[\d=<>]", reference):
        return True
    reference = re.sub(rf"\\(?:{'|'.join(FONTS)})\s*\{{([^{{}}]*)\}}", r"\1", reference)
    if _FORMULA.search(reference):
        return False
    words = {word.casefold() for word in _WORD.findall(reference)}
    return bool(words - _MATHEMATICAL) or "&" in reference


def are_short_words(answer: str, reference: str) -> bool:
    """Whether one of two is a short word, no product."""
    return not _SHORT_WORDS.isdisjoint((answer.casefold(), reference.casefold()))


def equal_words(answer: str, reference: str) -> bool:
    """Whether two texts have the same words, whatever their case and punctuation; a leading article does not count."""
    given, right = words(answer), words(reference)
    return given == right != ""


def words(text: str) -> str:
    """Return a text in lower case, with single spaces and without punctuation that says nothing."""
    text = re.sub(rf"\\(?:{'|'.join(FONTS)})\s*\{{([^{{}}]*)\}}", r"\1", text)
    text = re.sub(r"\\(triangle|angle)(?![A-Za-z])\s*", r"\1 ", text)
    text = re.sub(r"[\"'!?`]|(?<!\d)\.|\.(?!\d)|\\(?=[&%$ ])", "", text.casefold())
    text = re.sub(r"(?<=[一-鿿])\s+(?=[一-鿿])", "", text)
    text = _DIRECTION.sub(r"\1\2", " ".join(text.replace(",", " , ").split()))
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = re.sub(r"(?<=[a-z])-(?=[a-z])|(?<=\d)(?=[ap]m\b)", " ", text)
    return _ARTICLE.sub("", text).strip(" ,;:")


def equal_word_lists(answer: str, reference: str, in_order: bool) -> bool | None:
    """Whether two lists name the same; None where the reference is no list. `or` is not `and`."""
    if _CIRCLED_LIST.fullmatch(reference.strip()):
        return bool(_CIRCLED_LIST.fullmatch(answer.strip())) and set(_CIRCLED.findall(answer)) == set(
            _CIRCLED.findall(reference)
        )
    right = items(reference)
    if len(right) < 2:
        return None
    joints = [set(re.findall(r"\b(?:and|or)\b", text.casefold())) for text in (answer, reference)]
    if {"and"} in joints and {"or"} in joints:
        return False
    given, right = [words(one) for one in items(answer)], [words(one) for one in right]
    return given == right if in_order else Counter(given) == Counter(right)


def items(text: str) -> list[str]:
    """Return the parts of a list: `[a, b]`, `a; b and c`, `- a` and `- b` in lines, `['a', 'b']`."""
    text = text.strip()
    if len(text) > 1 and text[0] + text[-1] in ("[]", "()", "{}"):
        text = text[1:-1]
    text = _BULLET.sub("\n", text).strip()
    return [part.strip(" '\"") for part in _BETWEEN.split(text) if part.strip(" '\"")]
