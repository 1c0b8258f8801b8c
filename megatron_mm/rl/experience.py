"""Responses that were drawn and credited -> micro-batches of one data-parallel rank."""

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.distributed as dist

from megatron_mm.chat.modes import Mode
from megatron_mm.chat.render import Prompt, Sample
from megatron_mm.config.flops import training_flops
from megatron_mm.config.layout import sample_multiple
from megatron_mm.config.schema import ObjectiveConfig, RunConfig
from megatron_mm.data.loader import Batch, Form, collate
from megatron_mm.data.plan import balanced
from megatron_mm.grading.rewards import Grade
from megatron_mm.rl.objective import Tokens, token_weights
from megatron_mm.train.step import trained_order


@dataclass(frozen=True, slots=True)
class Wording:
    """What a response answers, for those who read it.

    Attributes:
        sample: its name.
        part: of the data.
        question: without the pictures.
        reference: the right answer.
    """

    sample: str
    part: str
    question: str
    reference: str


@dataclass(frozen=True, slots=True)
class Rollout:
    """A response.

    Attributes:
        row: of the question; wording: what it says.
        prompt_tokens, prompt_tiles: of the prompt, up to and including `<think>`.
        mode: that the response was drawn in.
        given: ids behind the prompt that force the mode, none in auto mode.
        drawn: ids that the engine drew, the end of turn included where it was reached.
        logprobs: of each under the engine, in nats.
        text: of the whole response, `<think>` included, the end of turn not.
        finished: false where the limit of tokens cut it off.
        grade: what it is worth.
    """

    row: int
    wording: Wording
    prompt_tokens: int
    prompt_tiles: int
    mode: Mode
    given: tuple[int, ...]
    drawn: "array[int]"
    logprobs: "array[float]"
    text: str
    finished: bool
    grade: Grade

    def skipped(self, config: ObjectiveConfig) -> int:
        """Tokens at its beginning that are not trained."""
        return len(self.given) if config.mask_trigger_tokens else 0

    def num_trained(self, config: ObjectiveConfig) -> int:
        """Tokens that the policy learns from."""
        return len(self.given) + len(self.drawn) - self.skipped(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch(Batch):
    """A micro-batch of responses.

    Attributes:
        tokens: of the responses on this rank, as the model orders them.
    """

    tokens: Tokens


def micro_batches(
    rollouts: Sequence[Rollout],
    prompt_of: Callable[[int], Prompt],
    config: RunConfig,
    objective: ObjectiveConfig,
    max_response_tokens: int,
    pad: int,
    rank: int,
    num_ranks: int,
    context: dist.ProcessGroup,
) -> list[RolloutBatch]:
    """This data-parallel rank's part of a mini-batch: as many micro-batches on every rank, alike in cost.

    Log-probabilities before the update and advantages are not known yet; they stand as zeros. Where there are too few
    responses for that, some stand in a second time, with tokens that weigh nothing.

    Args:
        rollouts: the whole mini-batch, at least one a rank.
        prompt_of: the prompt of a row.
        config: of the run.
        objective: of the update.
        max_response_tokens: longest response.
        pad: id that fills up.
        rank, num_ranks: of the data-parallel group.
        context: this rank's context-parallel group.
    """
    lengths = torch.tensor([one.num_trained(objective) for one in rollouts])
    weights = token_weights(objective, lengths, max_response_tokens).float()
    patches, form = config.model.vision.patches_per_tile, Form.of_run(config)
    made = []
    for unit in balanced_units(rollouts, config, num_ranks)[rank]:
        numbers, counts = [abs(number) - 1 for number in unit], [number > 0 for number in unit]
        chosen = [rollouts[number] for number in numbers]
        samples = [_sample(one, prompt_of(one.row), one.skipped(objective)) for one in chosen]
        batch = collate(samples, pad, patches, form)
        responses = torch.tensor(numbers).repeat_interleave(lengths[numbers])
        shares = torch.tensor(counts).repeat_interleave(lengths[numbers]) * weights[responses]
        sampled = [logprob for one in chosen for logprob in _of_engine(one, objective)]
        order = trained_order(batch, context)
        tokens = Tokens(
            old=torch.zeros(len(order)),
            sampled=torch.tensor(sampled)[order],
            reference=None,
            advantages=torch.zeros(len(order)),
            weights=shares[order],
            responses=responses[order],
        )
        values = {field.name: getattr(batch, field.name) for field in fields(Batch)}
        made.append(RolloutBatch(**values, tokens=tokens))
    return made


def balanced_units(rollouts: Sequence[Rollout], config: RunConfig, num_ranks: int) -> list[list[list[int]]]:
    """Numbers of the responses of each micro-batch of each rank, from 1 on; those below zero only stand in."""
    lengths = np.array([one.prompt_tokens + len(one.given) + len(one.drawn) - 1 for one in rollouts])
    tiles = np.array([one.prompt_tiles for one in rollouts])
    if config.data.packed:
        from megatron_mm.data.packing import best_fit  # Numba, which must not be there before vLLM is

        multiple = sample_multiple(config)
        rounded = -(-lengths // multiple) * multiple
        most = config.data.max_pack_tiles or int(tiles.sum())
        packs, count = best_fit(rounded, tiles, config.data.max_sequence_tokens, most)
        units = [np.flatnonzero(packs == pack).tolist() for pack in range(count)]
    else:
        # Alike in length, so that little is padded.
        order, size = np.argsort(-lengths, kind="stable").tolist(), config.train.micro_batch
        units = [order[first : first + size] for first in range(0, len(order), size)]
    # Interleaved stages work on micro-batches in groups.
    parallel = config.parallel
    count = num_ranks * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
    while len(units) % count and len(units) < len(rollouts):
        largest = max(range(len(units)), key=lambda unit: len(units[unit]))
        unit = units[largest]
        units[largest : largest + 1] = [unit[: len(unit) // 2], unit[len(unit) // 2 :]]
    num_real = len(units)
    shortest = int(lengths.argmin())
    units += [[shortest]] * (-num_real % count)
    flops = training_flops(config.model, config.train.trained)
    squares = lengths.astype(np.float64) ** 2
    costs = [flops.of(lengths[unit].sum(), squares[unit].sum(), tiles[unit].sum(), 0) for unit in units]
    signed = [[(one + 1) * (1 if place < num_real else -1) for one in unit] for place, unit in enumerate(units)]
    return [[signed[number] for number in share] for share in balanced(np.array(costs), num_ranks)]


def _sample(rollout: Rollout, prompt: Prompt, skipped: int) -> Sample:
    ids = np.concatenate([prompt.ids, np.array([*rollout.given, *rollout.drawn], np.int64)])
    trained = np.zeros(len(ids), bool)
    trained[len(prompt.ids) + skipped :] = True
    return Sample(ids, trained, prompt.tiles, prompt.tilings)


def _of_engine(rollout: Rollout, config: ObjectiveConfig) -> list[float]:
    """The engine's log-probabilities of the trained tokens, NaN where it did not draw them."""
    given = len(rollout.given) - rollout.skipped(config)
    return [math.nan] * given + list(rollout.logprobs)
