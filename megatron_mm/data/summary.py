"""What a prepared data set holds, as one run trains on it: counts of its parts, lengths, packs, duplicates.

Counted from the index alone, by array operations over stretches of rows: no shard is opened, and tens of millions of
rows need no more memory than the plan itself.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mm.chat.render import Rendering
from megatron_mm.config.errors import InputError
from megatron_mm.config.flops import training_flops
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.index import Index, PartRange
from megatron_mm.data.plan import Plan, PlanSettings
from megatron_mm.data.shards import PreparedData

# Rows that are looked at together.
STRETCH = 2**22
# An epoch of more windows is estimated from so many of them.
MOST_WINDOWS = 8
# Last values of the bins; one more bin follows for what is larger.
TOKEN_EDGES = tuple(2**power for power in range(5, 18))
TILE_EDGES = (0, 1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Counts:
    """Of a part, a mode, or everything; samples that do not fit count in `left_out` alone.

    Attributes:
        name: of the part or mode.
        samples: that are trained on.
        left_out: too long, too many tiles, or without the reasoning that a cold start needs.
        pictures, tiles: of the samples.
        text_tokens: inputs of the language model that are no placeholders. A sample's last token is only a label.
        placeholder_tokens: inputs that pictures' features take the place of.
        seen_tokens: inputs in the windows that were looked at, as the blend mixes them.
    """

    name: str
    samples: int
    left_out: int
    pictures: int
    tiles: int
    text_tokens: int
    placeholder_tokens: int
    seen_tokens: int

    @property
    def tokens(self) -> int:
        """All inputs of the language model."""
        return self.text_tokens + self.placeholder_tokens


@dataclass(frozen=True, slots=True)
class Histogram:
    """Numbers of samples by bins, of which each has a label; `unit` is what the labels count."""

    title: str
    unit: str
    labels: tuple[str, ...]
    counts: tuple[int, ...]

    def filled(self) -> list[tuple[str, int]]:
        """Labels and counts from the first bin that holds something to the last."""
        filled = [number for number, count in enumerate(self.counts) if count]
        if not filled:
            return []
        return list(zip(self.labels, self.counts, strict=True))[filled[0] : filled[-1] + 1]


@dataclass(frozen=True, slots=True)
class Packing:
    """How the samples of an epoch become units: packs, or single samples where nothing is packed.

    Attributes:
        packed: whether units are packs.
        windows: of an epoch.
        looked_at: windows that the other numbers are from.
        units: of an epoch, estimated where not all windows were looked at.
        filled: tokens / (units * data.max_sequence_tokens).
        most_tiles: in a unit.
        global_batch: units a step.
    """

    packed: bool
    windows: int
    looked_at: int
    units: int
    filled: float
    most_tiles: int
    global_batch: int

    @property
    def steps(self) -> float:
        """Of an epoch."""
        return self.units / self.global_batch


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one split of a data set.

    Attributes:
        parts: in the order of the index, those outside of the blend included.
        modes: the parts' sums by their last component: thinking, non_thinking, document.
        total: sum over all parts.
        longest: tokens of the longest sample, one that is left out included.
        most_tiles: of a sample, the same way.
        duplicates: samples of the split that repeat an earlier one in texts and pictures.
        lengths, tiles: of the samples that are trained on.
    """

    path: str
    split: str
    parts: tuple[Counts, ...]
    modes: tuple[Counts, ...]
    total: Counts
    longest: int
    most_tiles: int
    duplicates: int
    packing: Packing
    lengths: Histogram
    tiles: Histogram


@dataclass(frozen=True, slots=True)
class Table:
    """Cells to show; the first column is a name, the others are values."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def summarise(config: RunConfig, split: str = "train") -> Summary:
    """Count what a split holds, as the run of `config` sees it.

    Raises:
        InputError: see `open_plan`.
    """
    data, plan = open_plan(config, split)
    return summary_of(data, plan, config, split)


def open_plan(config: RunConfig, split: str) -> tuple[PreparedData, Plan]:
    """The data set of a config and its plan, which may leave out more than data.max_left_out: a look shall tell why.

    Raises:
        InputError: data.path is not given, or holds no such data; the blend names a part that is not there; no sample
            fits.
    """
    if config.data.path is None:
        raise InputError(
            "data.path is not given; add data.path=DIRECTORY, which `megatron-mm data prepare` has written"
        )
    data = PreparedData(config.data.path)
    flops = training_flops(config.model, config.train.trained)
    return data, Plan(data.index, split, PlanSettings.of_run(config), flops)


def summary_of(data: PreparedData, plan: Plan, config: RunConfig, split: str) -> Summary:
    """The same of a data set and plan that are open already."""
    ranges = data.index.ranges(split)
    packing, seen = _packing_of(plan, config, ranges)
    counter = _Counter(data.index, plan, Rendering(config.data.rendering))
    parts = [counter.count(part, int(tokens)) for part, tokens in zip(ranges, seen, strict=True)]
    names = sorted({_mode_of(part) for part in parts})
    modes = [_sum(name, [part for part in parts if _mode_of(part) == name]) for name in names]
    return Summary(
        data.path,
        split,
        tuple(parts),
        tuple(modes),
        _sum("total", parts),
        counter.longest,
        counter.most_tiles,
        count_duplicates(data.index, ranges),
        packing,
        _histogram("tokens of a sample", "tokens", TOKEN_EDGES, counter.lengths),
        _histogram("tiles of a sample", "tiles", TILE_EDGES, counter.tiles),
    )


def tables_of(summary: Summary) -> list[Table]:
    """A summary's numbers as text."""
    columns = ("samples", "left out", "pictures", "tiles", "text tokens", "picture tokens", "of data", "of training")
    parts, modes = (
        tuple(_cells(counts, summary.total) for counts in (*group, *last))
        for group, last in ((summary.parts, (summary.total,)), (summary.modes, ()))
    )
    packing, total = summary.packing, summary.total
    unit = "packs" if packing.packed else "samples"
    all_samples = total.samples + total.left_out
    facts = (
        (f"{unit} an epoch", f"{packing.units:,}{_source(packing)}"),
        (f"filled of {unit} x max_sequence_tokens", f"{packing.filled:.1%}{_source(packing)}"),
        ("steps an epoch", f"{packing.steps:,.1f} of {packing.global_batch:,} {unit}"),
        (f"most tiles of a {unit[:-1]} that is trained on", f"{packing.most_tiles:,}{_source(packing)}"),
        ("longest sample, left out or not", f"{summary.longest:,} tokens"),
        ("most tiles of a sample, left out or not", f"{summary.most_tiles:,}"),
        ("left out", f"{total.left_out:,} of {all_samples:,} ({total.left_out / all_samples:.2%})"),
        ("duplicates", f"{summary.duplicates:,} of {all_samples:,} ({summary.duplicates / all_samples:.2%})"),
    )
    return [
        Table(f"Parts of {summary.path}, {summary.split}", ("part", *columns), parts),
        Table("Modes", ("mode", *columns), modes),
        Table("Epoch", ("", "value"), facts),
    ]


def count_duplicates(index: Index, ranges: Sequence[PartRange]) -> int:
    """Rows of the ranges that repeat an earlier one.

    Digests are sorted by groups that no two equal ones can be in different ones of, so that memory stays bounded.
    """
    digests = index.digests
    halves = np.frombuffer(digests.buffers()[1], "<u8").reshape(-1, 2)[digests.offset : digests.offset + len(index)]
    stretches = [
        halves[first : min(first + STRETCH, part.first + part.count)]
        for part in ranges
        for first in range(part.first, part.first + part.count, STRETCH)
    ]
    groups = 2 ** math.ceil(math.log2(max(sum(map(len, stretches)) / STRETCH, 1)))
    count = 0
    for group in range(groups):
        chosen = np.concatenate([stretch[stretch[:, 0] % groups == group] for stretch in stretches])
        chosen = chosen[np.lexsort((chosen[:, 1], chosen[:, 0]))]
        count += int((chosen[1:] == chosen[:-1]).all(axis=1).sum())
    return count


class _Counter:
    """Counts parts, and what is asked of all of them together."""

    def __init__(self, index: Index, plan: Plan, rendering: Rendering):
        self._index = index
        self._sizes = plan.sizes
        self._texts = index.cold_start_tokens if rendering.wraps_answer else index.text_tokens
        self.longest, self.most_tiles = 0, 0
        self.lengths = np.zeros(len(TOKEN_EDGES) + 1, np.int64)
        self.tiles = np.zeros(len(TILE_EDGES) + 1, np.int64)

    def count(self, part: PartRange, seen_tokens: int) -> Counts:
        """Of one part."""
        end = part.first + part.count
        sums = np.zeros(5, np.int64)
        for first in range(part.first, end, STRETCH):
            sums += self._count(slice(first, min(first + STRETCH, end)))
        samples, pictures, tiles, texts, placeholders = sums.tolist()
        return Counts(part.part, samples, part.count - samples, pictures, tiles, texts, placeholders, seen_tokens)

    def _count(self, rows: slice) -> np.ndarray:
        """Samples, pictures, tiles, text tokens and placeholders of a stretch: int64 [5]."""
        fits, tokens, tiles, texts = (
            self._sizes.fits[rows],
            self._sizes.tokens[rows],
            self._sizes.tiles[rows],
            self._texts,
        )
        texts = texts[rows]
        self.longest = max(self.longest, int(tokens.max(where=texts > 0, initial=0)))
        self.most_tiles = max(self.most_tiles, int(tiles.max(where=texts > 0, initial=0)))
        tokens, tiles, texts = tokens[fits], tiles[fits], texts[fits]
        self.lengths += _binned(tokens, TOKEN_EDGES)
        self.tiles += _binned(tiles, TILE_EDGES)
        pictures = np.diff(self._index.picture_starts[rows.start : rows.stop + 1])[fits]
        # The last token, always one of text, is no input.
        inputs = texts - 1
        return np.array([values.sum(dtype=np.int64) for values in (fits, pictures, tiles, inputs, tokens - inputs)])


def _packing_of(plan: Plan, config: RunConfig, ranges: Sequence[PartRange]) -> tuple[Packing, np.ndarray]:
    """Of an epoch; and tokens of each part in the windows that were looked at, int64 [parts]."""
    windows = plan.epoch_windows()
    looked_at = np.unique(np.linspace(0, windows - 1, min(windows, MOST_WINDOWS)).round().astype(np.int64)).tolist()
    firsts = np.array([part.first for part in ranges])
    seen, num_units, most_tiles = np.zeros(len(ranges), np.int64), 0, 0
    for window in looked_at:
        units = plan.units(window)
        if not len(units):
            continue  # none of the window's samples fits
        num_units += len(units)
        most_tiles = max(most_tiles, int(units.totals(plan.sizes.tiles[units.rows]).max()))
        parts = np.searchsorted(firsts, units.rows, side="right") - 1
        tokens = plan.sizes.tokens[units.rows]
        # Sums of whole numbers below 2^53, which are exact.
        seen += np.bincount(parts, weights=tokens, minlength=len(ranges)).astype(np.int64)
    filled = seen.sum() / (num_units * config.data.max_sequence_tokens) if num_units else 0.0
    units_an_epoch = round(num_units * windows / len(looked_at))
    packing = Packing(
        config.data.packed,
        windows,
        len(looked_at),
        units_an_epoch,
        float(filled),
        most_tiles,
        config.train.global_batch,
    )
    return packing, seen


def _mode_of(part: Counts) -> str:
    return part.name.rsplit("/", 1)[-1]


def _sum(name: str, parts: Sequence[Counts]) -> Counts:
    fields = [field.name for field in dataclasses.fields(Counts) if field.name != "name"]
    return Counts(name, **{field: sum(getattr(part, field) for part in parts) for field in fields})


def _binned(values: np.ndarray, edges: Sequence[int]) -> np.ndarray:
    """How many values are at most each edge and above the one before it, and how many above all: int64 [edges + 1]."""
    return np.bincount(np.searchsorted(np.asarray(edges, values.dtype), values), minlength=len(edges) + 1)


def _histogram(title: str, unit: str, edges: Sequence[int], counts: np.ndarray) -> Histogram:
    firsts = [0, *(edge + 1 for edge in edges)]
    labels = [str(last) if first == last else f"{first:,}-{last:,}" for first, last in zip(firsts, edges, strict=False)]
    return Histogram(title, unit, (*labels, f"{firsts[-1]:,}+"), tuple(counts.tolist()))


def _cells(counts: Counts, total: Counts) -> tuple[str, ...]:
    numbers = (counts.samples, counts.left_out, counts.pictures, counts.tiles)
    tokens = (counts.text_tokens, counts.placeholder_tokens)
    shares = ((counts.tokens, total.tokens), (counts.seen_tokens, total.seen_tokens))
    return (
        counts.name,
        *(f"{number:,}" for number in (*numbers, *tokens)),
        *(f"{part / whole:.1%}" if whole else "-" for part, whole in shares),
    )


def _source(packing: Packing) -> str:
    if packing.looked_at == packing.windows:
        return ""
    return f", estimated from {packing.looked_at} of {packing.windows:,} windows"
