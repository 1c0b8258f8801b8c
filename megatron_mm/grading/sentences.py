"""The one answer that a sentence holds: `There are 5 apples.`, `It is a cat, not a dog.`

A sentence that hedges, denies, compares or offers several values holds none.
"""

import re

from megatron_mm.grading.numerals import in_digits

_WORD = re.compile(r"[A-Za-z]{2,}")
_HEDGES = re.compile(
    r"\b(?:not|never|no|none|nothing|neither|nor|cannot|can't|\w+n't|or|either|between|at\s+least|at\s+most|more|less|fewer"
    r"|greater|smaller|larger|over|under|above|below|after|before|until|since|maybe|perhaps|might|may|could|would|should"
    r"|possibly|probably|unless|if|except|but|however|anything|any|unknown|unsure|minimum|maximum|up\s+to|wrong"
    r"|incorrect|false|mark|grader|increased?|decreased?|loss|lost|off|lower|higher|almost|nearly|half|twice|double)\b"
    r"|\?",
    re.IGNORECASE,
)
# `It isn't 42, it's 24`, `I first got 42, but the correct answer is 45`: what is said in the end.
_CORRECTION = re.compile(
    r"\A(?P<denied>[^,;.]*(?:\bnot\b|n't\b|\bfirst\b|\binitially\b)[^,;.]*)[,;]\s*(?:but\s+)?"
    r"(?P<said>(?:it(?:'s|\s+is)|the\s+(?:correct\s+|right\s+|real\s+)?(?:answer|value|result)\s+is)\s+.+)\Z",
    re.IGNORECASE,
)
_DENIED_BEHIND = re.compile(r"\A(?P<said>[^,;]+),\s*(?:and\s+)?not\s+[^,;]+\Z", re.IGNORECASE)
_CONCLUSION = re.compile(r"[,;.]\s*(?:so|thus|therefore|hence)\b,?\s*", re.IGNORECASE)
_WHOLE = re.compile(
    r"\bout\s+of\s+(?:the\s+)?\d[\d,]*|\A\s*of\s+(?:the\s+|these\s+)?\d[\d,]*\s+[A-Za-z ]+,", re.IGNORECASE
)
_IS = re.compile(r"\b(?:is|are|was|were|equals?|'s)\s+", re.IGNORECASE)
_NAME_IS = re.compile(
    r"\A(?:the\s+(?:[a-z]+\s+){1,4}?(?:of\s+)?)?(?P<name>(?:\\angle\s*)?[A-Za-z]{1,3}(?:_\w)?)\s+(?:is|equals|=)\s+(?P<value>(?!not\b)\S.*)\Z"
)
_NAMED = re.compile(r"\A(?:[A-Z]{2,3}|[a-zA-Z](?:_\w)?|\\angle\s*[A-Z]{1,3}|pO?H)\Z")
_NUMBER = re.compile(r"(?<![\^\w{.])[-+]?(?:[$€£¥]\s?)?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?%?")
_TIME = re.compile(r"\d{1,2}:\d\d(?:\s*[ap]m)?|\d{1,2}\s*[ap]m\b", re.IGNORECASE)
_OPENING = re.compile(
    r"\A(?:thus|so|hence|therefore|then|and|in|there\s+(?:is|are|were|was)|it\s+(?:is|was|happened\s+in))\b,?\s*",
    re.IGNORECASE,
)
_YES_OR_NO = re.compile(r"\A(?P<word>yes|no|true|false)\b[,.;:!]\s*(?P<rest>.*)\Z", re.IGNORECASE | re.DOTALL)


def last_said(text: str) -> str:
    """Return a text without what it takes back: `24` is left of `It isn't 42, it's 24`."""
    if correction := _CORRECTION.match(text):
        return _IS.split(correction["said"], maxsplit=1)[-1].strip()
    if denied := _DENIED_BEHIND.match(text):
        return denied["said"].strip()
    return text


def named(text: str) -> str:
    """Return `x = 5` for `the value of x is 5`; any other text as it is."""
    match = _NAME_IS.match(text)
    if match is None or not _NAMED.match(match["name"]) or _HEDGES.search(match["value"]):
        return text
    return f"{match['name']} = {match['value']}"


def value_in(sentence: str) -> str | None:
    """Return the only number in a sentence, with what stands behind it; None where it holds none or several."""
    if not _WORD.search(sentence) or "\n" in sentence.strip():
        return None
    text = _CONCLUSION.split(last_said(sentence))[-1]
    text = _WHOLE.sub(" ", text)
    text = in_digits(text) if not _NUMBER.search(text) else text
    if _HEDGES.search(text) or "=" in text or "\\" in text:
        return None
    if times := _TIME.findall(text):
        return times[0] if len(times) == 1 else None
    numbers = list(_NUMBER.finditer(text))
    if len(numbers) != 1:
        return None
    number = numbers[0]
    is_part_of_word = re.search(r"[A-Za-z_\-/:]\Z", text[: number.start()]) or re.match(
        r"[:\-/]\w", text[number.end() :]
    )
    before = _OPENING.sub("", text[: number.start()]).strip()
    if is_part_of_word or (before and not _WORD.search(before)):
        return None
    # A unit, if the next word is one: `63 students`, `49 cm^2`; the rest of the sentence says nothing of the value.
    unit = re.match(r"\s*(?:[A-Za-zμΩ°]+(?:\s*[\^/]\s*\{?-?[A-Za-z\d]+\}?)*)?", text[number.end() :])
    assert unit is not None  # it matches nothing as well
    return (number[0] + unit[0]).strip()


def holds_words(sentence: str, reference: str, question: str) -> bool:
    """Whether what a sentence says of its subject is the reference and nothing else.

    `The man is wearing a red hat` says `red` where the question names the hat; `the hat is dark red` does not.
    """
    sentence = last_said(sentence.strip()).rstrip(".!")
    if (word := _YES_OR_NO.match(sentence)) and not re.search(r"\byes\b|\bno\b", word["rest"], re.IGNORECASE):
        return word["word"].casefold() == reference.casefold()
    if re.search(r"[,;:\n]", sentence) or _HEDGES.search(sentence):
        return False
    clauses = _IS.split(sentence)
    wanted = reference.casefold().split()
    said = [word.strip("'\".") for word in clauses[-1].casefold().split()]
    if len(clauses) != 2:
        # `It stays the same` has no `is`.
        said = re.sub(r"\A(?:it|they|he|she|this|that)\s+", "", sentence.casefold()).split()
        return len(clauses) == 1 and said == wanted and sentence.casefold() != reference.casefold()
    asked = set(re.findall(r"[a-z]+", question.casefold()))
    said = said[1:] if said and said[0].endswith("ing") and said[0] not in wanted else said
    said = [word for word in said if word in wanted or word not in asked | {"a", "an", "the"}]
    return said == [word for word in wanted if word not in ("a", "an", "the") or word in said]
