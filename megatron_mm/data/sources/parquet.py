"""Parquet files of questions with answers (geometry3k, Vision-R1-rl), or of conversations as chat.py has them.

Columns `problem` and `answer`, and `reasoning` (or another name that chat.py has for it) where there is one; or
`conversations` or `messages`, and `system`. Pictures are under `images` or `image`, or a name like these (media.py):
bytes, {"bytes", "path"}, or paths, or a list of these.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_mm.config.errors import InputError
from megatron_mm.config.prepare import SourceConfig
from megatron_mm.data.sources import chat
from megatron_mm.data.sources.base import RawSample, Reject, Task
from megatron_mm.data.sources.faults import Fault, Found, judged
from megatron_mm.data.sources.media import other_media, picture_field
from megatron_mm.data.sources.paths import files_of, with_spans
from megatron_mm.data.sources.texts import one_turn, plain_answer, required_text

QUESTION, ANSWER, SYSTEM = "problem", "answer", "system"
# Rows hold pictures: few are in memory at a time.
_BATCH_ROWS = 32


@dataclass(frozen=True, slots=True)
class ParquetTask:
    """Rows `start` to `stop` of a file, counted from 0."""

    file: Path
    start: int
    stop: int
    columns: tuple[str, ...]
    pictures: Path
    end: float

    def records(self) -> Iterator[RawSample | Reject]:
        """Every row, in order.

        Raises:
            InputError: the file is damaged.
        """
        for number, row in enumerate(self._rows(), self.start + 1):
            yield judged(f"{self.file} row {number}", lambda row=row: _read(_parsed(row), self.pictures))

    def _rows(self) -> Iterator[pa.RecordBatch]:
        try:
            with pq.ParquetFile(self.file, pre_buffer=False) as opened:
                groups, first = _groups_of(opened.metadata, self.start, self.stop)
                # One thread: every worker has a processor of its own.
                batches = opened.iter_batches(_BATCH_ROWS, groups, columns=list(self.columns), use_threads=False)
                for batch in batches:
                    for row in range(max(self.start - first, 0), min(self.stop - first, batch.num_rows)):
                        yield batch.slice(row, 1)
                    first += batch.num_rows
                    if first >= self.stop:
                        return
                raise OSError(f"it ends before row {self.stop}")
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self.file, error) from None


def tasks(source: SourceConfig, records_per_task: int) -> Iterator[Task]:
    """Tasks of *.parquet files; no task is of two files.

    Raises:
        InputError: there are none; while iterating, one is damaged or has other columns.
    """
    files = files_of(source, (".parquet",))
    return (
        task
        for file, share in with_spans(files)
        for task in _tasks_of(file, share, source.pictures or file.parent, records_per_task)
    )


def _tasks_of(
    file: Path, share: Callable[[float], float], pictures: Path, records_per_task: int
) -> Iterator[ParquetTask]:
    try:
        with pq.ParquetFile(file, pre_buffer=False) as opened:
            names, num_rows = opened.schema_arrow.names, opened.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from None
    for start in range(0, num_rows, records_per_task):
        stop = min(start + records_per_task, num_rows)
        yield ParquetTask(file, start, stop, _columns(file, names), pictures, share(stop / num_rows))


def _columns(file: Path, names: list[str]) -> tuple[str, ...]:
    """The columns that are read."""
    media = (*picture_field(names), *other_media(names))
    wanted = (*media, *chat.TURNS, *chat.REASONING, SYSTEM)
    if not any(name in names for name in chat.TURNS):
        wanted = (*media, QUESTION, ANSWER, *chat.REASONING)
        if QUESTION not in names or ANSWER not in names:
            raise InputError(
                f"{file} has columns {', '.join(names)}; rename them so that there are {QUESTION} and {ANSWER}, or "
                f"{' or '.join(chat.TURNS)}"
            )
    return tuple(name for name in wanted if name in names)


def _groups_of(metadata: Any, start: int, stop: int) -> tuple[list[int], int]:
    """Row groups that hold some of the rows, and the number of their first row."""
    groups, first, row = [], 0, 0
    for number in range(metadata.num_row_groups):
        end = row + metadata.row_group(number).num_rows
        if row < stop and start < end:
            first = first if groups else row
            groups.append(number)
        row = end
    return groups, first


def _parsed(row: pa.RecordBatch) -> dict[str, Any]:
    """The one row of a batch."""
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        raise Fault(f"text is not UTF-8: {error.reason}") from None


def _read(row: dict[str, Any], root: Path) -> Found:
    pictures = chat.pictures_of(row, root)
    if QUESTION not in row:
        return chat.conversation_of(row, len(pictures)), pictures
    question, answer = required_text(row[QUESTION], QUESTION), plain_answer(row[ANSWER], ANSWER)
    content = one_turn(question, answer, len(pictures))
    if reasoning := chat.reasoning_of(row, "the row"):
        (turn,) = content.turns
        if turn.reasoning is not None:
            raise Fault(f"reasoning both in {ANSWER} and in a column of its own")
        content = replace(content, turns=(replace(turn, reasoning=reasoning),))
    return content, pictures


def _damaged(file: Path, error: Exception) -> InputError:
    # Arrow's messages may have several lines.
    reason = " ".join(str(error).split())
    return InputError(f"{file} is damaged, cut off or not Parquet ({reason}); copy it again")
