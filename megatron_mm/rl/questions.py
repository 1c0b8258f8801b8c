"""The questions of each step, as a pure function of the data, the blend, the seed and the step."""

from megatron_mm.chat.images import TileRules
from megatron_mm.chat.modes import Mode
from megatron_mm.chat.render import Prompt, render_prompt
from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.plan import plan_of_run, remembered
from megatron_mm.data.questions import Asked, ask
from megatron_mm.data.shards import PreparedData


class Questions:
    """Questions with one answer each, of the parts that the run's blend names.

    Attributes:
        plan: which of them make up a step; its global batches are of prompts.
        max_tokens: of a question and its response.
        max_broken: share of the questions that may turn out to be of no use.

    Raises:
        InputError: see data/plan.py.
    """

    def __init__(self, config: RunConfig, data: PreparedData, tokenizer: ChatTokenizer):
        # Prompts are drawn one by one, however responses are packed.
        unpacked = config.model_copy(update={"data": config.data.model_copy(update={"packed": False})})
        self._data, self._tokenizer, self._rules = data, tokenizer, TileRules.of_model(config.model)
        self.plan, self.max_tokens = plan_of_run(data.index, unpacked), config.data.max_sequence_tokens
        self.max_broken = config.data.max_broken
        self._system = None if config.rl is None else config.rl.system_prompt
        self._asked: dict[int, Asked] = {}
        self._prompts: dict[int, Prompt] = {}
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
            InputError: see data/questions.py.
        """
        return remembered(self._asked, row, self._kept, lambda row: ask(self._data, row))

    def part(self, row: int) -> str:
        """Of the data, such as "math/non_thinking"."""
        return self._data.index.part_of(row)

    def prompt(self, row: int) -> Prompt:
        """Of a row's question, up to and including `<think>`."""
        return remembered(self._prompts, row, self._kept, self._make_prompt)

    def _make_prompt(self, row: int) -> Prompt:
        asked = self.ask(row)
        system = asked.system if self._system is None else self._system
        return render_prompt(asked.question, Mode.AUTO, self._tokenizer, self._rules, system)
