"""What the writing rank shows: a progress bar where standard output is a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from megatron_mm.processes import parents_terminal_width

# metrics.jsonl has them all.
LEARNING = ("tokens_per_second", "tflops", "mfu", "data_wait")
REINFORCING = ("reward", "think_rate", "heldout/accuracy", "heldout/think_rate", "kl", "truncated")
SHOWN = ("loss", "validation/loss", *REINFORCING, "grad_norm", "lr", *LEARNING)


class Terminal:
    """Shows how far a run is.

    Args:
        label: of the run.
        num_steps: of the run.
        first_step: that it goes on after.
    """

    def __init__(self, label: str, num_steps: int, first_step: int):
        self._label, self._num_steps, self._first_step = label, num_steps, first_step
        self._started = time.monotonic()
        self._progress: Progress | None = None
        # A rank's standard output is a pipe to its launcher.
        width = parents_terminal_width()
        console = Console() if width is None else Console(force_terminal=True, width=width)
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
                # Drawn when there is news. A thread that draws could hold its lock while a loader worker is forked,
                # which would wait for it for ever.
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._progress.add_task(label, total=num_steps, completed=first_step, figures="")

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        with _though_unheard():
            if self._progress is None:
                print(text, flush=True)
            else:
                self._progress.console.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a line to standard error."""
        self.close()  # else it would stand in the bar's line
        with _though_unheard():
            print(f"megatron-mm: {text}", file=sys.stderr, flush=True)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """How far the run is, and its most telling figures."""
        figures = "  ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics)
        if self._progress is not None:
            with _though_unheard():
                self._progress.start()
                self._progress.update(self._task, completed=step, figures=figures, refresh=True)
            return
        seconds = time.monotonic() - self._started
        left = (self._num_steps - step) * seconds / max(step - self._first_step, 1)
        self.say(
            f"{self._label}  step {step}/{self._num_steps}  {figures}  "
            f"{timedelta(seconds=round(seconds))} ({timedelta(seconds=round(left))} left)"
        )

    def end(self, text: str) -> None:
        """Leave the bar as it stands, and print a last line below it."""
        self.close()
        with _though_unheard():
            print(text, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands; `show` draws it anew."""
        if self._progress is not None:
            with _though_unheard():
                self._progress.stop()


@contextmanager
def _though_unheard() -> Iterator[None]:
    """Output may go to a file on the disk that is full, or to a pipe whose reader is gone: no reason to end a run."""
    with suppress(OSError):
        yield
