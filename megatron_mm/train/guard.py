"""Steps that went wrong: NaN, infinity, spikes. Their updates are skipped and counted."""

import math
from collections import deque
from typing import Any

from megatron_mm.config.schema import GuardConfig

# OLMo-core's SkipStepOptimizer.
SPIKE_SIGMA = 6.0


class Guard:
    """Judges each step by its loss and gradient norm, and remembers the last ones.

    A spike is told as OLMo-core's SkipStepOptimizer does: so many standard deviations above the mean of the last
    steps. Losses that spike are not remembered: where they stay high, the run has to roll back. So a loss has to rise
    by `spike_rise` as well, else a run whose losses are nearly 0 would end on noise. A gradient norm may rise for good
    while the loss falls.

    Args:
        config: says what is skipped.
        spike_sigma: of the kind of run, where the config leaves it out.

    Attributes:
        num_skipped: updates skipped so far.
        num_rollbacks: roll-backs so far.
    """

    def __init__(self, config: GuardConfig, spike_sigma: float = SPIKE_SIGMA):
        self._config = config
        self._sigma = spike_sigma if config.spike_sigma is None else config.spike_sigma
        self._remembered: dict[str, deque[float]] = {
            name: deque(maxlen=config.spike_window) for name in ("loss", "gradient norm")
        }
        self._in_a_row = 0
        self.num_skipped = 0
        self.num_rollbacks = 0

    @property
    def gives_up(self) -> bool:
        """Whether so many updates in a row were skipped for their loss, or for NaN, that the run should roll back."""
        return self._in_a_row >= self._config.max_skips

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Why the update of this step would do harm, None if it would not."""
        reason = (
            _infinite("loss", loss)
            or _infinite("gradient norm", grad_norm)
            or self._spike("loss", loss, self._config.spike_rise)
        )
        if reason is not None:
            self._in_a_row += 1
        else:
            self._in_a_row = 0
            self._remembered["loss"].append(loss)
            reason = self._spike("gradient norm", grad_norm)
            # Spikes too: without updates a steep place stays steep, and a norm that stays high is no spike any more.
            self._remembered["gradient norm"].append(grad_norm)
        self.num_skipped += reason is not None
        return reason

    def _spike(self, name: str, value: float, least_rise: float = 0.0) -> str | None:
        past = self._remembered[name]
        if not self._sigma or len(past) < self._config.spike_window // 2:
            return None
        mean = math.fsum(past) / len(past)
        deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in past) / len(past))
        if value <= mean + max(self._sigma * deviation, least_rise):
            return None
        return f"the {name} {value:.4g} is a spike (mean {mean:.4g}, standard deviation {deviation:.2g})"

    @property
    def is_steady(self) -> bool:
        """Whether nothing tells against the weights: the last loss was no spike, and all was finite."""
        return self._in_a_row == 0

    def roll_back(self, state: dict[str, Any]) -> None:
        """Count a roll-back to a checkpoint that kept `state`; what was counted since stays counted."""
        num_skipped, num_rollbacks = self.num_skipped, self.num_rollbacks
        self.load(state)
        self.num_skipped, self.num_rollbacks = num_skipped, num_rollbacks + 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "remembered": {name: list(past) for name, past in self._remembered.items()},
            "in_a_row": self._in_a_row,
            "num_skipped": self.num_skipped,
            "num_rollbacks": self.num_rollbacks,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for name, past in self._remembered.items():
            past.clear()
            past.extend(state["remembered"][name])
        self._in_a_row = state["in_a_row"]
        self.num_skipped = state["num_skipped"]
        self.num_rollbacks = state["num_rollbacks"]


def _infinite(name: str, value: float) -> str | None:
    return None if math.isfinite(value) else f"the {name} is {value}"
