"""How a reader says that a record cannot be used."""

import json
from collections.abc import Callable

from megatron_mm.data.records import StoredContent
from megatron_mm.data.sources.base import PictureSource, RawSample, Reject

# What a record holds: texts, and where the pictures they number are.
Found = tuple[StoredContent, tuple[PictureSource, ...]]


class Fault(Exception):
    """This one record cannot be used; the message is the reason. Never leaves a reader: it becomes a `Reject`."""


def judged(origin: str, read: Callable[[], Found]) -> RawSample | Reject:
    """What `read` finds, or why it cannot be used.

    Args:
        origin: of the record.
        read: raises `Fault` for a record that cannot be used.
    """
    try:
        content, pictures = read()
        # JSON may hold half of a surrogate pair, which no UTF-8 file can.
        json.dumps(content.to_json(), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.start + 1]
        return Reject(_writable(origin), f"text holds {half!r}, half of a surrogate pair")
    except Fault as fault:
        return Reject(_writable(origin), _writable(str(fault)))
    return RawSample(_writable(origin), content, pictures)


def _writable(text: str) -> str:
    """With what UTF-8 cannot hold escaped: names of files may have it."""
    return text.encode(errors="backslashreplace").decode()
