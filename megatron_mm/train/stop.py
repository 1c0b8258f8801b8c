"""Signals that ask a run to save and leave."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Slurm's warning before a time limit or preemption; the launcher's and Ctrl-C's way to end a run.
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        signal_name: of the signal that asked, None where none did.
    """

    signal_name: str | None = None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Note the signals instead of dying of them, so that the step is finished and saved.

    A second SIGINT or SIGTERM ends the process. One after SIGUSR1 is not a second one: the launcher passes everything
    on as SIGUSR1, and Slurm sends its SIGTERM to every process of a job as well. Use in the main thread.
    """
    request = StopRequest()
    num_terminations = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal num_terminations
        del frame
        num_terminations += number != signal.SIGUSR1
        if num_terminations > 1 and number != signal.SIGUSR1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        request.signal_name = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
