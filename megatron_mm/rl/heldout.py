"""How a policy answers held-out questions while it learns: in auto mode, greedily."""

import fnmatch
from collections import defaultdict
from collections.abc import Sequence

from megatron_mm.chat import modes
from megatron_mm.chat.modes import Mode
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.shards import PreparedData
from megatron_mm.generation.engine import Sampling
from megatron_mm.rl.experience import Rollout
from megatron_mm.rl.sampler import Sampler
from megatron_mm.train.validate import SPLIT


class HeldOut:
    """The first questions of every part of the held-out split that the blend names, always the same ones.

    Raises:
        InputError: it names none.
    """

    def __init__(self, config: RunConfig, data: PreparedData, num_questions: int):
        patterns = config.data.blend or {"*": 1.0}
        self._parts = [
            part
            for part in data.index.ranges(SPLIT)
            if any(fnmatch.fnmatchcase(part.part, pattern) for pattern in patterns)
        ]
        if not self._parts:
            raise InputError(
                f"train.validate_every: {data.path} holds out no sample of data.blend's parts; prepare held-out "
                "samples, or leave it out"
            )
        self._num_questions = num_questions

    def run(self, sampler: Sampler, max_tokens: int) -> dict[str, float]:
        """Accuracy, think rate and mean length for each source, and accuracy and think rate of all of it.

        A name says the mode that the questions were asked in, not the one that their samples were stored in: the
        question is the same in both.

        Returns:
            metrics, the same on every rank; all call it together.
        """
        by_source: dict[str, list[Rollout]] = defaultdict(list)
        for part in self._parts:
            rows = list(range(part.first, part.first + min(self._num_questions, part.count)))
            groups = sampler.draw(rows, (Mode.AUTO,), Sampling(max_tokens), 0, is_counted=False)
            source, _, _ = part.part.rpartition("/")
            by_source[source] += [rollout for (rollout,) in groups]
        metrics = {}
        for source, rollouts in by_source.items():
            means = {**_means(rollouts), "response_tokens": sum(len(one.drawn) for one in rollouts) / len(rollouts)}
            metrics |= {f"heldout/{source}/{Mode.AUTO}/{name}": value for name, value in means.items()}
        every = _means([rollout for rollouts in by_source.values() for rollout in rollouts])
        return metrics | {f"heldout/{name}": value for name, value in every.items()}


def _means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Accuracy and think rate of responses in auto mode."""
    num_right = sum(map(_is_right, rollouts))
    num_thoughts = sum(modes.begins_thought(rollout.text) for rollout in rollouts)
    return {"accuracy": num_right / len(rollouts), "think_rate": num_thoughts / len(rollouts)}


def _is_right(rollout: Rollout) -> bool:
    """Whether the answer is right; of a reward that does not say so, whether it pays."""
    right = rollout.grade.answer_right
    return rollout.grade.reward > 0 if right is None else right
