"""Where the time of a step goes, by our own parts and by Megatron-Core's timers.

Each moment of a measured step is charged to one part, the innermost that has begun, so the parts add up to the step.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_mm.train.assemble import Trainee

PARTS: tuple[str, ...] = (
    "data",
    "forward",
    "backward",
    "communication",
    "optimizer",
    "other",
)
"""What a step is divided into; `other` is what no part has claimed, such as waiting between pipeline stages' work."""

# Every timer of megatron-core 0.16.1. Its point-to-point ones include the wait for the other stage.
_MEGATRON_TIMERS = {
    "forward-compute": "forward",
    "backward-compute": "backward",
    "forward-backward": "other",
    **dict.fromkeys(
        (
            "forward-recv",
            "forward-send",
            "forward-send-backward-recv",
            "forward-send-forward-recv",
            "forward-backward-send-forward-backward-recv",
            "backward-recv",
            "backward-send",
            "backward-send-forward-recv",
            "backward-send-backward-recv",
            "all-grads-sync",
            "conditional-embedder-grads-all-reduce",
            "non-tensor-parallel-grads-all-reduce",
            "embedding-grads-all-reduce",
            "params-all-gather",
        ),
        "communication",
    ),
    **dict.fromkeys(
        (
            "optimizer-copy-to-main-grad",
            "optimizer-unscale-and-check-inf",
            "optimizer-clip-main-grad",
            "optimizer-count-zeros",
            "optimizer-inner-step",
            "optimizer-copy-main-to-model-params",
        ),
        "optimizer",
    ),
}


class StepTimer:
    """Seconds of each part of the measured steps, by a clock that a change of the time of day does not move.

    A GPU works on after the host has given it its work, so the clock is read when the device is done. That costs time,
    so only steps that are measured have it; in the others nothing is done.

    Args:
        synchronize: waits for the device (Platform.synchronize).
    """

    def __init__(self, synchronize: Callable[[], None]):
        self._synchronize = synchronize
        self._seconds = dict.fromkeys(PARTS, 0.0)
        # Parts that have begun, each within the one before; empty while nothing is measured.
        self._begun: list[str] = []
        self._charged_until = 0.0
        self._idle = _Span(None, "other")
        self._spans = {part: _Span(self, part) for part in PARTS}

    def attach(self, trainee: Trainee) -> None:
        """Become the timers that Megatron-Core's schedules, gradient reduction and optimizers ask for."""
        # One config serves all chunks.
        trainee.chunks[0].config.timers = self
        for part in trainee.optimizer.chained_optimizers:
            part.config.timers = self

    def measure(self, on: bool) -> None:
        """Begin a step, measured or not."""
        self._charge()
        self._begun = ["other"] if on else []
        if on:
            self._synchronize()
            self._charged_until = time.monotonic()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge what the block takes to a part of PARTS, but for parts that begin within it."""
        assert name in PARTS, f"{name} is none of {PARTS}"
        if not self._begun:
            yield
            return
        depth = len(self._begun)
        self.begin(name)
        try:
            yield
        finally:
            self._charge()
            # An error may have left Megatron-Core's own parts unfinished.
            del self._begun[depth:]

    def take(self) -> dict[str, float]:
        """End the measured step; the seconds of every part since the last call, 0 where nothing was measured."""
        self.measure(False)
        seconds, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return seconds

    def __call__(self, name: str, log_level: int | None = None) -> "_Span":
        """The timer of Megatron-Core's that is called so (megatron/core/timers.py)."""
        del log_level  # which of them are asked for at all: here all are, or none
        return self._spans[_MEGATRON_TIMERS[name]] if self._begun else self._idle

    def begin(self, part: str) -> None:
        """What follows is of `part`."""
        self._charge()
        self._begun.append(part)

    def end(self, part: str) -> None:
        """What follows is of the part before `part` again."""
        self._charge()
        ended = self._begun.pop()
        assert ended == part, f"{part} ends within {ended}"

    def _charge(self) -> None:
        if self._begun:
            self._synchronize()
            now = time.monotonic()
            self._seconds[self._begun[-1]] += now - self._charged_until
            self._charged_until = now


class _Span:
    """What Megatron-Core starts and stops; without a timer it does nothing."""

    def __init__(self, timer: StepTimer | None, part: str):
        self._timer = timer
        self._part = part

    def start(self, barrier: bool = False) -> None:
        # No barrier: ranks that wait for each other do so in the collectives, and are charged there.
        del barrier
        if self._timer is not None:
            self._timer.begin(self._part)

    def stop(self, barrier: bool = False) -> None:
        del barrier
        if self._timer is not None:
            self._timer.end(self._part)
