"""How far a preparation is: a bar for each source where standard output is a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


@dataclass(slots=True)
class _Source:
    """What is known of one source.

    Attributes:
        started: when its first task began, in seconds.
        share: of its input that is done, 0 to 1.
        restored: share of it that an earlier call did, which took no time now.
        records: done in this call.
        bar: on the terminal.
    """

    started: float
    bar: TaskID | None = None
    share: float = 0.0
    restored: float = 0.0
    records: int = 0


class PreparationProgress:
    """Shows how far each source is, its records a second and the time left.

    Args:
        sources: their names, in the order in which they are prepared.
        say: takes plain lines.
        clock: in seconds.
    """

    def __init__(
        self, sources: Sequence[str], say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._clock = say, clock
        self._numbers = {name: number for number, name in enumerate(sources, 1)}
        self._sources: dict[str, _Source] = {}
        self._said = clock()
        self._bars: Progress | None = None
        console = Console()
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[records]:,} records, {task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._bars = Progress(*columns, console=console)

    def __enter__(self) -> "PreparationProgress":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def begin(self, name: str) -> None:
        """Start the clock of a source; again, it does nothing."""
        if name not in self._sources:
            bar = None if self._bars is None else self._bars.add_task(name, total=1.0, records=0, rate="starting")
            self._sources[name] = _Source(self._clock(), bar)

    def restore(self, name: str, share: float) -> None:
        """Count a task that an earlier call finished.

        Args:
            name: of the source.
            share: of the source's input that the task is.
        """
        source = self._sources[name]
        source.restored += share
        source.share += share

    def advance(self, name: str, share: float, records: int) -> None:
        """Count a finished task.

        Args:
            name: of the source.
            share: of the source's input that the task is.
            records: that it read.
        """
        source = self._sources[name]
        source.share += share
        source.records += records
        now = self._clock()
        seconds = max(now - source.started, 1e-3)
        rate = f"{source.records / seconds:,.0f} records/s"
        if self._bars is not None and source.bar is not None:
            self._bars.update(source.bar, completed=source.share, records=source.records, rate=rate)
        # What an earlier call did took no time in this one.
        elif now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            left = timedelta(seconds=round(seconds * (1 - source.share) / (source.share - source.restored)))
            self._say(
                f"{name} (source {self._numbers[name]} of {len(self._numbers)}): {source.share:.0%}, "
                f"{source.records:,} records, {rate}, {left} left"
            )
