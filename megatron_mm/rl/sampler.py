"""Questions -> graded responses, by engines that share the ranks out."""

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch.distributed as dist
from PIL import Image

from megatron_mm.chat import modes
from megatron_mm.chat.modes import Mode
from megatron_mm.chat.render import Prompt, trigger_ids
from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.data.loader import check_broken, tell_left_out
from megatron_mm.generation.engine import MAX_PICTURES, Completion, Engine, Sampling
from megatron_mm.grading.rewards import Grade, Submission
from megatron_mm.grading.workers import Graders
from megatron_mm.parallel import state
from megatron_mm.rl.experience import Rollout, Wording
from megatron_mm.rl.questions import Questions


@dataclass(frozen=True, slots=True)
class _Request:
    """A prompt, its pictures, and how responses to it are drawn."""

    prompt: Prompt
    pictures: Sequence[Image.Image]
    sampling: Sampling


class Sampler:
    """Draws and grades responses.

    Args:
        engine: of this rank and its neighbours.
        ranks: of an engine.
        tokenizer: of the model.
        graders: on the first rank of each engine; None on others.
        seed: of the run.
        timeout_seconds: longest that ranks wait for each other's responses.
    """

    def __init__(
        self,
        engine: Engine,
        ranks: int,
        questions: Questions,
        tokenizer: ChatTokenizer,
        graders: Graders | None,
        seed: int,
        timeout_seconds: float = state.TIMEOUT_SECONDS,
    ):
        self._engine, self._questions, self._graders, self._seed = engine, questions, graders, seed
        self._number, self._is_first = dist.get_rank() // ranks, dist.get_rank() % ranks == 0
        self._triggers = {mode: trigger_ids(mode, tokenizer) for mode in Mode}
        self._num_engines = dist.get_world_size() // ranks
        self._num_asked = self._num_left_out = 0
        # Through NCCL's group the pickled responses, a gigabyte of them, would pass through every GPU's memory, which
        # the engine has just then.
        self._group = state.host_group(timeout_seconds)

    def draw(
        self,
        rows: Sequence[int],
        modes_of: Sequence[Mode],
        sampling: Sampling,
        data_step: int,
        *,
        is_counted: bool = True,
    ) -> list[list[Rollout]]:
        """The responses to each question, mode by mode, on all ranks; all of them do it together.

        A response is cut off where question and response have data.max_sequence_tokens. Questions that cannot be asked
        are left out and told: damaged ones, several turns, prompts that leave no room for a response.

        What is drawn depends on seed, data step and question alone, as far as the engine's sums do not depend on what
        it works on beside.

        Args:
            rows: of the questions; one that stands there twice is answered anew.
            modes_of: mode of each response to a question.
            sampling: how responses are drawn, but for their number and seed.
            data_step: of the plan.
            is_counted: whether questions that cannot be asked count against data.max_broken; those that are asked
                again and again should not.

        Raises:
            InputError: more than data.max_broken of the questions so far, or all of these, cannot be asked.
        """
        # Questions with much to read are shared out first.
        tokens = self._questions.plan.sizes.tokens[list(rows)]
        mine = np.argsort(-tokens, kind="stable")[self._number :: self._num_engines].tolist()
        turns = _turns(rows)
        drawn = self._draw([(rows[number], turns[number]) for number in mine], modes_of, sampling, data_step)
        gathered: list[Any] = [None] * dist.get_world_size()
        responses = list(zip(mine, drawn, strict=True)) if self._is_first else []
        dist.all_gather_object(gathered, responses, group=self._group)
        found = dict(group for of_rank in gathered for group in of_rank)
        return self._usable([found[number] for number in range(len(rows))], is_counted)

    def state(self) -> dict[str, int]:
        """How many questions were asked, and how many of them could not be."""
        return {"asked": self._num_asked, "left_out": self._num_left_out}

    def load(self, state: Mapping[str, int]) -> None:
        """Count on from `state`."""
        self._num_asked, self._num_left_out = state["asked"], state["left_out"]

    def rest(self, *, keeps_weights: bool) -> None:
        """Give the engine's memory to the trainer; see generation/engine.py."""
        self._engine.rest(keeps_weights=keeps_weights)

    def _usable(self, found: Sequence[list[Rollout] | str], is_counted: bool) -> list[list[Rollout]]:
        """Without the questions that could not be asked, if there are few."""
        reasons = [one for one in found if isinstance(one, str)]
        if state.writes():
            for reason in reasons:
                tell_left_out(reason)
        if is_counted:
            self._num_asked += len(found)
            self._num_left_out += len(reasons)
        if reasons and is_counted:
            check_broken(self._num_left_out, self._num_asked, self._questions.max_broken, reasons[-1])
        if len(reasons) == len(found):
            raise InputError(f"none of the {len(found)} questions of a step can be asked; the last one: {reasons[-1]}")
        return [one for one in found if not isinstance(one, str)]

    def _draw(
        self, places: list[tuple[int, int]], modes_of: Sequence[Mode], sampling: Sampling, data_step: int
    ) -> list[list[Rollout] | str]:
        """The responses to each question, given by its row and turn, or why it cannot be asked."""
        wanted = {mode: modes_of.count(mode) for mode in dict.fromkeys(modes_of)}
        requests, faults = list[_Request](), dict[int, str]()
        for row, turn in places:
            try:
                requests += self._requests(row, turn, wanted, sampling, data_step)
            except InputError as error:
                faults[row] = str(error)
        prompts = [request.prompt for request in requests]
        pictures = [request.pictures for request in requests]
        samplings = [request.sampling for request in requests]
        completions = iter(self._engine.sample(prompts, pictures, samplings) if requests else ())
        asked = [row for row, _ in places if row not in faults]
        groups = self._graded(
            [
                [self._rollout(row, mode, completion) for mode in wanted for completion in next(completions)]
                for row in asked
            ]
        )
        answered = iter(groups)
        return [faults[row] if row in faults else next(answered) for row, _ in places]

    def _requests(
        self, row: int, turn: int, wanted: Mapping[Mode, int], sampling: Sampling, data_step: int
    ) -> list[_Request]:
        """What the engine is asked for a question: once a mode.

        Raises:
            InputError: it cannot be asked.
        """
        requests = []
        for number, (mode, count) in enumerate(wanted.items()):
            prompt = self._questions.prompt(row).followed_by(self._triggers[mode])
            seeds = np.random.SeedSequence([self._seed, data_step, row, number + turn * len(wanted)])
            longest, seed = min(sampling.max_tokens, self._room(row, prompt)), int(seeds.generate_state(1)[0])
            pictures = self._questions.ask(row).question.pictures
            if len(pictures) > MAX_PICTURES:
                name = self._questions.ask(row).name
                raise InputError(f"sample {name} has {len(pictures)} pictures; an engine takes {MAX_PICTURES}")
            requests.append(_Request(prompt, pictures, replace(sampling, max_tokens=longest, count=count, seed=seed)))
        return requests

    def _room(self, row: int, prompt: Prompt) -> int:
        """Tokens that a prompt leaves for a response."""
        most, taken = self._questions.max_tokens, len(prompt.ids)
        if taken >= most:
            raise InputError(
                f"the prompt of sample {self._questions.ask(row).name} has {taken} tokens, which leaves none of "
                f"data.max_sequence_tokens={most} for a response; raise it, shorten rl.system_prompt, or leave the "
                "sample out"
            )
        return most - taken

    def _rollout(self, row: int, mode: Mode, completion: Completion) -> Rollout:
        """A response that is not graded yet."""
        asked, prompt = self._questions.ask(row), self._questions.prompt(row)
        return Rollout(
            row=row,
            wording=Wording(asked.name, self._questions.part(row), asked.text, asked.reference),
            prompt_tokens=len(prompt.ids),
            prompt_tiles=len(prompt.tiles),
            mode=mode,
            given=self._triggers[mode],
            drawn=array("i", completion.ids),
            logprobs=array("f", completion.logprobs),
            text=modes.TRIGGERS[mode] + completion.text,
            finished=completion.finished,
            grade=Grade(0.0),
        )

    def _graded(self, groups: list[list[Rollout]]) -> list[list[Rollout]]:
        if self._graders is None:
            return groups
        rollouts = [one for group in groups for one in group]
        submissions = [
            Submission(one.text, one.wording.reference, one.wording.question, one.finished) for one in rollouts
        ]
        grades = iter(self._graders.grade(submissions))
        return [[replace(rollout, grade=next(grades)) for rollout in group] for group in groups]


def _turns(rows: Sequence[int]) -> list[int]:
    """How often each row stood before."""
    seen = Counter[int]()
    turns = []
    for row in rows:
        turns.append(seen[row])
        seen[row] += 1
    return turns
