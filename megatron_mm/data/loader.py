"""Plan -> batches of tensors for one data-parallel rank."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatron_mm.chat.images import NEWLINE, Downscale, TileRules, Tiling, feature_order, kept_plane, pixel_values
from megatron_mm.chat.render import Question, Response, Sample, render_sample
from megatron_mm.chat.tokenizer import PAD, ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.config.layout import sample_multiple, sequence_multiple
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.plan import Plan
from megatron_mm.data.shards import PreparedData, Record


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: samples under each other, padded on the right, or packed behind each other in one row.

    Attributes:
        ids, labels: int64 [B, S]; labels are the ids that follow.
        trained: bool [B, S], whether the label is a target of the loss.
        starts: int32 [samples + 1], of a pack: where each sample begins, and the end; None where B are samples.
        tiles: float [T, 3, h, w], normalised, or None without pictures.
        order: int64 [N], which feature each placeholder takes, see models/fusion.py.
        downscales: of the pictures that have one, in order.
        num_tokens: tokens of the samples without padding.
    """

    ids: Tensor
    labels: Tensor
    trained: Tensor
    starts: Tensor | None
    tiles: Tensor | None
    order: Tensor
    downscales: tuple[Downscale, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Form:
    """How samples become a micro-batch.

    Attributes:
        packed: behind each other in one row.
        sample_multiple: each sample's length in a pack is padded to a multiple of it.
        sequence_multiple: so is the row's.
    """

    packed: bool = False
    sample_multiple: int = 1
    sequence_multiple: int = 1

    @classmethod
    def of_run(cls, config: RunConfig) -> "Form":
        """From a training config."""
        return cls(config.data.packed, sample_multiple(config), sequence_multiple(config))


def collate(samples: list[Sample], pad: int, patches_per_tile: int, form: Form = Form()) -> Batch:  # noqa: B008
    """Make a micro-batch.

    Args:
        samples: at least one.
        pad: id that fills up.
        patches_per_tile: P.
        form: packed or padded.
    """
    lengths = [len(sample.ids) - 1 for sample in samples]
    if form.packed:
        ends = np.cumsum([_up(length, form.sample_multiple) for length in lengths])
        ends[-1] = _up(ends[-1], form.sequence_multiple)
        # The last sample takes the padding at the end of the row; nothing of it sees what follows.
        starts = np.concatenate([[0], ends]).astype(np.int32)
        shape, places = (1, int(ends[-1])), [(0, int(start)) for start in starts[:-1]]
    else:
        starts = None
        shape = (len(samples), _up(max(lengths), form.sequence_multiple))
        places = [(row, 0) for row in range(len(samples))]
    ids = np.full(shape, pad, np.int64)
    labels, trained = ids.copy(), np.zeros(shape, bool)
    for sample, length, (row, first) in zip(samples, lengths, places, strict=True):
        place = row, slice(first, first + length)
        ids[place], labels[place], trained[place] = sample.ids[:-1], sample.ids[1:], sample.trained[1:]
    order, downscales = _features([grid for sample in samples for grid in sample.tilings], patches_per_tile)
    tiles = np.concatenate([sample.tiles for sample in samples])
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(labels),
        torch.from_numpy(trained),
        None if starts is None else torch.from_numpy(starts),
        torch.from_numpy(pixel_values(tiles)) if len(tiles) else None,
        order,
        downscales,
        sum(lengths),
    )


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _features(grids: list[Tiling], patches_per_tile: int) -> tuple[Tensor, tuple[Downscale, ...]]:
    """Order and downscales of a batch's pictures, their features numbered behind each other.

    First all tiles' features, then the newline, then the downscaled ones.
    """
    newline = patches_per_tile * sum(grid.num_tiles for grid in grids)
    first, first_downscaled = 0, newline + 1
    orders, downscales = [np.empty(0, np.int64)], []
    for grid in grids:
        num_features = patches_per_tile * grid.num_tiles
        local = feature_order(grid)
        of_tiles = np.where(local == NEWLINE, newline, local + first)
        orders.append(np.where(local < num_features, of_tiles, local - num_features + first_downscaled))
        if grid.downscaled is not None:
            downscales.append(Downscale(torch.from_numpy(kept_plane(grid) + first), grid.downscaled))
            first_downscaled += grid.downscaled[0] * grid.downscaled[1]
        first += num_features
    return torch.from_numpy(np.concatenate(orders)), tuple(downscales)


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
        form, patches = Form.of_run(config), config.model.vision.patches_per_tile
        return [
            collate(samples[start : start + size], self._pad, patches, form) for start in range(0, len(samples), size)
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
