"""How a policy answers held-out questions while it learns: in auto mode, greedily."""

import fnmatch

from megatron_mm.chat import modes
from megatron_mm.chat.modes import Mode
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.shards import PreparedData
from megatron_mm.generation.engine import Sampling
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
        """Accuracy, think rate and mean length for each part, and the think rate of all of it.

        Metrics, the same on every rank; all call it together.
        """
        metrics, began = {}, []
        for part in self._parts:
            rows = list(range(part.first, part.first + min(self._num_questions, part.count)))
            groups = sampler.draw(rows, (Mode.AUTO,), Sampling(max_tokens), 0, is_counted=False)
            rollouts = [one for (one,) in groups]
            right = [one.grade.answer_right for one in rollouts]
            thoughts = [modes.begins_thought(one.text) for one in rollouts]
            began += thoughts
            values = {
                "accuracy": sum(one.grade.reward > 0 for one in rollouts) if None in right else sum(map(bool, right)),
                "think_rate": sum(thoughts),
                "response_tokens": sum(len(one.drawn) for one in rollouts),
            }
            metrics |= {f"heldout/{part.part}/{name}": total / len(rollouts) for name, total in values.items()}
        return {**metrics, "heldout/think_rate": sum(began) / len(began)}
