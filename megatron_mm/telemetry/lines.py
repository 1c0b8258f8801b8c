"""Files of one JSON object a line (metrics.jsonl, events.jsonl), in which every line is whole."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path


class JsonLines:
    """Appends lines. What cannot be written, on a full disk say, is kept and written before the next line.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path):
        self._path = path
        # Unbuffered: a line is with the operating system, so a killed process does not lose it.
        self._file = path.open("ab", buffering=0)
        self._waiting: list[bytes] = []

    @property
    def num_waiting(self) -> int:
        """Lines that could not be written yet."""
        return len(self._waiting)

    def append(self, record: Mapping[str, object]) -> None:
        """Write a line; NaN and infinity, which JSON does not have, become null.

        Raises:
            OSError: the line, or one that waits before it, cannot be written; it waits.
        """
        finite = {name: None if _is_infinite(value) else value for name, value in record.items()}
        self._waiting.append(json.dumps(finite, allow_nan=False).encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Write the lines that wait.

        Raises:
            OSError: one of them cannot be written.
        """
        while self._waiting:
            _write_whole(self._file.fileno(), self._waiting[0])
            del self._waiting[0]

    def rewind(self, step: int) -> None:
        """Remove the lines of steps after `step`, written or waiting.

        Raises:
            OSError: the file cannot be changed.
        """
        self._waiting = [line for line in self._waiting if (_step_of(line) or 0) <= step]
        cut_after(self._path, step)

    def close(self) -> None:
        """Close the file; lines that wait are lost."""
        self._file.close()


def cut_after(path: Path, step: int) -> None:
    """Remove the lines of later steps from the end of a file, and a line that a kill has cut off.

    Steps only grow in such a file, so it ends behind the last whole line of a step to keep. Shortening it is one
    operation that needs no space: a kill leaves the old file or the new one.

    Raises:
        OSError: the file can be read but not be changed.
    """
    if not path.exists():
        return
    position = end = 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            if (found := _step_of(line)) is not None and found <= step:
                end = position
    if end < position:
        os.truncate(path, end)


def _step_of(line: bytes) -> int | None:
    """The step of a whole line, None of one that is cut off."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    # A line without its end is cut off, even where what is there is an object.
    return record["step"] if line.endswith(b"\n") and isinstance(record, dict) and "step" in record else None


def _is_infinite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _write_whole(file: int, line: bytes) -> None:
    """Append all of a line or, raising OSError, nothing of it."""
    before = os.fstat(file).st_size
    try:
        written = 0
        while written < len(line):
            written += os.write(file, line[written:])
    except OSError:
        os.ftruncate(file, before)
        raise
