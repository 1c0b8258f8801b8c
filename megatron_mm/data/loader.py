"""Plan -> batches of tensors for one data-parallel rank."""

import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from megatron_mm.chat.images import NEWLINE, Downscale, Tiling, feature_order, kept_plane
from megatron_mm.chat.render import Sample
from megatron_mm.chat.tokenizer import PAD, ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.config.layout import sample_multiple, sequence_multiple
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.decode import DaliDecoder, Decoder, decode_with_pillow
from megatron_mm.data.decode_process import DecodeProcess
from megatron_mm.data.handover import Packed, pack, unpack
from megatron_mm.data.plan import Units, plan_of_run, remembered
from megatron_mm.data.reader import BrokenSample, SampleReader
from megatron_mm.data.shards import PreparedData

# The share of broken samples is of at least so many: one in the first step is no reason to end a run.
FEWEST_SAMPLES = 1000
# Workers that were killed are started again so often in a run.
MAX_RESTARTS = 5


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: samples under each other, padded on the right, or packed behind each other in one row.

    Attributes:
        ids, labels: int64 [B, S]; labels are the ids that follow.
        trained: bool [B, S], whether the label is a target of the loss.
        starts: int32 [samples + 1], of a pack: where each sample begins, and the end; None where B are samples.
        tiles: uint8 [T, h, w, 3], or None without pictures.
        order: int64 [N], which feature each placeholder takes, see models/fusion.py.
        downscales: of the pictures that have one, in order.
        parts: int64 [samples], the part of the data that each sample belongs to, see `MicroBatches.parts`.
        num_tokens: tokens of the samples without padding.
        squared_tokens: sum of the squares of the samples' lengths, which attention grows with.
        num_samples: samples, the damaged ones included.
        broken: why each damaged sample was left out; an empty one stands in its place.
    """

    ids: Tensor
    labels: Tensor
    trained: Tensor
    starts: Tensor | None
    tiles: Tensor | None
    order: Tensor
    downscales: tuple[Downscale, ...]
    parts: Tensor
    num_tokens: int
    squared_tokens: int
    num_samples: int
    broken: tuple[str, ...] = ()


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


def collate(
    samples: list[Sample],
    pad: int,
    patches_per_tile: int,
    form: Form = Form(),  # noqa: B008
    parts: Sequence[int] | None = None,
) -> Batch:
    """Make a micro-batch.

    Args:
        samples: at least one.
        pad: id that fills up.
        patches_per_tile: P.
        form: packed or padded.
        parts: of the data that the samples belong to; left out, all to the first.
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
        torch.from_numpy(tiles) if len(tiles) else None,
        order,
        downscales,
        torch.tensor(parts if parts is not None else [0] * len(samples)),
        sum(lengths),
        sum(length**2 for length in lengths),
        len(samples),
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


class MicroBatches(Dataset[Batch]):
    """The micro-batches of one data-parallel rank, numbered from the first step's first.

    Args:
        gpu: number of this rank's GPU, which data.decoder=dali decodes on; None without one.

    Attributes:
        plan: which samples they hold.
        parts: names of the parts of the data, which batches have by number.
        per_step: how many make up a step.
        gpu: see above.
        make_decoder: makes what decodes, in the process that uses it.

    Raises:
        InputError: there is no such data; data.blend names a part that is not there; too many samples do not fit; the
            tokenizer is larger than the model's vocabulary. On reading: the index says something else of a sample.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: ChatTokenizer,
        rank: int,
        num_ranks: int,
        split: str = "train",
        gpu: int | None = None,
    ):
        assert config.data.path is not None
        if len(tokenizer) > config.model.language.vocab_size:
            raise InputError(
                f"the tokenizer in {tokenizer.directory} has {len(tokenizer)} tokens, more than "
                f"model.language.vocab_size={config.model.language.vocab_size}"
            )
        self._config = config
        self._tokenizer = tokenizer
        self._rank, self._num_ranks = rank, num_ranks
        self._data = PreparedData(config.data.path)
        self.plan = plan_of_run(self._data.index, config, split)
        self.parts = sorted({part.part for part in self._data.index.parts})
        self._pad = tokenizer.control(PAD)
        self._steps: dict[int, tuple[Units, list[int]]] = {}
        self.per_step = config.train.global_batch // num_ranks // config.train.micro_batch
        self.gpu = gpu
        self.make_decoder = self._make_decoder

    @property
    def fingerprint(self) -> str:
        """Of the whole sequence of global batches."""
        return self.plan.fingerprint(self._data.index)

    def __getitem__(self, number: int) -> Batch:
        step, place = divmod(number, self.per_step)
        units, mine = self.find(step)
        size = self._config.train.micro_batch
        rows = np.concatenate([units[unit] for unit in mine[place * size : (place + 1) * size]])
        read = [(self._sample(int(row)), self.parts.index(self._data.index.part_of(int(row)))) for row in rows]
        broken = tuple(sample for sample, _ in read if isinstance(sample, str))
        whole = [(sample, part) for sample, part in read if isinstance(sample, Sample)]
        if not self._config.data.packed:
            whole = [(sample if isinstance(sample, Sample) else self._empty(), part) for sample, part in read]
        samples, parts = zip(*(whole or [(self._empty(), 0)]), strict=True)
        patches = self._config.model.vision.patches_per_tile
        batch = collate(list(samples), self._pad, patches, Form.of_run(self._config), parts)
        return replace(batch, num_samples=len(rows), broken=broken)

    def step(self, step: int) -> list[Batch]:
        """Micro-batches of a step, counted from 0."""
        return [self[number] for number in range(step * self.per_step, (step + 1) * self.per_step)]

    def find(self, step: int) -> tuple[Units, list[int]]:
        """The units of a step, and numbers of this rank's."""
        return remembered(self._steps, step, 2, self._make_step)

    def _make_step(self, step: int) -> tuple[Units, list[int]]:
        units = self.plan.global_batch(step)
        return units, self.plan.share(units, self._rank, self._num_ranks)

    def _sample(self, row: int) -> Sample | str:
        """The sample of a row, or what is wrong with it."""
        try:
            return self._reader.read(row)[1]
        except BrokenSample as error:
            return str(error)

    def _empty(self) -> Sample:
        """Takes the place of a broken sample: nothing to see, nothing to learn."""
        side = self._config.model.vision.image_size
        return Sample(np.full(2, self._pad), np.zeros(2, bool), np.zeros((0, side, side, 3), np.uint8), ())

    @cached_property
    def _reader(self) -> SampleReader:
        """Made in the process that uses it, as decoders must be."""
        return SampleReader(self._data, self.plan.sizes, self._config, self._tokenizer, self.make_decoder())

    def _make_decoder(self) -> Decoder:
        return decode_with_pillow if self._config.data.decoder == "pillow" else DaliDecoder(self.gpu)


def tell_left_out(reason: str) -> None:
    """Say that a sample is left out."""
    print(f"megatron-mm: left out: {reason}", file=sys.stderr, flush=True)


def check_broken(num_broken: int, num_samples: int, max_broken: float, last: str) -> None:
    """Raise `InputError` if more samples than data.max_broken allows were left out."""
    if num_broken > max_broken * max(num_samples, FEWEST_SAMPLES):
        raise InputError(
            f"{num_broken} of {num_samples} samples cannot be used, more than data.max_broken={max_broken} (of at "
            f"least {FEWEST_SAMPLES}); the last one: {last}"
        )


class _Told(Dataset[Packed | InputError]):
    """Hands bad input over as a value: raised in a worker, torch would wrap the message in the worker's traceback."""

    def __init__(self, dataset: MicroBatches):
        self._dataset = dataset

    def __getitem__(self, number: int) -> Packed | InputError:
        try:
            return pack(self._dataset[number])
        except InputError as error:
            return error

    def connect(self, process: DecodeProcess, worker: int) -> None:
        """Have pictures decoded by a process instead of this one, a loader worker."""
        self._dataset.make_decoder = partial(process.connect, worker)


class Feed:
    """The micro-batches of steps from `first_step` to `end_step`, read ahead by `data.num_workers` processes.

    Workers that were killed are started again where they stopped.

    Args:
        end_step: the step after the last one; left out, the run's.

    Attributes:
        num_broken, num_samples: damaged samples, and all, handed out on this rank.
        waited_seconds: that the consumer waited for batches.
    """

    def __init__(self, dataset: MicroBatches, first_step: int, config: RunConfig, end_step: int | None = None):
        self._dataset = dataset
        self._steps = range(first_step, config.train.steps if end_step is None else end_step)
        self._data = config.data
        self.num_broken = 0
        self.num_samples = 0
        self.waited_seconds = 0.0

    def __iter__(self) -> Iterator[list[Batch]]:
        """Steps.

        Raises:
            InputError: see MicroBatches; more than data.max_broken of the samples are damaged; workers were killed
                again and again.
        """
        per_step = self._dataset.per_step
        restarts = 0
        position, end = self._steps.start * per_step, self._steps.stop * per_step
        while position < end:
            started = time.monotonic()
            with self._decoding() as decoding:
                source = self._start(range(position, end), decoding)
                try:
                    while position < end:
                        batches = [self._checked(next(source)) for _ in range(per_step)]
                        self.waited_seconds += time.monotonic() - started
                        position += per_step
                        yield batches
                        started = time.monotonic()
                except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
                    if not self._tells_of_a_death(error):
                        raise
                    restarts += 1
                    if restarts > MAX_RESTARTS:
                        raise InputError(
                            f"loader workers were killed {restarts} times; is memory short? Lower data.num_workers"
                        ) from None
                    print("megatron-mm: a loader worker was killed; starting them again", file=sys.stderr, flush=True)
                finally:
                    del source  # ends the workers

    @contextmanager
    def _decoding(self) -> Iterator[DecodeProcess | None]:
        """Within, a process decodes on this rank's GPU, where there are workers that cannot."""
        gpu, workers = self._dataset.gpu, self._data.num_workers
        if gpu is None or workers == 0 or self._data.decoder != "dali":
            yield None
            return
        with closing(DecodeProcess(gpu, workers)) as process:
            yield process

    def _tells_of_a_death(self, error: Exception) -> bool:
        """Whether a worker is gone: torch says so, or a batch that it still had to hand over cannot be fetched."""
        if isinstance(error, RuntimeError):
            return "DataLoader worker (pid" in str(error)
        # What is raised in a worker has "Caught" before it.
        return self._data.num_workers > 0 and not str(error).startswith("Caught ")

    def _start(self, numbers: range, decoding: DecodeProcess | None) -> Iterator[Packed | InputError]:
        workers = self._data.num_workers
        own_dali = workers > 0 and self._data.decoder == "dali" and decoding is None
        # Once here, and not in each worker.
        self._dataset.find(numbers[0] // self._dataset.per_step)
        before = signal.getsignal(signal.SIGCHLD) if _in_main_thread() else None
        source = iter(
            DataLoader(
                _Told(self._dataset),
                sampler=numbers,
                batch_size=None,
                num_workers=workers,
                # Nobody forks a process that may have used DALI, but for workers that do not use it themselves.
                multiprocessing_context="spawn" if own_dali else None,
                worker_init_fn=None if decoding is None else partial(_connect, decoding),
            )
        )
        # torch would raise the death of a worker wherever the main thread happens to be; it also sees it when it waits.
        if before is not None:
            signal.signal(signal.SIGCHLD, before)
        return source

    def _checked(self, told: Packed | InputError) -> Batch:
        if isinstance(told, InputError):
            raise told
        batch = unpack(told)
        self.num_samples += batch.num_samples
        self.num_broken += len(batch.broken)
        for reason in batch.broken:
            tell_left_out(reason)
        if batch.broken:
            check_broken(self.num_broken, self.num_samples, self._data.max_broken, batch.broken[-1])
        return batch


def _connect(process: DecodeProcess, worker: int) -> None:
    """Run first in each loader worker."""
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, _Told)
    info.dataset.connect(process, worker)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
