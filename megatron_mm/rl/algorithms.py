"""What to sample for a prompt, and how its responses are credited."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_mm.chat.modes import Mode

# Added to standard deviations, as EasyR1 has it; neither paper says.
_EPSILON = 1e-6


class Algorithm(Protocol):
    """Says what one prompt's group of responses is made of, and what each is worth to the update."""

    def modes(self, group_size: int) -> tuple[Mode, ...]:
        """The mode of each response to a prompt."""
        ...

    def advantages(self, rewards: Tensor) -> Tensor:
        """Advantages of the responses [P, K] from their rewards [P, K], for P prompts with K responses each."""
        ...


@dataclass(frozen=True, slots=True)
class Grpo:
    """One group a prompt, each response in the mode that the policy chooses (arXiv 2402.03300, section 4.1).

    Attributes:
        by_deviation: divide by the group's standard deviation; Dr. GRPO (2503.20783, section 3.2) does not.
    """

    by_deviation: bool = True

    def modes(self, group_size: int) -> tuple[Mode, ...]:
        """`group_size` times the same."""
        return (Mode.AUTO,) * group_size

    def advantages(self, rewards: Tensor) -> Tensor:
        """(r - mean) / std within the group; the deviation is a sample's, as EasyR1 has it."""
        centred = rewards - rewards.mean(1, keepdim=True)
        return centred / (rewards.std(1, keepdim=True) + _EPSILON) if self.by_deviation else centred


@dataclass(frozen=True, slots=True)
class Bpo(Grpo):
    """As many responses that think as ones that do not, forced by their triggers (R-4B, arXiv 2508.21113v2, section 3).

    Credited as GRPO's are, over the union of both, so that the better mode of a prompt has the larger advantages.
    """

    def modes(self, group_size: int) -> tuple[Mode, ...]:
        """g that think, then g that do not."""
        return (Mode.THINKING,) * group_size + (Mode.NON_THINKING,) * group_size


def is_flat(rewards: Tensor) -> Tensor:
    """Bool [P]: whether all of a prompt's responses got the same, so that nothing can be learned from them."""
    return (rewards == rewards[:, :1]).all(1)
