"""Plan -> batches of tensors for one data-parallel rank."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatron_mm.chat.images import NEWLINE, TileRules, feature_order, pixel_values
from megatron_mm.chat.render import Question, Response, Sample, render_sample
from megatron_mm.chat.tokenizer import PAD, ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.plan import Plan
from megatron_mm.data.shards import PreparedData, Record


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, padded on the right to its longest sample.

    Attributes:
        ids, labels: int64 [B, S]; labels are the ids that follow.
        trained: float [B, S], 1 where the label is a target of the loss.
        tiles: float [T, 3, h, w], normalised, or None without pictures.
        order: int64 [N], which row of the flattened [T * P] features each placeholder takes; T * P is the newline.
        num_tokens: tokens of the samples without padding.
    """

    ids: Tensor
    labels: Tensor
    trained: Tensor
    tiles: Tensor | None
    order: Tensor
    num_tokens: int


def collate(samples: list[Sample], pad: int, patches_per_tile: int, divisor: int = 1) -> Batch:
    """Make a micro-batch.

    Args:
        samples: B of them.
        pad: id that fills up.
        patches_per_tile: P.
        divisor: the padded length is a multiple of it (sequence parallelism cuts it).
    """
    lengths = [len(sample.ids) - 1 for sample in samples]
    longest = -(-max(lengths) // divisor) * divisor
    ids = np.full((len(samples), longest), pad, np.int64)
    labels, trained = ids.copy(), np.zeros(ids.shape, np.float32)
    orders, num_tiles = [], sum(len(sample.tiles) for sample in samples)
    first_tile = 0
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        ids[row, :length], labels[row, :length] = sample.ids[:-1], sample.ids[1:]
        trained[row, :length] = sample.trained[1:]
        for grid in sample.tilings:
            order = feature_order(grid)
            orders.append(
                np.where(order == NEWLINE, num_tiles * patches_per_tile, order + first_tile * patches_per_tile)
            )
            first_tile += grid.num_tiles
    tiles = np.concatenate([sample.tiles for sample in samples])
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(labels),
        torch.from_numpy(trained),
        torch.from_numpy(pixel_values(tiles)) if num_tiles else None,
        torch.from_numpy(np.concatenate(orders)) if orders else torch.empty(0, dtype=torch.int64),
        sum(lengths),
    )


class StepBatches(Dataset[list[Batch]]):
    """The micro-batches of one data-parallel rank, by step.

    Raises:
        InputError: data.blend names a part that is not there; the tokenizer is larger than the model's vocabulary.
            On reading: a sample is too long or damaged.
    """

    def __init__(self, config: RunConfig, tokenizer: ChatTokenizer, rank: int, num_ranks: int):
        assert config.data.path is not None
        if len(tokenizer) > config.model.language.vocab_size:
            raise InputError(
                f"the tokenizer in {tokenizer.directory} has {len(tokenizer)} tokens, more than "
                f"model.language.vocab_size={config.model.language.vocab_size}"
            )
        self._config = config
        self._tokenizer = tokenizer
        self._rank, self._num_ranks = rank, num_ranks
        self._data = PreparedData(config.data.path, "train")
        parts = {part: self._data.rows_of(part) for part in config.data.blend}
        self._plan = Plan(parts, config.data.blend, config.seed, config.train.global_batch)
        self._pad = tokenizer.control(PAD)
        self._rules = TileRules.of_model(config.model)

    def __len__(self) -> int:
        return self._config.train.steps

    def __getitem__(self, step: int) -> list[Batch]:
        config = self._config
        mine = self._plan.batch(step)[self._rank :: self._num_ranks]
        samples = [self._sample(self._data.read(row)) for row in mine]
        size = config.train.micro_batch
        divisor = config.parallel.tensor if config.parallel.sequence else 1
        patches = config.model.vision.patches_per_tile
        return [
            collate(samples[start : start + size], self._pad, patches, divisor)
            for start in range(0, len(samples), size)
        ]

    def _sample(self, record: Record) -> Sample:
        turn = record.turn
        if self._config.data.text_only:
            question = Question(f"{record.caption}\n{turn.question}")
        else:
            question = Question(turn.question, (record.picture,))
        sample = render_sample(question, Response(turn.answer, turn.reasoning), self._tokenizer, self._rules)
        limit = self._config.data.max_sequence_tokens
        if len(sample.ids) > limit:
            raise InputError(
                f"sample {record.name} has {len(sample.ids)} tokens, more than data.max_sequence_tokens={limit}"
            )
        return sample


class _Told(Dataset[list[Batch] | InputError]):
    """Hands bad input over as a value: raised in a worker, torch would wrap the message in the worker's traceback."""

    def __init__(self, dataset: StepBatches):
        self._dataset = dataset

    def __getitem__(self, step: int) -> list[Batch] | InputError:
        try:
            return self._dataset[step]
        except InputError as error:
            return error


def batches_from(dataset: StepBatches, first_step: int, num_workers: int) -> Iterator[list[Batch]]:
    """Micro-batches of every step from `first_step` on, read ahead by `num_workers` processes.

    Raises:
        InputError: see StepBatches.
    """
    steps = range(first_step, len(dataset))
    for batches in DataLoader(_Told(dataset), sampler=steps, batch_size=None, num_workers=num_workers):
        if isinstance(batches, InputError):
            raise batches
        yield batches
