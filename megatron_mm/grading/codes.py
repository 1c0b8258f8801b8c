"""Codes, plates, seats, versions, telephone numbers, sizes: texts that look like arithmetic, and are none."""

import re

# A telephone number or ISBN is its digits.
_PHONE = re.compile(r"(?:\+?\d{1,3}[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}|(?:97[89]-)?(?:\d+-){3}[\dX]")
_BY = re.compile(r"(?<=\d)\s*(?:\\times|\\cdot|[x×X*·]|\bby\b)\s*(?=\d)")
_SIZE = re.compile(r"\d+(?:\.\d+)?\s*by\s*\d+")
# Between letters and digits a space or a hyphen says nothing; between two numbers it does.
_JOINT = re.compile(r"(?<=[A-Za-z])[\s-]+(?=\d)|(?<=\d)[\s-]+(?=[A-Za-z])")
_LABEL = re.compile(r"(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z\d]+")
_VERSION = re.compile(r"v\d+(?:\.\d+)*|\d+(?:\.\d+){2,}", re.IGNORECASE)
_ZERO_AHEAD = re.compile(r"(?<![\d.,])(?<!\d )0\d")
_FONT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|rm)\s*\{([^{}]*)\}")
# A price or a measure that is printed somewhere is no code.
_MEASURE = re.compile(r"[$€£¥₹%°]|\d\s+(?!(?:x|X|by)\b)[A-Za-zμΩ]{1,}|\d(?:cm|mm|km|kg|ml|mL|mg|lb|oz|mph)\b")
_MEASURE_OF_LETTERS = re.compile(r"\d+\s+[A-Z]{1,4}(?:\s|\Z)")
_CODE = re.compile(r"(?=.*\d)[\w\s./:#+×*-]+|[^\W\d_]{1,3}|[A-Z]{2,}|.*\\times.*|[A-Za-z]{1,3}[+-]")


def equal_codes(answer: str, reference: str, question: str, keeps_case: bool) -> bool | None:
    """Whether two codes that are to be read off are the same; None where the reference looks like none.

    Args:
        question: its nouns may stand in front: `room B204`.
    """
    if _MEASURE.search(reference) and not _MEASURE_OF_LETTERS.search(reference):
        return None
    if not _CODE.fullmatch(reference.strip()):
        return None
    if _PHONE.fullmatch(reference.strip()):
        return _digits(answer) == _digits(reference)
    given, right = _plain(_without_nouns(answer, reference, question)), _plain(reference)
    return given == right if keeps_case else given.casefold() == right.casefold()


def equal_labels(answer: str, reference: str) -> bool | None:
    """Whether two are the same that are codes by their look, whatever is asked; None where none is.

    `A10` is no product, for nobody writes the factor behind the variable; nor is `0047-A` a difference.
    """
    given, right = _FONT.sub(r"\1", answer).strip(), _FONT.sub(r"\1", reference).strip()
    if _PHONE.fullmatch(right):
        return _digits(given) == _digits(right)
    if _SIZE.fullmatch(right) or (_SIZE.fullmatch(given) and _BY.search(right)):
        return _plain(given) == _plain(right)
    if _LABEL.fullmatch(given) and _LABEL.fullmatch(right):
        behind = [re.search(r"[A-Za-z]\d", text) is not None for text in (given, right)]
        return given.casefold() == right.casefold() if any(behind) else None
    if any(_ZERO_AHEAD.search(text) and re.search(r"[A-Za-z]", text) for text in (given, right)):
        return _plain(given).casefold() == _plain(right).casefold()
    if _VERSION.fullmatch(given) or _VERSION.fullmatch(right):
        return given.casefold() == right.casefold()
    return None


def _digits(text: str) -> str:
    return re.sub(r"[^\dX]", "", text) if re.fullmatch(r"[\d\s().+X-]+", text.strip()) else text


def _without_nouns(answer: str, reference: str, question: str) -> str:
    """Return an answer without the words in front of it that are the question's, and not the reference's."""
    asked, wanted = (set(re.findall(r"[a-z]{3,}", text.casefold())) for text in (question, reference))
    words = answer.split()
    while len(words) > 1 and words[0].casefold() in (asked | {"the", "no", "no.", "number"}) - wanted:
        words = words[1:]
    return " ".join(words)


def _plain(text: str) -> str:
    text = _BY.sub("x", _FONT.sub(r"\1", text))
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return " ".join(_JOINT.sub("", re.sub(r"\s*([:/.+-])\s*", r"\1", text.strip())).split())
