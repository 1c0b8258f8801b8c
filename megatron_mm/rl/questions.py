"""The questions of each step, as a pure function of the data, the blend, the seed and the step."""

from dataclasses import dataclass

from megatron_mm.chat.images import TileRules
from megatron_mm.chat.modes import Mode
from megatron_mm.chat.render import Conversation, Prompt, Question, render_prompt
from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.decode import decode_with_pillow
from megatron_mm.data.plan import plan_of_run, remembered
from megatron_mm.data.shards import PreparedData


@dataclass(frozen=True, slots=True)
class Asked:
    """A question of the data set.

    Attributes:
        name: of the sample.
        part: of the data, such as "math/non_thinking".
        prompt: up to and including `<think>`.
        reference: the right answer.
    """

    name: str
    part: str
    question: Question
    prompt: Prompt
    reference: str

    @property
    def text(self) -> str:
        """Without the pictures."""
        return "".join(part for part in self.question.parts if isinstance(part, str)).strip()


class Questions:
    """Questions with one answer each, of the parts that the run's blend names.

    Attributes:
        plan: which of them make up a step; its global batches are of prompts.

    Raises:
        InputError: see data/plan.py.
    """

    def __init__(self, config: RunConfig, data: PreparedData, tokenizer: ChatTokenizer):
        # Prompts are drawn one by one, however responses are packed.
        unpacked = config.model_copy(update={"data": config.data.model_copy(update={"packed": False})})
        self._data, self._tokenizer, self._rules = data, tokenizer, TileRules.of_model(config.model)
        self.plan = plan_of_run(data.index, unpacked)
        self._system = None if config.rl is None else config.rl.system_prompt
        self._asked: dict[int, Asked] = {}
        # Those of a step, and of the draws before it.
        self._kept = config.train.global_batch * (1 if config.rl is None else config.rl.max_draws)

    @property
    def fingerprint(self) -> str:
        """Of the whole sequence."""
        return self.plan.fingerprint(self._data.index)

    def rows(self, data_step: int) -> list[int]:
        """Of the questions of a step of the plan."""
        return self.plan.global_batch(data_step).rows.tolist()

    def ask(self, row: int) -> Asked:
        """The question of a row.

        Raises:
            InputError: it is damaged, or not one question with one answer.
        """
        return remembered(self._asked, row, self._kept, self._make)

    def prompt(self, row: int) -> Prompt:
        """Of a row's question."""
        return self.ask(row).prompt

    def _make(self, row: int) -> Asked:
        stored = self._data.read(row)
        content = stored.content.content(decode_with_pillow(stored.pictures, stored.name))
        if not isinstance(content, Conversation) or len(content.turns) != 1:
            raise InputError(f"sample {stored.name} is not one question with one answer, which can be checked")
        ((question, response),) = content.turns
        prompt = render_prompt(question, Mode.AUTO, self._tokenizer, self._rules, self._system)
        return Asked(stored.name, self._data.index.part_of(row), question, prompt, response.answer)
