"""Multiple choice: `B`, `(B)`, `B. 12 cm`, `option B`, `A and C`, or the text of an option."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_mm.grading.characters import plain_characters

# MMMU has up to nine options; we have not seen more.
LETTERS = "ABCDEFGHIJ"
FONTS = ("text", "textbf", "textrm", "mathbf", "mathrm")
_LETTER = rf"[{LETTERS}]"
_LABEL = rf"(?:[(\[]\s*(?P<inside>{_LETTER}|{_LETTER.lower()})\s*[)\]]|(?P<plain>{_LETTER}|{_LETTER.lower()}))"
_WORD = r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s*(?:is\s*)?:?\s*)*"
# A letter that is followed by nothing, or by what sets it apart from the first word of a text.
_LABELLED = re.compile(rf"\s*(?i:{_WORD}){_LABEL}\s*(?:[.)]?\s*\Z|(?:(?<=[)\]])|[.:)])\s*(?P<text>\S.*))\Z", re.DOTALL)
_SEVERAL = re.compile(
    rf"\s*(?i:{_WORD}|options\s*)(?P<all>\(?{_LETTER}\)?(?:\s*+(?:(?:,|and|&|/)\s*+)*+\(?{_LETTER}\)?)++)\.?\s*"
)
_ANOTHER = re.compile(rf"(?:\b(?:or|and)\b|[,/;])\s*\(?({_LETTER})(?:[.:)]|\Z)")
_JOINED = re.compile(rf"{_LETTER}{{2,}}")
_POINT = re.compile(rf"(?:the\s+)?point\s+({_LETTER})", re.IGNORECASE)
# A letter in a font of its own before the text of its option.
_IN_FONT = re.compile(rf"(?:\\(?:{'|'.join(FONTS)})\s*\{{(?P<braces>[^{{}}]*)\}}|\*\*(?P<stars>[^*]*)\*\*)(?:\\[ ,;])?")
# A letter that is followed by nothing but space, a dash, a comma or a parenthesis: `A cat` is no choice of A.
_BESIDE_TEXT = re.compile(rf"(?P<letter>{_LETTER})(?:\s*[,-]\s*|\s+)(?P<text>\S.*)", re.DOTALL)
# Options in a question: at the start of a line, or in parentheses anywhere.
_AT_LINE_START = re.compile(rf"^[ \t]*\(?(?P<letter>{_LETTER})[.:)][ \t]*(?P<text>.+)$", re.MULTILINE)
_IN_PARENTHESES = re.compile(rf"\((?P<letter>{_LETTER})\)(?P<text>.*?)(?=\({_LETTER}\)|\n|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen.

    Attributes:
        letters: empty where the text alone is given.
        text: of the option; empty where the letters alone are given.
    """

    letters: frozenset[str]
    text: str


def parse_choice(text: str) -> Choice:
    """Split a choice into its letters and its text."""
    if match := _LABELLED.fullmatch(text):
        letter = (match["inside"] or match["plain"]).upper()
        text = (match["text"] or "").strip()
        return Choice(frozenset((letter, *_ANOTHER.findall(text))), text)
    if match := _SEVERAL.fullmatch(text):
        return Choice(frozenset(re.findall(_LETTER, match["all"])), "")
    return Choice(frozenset(), text.strip())


def is_letter(text: str) -> bool:
    """Whether a reference is an option's letter: upper case, for `x` and `b` are variables too."""
    return re.fullmatch(rf"\s*(?:\({_LETTER}\)|{_LETTER}[.)]?)\s*", text) is not None


def are_letters(answer: str, reference: str) -> bool:
    """Whether both are several letters, each once, which one of them lists: `A,B` and `AB`."""
    joined = [_JOINED.fullmatch(text) is not None for text in (answer, reference)]
    return any(joined) and not all(joined) and _are_several(answer) and _are_several(reference)


def _are_several(text: str) -> bool:
    match = _SEVERAL.fullmatch(text)
    letters = re.findall(_LETTER, match["all"]) if match else []
    return len(letters) == len(set(letters)) > 1


def options_of(question: str) -> dict[str, str]:
    """Text of each option that a question gives, by letter; empty unless they begin with A and leave none out."""
    question = plain_characters(question)
    for pattern in (_AT_LINE_START, _IN_PARENTHESES):
        found = {match["letter"]: match["text"].strip() for match in pattern.finditer(question)}
        if len(found) > 1 and "".join(found) == LETTERS[: len(found)]:
            return found
    return {}


def equal_choices(answer: str, reference: str, options: dict[str, str], same: Callable[[str, str], bool]) -> bool:
    """Whether the same is chosen.

    The letter decides. Beside it, a text of another option makes an answer wrong; alone, a text has to be that of
    exactly one option.

    Args:
        same: compares two texts.
    """
    given, right = _parse_answer(answer, options, same), parse_choice(reference)
    letters, right_letters = given.letters or _letter_of(given.text, options, same), right.letters
    right_letters = right_letters or _letter_of(right.text, options, same)
    if not (letters and right_letters):
        # Options that are not known: the texts decide.
        return bool(given.text and right.text) and same(given.text, right.text)
    if letters != right_letters:
        return False
    if not (given.letters and given.text):
        return True
    if options:
        meant = _letter_of(given.text, options, same)
        return not meant or meant == letters
    return not right.text or same(given.text, right.text)


def _parse_answer(text: str, options: dict[str, str], same: Callable[[str, str], bool]) -> Choice:
    """As `parse_choice`; the options also tell a letter from the first word of a text."""
    choice = parse_choice(text)
    if choice.letters or _letter_of(choice.text, options, same):
        return choice
    if point := _POINT.fullmatch(choice.text):
        return Choice(frozenset(point[1].upper()), "")
    text = _without_font(choice.text)
    if (plain := parse_choice(text)).letters:
        return plain
    match = _BESIDE_TEXT.fullmatch(text)
    if match and _letter_of(_without_parentheses(match["text"]), options, same) == {match["letter"]}:
        return Choice(frozenset(match["letter"]), match["text"])
    return choice


def _without_font(text: str) -> str:
    match = _IN_FONT.match(text)
    return f"{match['braces'] or match['stars'] or ''} {text[match.end() :]}" if match else text


def _without_parentheses(text: str) -> str:
    is_note = text.startswith("(") and text.endswith(")") and text.count("(") == 1 and "," not in text
    return text[1:-1] if is_note else text


def _letter_of(text: str, options: dict[str, str], same: Callable[[str, str], bool]) -> frozenset[str]:
    """Letter of the only option with this text, or else of the only one that has these words in it."""
    matches = [letter for letter, option in options.items() if text and same(text, option)]
    if not matches and re.search(r"[^\W\d_]{3}", text):
        matches = [letter for letter, option in options.items() if _contains(option, text)]
    return frozenset(matches) if len(matches) == 1 else frozenset()


def _contains(option: str, text: str) -> bool:
    return f" {' '.join(text.casefold().split())} " in f" {' '.join(option.casefold().split())} "
