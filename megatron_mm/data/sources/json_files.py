"""Records of JSON files (one array) and JSONL files (a record a line)."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mm.config.errors import InputError
from megatron_mm.config.prepare import SourceConfig
from megatron_mm.data.sources.base import RawSample, Reject
from megatron_mm.data.sources.faults import Fault, Found, judged
from megatron_mm.data.sources.paths import files_of, in_batches, with_spans

JSON_SUFFIXES = (".json", ".jsonl")


@dataclass(frozen=True, slots=True)
class JsonEntry:
    """A record that may not be parsed yet.

    Attributes:
        file: that holds it.
        origin: file and number, counted from 1.
        value: the record, or the bytes of its line.
        end: share of all files that lies before its end.
    """

    file: Path
    origin: str
    value: Any
    end: float = 1.0

    def record(self) -> Any:
        """The parsed record, which may be anything that JSON can say.

        Raises:
            Fault: the line is not JSON.
        """
        return parsed(self.value) if isinstance(self.value, bytes) else self.value


def parsed(content: bytes) -> Any:
    """What the JSON says.

    Raises:
        Fault: it is not JSON.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Fault(f"not JSON: {error}") from None


@dataclass(frozen=True, slots=True)
class JsonTask:
    """Records, and the function of a module that reads one, given the directory of its pictures."""

    entries: tuple[JsonEntry, ...]
    read: Callable[[Any, Path], Found]
    pictures: Path | None

    @property
    def end(self) -> float:
        """See `Task`."""
        return self.entries[-1].end

    def records(self) -> Iterator[RawSample | Reject]:
        """Every record, in order."""
        for entry in self.entries:
            yield judged(entry.origin, lambda entry=entry: self._read(entry))

    def _read(self, entry: JsonEntry) -> Found:
        return self.read(entry.record(), self.pictures or entry.file.parent)


def json_tasks(source: SourceConfig, records_per_task: int, read: Callable[[Any, Path], Found]) -> Iterator[JsonTask]:
    """Tasks of a source that is JSON files only.

    Raises:
        InputError: there are none; while iterating, one of them is not JSON.
    """
    entries = entries_of(files_of(source, JSON_SUFFIXES))
    return (JsonTask(batch, read, source.pictures) for batch in in_batches(entries, records_per_task))


def entries_of(files: Sequence[Path]) -> Iterator[JsonEntry]:
    """Every record of the files; blank lines are none.

    Raises:
        InputError: a file cannot be read, or is not a JSON array.
    """
    for file, share in with_spans(files):
        yield from _lines(file, share) if file.suffix.lower() == ".jsonl" else _array(file, share)


def _lines(file: Path, share: Callable[[float], float]) -> Iterator[JsonEntry]:
    try:
        size, end = file.stat().st_size, 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                end += len(line)
                if line.strip():
                    yield JsonEntry(file, f"{file} line {number}", line, share(end / size))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}") from None


def _array(file: Path, share: Callable[[float], float]) -> Iterator[JsonEntry]:
    try:
        records = parsed(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    except Fault as fault:
        raise InputError(
            f"{file} is {fault}; it may be cut off: copy it again, or call it *.jsonl if each line is a record"
        ) from None
    if not isinstance(records, list):
        raise InputError(f"{file} holds a JSON {type(records).__name__}, not an array of records; put it in [ ]")
    for number, record in enumerate(records, 1):
        yield JsonEntry(file, f"{file} record {number}", record, share(number / len(records)))
