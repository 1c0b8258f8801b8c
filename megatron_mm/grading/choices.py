"""Multiple choice: `B`, `(b)`, `B. 12 cm`, `option B`, `A and C`, `I would choose B`, or the text of an option."""

import ast
import re
import string
from collections.abc import Callable
from dataclasses import dataclass

from megatron_mm.grading.characters import plain_characters
from megatron_mm.grading.sentences import last_said
from megatron_mm.grading.wrappings import FONTS

LETTERS = string.ascii_uppercase
# Letters that stand alone: MMMU has up to nine options, later ones are rather variables.
_LETTER = "[A-J]"
_LABEL = rf"(?:[(\[]\s*(?P<inside>{_LETTER}|{_LETTER.lower()})\s*[)\]]|(?P<plain>{_LETTER}|{_LETTER.lower()}))"
_WORD = (
    r"(?:(?:the\s+|only\s+|i\s+(?:would\s+|will\s+)?(?:choose|pick|select)\s+)?(?:correct\s+)?"
    r"(?:(?:option|choice|answer|statement)s?\s*(?:is\s*|are\s*)?:?)?\s*)*"
)
# A letter that is followed by nothing, or by what sets it apart from the first word of a text.
_LABELLED = re.compile(rf"\s*(?i:{_WORD}){_LABEL}\s*(?:[.):]?\s*\Z|(?:(?<=[)\]])|[.:)])\s*(?P<text>\S.*))\Z", re.DOTALL)
_SEVERAL = re.compile(
    rf"\s*(?i:{_WORD})(?:both\s+)?(?P<all>\(?{_LETTER}\)?(?:\s*+(?:(?:,|;|and|&|/)\s*+)*+\(?{_LETTER}\)?)++)\.?\s*"
)
_SEVERAL_SMALL = re.compile(r"\(?[a-j]\)?(?:\s*+(?:,|;|and|&)(?:\s*and)?\s*+\(?[a-j]\)?)++\.?")
_ANOTHER = re.compile(rf"(?:\b(?:or|and)\b|[,/;])\s*\(?({_LETTER})(?:[.:)]|\Z)")
_JOINED = re.compile(rf"{_LETTER}{{2,}}")
_POINT = re.compile(rf"(?:the\s+)?point\s+({_LETTER})", re.IGNORECASE)
_WRONG = re.compile(rf"\(?{_LETTER}\)?\s+(?:is|are|was)\s+(?:wrong|incorrect|not|false)\b", re.IGNORECASE)
_RIGHT = re.compile(
    rf"\(?(?P<letter>{_LETTER})\)?\s+(?:is|must\s+be)\s+(?:the\s+)?(?:right|correct|true)\b.*", re.DOTALL
)
_BECAUSE = re.compile(rf"\(?(?P<letter>{_LETTER})\)?\s*,?\s+(?:because|since|as)\s+.+", re.DOTALL)
# A letter in a font of its own before the text of its option.
_IN_FONT = re.compile(rf"(?:\\(?:{'|'.join(FONTS)})\s*\{{(?P<braces>[^{{}}]*)\}}|\*\*(?P<stars>[^*]*)\*\*)(?:\\[ ,;])?")
# A letter that is followed by nothing but space, a dash, a comma or a parenthesis: `A cat` is no choice of A.
_BESIDE_TEXT = re.compile(rf"(?P<letter>{_LETTER})(?:\s*[,-]\s*|\s+)(?P<text>\S.*)", re.DOTALL)
_CIRCLED = "①②③④⑤⑥⑦⑧⑨⑩⑪⑫⑬⑭⑮⑯⑰⑱⑲⑳"
# How a question marks its options; the letter is put in for {}. In a line of their own they need less of a mark.
_MARKS = [
    r"^[ \t]*(?:[-*•]\s*)?(?:\*\*)?\(?{}[.:)](?:\*\*)?[ \t]*",
    r"^[ \t]*{}\t+",
    r"[(\[]\s*{}\s*[)\]]\s*",
    r"(?:\*\*){}[.:)]?(?:\*\*)\s*",
    r"(?<![A-Za-z0-9]){}[.:]\s*",
    r"(?<![A-Za-z0-9(]){}\)\s*",
]
_QUOTED_LIST = re.compile(r"(?:options|choices)\s*(?:are)?\s*[:=]?\s*(\[[^\[\]]*\])", re.IGNORECASE)


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
    """Split a choice into its letters and its text; `A or C` and `not B` choose nothing."""
    text = last_said(text)
    if match := _RIGHT.fullmatch(text) or _BECAUSE.fullmatch(text):
        return Choice(frozenset(match["letter"]), "")
    if match := _SEVERAL.fullmatch(text):
        return Choice(frozenset(re.findall(_LETTER, match["all"])), "")
    if match := _LABELLED.fullmatch(text):
        letter = (match["inside"] or match["plain"]).upper()
        text = (match["text"] or "").strip()
        return Choice(frozenset((letter, *_ANOTHER.findall(text))), text)
    if _SEVERAL_SMALL.fullmatch(text):
        return Choice(frozenset(letter.upper() for letter in re.findall(r"\b[a-j]\b", text)), "")
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
    """Return the text of each option that a question gives, by letter; the letters begin with A and leave none out.

    Options stand in lines of their own or in one line, in either case of letters; ① stands for A.
    """
    if listed := _QUOTED_LIST.search(question):
        try:
            return dict(zip(LETTERS, map(str, ast.literal_eval(listed[1])), strict=False))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass  # no list of Python's, but text in brackets
    question = plain_characters(re.sub("(?<=[A-Za-z])、", ".", question))
    if len(found := _options(question, r"{}[.:)]?\s*", _CIRCLED)) > 1:
        return found
    for mark in _MARKS:
        for letters in (LETTERS, LETTERS.lower()):
            if len(found := _options(question, mark, letters)) > 1:
                return found
    return {}


def _options(question: str, mark: str, letters: str) -> dict[str, str]:
    """Return the options that are marked so, as long as the next letter follows."""
    starts: list[re.Match[str]] = []
    for letter in letters:
        pattern = re.compile(mark.replace("{}", letter), re.MULTILINE)
        match = pattern.search(question, starts[-1].end() if starts else 0)
        if match is None:
            break
        starts.append(match)
    if len(starts) < 2:
        return {}
    ends = [*(match.start() for match in starts[1:]), len(question)]
    texts = [question[match.end() : end].strip().rstrip(",;").strip() for match, end in zip(starts, ends, strict=True)]
    # What follows the last one in lines below is the question again.
    texts[-1] = texts[-1].split("\n")[0].strip()
    return dict(zip(LETTERS, texts, strict=False)) if all(texts) else {}


def letter_of_mark(reference: str, options: dict[str, str]) -> str:
    """Return `b` and `②` as the letter of their option; any other reference as it is."""
    mark = reference.strip()
    if len(mark) == 1 and mark in _CIRCLED and LETTERS[_CIRCLED.index(mark)] in options:
        return LETTERS[_CIRCLED.index(mark)]
    small = re.fullmatch(r"\(?([a-zA-Z])\)?[.)]?", mark)
    return small[1].upper() if small and small[1].upper() in options else reference


def equal_choices(answer: str, reference: str, options: dict[str, str], same: Callable[[str, str], bool]) -> bool:
    """Whether the same is chosen.

    The letter decides. Beside it, a text of another option makes an answer wrong; alone, a text has to be that of
    exactly one option.

    Args:
        same: compares two texts.
    """
    reference = letter_of_mark(reference, options)
    right = _chosen(reference, options)
    given = _parse_answer(letter_of_mark(answer, options), options, same)
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


def _chosen(text: str, options: dict[str, str]) -> Choice:
    """As `parse_choice`; letters beyond J are told by the options."""
    return Choice(frozenset(text), "") if text in options else parse_choice(text)


def _parse_answer(text: str, options: dict[str, str], same: Callable[[str, str], bool]) -> Choice:
    """As `parse_choice`; the options also tell a letter from the first word of a text."""
    choice = _chosen(text, options)
    if choice.letters:
        return Choice(frozenset(), "") if _WRONG.search(text) else choice
    if _letter_of(choice.text, options, same):
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
    if not text:
        return frozenset()
    matches = [letter for letter, option in options.items() if " ".join(option.split()) == " ".join(text.split())]
    matches = matches or [letter for letter, option in options.items() if same(text, option)]
    if not matches and re.search(r"[^\W\d_]{3}", text):
        matches = [letter for letter, option in options.items() if _contains(option, text)]
    return frozenset(matches) if len(matches) == 1 else frozenset()


def _contains(option: str, text: str) -> bool:
    return f" {' '.join(text.casefold().split())} " in f" {' '.join(option.casefold().split())} "
