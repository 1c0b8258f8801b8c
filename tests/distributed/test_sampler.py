"""What is asked of the engine, and what becomes of its answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch.distributed as dist

from megatron_mm.chat.modes import Mode
from megatron_mm.chat.render import Prompt
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.questions import Asked
from megatron_mm.data.shards import PreparedData
from megatron_mm.generation.engine import Completion, Engine, Sampling
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.rl.questions import Questions
from megatron_mm.rl.sampler import Sampler
from tests.ranks import run_on_ranks
from tests.tiny import digits_config

MODES = (Mode.THINKING, Mode.NON_THINKING, Mode.THINKING)
STAGES = "[{steps: 4, max_response_tokens: 64, group_size: 2}]"


class _Engine:
    """Says the seed that it is given."""

    def __init__(self) -> None:
        self.asked: list[tuple[Prompt, Sampling]] = []

    def sample(self, prompts: Sequence[Prompt], pictures: Any, samplings: Sequence[Sampling]) -> list[list[Completion]]:
        del pictures
        self.asked += zip(prompts, samplings, strict=True)
        return [[Completion([(one.seed or 0) >> 1], [-1.0], "x", True)] * one.count for one in samplings]


def _config(digits: Path, **overrides: Any) -> RunConfig:
    return digits_config(digits, Path("unused"), rl=f"{{algorithm: bpo, stages: {STAGES}}}", **overrides)


def _drawn(config: RunConfig) -> tuple[list[tuple[int, Sampling]], list[list[tuple[int, Mode, int]]]]:
    """Lengths of the prompts and samplings that this rank's engine got; all responses. Runs on every rank."""
    platform, data = get_platform("cpu"), PreparedData(str(config.data.path))
    with state.process_group(platform), state.model_parallel(config.parallel, 0):
        questions, engine = Questions(config, data, data.tokenizer()), _Engine()
        sampler = Sampler(cast(Engine, engine), 1, questions, data.tokenizer(), None, 0)
        gather, through = dist.all_gather_object, list[Any]()
        dist.all_gather_object = lambda found, mine, group=None: through.append(group) or gather(found, mine, group)
        groups = sampler.draw(questions.rows(0), MODES, Sampling(64, 1.0), 0)
        num_asked = len(engine.asked)
        # A group of its own, and the same one every time: the job's may be NCCL's.
        sampler.draw(questions.rows(1), MODES, Sampling(64, 1.0), 1)
        assert through == [sampler._group] * 2
        assert dist.get_backend(sampler._group) == "gloo"
        asked = [(len(prompt.ids), sampling) for prompt, sampling in engine.asked[:num_asked]]
        return asked, [[(one.row, one.mode, one.drawn[0]) for one in group] for group in groups]


def test_engines_share_the_questions_out_and_all_ranks_get_all_responses(digits: Path) -> None:
    ((_, alone),) = run_on_ranks(_drawn, 1, _config(digits))
    (first, groups), (second, others) = run_on_ranks(_drawn, 2, _config(digits))
    assert groups == others == alone  # seeds depend on the question, not on the engine
    # A question is asked once a mode, its pictures with it.
    assert len(first) == len(second) == 2 * len(groups) // 2
    assert [sampling.count for _, sampling in first[:2]] == [2, 1]
    for group in groups:
        assert [mode for _, mode, _ in group] == [Mode.THINKING, Mode.THINKING, Mode.NON_THINKING]
    assert len({seed for group in groups for _, _, seed in group}) == 2 * len(groups)


def _seeds(config: RunConfig) -> list[list[list[int]]]:
    """What is drawn for a question alone, and where it stands three times among others."""
    platform, data = get_platform("cpu"), PreparedData(str(config.data.path))
    with state.process_group(platform), state.model_parallel(config.parallel, 0):
        questions = Questions(config, data, data.tokenizer())
        sampler = Sampler(cast(Engine, _Engine()), 1, questions, data.tokenizer(), None, 0)
        one, other = questions.rows(0)[:2]
        draws = (sampler.draw(rows, MODES, Sampling(64, 1.0), 0) for rows in ([one], [one, other, one, one]))
        return [[[rollout.drawn[0] for rollout in group] for group in draw] for draw in draws]


def test_a_question_that_stands_in_a_step_twice_is_answered_anew(digits: Path) -> None:
    ([alone], (first, other, second, third)), again = run_on_ranks(_seeds, 2, _config(digits))
    assert again == [[alone], [first, other, second, third]]
    assert first == alone
    assert len({seed for group in (first, other, second, third) for seed in group}) == 8


def test_a_response_has_what_the_question_leaves(digits: Path) -> None:
    ((asked, _),) = run_on_ranks(_drawn, 1, _config(digits, data__max_sequence_tokens=96))
    assert {tokens + sampling.max_tokens for tokens, sampling in asked} == {96}
    ((asked, _),) = run_on_ranks(_drawn, 1, _config(digits))
    assert {sampling.max_tokens for _, sampling in asked} == {64}


def _refused(config: RunConfig) -> str:
    with pytest.raises(InputError) as error:
        _drawn(config)
    return str(error.value)


def test_a_question_that_leaves_nothing_is_named(digits: Path) -> None:
    rl = f"{{algorithm: bpo, stages: {STAGES}, system_prompt: {'think ' * 80}}}"
    config = digits_config(digits, Path("unused"), rl=rl, data__max_sequence_tokens=96)
    (said,) = run_on_ranks(_refused, 1, config)
    assert "which leaves none of data.max_sequence_tokens=96" in said
    assert "digits" in said or "sample" in said


class _Damaged(Questions):
    """Some of whose samples cannot be read."""

    broken: frozenset[int] = frozenset()

    def ask(self, row: int) -> Asked:
        if row in self.broken:
            raise InputError(f"sample {row} is damaged")
        return super().ask(row)


def _drawn_around(
    config: RunConfig, places: Sequence[int], times: int = 1, is_counted: bool = True
) -> tuple[list[int], list[int] | str]:
    """Rows of a step, and those that were answered where the ones at `places` are damaged. Runs on every rank.

    The sampler is asked so many times, the last time counted, and goes on each time from where another one stopped.
    """
    platform, data = get_platform("cpu"), PreparedData(str(config.data.path))
    with state.process_group(platform), state.model_parallel(config.parallel, 0):
        questions = _Damaged(config, data, data.tokenizer())
        rows = questions.rows(0)
        questions.broken = frozenset(rows[place] for place in places)
        counts, groups = {"asked": 0, "left_out": 0}, []
        try:
            for time in range(1, times + 1):
                sampler = Sampler(cast(Engine, _Engine()), 1, questions, data.tokenizer(), None, 0)
                sampler.load(counts)
                groups = sampler.draw(rows, MODES, Sampling(64, 1.0), 0, is_counted=is_counted or time == times)
                counts = sampler.state()
        except InputError as error:
            return rows, str(error)
        return rows, [group[0].row for group in groups]


def test_a_question_that_cannot_be_asked_is_left_out(digits: Path) -> None:
    for rows, answered in run_on_ranks(_drawn_around, 2, _config(digits), [1]):
        assert answered == [rows[0], *rows[2:]]
    # The same held-out one again and again says nothing of the data.
    for rows, answered in run_on_ranks(_drawn_around, 2, _config(digits), [1], 3, False):
        assert answered == [rows[0], *rows[2:]]
    for _, said in run_on_ranks(_drawn_around, 2, _config(digits), [1], 3, True):
        assert "2 of 8 samples cannot be used" in said


def test_many_questions_that_cannot_be_asked_end_the_run(digits: Path) -> None:
    for _, said in run_on_ranks(_drawn_around, 2, _config(digits), [1, 2]):
        assert "2 of 4 samples cannot be used, more than data.max_broken=0.001" in said
        assert "is damaged" in said
    for _, said in run_on_ranks(_drawn_around, 2, _config(digits, data__max_broken=1), range(4)):
        assert "none of the 4 questions of a step can be asked" in said
