"""Steps that went wrong: NaN, infinity, spikes. Their updates are skipped and counted."""

import math
from collections import deque
from typing import Any

from megatron_mm.config.schema import GuardConfig


class Guard:
    """Judges each step by its loss and gradient norm, and remembers the last ones.

    A spike is told as OLMo-core's SkipStepOptimizer does: so many standard deviations above the mean of the last
    updates.

    Attributes:
        num_skipped: updates skipped so far.
        num_rollbacks: roll-backs so far.
    """

    def __init__(self, config: GuardConfig):
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._norms: deque[float] = deque(maxlen=config.spike_window)
        self._in_a_row = 0
        self.num_skipped = 0
        self.num_rollbacks = 0

    @property
    def gives_up(self) -> bool:
        """Whether so many updates in a row were skipped that the run should roll back."""
        return self._in_a_row >= self._config.max_skips

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Why the update of this step would do harm, None if it would not."""
        reason = self._fault("loss", loss, self._losses) or self._fault("gradient norm", grad_norm, self._norms)
        if reason is None:
            self._losses.append(loss)
            self._norms.append(grad_norm)
            self._in_a_row = 0
        else:
            self.num_skipped += 1
            self._in_a_row += 1
        return reason

    def _fault(self, name: str, value: float, past: deque[float]) -> str | None:
        if not math.isfinite(value):
            return f"the {name} is {value}"
        if not self._config.spike_sigma or len(past) < self._config.spike_window // 2:
            return None
        mean = math.fsum(past) / len(past)
        deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in past) / len(past))
        if value <= mean + self._config.spike_sigma * deviation:
            return None
        return f"the {name} {value:.4g} is a spike (mean {mean:.4g}, standard deviation {deviation:.2g})"

    @property
    def is_steady(self) -> bool:
        """Whether the last step was updated."""
        return self._in_a_row == 0

    def roll_back(self, state: dict[str, Any]) -> None:
        """Count a roll-back to a checkpoint that kept `state`; what was counted since stays counted."""
        num_skipped, num_rollbacks = self.num_skipped, self.num_rollbacks
        self.load(state)
        self.num_skipped, self.num_rollbacks = num_skipped, num_rollbacks + 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "in_a_row": self._in_a_row,
            "num_skipped": self.num_skipped,
            "num_rollbacks": self.num_rollbacks,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._losses.clear()
        self._norms.clear()
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])
        self._in_a_row = state["in_a_row"]
        self.num_skipped = state["num_skipped"]
        self.num_rollbacks = state["num_rollbacks"]
