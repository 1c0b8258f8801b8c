"""A tree of pictures with captions: `name.txt` beside `name.jpg`, the suffixes in any case, or imagefolder's metadata.

Metadata is `metadata.jsonl` or `metadata.csv`, with `file_name`, relative to its own directory, and `text` or
`caption`. Hidden files, and files of other kinds, are no data.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from megatron_mm.config.errors import InputError
from megatron_mm.config.prepare import SourceConfig
from megatron_mm.data.sources.base import RawSample, Reject, Task
from megatron_mm.data.sources.chat import as_object, one_of
from megatron_mm.data.sources.faults import Fault, Found, judged
from megatron_mm.data.sources.json_files import JsonEntry, entries_of
from megatron_mm.data.sources.paths import files_of, in_batches
from megatron_mm.data.sources.picture_names import PICTURE_SUFFIXES, picture_path
from megatron_mm.data.sources.texts import captioned, decoded, required_text

FILE_NAME, CAPTIONS = "file_name", ("text", "caption")
METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True, slots=True)
class FolderEntry:
    """A picture with its caption, or what is left where one of the two is missing.

    Attributes:
        picture: None where there is none.
        caption: the text, the file that holds it, or None.
        origin: file, or file and line.
        fault: why it cannot be used, if that is known.
    """

    picture: Path | None
    caption: Any
    origin: str
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class FolderTask:
    """Entries, and what is asked about their pictures."""

    entries: tuple[FolderEntry, ...]
    question: str
    end: float

    def records(self) -> Iterator[RawSample | Reject]:
        """Every picture, and every caption without one, in order."""
        for entry in self.entries:
            yield judged(entry.origin, lambda entry=entry: self._read(entry))

    def _read(self, entry: FolderEntry) -> Found:
        if entry.fault is not None or entry.picture is None:
            raise Fault(entry.fault or "no picture")
        caption = entry.caption
        if isinstance(caption, Path):
            try:
                caption = decoded(caption.read_bytes())
            except OSError as error:
                raise Fault(f"caption {caption} cannot be read: {error.strerror}") from None
        return captioned(self.question, caption, 1), (entry.picture,)


def tasks(source: SourceConfig, records_per_task: int) -> Iterator[Task]:
    """Tasks of a directory.

    Raises:
        InputError: it is no directory, holds no pictures, or metadata in it cannot be read.
    """
    if source.path.is_file():
        raise InputError(f"path {source.path} of source {source.name} is a file; give the directory of the pictures")
    files = files_of(source, (*PICTURE_SUFFIXES, ".txt", ".jsonl", ".csv"))
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
    if not pictures:
        raise InputError(f"no picture ({', '.join(PICTURE_SUFFIXES)}) in {source.path}; correct its path")
    listed = [entry for file in files if file.name in METADATA for entry in _metadata(file)]
    entries = list(_entries(pictures, {file for file in files if file.suffix.lower() == ".txt"}, listed))
    batches = in_batches(zip(entries, range(1, len(entries) + 1), strict=True), records_per_task)
    return (FolderTask(tuple(e for e, _ in batch), source.question, batch[-1][1] / len(entries)) for batch in batches)


def _entries(pictures: list[Path], texts: set[Path], listed: list[FolderEntry]) -> Iterator[FolderEntry]:
    by_picture: dict[Path, list[FolderEntry]] = {}
    alone: list[FolderEntry] = []
    known = set(pictures)
    # Suffixes in any case; on some file systems both a.txt and a.TXT can be there.
    captions_of: dict[Path, list[Path]] = {}
    for text in sorted(texts):
        captions_of.setdefault(text.with_suffix(""), []).append(text)
    for entry in listed:
        if entry.picture in known:
            by_picture.setdefault(entry.picture, []).append(entry)
        elif entry.fault is None:
            alone.append(FolderEntry(None, None, entry.origin, f"caption of {entry.picture}, which is no picture here"))
        else:
            alone.append(entry)
    for picture in pictures:
        captions: list[Any] = [entry.caption for entry in by_picture.get(picture, [])]
        captions += captions_of.get(picture.with_suffix(""), [])
        fault = None if len(captions) == 1 else f"{len(captions)} captions" if captions else "no caption"
        yield FolderEntry(picture, captions[0] if captions else None, str(picture), fault)
    beside = {picture.with_suffix("") for picture in pictures}
    for text in sorted(text for text in texts if text.with_suffix("") not in beside):
        yield FolderEntry(None, text, str(text), "caption without a picture beside it")
    yield from alone


def _metadata(file: Path) -> Iterator[FolderEntry]:
    for entry in entries_of([file]) if file.suffix == ".jsonl" else _table(file):
        try:
            record = as_object(entry.record())
            name = required_text(record.get(FILE_NAME), FILE_NAME)
            found = FolderEntry(picture_path(name, file.parent), one_of(record, CAPTIONS), entry.origin)
        except Fault as fault:
            found = FolderEntry(None, None, entry.origin, str(fault))
        yield found


def _table(file: Path) -> Iterator[JsonEntry]:
    try:
        # A line break inside of quotes is the table's own.
        rows = csv.DictReader(StringIO(decoded(file.read_bytes()), newline=""), strict=True)
        names = rows.fieldnames or ()
        if FILE_NAME not in names or not any(name in names for name in CAPTIONS):
            raise InputError(
                f"{file} has columns {', '.join(names)}; it needs {FILE_NAME} and {' or '.join(CAPTIONS)}: rename them"
            )
        for row in rows:
            yield JsonEntry(file, f"{file} line {rows.line_num}", row)
    except (OSError, csv.Error, Fault) as error:
        raise InputError(f"{file} cannot be read: {error}; write it anew as CSV in UTF-8") from None
