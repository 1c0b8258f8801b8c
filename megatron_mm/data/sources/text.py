"""Plain text: a *.txt file is one document, kept exactly; *.json and *.jsonl hold records {"text": str}."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_mm.config.prepare import SourceConfig
from megatron_mm.data.records import StoredContent
from megatron_mm.data.sources.base import RawSample, Reject, Task
from megatron_mm.data.sources.chat import as_object
from megatron_mm.data.sources.faults import Fault, Found, judged
from megatron_mm.data.sources.json_files import JSON_SUFFIXES, JsonEntry, entries_of
from megatron_mm.data.sources.paths import files_of, in_batches, with_spans
from megatron_mm.data.sources.texts import decoded, required_text

PLAIN = ".txt"


@dataclass(frozen=True, slots=True)
class TextTask:
    """Documents: records, and files that are one document each."""

    entries: tuple[JsonEntry | Path, ...]
    end: float

    def records(self) -> Iterator[RawSample | Reject]:
        """Every document, in order."""
        for entry in self.entries:
            origin = str(entry) if isinstance(entry, Path) else entry.origin
            yield judged(origin, lambda entry=entry: _read(entry))


def tasks(source: SourceConfig, records_per_task: int) -> Iterator[Task]:
    """Tasks of text files.

    Raises:
        InputError: there are none; while iterating, a JSON file is not JSON.
    """
    files = files_of(source, (PLAIN, *JSON_SUFFIXES))
    return (
        TextTask(tuple(entry for entry, _ in batch), batch[-1][1])
        for batch in in_batches(_entries(files), records_per_task)
    )


def _entries(files: list[Path]) -> Iterator[tuple[JsonEntry | Path, float]]:
    """Every document, with the share of all files that lies before its end."""
    for file, share in with_spans(files):
        if file.suffix.lower() == PLAIN:
            yield file, share(1)
        else:
            yield from ((entry, share(entry.end)) for entry in entries_of([file]))


def _read(entry: JsonEntry | Path) -> Found:
    if isinstance(entry, Path):
        try:
            text = decoded(entry.read_bytes())
        except OSError as error:
            raise Fault(f"cannot be read: {error.strerror}") from None
    else:
        text = required_text(as_object(entry.record()).get("text"), "text")
    if not text.strip():
        raise Fault("empty text")
    return StoredContent(document=[text]), ()
