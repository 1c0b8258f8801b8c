"""Pictures as records name them: a path, a URL, bytes, or a dict of one of these. None of them is opened here."""

import base64
import binascii
import os.path
import re
from pathlib import Path
from typing import Any

from megatron_mm.data.sources.base import PictureSource
from megatron_mm.data.sources.faults import Fault

PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"),
    *(".avif", ".heic", ".heif"),
)
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_OTHER_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", re.IGNORECASE)
_SHOWN_CHARACTERS = 80


def picture_sources(value: Any, root: Path) -> tuple[PictureSource, ...]:
    """Pictures of a field: nothing, one, or a list.

    Args:
        value: str, bytes, {"path": str}, {"bytes": bytes, "path": str or None}, or a list of these; None for nothing.
        root: directory that paths are relative to and have to stay in.

    Raises:
        Fault: a picture is given in another way, or is not in `root`.
    """
    if value is None:
        return ()
    return tuple(picture_source(item, root) for item in (value if isinstance(value, list) else [value]))


def picture_source(value: Any, root: Path) -> PictureSource:
    """One picture; see `picture_sources`."""
    if isinstance(value, dict):
        given = value.get("bytes")
        value = value.get("path") if given is None else given
        if value is None:
            raise Fault("a picture has neither bytes nor a path")
        if isinstance(given, str):
            raise Fault("a picture's bytes are text, not bytes")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise Fault(f"a picture is given as {type(value).__name__}, not as a path")
    if value.startswith(("http://", "https://")):
        return value
    if found := _DATA_URL.match(value):
        try:
            return base64.b64decode(value[found.end() :], validate=True)
        except binascii.Error as error:
            raise Fault(f"a picture's data URL is not base64: {error}") from None
    return picture_path(value, root)


def picture_path(name: str, root: Path) -> Path:
    """Where a picture of that name is.

    Raises:
        Fault: that is outside `root`, or no path at all.
    """
    shown = repr(name if len(name) <= _SHOWN_CHARACTERS else name[:_SHOWN_CHARACTERS] + "...")
    if _OTHER_URL.match(name):
        raise Fault(f"picture {shown} is neither a path nor an http(s) URL")
    if not name or "\0" in name or not _can_name_a_file(name):
        raise Fault(f"picture path {shown} cannot be that of a file")
    # Data from elsewhere has no business with other files of this machine.
    inside = os.path.relpath(os.path.join(os.path.abspath(root), name), os.path.abspath(root))
    if inside.split(os.sep)[0] == os.pardir:
        raise Fault(f"picture path {shown} leaves {root}; set the source's pictures to the directory that it lies in")
    return root / inside


def _can_name_a_file(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True
