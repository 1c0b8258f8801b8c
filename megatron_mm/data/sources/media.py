"""Which fields of a record name its pictures, under the names that data sets give them, and what cannot be learned.

A picture that its record names and that does not reach the sample would teach answers about something that the model
does not see. So a record whose pictures are named in a way that is not read is refused, and so is one with videos,
sounds or calls of tools.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_mm.data.sources.faults import Fault
from megatron_mm.data.sources.picture_names import PICTURE_SUFFIXES

# The names that the documentation gives; others are read where neither has a value.
PICTURES = ("image", "images")
_WHAT = r"((file|path|url|uri|name)s?)*"
_PICTURE_FIELD = re.compile(rf"(image|img|picture|photo|pic)s?{_WHAT}")
_OTHER_FIELD = re.compile(rf"(video|audio|movie|sound|speech|speeche|voice)s?{_WHAT}")
OTHER_SUFFIXES = (
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".wav", ".mp3", ".flac", ".ogg", ".m4a"),
    # Pictures that are not read.
    *(".svg", ".jp2", ".j2k", ".jxl", ".psd", ".exr", ".dcm", ".eps"),
)
_TOOLS = ("tools", "functions", "tool_calls", "function_call", "tool_call_id")
# A name with a suffix, as a path or URL may end, and no text that happens to.
_FILE = re.compile(r"\S{1,1024}")
_SHOWN_CHARACTERS = 60


def is_empty(value: Any) -> bool:
    """Whether a field says that there is nothing, as table tools write it: null, "", NaN, or a list of these."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, (list, tuple)):
        return all(is_empty(item) for item in value)
    return value is None or value != value  # not equal to itself: NaN, as tables write "none"


def picture_field(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names under which pictures are looked for, of fields that may have a value, the documented first."""
    names = list(names)
    known = [name for name in PICTURES if name in names]
    return (*known, *(name for name in names if name not in PICTURES and _PICTURE_FIELD.fullmatch(_letters(name))))


def other_media(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names that are those of videos and sounds."""
    return tuple(name for name in names if _OTHER_FIELD.fullmatch(_letters(name)))


def named_pictures(record: Mapping[str, Any]) -> Any:
    """Return the value of the field that names a record's pictures; None where there is none.

    Raises:
        Fault: several fields name pictures; or none does, and another field holds the name of a picture's file.
    """
    filled = [name for name in picture_field(map(str, record)) if not is_empty(record.get(name))]
    documented = [name for name in filled if name in PICTURES]
    found = documented or filled
    if len(found) > 1:
        raise Fault(f"both {' and '.join(found)}")
    return record[found[0]] if found else None


def refuse_other_media(record: Mapping[str, Any], *, has_pictures: bool) -> None:
    """Refuse a record whose media, or calls of tools, do not reach the sample.

    Args:
        record: its fields.
        has_pictures: whether some of its pictures were found.

    Raises:
        Fault: it has some.
    """
    refuse_tools(record)
    for name in other_media(map(str, record)):
        if not is_empty(record[name]):
            raise Fault(f"field {name} names a video or a sound, which cannot be learned")
    if has_pictures:
        return
    for name, value in record.items():
        first = value[0] if isinstance(value, list) and value else value
        if not isinstance(first, str) or not _FILE.fullmatch(first):
            continue
        suffix = f".{first.partition('?')[0].rpartition('.')[2].lower()}"
        if suffix in PICTURE_SUFFIXES or suffix in OTHER_SUFFIXES:
            raise Fault(
                f"field {name} names a file ({first[:_SHOWN_CHARACTERS]!r}) that does not become part of the sample; "
                f"pictures are read from {' or '.join(PICTURES)}: rename the field, or remove it"
            )


def refuse_tools(fields: Mapping[str, Any]) -> None:
    """Refuse a record or turn with calls of tools.

    Raises:
        Fault: it has some.
    """
    for name in _TOOLS:
        if fields.get(name):
            raise Fault(f"{name}: calls of tools cannot be learned")


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())
