"""Says when a policy that chose between the modes has stopped choosing."""

from collections.abc import Callable


class ModeAlarm:
    """Watches the share of answers in auto mode that think.

    Args:
        least_share: of a mode, below which it counts as collapsed; with 0 none ever does.
        warn: takes what is said, once a collapse.

    Attributes:
        has_both: whether the policy has had both modes, and has not lost one since; checkpoints keep it.
    """

    def __init__(self, least_share: float, warn: Callable[[str], None]):
        self._least_share, self._warn = least_share, warn
        # A model that has always had one mode, as after a cold start, has lost none.
        self.has_both = False

    def look(self, step: int, think_rate: float, questions: str) -> None:
        """At the think rate after a step.

        Args:
            questions: which were answered, for the message.
        """
        chosen_least = min(think_rate, 1 - think_rate)
        if chosen_least >= self._least_share:
            self.has_both = True
        elif self.has_both:
            self.has_both = False
            mode = "thinking" if think_rate < 0.5 else "non-thinking"
            self._warn(
                f"step {step}: the {mode} mode has collapsed: {think_rate:.1%} of the {questions} are answered with a "
                "thought. If this is not what the questions ask for, lower optim.lr, raise rl.objective.kl_coef, or "
                "go back to an earlier checkpoint"
            )
