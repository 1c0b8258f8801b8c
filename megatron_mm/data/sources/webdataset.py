"""WebDataset: tar files in which the members that share a name up to its first dot are a sample.

    cat.jpg cat.txt                    a picture and its caption
    cat.0.jpg cat.1.png cat.json       pictures in the order of their numbers, and a conversation as chat.py has it,
                                       {"caption" or "text": str}, or what `megatron-mm data prepare` itself writes

The members are a conversation's pictures, whatever names it gives them, and none that it names may be missing. A
conversation goes before a caption, and `.txt` before a caption in `.json`. A directory with `.nv-meta` is read as
energon.py says.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mm.config.errors import InputError
from megatron_mm.config.prepare import SourceConfig
from megatron_mm.data.records import StoredContent, StoredTurn
from megatron_mm.data.sources import chat
from megatron_mm.data.sources.base import FileRange, RawSample, Reject, Task
from megatron_mm.data.sources.energon import CAPTIONING, META, FieldMap, read_layout
from megatron_mm.data.sources.faults import Fault, Found, judged
from megatron_mm.data.sources.json_files import parsed
from megatron_mm.data.sources.media import OTHER_SUFFIXES, refuse_other_media
from megatron_mm.data.sources.paths import files_of, in_batches, visible_files, with_spans
from megatron_mm.data.sources.picture_names import PICTURE_SUFFIXES
from megatron_mm.data.sources.tar_files import TarSample, scan
from megatron_mm.data.sources.texts import captioned, decoded, one_turn, required_text

CAPTIONS = ("caption", "text")
_STORED = ("turns", "document")
_COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True, slots=True)
class TarTask:
    """Samples of one tar file, whose headers have been read, and how their members become a sample."""

    file: Path
    samples: tuple[TarSample, ...]
    question: str
    fields: FieldMap | None
    end_fault: str | None
    end: float

    def records(self) -> Iterator[RawSample | Reject]:
        """Every sample, in order, and then what is wrong with the archive's end."""
        for sample in self.samples:
            read = judged(f"{self.file} sample {sample.key}", lambda sample=sample: self._read(sample))
            # What reads named members of energon's layout may find them all the same.
            if sample.merged and (self.fields is None or isinstance(read, Reject)):
                for name in sample.merged:
                    yield judged(f"{self.file} sample {name}", lambda name=name: self._merged(name))
            else:
                yield read
        if self.end_fault is not None:
            yield judged(str(self.file), self._at_end)

    def _merged(self, name: str) -> Found:
        raise Fault(
            f"the name {name!r} has a dot, so that WebDataset takes it for another member of the sample before the "
            "dot; write the archive with other names"
        )

    def _at_end(self) -> Found:
        raise Fault(self.end_fault or "")

    def _read(self, sample: TarSample) -> Found:
        if sample.fault is not None:
            raise Fault(sample.fault)
        if self.fields is not None:
            return _read_fields(sample, self.fields, self.question)
        return _read_members(sample, self.question)


def tasks(source: SourceConfig, records_per_task: int) -> Iterator[Task]:
    """Tasks of *.tar files; no task is of two files.

    Raises:
        InputError: there are none, or compressed ones, or the energon layout is not supported; while iterating, one
            is no tar file.
    """
    packed = visible_files(source.path) if source.path.is_dir() else [source.path]
    packed = [path for path in packed if path.name.lower().endswith(_COMPRESSED)]
    if packed:
        raise InputError(f"{packed[0]} is compressed, and is not read in parts; unpack it to a plain *.tar")
    if (source.path / META).is_dir():
        layout = read_layout(source)
        files, excluded, fields = list(layout.shards), layout.excluded, layout.fields
    else:
        files, excluded, fields = files_of(source, (".tar",)), {}, None
    return (
        TarTask(file, batch, source.question, fields, fault, share(end))
        for file, share in with_spans(files)
        for batch, fault, end in _batches_of(file, excluded.get(file, frozenset()), records_per_task)
    )


def _batches_of(
    file: Path, excluded: frozenset[str], records_per_task: int
) -> Iterator[tuple[tuple[TarSample, ...], str | None, float]]:
    """Samples of each task, what is wrong with the archive's end, and the share of the file that ends there."""
    samples, fault = scan(file)
    batches = list(in_batches((sample for sample in samples if sample.key not in excluded), records_per_task))
    if not batches and fault is not None:
        batches = [()]
    for number, batch in enumerate(batches, 1):
        yield batch, fault if number == len(batches) else None, number / len(batches)


def _read_members(sample: TarSample, question: str) -> Found:
    pictures = tuple(sample.members[name] for name in sorted(sample.members, key=_by_number) if _is_picture(name))
    for name in sample.members:
        if f".{_last_part(name)}" in OTHER_SUFFIXES:
            raise Fault(f"member {name} is no picture that is read, and cannot be learned")
    record = parsed(_bytes_of(sample.members["json"])) if "json" in sample.members else None
    if isinstance(record, dict):
        if any(name in record for name in _STORED):
            return _stored(record, len(pictures)), pictures
        if any(record.get(name) is not None for name in chat.TURNS):
            _check_named(record, len(pictures))
            return chat.conversation_of(record, len(pictures)), pictures
    if "txt" in sample.members:
        caption = decoded(_bytes_of(sample.members["txt"]))
    elif record is None:
        raise Fault("missing member: txt or json")
    else:
        caption = chat.one_of(chat.as_object(record), CAPTIONS)
        if caption is None:
            raise Fault(f"json has none of {', '.join((*chat.TURNS, *CAPTIONS, *_STORED))}")
    if not pictures:
        raise Fault("missing member: a picture to the caption")
    return captioned(question, caption, len(pictures)), pictures


def _check_named(record: dict[str, Any], num_pictures: int) -> None:
    """Compare what a conversation says of its pictures with the members.

    Raises:
        Fault: it names more pictures, or media that cannot be learned.
    """
    refuse_other_media(record, has_pictures=num_pictures > 0)
    num_named = chat.num_named(record)
    if num_named > num_pictures:
        raise Fault(f"missing member: json names {num_named} pictures, and {num_pictures} are there")


def _read_fields(sample: TarSample, fields: FieldMap, question: str) -> Found:
    picture = _field(sample, fields, "image")
    if not isinstance(picture, FileRange):
        raise Fault(f"field image ({fields.written['image']}) is {type(picture).__name__}, not a picture")
    if fields.kind == CAPTIONING:
        return captioned(question, _field_text(sample, fields, "caption"), 1), (picture,)
    context, answer = _field_text(sample, fields, "context"), _field_text(sample, fields, "answers")
    return one_turn(context, answer, 1), (picture,)


def _field_text(sample: TarSample, fields: FieldMap, field: str) -> str:
    value = _field(sample, fields, field)
    if isinstance(value, FileRange):
        raise Fault(f"field {field} ({fields.written[field]}) is a whole file, not text")
    # Of several right answers the first is learned.
    if field == "answers" and isinstance(value, list) and value:
        value = value[0]
    return required_text(value, f"field {field} ({fields.written[field]})")


def _field(sample: TarSample, fields: FieldMap, field: str) -> Any:
    """The value of the first path that leads to one: a picture as its range, and text or JSON parsed."""
    for path in fields.paths[field]:
        member = sample.members.get(path.member)
        if member is None:
            continue
        if _is_picture(path.member):
            return member
        if _last_part(path.member) == "txt":
            return decoded(_bytes_of(member))
        if _last_part(path.member) != "json":
            return member
        value = parsed(_bytes_of(member))
        try:
            for key in path.keys:
                value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, ValueError, TypeError):
            continue
        return value
    raise Fault(f"missing member: {fields.written[field]} for field {field}")


def _stored(record: dict[str, Any], num_pictures: int) -> StoredContent:
    """What this program has written.

    Raises:
        Fault: it has not.
    """
    try:
        content = StoredContent.from_json(record)
        parts = content.parts
    except (KeyError, TypeError, AttributeError) as error:
        raise Fault(f"json is no stored sample: {error!r}") from None
    if not _is_stored(content):
        raise Fault("json is no stored sample: texts or numbers of pictures are of other types")
    placed = {part for part in parts if isinstance(part, int)}
    if placed != set(range(num_pictures)):
        raise Fault(f"missing member: json places pictures {sorted(placed)}, and {num_pictures} are there")
    return content


def _is_stored(content: StoredContent) -> bool:
    def is_parts(parts: Any) -> bool:
        return isinstance(parts, list) and all(type(part) in (str, int) for part in parts)

    def is_turn(turn: StoredTurn) -> bool:
        optional = turn.reasoning is None or isinstance(turn.reasoning, str)
        return is_parts(turn.question) and isinstance(turn.answer, str) and optional

    if content.document is not None:
        return is_parts(content.document)
    has_system = content.system is None or isinstance(content.system, str)
    return bool(content.turns) and has_system and all(is_turn(turn) for turn in content.turns)


def _bytes_of(member: FileRange) -> bytes:
    try:
        with member.path.open("rb") as file:
            file.seek(member.offset)
            content = file.read(member.num_bytes)
    except OSError as error:
        raise InputError(f"{member.path} cannot be read: {error}") from None
    if len(content) < member.num_bytes:
        raise Fault(f"archive ends before byte {member.offset + member.num_bytes}")
    return content


def _last_part(extension: str) -> str:
    return extension.rpartition(".")[2]


def _is_picture(extension: str) -> bool:
    return f".{_last_part(extension)}" in PICTURE_SUFFIXES


def _by_number(extension: str) -> list[tuple[int, str]]:
    """Sort key by which 2.jpg goes before 10.jpg."""
    pieces = re.split(r"(\d+)", extension)
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces]
