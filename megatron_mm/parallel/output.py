"""What ranks print: everything to a log of each rank, some of it to the terminal.

On a terminal rank 0 draws a progress bar, which it does not end by a new line. What it draws is passed on as it comes;
its log gets the lines that are left in the end, without colours and moves of the cursor.

torch's own `DefaultLogsSpecs` with `tee` is not used: it makes new files at each start, and empties those that exist.
"""

import os
import re
import selectors
import socket
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from megatron_mm.config.errors import InputError
from megatron_mm.processes import terminal_width

_CHUNK_BYTES = 1 << 16
_ESCAPE = re.compile(rb"\x1b\[[?0-9;]*[A-Za-z]")
_CLEAR_LINE = b"\r\x1b[2K"
_SHOW_CURSOR = b"\x1b[?25h"


def log_file(logs: Path, rank: int) -> Path:
    """The log of a rank of the whole job."""
    return logs / f"rank_{rank:05d}.log"


@dataclass(slots=True)
class _Stream:
    """One stream of a rank: its log, and where on the terminal its lines go, if anywhere.

    Attributes:
        is_drawn: whether what comes is passed on at once, since a line is drawn over and over.
    """

    log: BinaryIO
    terminal: BinaryIO | None
    prefix: bytes
    unfinished: bytes = b""
    is_drawn: bool = False


class Output:
    """Forwards what ranks print. Logs are appended to, since a run that goes on keeps the old text.

    Attributes:
        terminal_width: columns of the terminal that rank 0's stdout is shown on, None where it is shown on none.
    """

    def __init__(self, logs: Path):
        """Write to `logs`, a directory that is made.

        Raises:
            InputError: it cannot be made.
        """
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{logs} cannot be made for the logs: {error.strerror}; choose another run_dir") from None
        self.terminal_width = terminal_width(sys.stdout)
        # Whether the terminal's cursor stands behind something drawn.
        self._is_mid_line = False
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
        is_drawn = rank == 0 and self.terminal_width is not None
        return self._pipe(_Stream(log, stdout, b"", is_drawn=is_drawn)), self._pipe(
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
            *lines, stream.unfinished = (stream.unfinished + chunk).split(b"\n")
            if stream.is_drawn:
                self._draw(stream, chunk, lines)
            else:
                stream.log.write(chunk)
                self._show(stream, lines)
        return bool(ready)

    def close(self) -> None:
        """Forward what is left and close the logs."""
        while self.forward(0):
            pass
        for key in list(self._selector.get_map().values()):
            self._end(key)
        self.end_line()
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
        stream: _Stream = key.data
        if stream.unfinished and stream.is_drawn:
            stream.log.write(_last_drawn(stream.unfinished) + b"\n")
        elif stream.unfinished:
            self._show(stream, [stream.unfinished])

    def end_line(self) -> None:
        """Begin a new line on the terminal where one is being drawn, for what others print there."""
        if self._is_mid_line:
            sys.stdout.buffer.write(_SHOW_CURSOR + b"\n")
            sys.stdout.buffer.flush()
            self._is_mid_line = False

    def _draw(self, stream: _Stream, chunk: bytes, lines: list[bytes]) -> None:
        assert stream.terminal is not None
        stream.terminal.write(chunk)
        stream.terminal.flush()
        self._is_mid_line = not chunk.endswith(b"\n")
        stream.log.write(b"".join(_last_drawn(line) + b"\n" for line in lines))
        # What was drawn over is not needed any more, and a bar is drawn over for weeks.
        stream.unfinished = stream.unfinished[max(stream.unfinished.rfind(b"\r"), 0) :]

    def _show(self, stream: _Stream, lines: list[bytes]) -> None:
        if stream.terminal is None or not lines:
            return
        # In place of the bar, which is drawn again below.
        over = _CLEAR_LINE if self._is_mid_line and stream.terminal.isatty() else b""
        stream.terminal.write(over + b"".join(stream.prefix + line + b"\n" for line in lines))
        stream.terminal.flush()


def _last_drawn(line: bytes) -> bytes:
    """What is left of a line that was drawn over and over, as plain text."""
    return _ESCAPE.sub(b"", line).rstrip(b"\r").rpartition(b"\r")[2].rstrip()
