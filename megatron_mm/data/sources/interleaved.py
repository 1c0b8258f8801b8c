"""Documents of texts and pictures as JSON, in three shapes:

    {"texts": ["One", null, "Two"], "images": [null, "1.jpg", null]}                                    OBELICS
    {"text_list": ["One", "Two"], "image_info": [{"image_name": "1.jpg", "matched_text_index": 1}]}     MMC4
    {"parts": [{"type": "text", "text": "One"}, {"type": "image", "image": "1.jpg"}]}       or "content"

Of MMC4, a picture goes in front of the text it matches; without `image_name` its `raw_url` names it. Image parts have
`image`, `path` or `url`, or all of them have none and the record lists the pictures under `images`.

Between two neighbours, texts or pictures, a line break is put unless white space stands there already.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_mm.config.prepare import SourceConfig
from megatron_mm.data.records import StoredContent, StoredParts
from megatron_mm.data.sources.base import PictureSource, Task
from megatron_mm.data.sources.chat import as_object, one_of
from megatron_mm.data.sources.faults import Fault, Found
from megatron_mm.data.sources.json_files import json_tasks
from megatron_mm.data.sources.media import is_empty, named_pictures, refuse_other_media
from megatron_mm.data.sources.picture_names import picture_source, picture_sources
from megatron_mm.data.sources.texts import joined, required_text

# A document in order: texts, and pictures.
Items = list[tuple[str, None] | tuple[None, PictureSource]]


def tasks(source: SourceConfig, records_per_task: int) -> Iterator[Task]:
    """Tasks of *.json and *.jsonl files.

    Raises:
        InputError: see `json_tasks`.
    """
    return json_tasks(source, records_per_task, read)


def read(record: Any, root: Path) -> Found:
    """A document with its pictures.

    Raises:
        Fault: it has none of the shapes, contradicts itself, or has no text.
    """
    record = as_object(record)
    if "texts" in record:
        items = _parallel(record, root)
    elif "text_list" in record:
        items = _matched(record, root)
    elif (parts := one_of(record, ("parts", "content"))) is not None:
        items = _parts(parts, record, root)
    else:
        raise Fault("none of texts, text_list, parts and content")
    if not any(text is not None and text.strip() for text, _ in items):
        raise Fault("no text")
    pictures = tuple(picture for _, picture in items if picture is not None)
    refuse_other_media(record, has_pictures=bool(pictures))
    return StoredContent(document=_on_lines(items)), pictures


def _on_lines(items: Items) -> StoredParts:
    numbers = iter(range(len(items)))
    found: StoredParts = []
    for text, _ in items:
        if text == "":
            continue
        part = next(numbers) if text is None else text
        if found and not _ends_open(found[-1]) and not _starts_open(part):
            found.append("\n")
        found.append(part)
    return joined(found)


def _ends_open(part: str | int) -> bool:
    return isinstance(part, str) and part[-1].isspace()


def _starts_open(part: str | int) -> bool:
    return isinstance(part, str) and part[0].isspace()


def _parallel(record: dict[str, Any], root: Path) -> Items:
    texts, names = _list(record, "texts"), _list(record, "images")
    if len(texts) != len(names):
        raise Fault(f"{len(texts)} texts beside {len(names)} images: the lists are not parallel")
    items: Items = []
    for number, (text, name) in enumerate(zip(texts, names, strict=True), 1):
        if not is_empty(text) and not is_empty(name):
            raise Fault(f"place {number} has both a text and a picture")
        if not is_empty(text):
            items.append((required_text(text, f"text {number}"), None))
        elif not is_empty(name):
            items.append((None, picture_source(name, root)))
    return items


def _matched(record: dict[str, Any], root: Path) -> Items:
    texts = [required_text(text, f"text {number}") for number, text in enumerate(_list(record, "text_list"), 1)]
    before: list[list[PictureSource]] = [[] for _ in texts]
    for number, info in enumerate(_list(record, "image_info"), 1):
        place = as_object(info).get("matched_text_index")
        if type(place) is not int or not 0 <= place < len(texts):
            raise Fault(f"picture {number} matches text {place!r} of {len(texts)} texts")
        name = info.get("image_name")
        before[place].append(picture_source(info.get("raw_url") if name is None else name, root))
    items: Items = []
    for text, pictures in zip(texts, before, strict=True):
        items += [(None, picture) for picture in pictures]
        items.append((text, None))
    return items


def _parts(parts: Any, record: dict[str, Any], root: Path) -> Items:
    if not isinstance(parts, list):
        raise Fault(f"parts are {type(parts).__name__}, not a list")
    listed = picture_sources(named_pictures(record), root)
    unnamed = iter(listed)
    items: Items = []
    num_pictures = 0
    for number, part in enumerate(parts, 1):
        part = as_object(part)
        if part.get("type") == "text":
            items.append((required_text(part.get("text"), f"text in part {number}"), None))
        elif part.get("type") == "image":
            num_pictures += 1
            name = one_of(part, ("image", "path", "url"))
            if name is not None and listed:
                raise Fault(f"part {number} names its picture, and the record lists pictures too")
            picture = next(unnamed, None) if name is None else picture_source(name, root)
            if picture is None:
                raise Fault(f"part {number} is a picture without a name")
            items.append((None, picture))
        else:
            raise Fault(f"part {number} is of type {part.get('type')!r}; known are text and image")
    if listed and num_pictures != len(listed):
        raise Fault(f"{num_pictures} image parts for {len(listed)} pictures")
    return items


def _list(record: dict[str, Any], name: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list):
        raise Fault(f"{name} is {type(value).__name__}, not a list" if value is not None else f"no {name}")
    return value
