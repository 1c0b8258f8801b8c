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
from megatron_mm.data.sources.paths import files_of, in_batches
from megatron_mm.data.sources.texts import decoded, required_text

PLAIN = ".txt"


@dataclass(frozen=True, slots=True)
class TextTask:
    """Documents: records, and files that are one document each."""

    entries: tuple[JsonEntry | Path, ...]

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
    entries = (entry for file in files for entry in ([file] if file.suffix.lower() == PLAIN else entries_of([file])))
    return (TextTask(batch) for batch in in_batches(entries, records_per_task))


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
