"""What every reader of a source makes: tasks, each of them records that one worker turns into one shard."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_mm.data.records import StoredContent


@dataclass(frozen=True, slots=True)
class FileRange:
    """A picture inside a larger file, such as a tar's member."""

    path: Path
    offset: int
    num_bytes: int


# Where a picture is: its bytes, a file, a part of a file, or an http(s) URL.
PictureSource = bytes | Path | FileRange | str


@dataclass(frozen=True, slots=True)
class RawSample:
    """A record as its source has it; nothing of its pictures has been looked at.

    Attributes:
        origin: file and record, for messages.
        content: texts, with the numbers of the pictures that follow.
        pictures: in the order of their numbers.
    """

    origin: str
    content: StoredContent
    pictures: tuple[PictureSource, ...] = ()


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that cannot be used, and why."""

    origin: str
    reason: str


class Task(Protocol):
    """Records of one shard. Can be pickled; is read in a worker."""

    @property
    def end(self) -> float:
        """Share of its source that lies before this task's end, above 0 and at most 1: what time left is told by."""
        ...

    def records(self) -> Iterator[RawSample | Reject]:
        """Every record once, in order, each as a sample or a reject: none is passed over."""
        ...


@dataclass(frozen=True, slots=True)
class ListedTask:
    """A task whose records are there already: all that its source has."""

    listed: Sequence[RawSample | Reject]

    @property
    def end(self) -> float:
        """See `Task`."""
        return 1.0

    def records(self) -> Iterator[RawSample | Reject]:
        """Every record, in order."""
        return iter(self.listed)
