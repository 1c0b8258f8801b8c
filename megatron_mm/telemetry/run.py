"""The run directory: config, metrics, events, boards, and lines on the terminal."""

import time
from collections.abc import Mapping

from megatron_mm.config.errors import InputError
from megatron_mm.config.load import to_yaml
from megatron_mm.config.schema import RunConfig
from megatron_mm.telemetry.boards import Board, BoardError, open_boards
from megatron_mm.telemetry.configs import write_config
from megatron_mm.telemetry.lines import JsonLines, cut_after
from megatron_mm.telemetry.terminal import Terminal

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
# Figures of the last line of a run.
LAST = ("loss", "validation/loss", "reward", "heldout/accuracy", "heldout/think_rate")


class Telemetry:
    """Takes the metrics of a run. Only the writing rank has a live one; the others are silent.

    A run does not end because its metrics cannot be written: it says so, goes on, and writes them when it can again.

    Args:
        writes: whether this is the writing rank.
        first_step: that the run goes on after; what was recorded of later steps is removed.

    Raises:
        InputError: the run directory cannot be written at the start, or W&B refuses.
    """

    def __init__(self, config: RunConfig, *, writes: bool, first_step: int):
        self._writes = writes
        self._step = first_step
        if not writes:
            return
        run_dir = self._run_dir = config.run_dir
        self._last: dict[str, float] = {}
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_config(run_dir, to_yaml(config))
            cut_after(run_dir / METRICS, first_step)
            self._metrics, self._events = JsonLines(run_dir / METRICS), JsonLines(run_dir / EVENTS)
            self._boards = open_boards(config, first_step)
        except OSError as error:
            raise InputError(f"run_dir {run_dir} cannot be written: {error.strerror}; choose another") from None
        self._terminal = Terminal(config.recipe, config.train.steps, first_step)
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line on the writing rank."""
        if self._writes:
            self._terminal.say(text)

    def warn(self, text: str, *, step: int | None = None) -> None:
        """Print a line to standard error and record it in events.jsonl, on the writing rank: for what all ranks know.

        Args:
            step: that it is about; left out, the last that was logged.
        """
        if not self._writes:
            return
        self._terminal.warn(text)
        times = {"time": time.time(), "monotonic_seconds": time.monotonic()}
        try:
            self._events.append({**times, "step": self._step if step is None else step, "text": text})
        except OSError as error:
            self._terminal.warn(f"{EVENTS} cannot be written ({error.strerror}); its lines wait")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step and show some of them."""
        self._step = step
        if not self._writes:
            return
        self._record({"step": step, "seconds": round(time.monotonic() - self._started, 3), **metrics})
        for board in list(self._boards):
            try:
                board.log(step, metrics)
            except BoardError as error:
                self._give_up(board, error)
        self._terminal.show(step, metrics)
        self._last |= {name: metrics[name] for name in LAST if name in metrics}

    def rewind(self, step: int) -> None:
        """Remove what is recorded of the steps after `step`, which come again: after a roll-back."""
        self._step = step
        if not self._writes:
            return
        try:
            self._metrics.rewind(step)
        except OSError as error:
            self.warn(f"{METRICS} keeps the steps after {step}: it cannot be shortened ({error.strerror})")
        for board in list(self._boards):
            try:
                board.rewind(step)
            except BoardError as error:
                self._give_up(board, error)

    def done(self, following: str) -> None:
        """Print the last line of a run: where it is, its last figures, and what comes next.

        Args:
            following: the command that comes next.
        """
        if self._writes:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in self._last.items())
            step = f"step {self._step}" + (f", {figures}" if figures else "")
            self._terminal.end(f"done: {self._run_dir} ({step}); next: {following}")

    def close(self) -> None:
        """Flush and close every sink."""
        if not self._writes:
            return
        self._terminal.close()
        for board in self._boards:
            try:
                board.close()
            except BoardError as error:
                self.warn(str(error))
        try:
            self._metrics.flush()
        except OSError as error:
            self.warn(f"{self._metrics.num_waiting} lines of {METRICS} are lost ({error.strerror})")
        self._metrics.close()
        self._events.close()

    def _record(self, line: Mapping[str, object]) -> None:
        before = self._metrics.num_waiting
        try:
            self._metrics.append(line)
        except OSError as error:
            if not before:
                self.warn(
                    f"{METRICS} cannot be written ({error.strerror}); training goes on, and the lines are written when "
                    "they can be"
                )
            return
        if before:
            self.warn(f"{METRICS} is written again, with the {before} lines that waited")

    def _give_up(self, board: Board, error: BoardError) -> None:
        self._boards.remove(board)
        self.warn(f"{error}; it has nothing of the rest of this run, {METRICS} has all")
