"""Times of day and dates: `3:30 pm`, `half past nine`, `noon`, `3点半`; `July 12, 2019`, `2019-07-12`, `5/12/2020`."""

import re
from datetime import datetime

from megatron_mm.grading.numerals import in_digits

_TIME = re.compile(r"(?P<hour>\d{1,2})(?P<rest>(?:\s*:\s*\d\d){0,2}+)\s*+(?P<half>(?i:[ap]\.?m\.?))?")
_CHINESE_TIME = re.compile(r"(?:(上午|早上|下午|晚上))?(\d{1,2})[时点](?:(\d{1,2})分|整)?")
_PAST = re.compile(
    r"(?P<what>half|quarter|\d{1,2})(?:\s+minutes?)?\s+(?P<side>past|to)\s+(?P<hour>\d{1,2})", re.IGNORECASE
)
_NAMED = {"noon": "12:00 pm", "midnight": "12:00 am", "midday": "12:00 pm"}
_ZERO_MINUTES = re.compile(r"\d{1,2}:0\d")
_OCLOCK = re.compile(r"\s*o'?\s?clock\b", re.IGNORECASE)
_DATE = re.compile(r"(\d++)\s*+/\s*+(\d++)\s*+/\s*+(\d++)")
_DATE_FORMATS = [
    "%B %d %Y", "%b %d %Y", "%d %B %Y", "%d %b %Y", "%Y-%m-%d", "%Y年%m月%d日", "%m月%d日 %Y", "%A %B %d %Y",
    "%A %d %B %Y",
]  # fmt: skip


def equal_times(answer: str, reference: str, is_asked: bool) -> bool | None:
    """Whether two times are the same; None where the reference is none.

    A time beside what is none may be a ratio: `6:10` is 3:5, unless a time is asked for or `12:05` cannot be one.
    """
    given, right = _time(answer), _time(reference)
    if right is None:
        # Nor is a ratio written with a zero.
        return False if given is not None and _ZERO_MINUTES.fullmatch(answer.strip()) else None
    if given is None:
        return False if is_asked or _ZERO_MINUTES.fullmatch(reference.strip()) else None
    return given == right


def _time(text: str) -> tuple[int, str, str] | None:
    """Return hour, the rest, and am or pm, which a time up to 12 o'clock does not have unless it says so."""
    text = _OCLOCK.sub(":00", _NAMED.get(text.strip().lower(), text.strip()))
    if past := _PAST.fullmatch(in_digits(text) if not text[:1].isdigit() else text):
        minutes = {"half": 30, "quarter": 15}.get(past["what"].lower()) or int(past["what"])
        hour = int(past["hour"]) - (past["side"].lower() == "to")
        minutes = 60 - minutes if past["side"].lower() == "to" else minutes
        text = f"{hour or 12}:{minutes:02d}"
    if chinese := _CHINESE_TIME.fullmatch(text if text[:1].isdigit() else in_digits(text)):
        half = {"上": " am", "早": " am", "下": " pm", "晚": " pm"}.get((chinese[1] or " ")[0], "")
        text = f"{chinese[2]}:{int(chinese[3] or 0):02d}{half}"
    elif "半" in text:
        text = in_digits(text)
    match = _TIME.fullmatch(re.sub(r"\b(noon|midnight)\b", "pm", text))
    if match is None or not (match["rest"] or match["half"]):
        return None
    hour, half = int(match["hour"]), (match["half"] or "").replace(".", "").lower()
    if hour > 24 or (half and hour > 12):
        return None
    if hour > 12:
        hour, half = hour - 12, "pm"
    rest = re.sub(r"\s", "", match["rest"]) or ":00"
    return hour, rest.removesuffix(":00") if rest.count(":") > 1 else rest, half


def equal_dates(answer: str, reference: str) -> bool | None:
    """Whether two dates are the same; None where the reference is none. The order of `7/12/2019` is not guessed."""
    right = _numerals(reference)
    if right is not None:
        return _numerals(answer) == right
    right = _date(reference)
    return None if right is None else _date(answer) == right


def _numerals(text: str) -> list[str] | None:
    """Return those of a date with slashes, without zeros ahead."""
    date = _DATE.fullmatch(text.strip())
    return [part.lstrip("0") for part in date.groups()] if date else None


def _date(text: str) -> datetime | None:
    """Return a date; one without a year lies in the year 4, which is a leap year."""
    if len(text) > 40:
        return None
    plain = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b|[,.]|\b(?:of|the|on)\b", " ", text)
    plain = " ".join(plain.split())
    for form in _DATE_FORMATS:
        # A year that no answer has, for one that names none.
        for text, year in ((plain, None), (f"{plain} 2000", 4)):
            try:
                date = datetime.strptime(text, form)
            except ValueError:
                continue
            return date.replace(year=year or date.year)
    return None
