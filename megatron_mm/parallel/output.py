"""What ranks print: everything to a log of each rank, some of it to the terminal.

torch's own `DefaultLogsSpecs` with `tee` is not used: it makes new files at each start, and empties those that exist.
"""

import os
import selectors
import socket
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from megatron_mm.config.errors import InputError

_CHUNK_BYTES = 1 << 16


def log_file(logs: Path, rank: int) -> Path:
    """The log of a rank of the whole job."""
    return logs / f"rank_{rank:05d}.log"


@dataclass(slots=True)
class _Stream:
    """One stream of a rank: its log, and where on the terminal its lines go, if anywhere."""

    log: BinaryIO
    terminal: BinaryIO | None
    prefix: bytes
    unfinished: bytes = b""


class Output:
    """Forwards what ranks print. Logs are appended to, since a run that goes on keeps the old text."""

    def __init__(self, logs: Path):
        """Write to `logs`, a directory that is made.

        Raises:
            InputError: it cannot be made.
        """
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{logs} cannot be made for the logs: {error.strerror}; choose another run_dir") from None
        self._logs = logs
        self._files: dict[int, BinaryIO] = {}
        self._selector = selectors.DefaultSelector()

    def open(self, rank: int, num_ranks: int) -> tuple[int, int]:
        """Begin a rank's log.

        Returns:
            descriptors to write its stdout and stderr to; whoever starts the rank closes them.
        """
        log = log_file(self._logs, rank).open("ab", buffering=0)
        self._files[rank] = log
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        log.write(f"==== {now} rank {rank} of {num_ranks} starts on {socket.gethostname()}\n".encode())
        stdout = sys.stdout.buffer if rank == 0 else None
        return self._pipe(_Stream(log, stdout, b"")), self._pipe(
            _Stream(log, sys.stderr.buffer, f"[rank {rank}] ".encode())
        )

    def note(self, rank: int, text: str) -> None:
        """Add a text of the launcher to a rank's log."""
        self._files[rank].write(text.encode())

    def forward(self, seconds: float) -> bool:
        """Forward what there is, waiting for some at most so many seconds; says whether there was any."""
        ready = self._selector.select(seconds)
        for key, _ in ready:
            chunk = os.read(key.fd, _CHUNK_BYTES)
            if not chunk:
                self._end(key)
                continue
            stream: _Stream = key.data
            stream.log.write(chunk)
            *lines, stream.unfinished = (stream.unfinished + chunk).split(b"\n")
            _show(stream, lines)
        return bool(ready)

    def close(self) -> None:
        """Forward what is left and close the logs."""
        while self.forward(0):
            pass
        for key in list(self._selector.get_map().values()):
            self._end(key)
        self._selector.close()
        for log in self._files.values():
            log.close()

    def _pipe(self, stream: _Stream) -> int:
        reading, writing = os.pipe()
        self._selector.register(reading, selectors.EVENT_READ, stream)
        return writing

    def _end(self, key: selectors.SelectorKey) -> None:
        self._selector.unregister(key.fileobj)
        os.close(key.fd)
        if key.data.unfinished:
            _show(key.data, [key.data.unfinished])


def _show(stream: _Stream, lines: list[bytes]) -> None:
    if stream.terminal is None or not lines:
        return
    stream.terminal.write(b"".join(stream.prefix + line + b"\n" for line in lines))
    stream.terminal.flush()
